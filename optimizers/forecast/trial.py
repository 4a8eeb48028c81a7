"""Steps that are short are not priced: a copy of the model takes a few, and they are timed."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable

from torch import Tensor, nn

from ..base import CurvatureOptimizer
from ..wrapper import innermost
from .rehearsal import Loss, Make, round_of, take_step

#: How often a kind of step is timed, at most, and seconds after which it is not timed again.
TIMES, ENOUGH = 3, 1.0


def tried(
    model: nn.Module, make: Make, inputs: Tensor, targets: Tensor, loss: Loss, clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds of whole steps, taken and timed.

    Args:
        model: in training mode; it is trained.
        make: builds its optimizer.
        inputs: a batch.
        targets: its targets.
        loss: of outputs and targets, a scalar.
        clock: seconds so far.

    Returns:
        Of an average step: "step", what each takes, and of what comes every so many steps, "update" and "refresh",
        what comes to that, by its share.
    """
    optimizer = make(model)
    inner = innermost(optimizer)

    def step() -> float:
        began = clock()
        optimizer.zero_grad()
        take_step(model, optimizer, inputs, targets, loss)
        return clock() - began

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step()
            step()
            if isinstance(inner, CurvatureOptimizer):
                return _of_curvature(inner, step, clock)
            length = round_of(optimizer)
            return {"step": _median(lambda: statistics.fmean(step() for _ in range(length)), clock)}
    finally:
        model.zero_grad()
        if isinstance(inner, CurvatureOptimizer):
            inner.close()


def _of_curvature(
    optimizer: CurvatureOptimizer, step: Callable[[], float], clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds of ordinary steps, and by their shares those of what comes to some of them; see ``rehearse``."""
    optimizer.early_updates = False  # from here on
    every, refresh = optimizer.update_every, max(optimizer.update_every, getattr(optimizer, "refresh_every", 1))

    def usual() -> float:
        optimizer._again = None  # nor what is gathered again since nothing was seen
        return step()

    ordinary = _median(usual, clock)
    if every == 1 and refresh == 1:
        return {"step": ordinary}

    def due(renew: Callable[[CurvatureOptimizer], object]) -> float:
        renew(optimizer)
        return step()

    renewed = _median(lambda: due(type(optimizer).renew), clock)
    updated = _median(lambda: due(CurvatureOptimizer.renew), clock) if refresh > every else renewed
    found = {"step": updated if every == 1 else ordinary}
    if every > 1:
        found["update"] = (updated - ordinary) / every
    if refresh > every:
        found["refresh"] = (renewed - updated) / refresh
    return found


def _median(step: Callable[[], float], clock: Callable[[], float]) -> float:
    """Seconds of a step: the median of some."""
    began = clock()
    times = [step()]
    while len(times) < TIMES and clock() - began < ENOUGH:
        times.append(step())
    return statistics.median(times)
