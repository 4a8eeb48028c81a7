"""Learning-rate schedules, as functions of progress through the budget: every length is a fraction of it.

Each takes the optimizer and the budget's length in ticks, and returns one of torch's own schedulers.
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
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


def _check(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    if not (low < value if open_low else low <= value) or not value <= high:
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low:g}, {high:g}], got {value!r}")


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
