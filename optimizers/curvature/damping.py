"""Damping that is found in training: the rule of Levenberg and Marquardt on how far the quadratic model can be trusted.

Source: Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015
(arXiv 1503.05671), section 6.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: Steps between two judgements, once lambda is calibrated (T_1).
EVERY = 5
#: What lambda is lowered by, or raised by the inverse of, at a judgement (omega_1).
OMEGA = (19 / 20) ** EVERY
#: The same at first, when every step is judged.
CALIBRATION = 2.0
#: At most so many judgements are of the calibration.
CALIBRATION_STEPS = 5
#: Ratios below the first raise lambda, ratios above the second lower it.
LOW, HIGH = 0.25, 0.75
#: How far lambda may get from where it started, either way.
RANGE = 1e8
#: Inverses whose lambda is off by more than this factor are made anew.
STALE = 1.5


class AdaptiveDamping:
    """A lambda that follows the reduction ratio, and the one that inverses in use were made with.

    The ratio is that of what a step changed in the loss of its batch to what the quadratic model had foretold. At first
    each step is judged and lambda doubles or is halved, until a verdict differs from the first one or five have been
    given; from then on every fifth step is, and lambda changes by ``(19/20)^5``. Beyond the published rule, a loss that
    grew where it was to fall, or is not finite, doubles lambda at any time, and after the former the next step is
    judged as well: without a clip, steps that have become too long grow faster than every fifth one can tell.

    Args:
        start: of lambda; None: what ``renew`` is told at the first refresh.

    Attributes:
        value: lambda; None: not known yet.
        used: that of the inverses in use.
        ratio: the last one; None: there was none yet.
        calibrated: whether calibration is over.
    """

    def __init__(self, start: float | None = None) -> None:
        self.value = self._start = start
        self.used = 1.0 if start is None else start
        self.ratio: float | None = None
        self.calibrated = False
        self._judged = 0
        self._failed = False  # whether the last verdict was of a negative ratio
        self._first = 0  # the side that the first verdict was on

    def due(self, step: int) -> bool:
        """Whether a step, counted from 0, is to be judged."""
        return not self.calibrated or self._failed or (step + 1) % EVERY == 0

    def renew(self, refreshing: bool, unit: Callable[[], float]) -> bool:
        """Before a step: whether all inverses are to be made with another lambda than they were, which is ``used`` now.

        Args:
            refreshing: whether some are made anyway.
            unit: asked for where lambda starts.
        """
        if self.value is None:
            start = unit()
            self.value = self._start = start if 0 < start < math.inf else 1.0
        if self.value == self.used:
            return False
        if not refreshing and max(self.value / self.used, self.used / self.value) <= STALE:
            return False
        self.used = self.value
        return True

    def judge(self, before: float, after: float, predicted: float, rounding: float, trust: float = math.inf) -> None:
        """Adapt lambda after a step.

        Args:
            before: loss of the batch.
            after: the same after the step.
            predicted: what the quadratic model expected of their difference. A step that it expects nothing of, or that
                the loss grows, is no test of it, and neither is one that is lost in rounding.
            rounding: of the losses, relative to them.
            trust: another ratio, whose verdict counts if it is the lower one.
        """
        if self.value is None or self._start is None:
            return
        if not (math.isfinite(before) and math.isfinite(after)):
            self._move(CALIBRATION)
            return
        if not -predicted > rounding * abs(before):
            return
        self.ratio = (after - before) / predicted
        lowest = min(self.ratio, trust)
        self._failed = lowest < 0
        side = 1 if lowest < LOW else -1 if lowest > HIGH else 0
        self._first = self._first if self._judged else side
        self._judged += 1
        if side != self._first or side == 0:
            self.calibrated = True
        self._move((1 / OMEGA if self.calibrated and not self._failed else CALIBRATION) ** side)
        self.calibrated = self.calibrated or self._judged >= CALIBRATION_STEPS

    def _move(self, factor: float) -> None:
        assert self.value is not None and self._start is not None
        self.value = min(max(self.value * factor, self._start / RANGE), self._start * RANGE)

    def state(self) -> Tensor:
        """All of it in one tensor, whose size is always the same."""
        unknown = [math.nan if x is None else x for x in (self.value, self._start, self.ratio)]
        counts = [float(x) for x in (self.calibrated, self._judged, self._failed, self._first)]
        return torch.tensor([*unknown, self.used, *counts], dtype=torch.float64)

    def restore(self, state: Tensor) -> None:
        """Take back what ``state`` returned."""
        value, start, ratio, self.used, calibrated, judged, failed, first = state.tolist()
        self.value, self._start, self.ratio = (None if math.isnan(x) else x for x in (value, start, ratio))
        self.calibrated, self._failed = bool(calibrated), bool(failed)
        self._judged, self._first = int(judged), int(first)
