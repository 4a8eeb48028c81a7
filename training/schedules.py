"""Schedules, as functions of progress through the budget: every length is a fraction of it.

Those of the learning rate take the optimizer and the budget's length in ticks, and return one of torch's own
schedulers. Any other scalar of an optimizer (damping, momentum, update_every, ...) follows a ``ScalarSchedule``.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from optimizers.wrapper import innermost
from training.errors import did_you_mean
from training.loop import compiler


def _check(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    if not (low < value if open_low else low <= value) or not value <= high:
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low:g}, {high:g}], got {value!r}")


def trial() -> Optimizer:
    """An optimizer of nothing, to try a schedule on before anything is trained."""
    compiler.leave_out()
    return SGD([torch.zeros(1)], lr=1.0)


def none(optimizer: Optimizer, ticks: int) -> LRScheduler:
    """The learning rate stays as it is."""
    return ConstantLR(optimizer, factor=1.0, total_iters=0)


def cosine(optimizer: Optimizer, ticks: int, warmup: float = 0.0, min_factor: float = 0.0) -> LRScheduler:
    """Half a cosine down to the end of the budget, after a linear warm-up.

    Args:
        optimizer: whose learning rates to drive.
        ticks: length of the budget.
        warmup: fraction of the budget in which the rate rises linearly to its full value.
        min_factor: the last rate, as a fraction of the first.

    Raises:
        ValueError: for a fraction out of its range.
    """
    _check("warmup", warmup, 0, 1)
    _check("min_factor", min_factor, 0, 1)
    rise = min(round(warmup * ticks), ticks - 1)
    fall = ticks - rise
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    # Before the warm-up scheduler exists: it lowers the rates that these two read.
    main: LRScheduler
    if min_factor == 0 or len(rates) == 1:
        main = CosineAnnealingLR(optimizer, T_max=fall, eta_min=min_factor * max(rates))
    else:  # torch's class has one floor for all groups
        main = LambdaLR(optimizer, lambda t: min_factor + (1 - min_factor) * (1 + math.cos(math.pi * t / fall)) / 2)
    if rise == 0:
        return main
    warm = LinearLR(optimizer, start_factor=1 / rise, total_iters=rise)
    return SequentialLR(optimizer, [warm, main], milestones=[rise])


def step(optimizer: Optimizer, ticks: int, every: float = 0.3, gamma: float = 0.1) -> LRScheduler:
    """Multiply the rate by ``gamma`` at regular intervals.

    Args:
        optimizer: whose learning rates to drive.
        ticks: length of the budget.
        every: interval, as a fraction of the budget.
        gamma: factor at each.

    Raises:
        ValueError: for a value out of its range.
    """
    _check("every", every, 0, 1, open_low=True)
    _check("gamma", gamma, 0, 1, open_low=True)
    return StepLR(optimizer, step_size=max(1, round(every * ticks)), gamma=gamma)


def multistep(
    optimizer: Optimizer, ticks: int, milestones: list[float] | None = None, gamma: float = 0.1
) -> LRScheduler:
    """Multiply the rate by ``gamma`` at given points.

    Args:
        optimizer: whose learning rates to drive.
        ticks: length of the budget.
        milestones: the points, as fractions of the budget; None: [0.5, 0.75].
        gamma: factor at each.

    Raises:
        ValueError: for a value out of its range.
    """
    milestones = [0.5, 0.75] if milestones is None else list(milestones)
    for milestone in milestones:
        _check("milestones", milestone, 0, 1)
    _check("gamma", gamma, 0, 1, open_low=True)
    return MultiStepLR(optimizer, milestones=sorted(round(m * ticks) for m in milestones), gamma=gamma)


def onecycle(
    optimizer: Optimizer, ticks: int, warmup: float = 0.3, start_factor: float = 0.04, end_factor: float = 4e-6
) -> LRScheduler:
    """One rise to the optimizer's rate and one cosine fall far below it (Smith's one-cycle policy, rates only).

    Args:
        optimizer: whose learning rates to drive; their values are the peaks.
        ticks: length of the budget.
        warmup: fraction of the budget in which the rate rises.
        start_factor: first rate, as a fraction of the peak.
        end_factor: last rate, as a fraction of the peak.

    Raises:
        ValueError: for a value out of its range.
    """
    _check("warmup", warmup, 0, 1)
    _check("start_factor", start_factor, 0, 1, open_low=True)
    _check("end_factor", end_factor, 0, start_factor, open_low=True)
    rise = min(warmup * ticks, ticks - 1)
    rise = rise if rise > 1 else 0.0  # torch's class would divide by the length of an empty phase
    return OneCycleLR(
        optimizer,
        max_lr=[float(group["lr"]) for group in optimizer.param_groups],
        total_steps=ticks,
        pct_start=rise / ticks,
        div_factor=1 / start_factor,
        final_div_factor=start_factor / end_factor,
        cycle_momentum=False,
    )


def range_test(optimizer: Optimizer, ticks: int, start_factor: float = 1e-3, end_factor: float = 100.0) -> LRScheduler:
    """The rate grows by the same factor every step, to see which rates a problem bears (Smith, 2017, 1506.01186).

    Args:
        optimizer: whose learning rates to drive.
        ticks: length of the budget.
        start_factor: first rate, as a multiple of the optimizer's.
        end_factor: last rate, as a multiple of the optimizer's.

    Raises:
        ValueError: for a value out of its range.
    """
    _check("start_factor", start_factor, 0, math.inf, open_low=True)
    _check("end_factor", end_factor, start_factor, math.inf, open_low=True)
    growth = end_factor / start_factor
    return LambdaLR(optimizer, lambda t: start_factor * growth ** (t / max(ticks - 1, 1)))


# -- every other scalar ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScalarSchedule:
    """A scalar as a function of progress: from its configured value to ``end``, and flat before and after.

    Attributes:
        end: the last value.
        shape: the way there: a straight line, a straight line on a logarithmic scale, or half a cosine.
        start: fraction of the budget at which the value leaves the configured one.
        stop: fraction of the budget from which on it is ``end``.

    Raises:
        ValueError: for a value out of its range.
    """

    end: float
    shape: Literal["linear", "exponential", "cosine"] = "linear"
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.end):
            raise ValueError(f"end must be finite, got {self.end!r}")
        if self.shape not in ("linear", "exponential", "cosine"):
            raise ValueError(f"shape must be one of linear, exponential, cosine, got {self.shape!r}")
        if self.shape == "exponential" and self.end <= 0:
            raise ValueError(f"end must be above 0 for the exponential shape, got {self.end!r}")
        _check("start", self.start, 0, 1)
        _check("stop", self.stop, self.start, 1)

    def value(self, first: float, progress: float) -> float:
        """The scalar at a place in the budget.

        Args:
            first: its configured value; above 0 for the exponential shape.
            progress: share of the budget that is used up.
        """
        if progress >= self.stop:
            return self.end
        if progress <= self.start:
            return first
        share = (progress - self.start) / (self.stop - self.start)
        if self.shape == "exponential":
            return first * (self.end / first) ** share
        share = share if self.shape == "linear" else (1 - math.cos(math.pi * share)) / 2
        return first + share * (self.end - first)


class Scalars:
    """Drives scalars of an optimizer: in every parameter group where they lie there, else as its attributes.

    They are a function of progress alone, so nothing has to be saved. The values to start from are read here, each
    group's own: make this before a checkpoint, which holds scheduled values, is loaded into the optimizer.

    Args:
        optimizer: any; of a wrapped one, that inside.
        schedules: by the scalar's name; a whole number stays one, by rounding.

    Attributes:
        values: what was last set, by name; of the first parameter group where they differ.

    Raises:
        ValueError: for a name that is no scalar of this optimizer, or one that has no value to start from.
    """

    def __init__(self, optimizer: Optimizer, schedules: Mapping[str, ScalarSchedule]) -> None:
        self.values: dict[str, float] = {}
        self._optimizer = innermost(optimizer)
        self._schedules = dict(schedules)
        kind: Any = type(self._optimizer)
        self._hints = _constructor_hints(kind)
        self._firsts = {name: self._first(name, schedule) for name, schedule in schedules.items()}

    def set(self, progress: float) -> None:
        """Give every scalar its value at this share of the budget."""
        for name, firsts in self._firsts.items():
            values = [self._value(name, first, progress) for first in firsts]
            self.values[name] = values[0]
            if name in self._optimizer.defaults:
                for group, value in zip(self._optimizer.param_groups, values, strict=True):
                    group[name] = value
            else:
                setattr(self._optimizer, name, values[0])

    def _value(self, name: str, first: float, progress: float) -> float:
        value, hint = self._schedules[name].value(first, progress), self._hints.get(name)
        # A whole number by nature, and no float that happens to be given as 0.
        counts = isinstance(first, int) and float not in (hint, *typing.get_args(hint))
        return round(value) if counts else value

    def _first(self, name: str, schedule: ScalarSchedule) -> list[float]:
        """The configured values of a scalar: one a parameter group, or that of the attribute."""
        if name == "lr":
            raise ValueError("lr is the scheduler's: choose scheduler=NAME, such as cosine or onecycle, in its place")
        known, kind = self._known(), type(self._optimizer).__name__
        if name not in known:
            names = sorted(known_name for known_name, values in known.items() if _is_number(values[0]))
            advice = did_you_mean(name, names) or f"; it has {', '.join(names) or 'none'}"
            raise ValueError(f"{name} is no scalar of {kind}{advice}")
        values = known[name]
        if any(value is None for value in values):
            raise ValueError(f"{name} is off (null), so there is nothing to start from: give optimizer.{name} a number")
        if not all(map(_is_number, values)):
            raise ValueError(f"{name} of {kind} is not a single number, so it cannot follow a schedule: leave it out")
        if schedule.shape == "exponential" and min(values) <= 0:
            raise ValueError(
                f"{name} starts from {min(values):g} and the exponential shape needs positive values: set "
                f"optimizer.{name} above 0, or another shape"
            )
        return values

    def _known(self) -> dict[str, list[Any]]:
        """Hyper-parameters by name: those of the parameter groups, and constructor arguments kept as attributes."""
        optimizer = self._optimizer
        own = {name: [getattr(optimizer, name)] for name in self._hints if hasattr(optimizer, name)}
        grouped = {name: [group[name] for group in optimizer.param_groups] for name in optimizer.defaults}
        return {name: values for name, values in (own | grouped).items() if name not in ("lr", "seed")}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@cache  # a sweep asks of every job
def _constructor_hints(kind: Any) -> dict[str, Any]:
    """Parameters of an optimizer's constructor with their type hints, as far as these can be resolved."""
    constructor = kind.__init__
    hints: dict[str, Any] = dict.fromkeys(inspect.signature(constructor).parameters, Any)
    try:
        return hints | typing.get_type_hints(constructor)
    except (NameError, TypeError, AttributeError):  # names that exist for type checkers only
        return hints
