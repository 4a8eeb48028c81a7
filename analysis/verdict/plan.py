"""A budget of wall time, divided: the same training seconds for every arm, a part of them for tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from analysis.pace import Pace
from analysis.tuning import Rungs
from training.errors import UserError

#: Seconds that a run takes beside its steps and evaluations: its data, its model, its files, its pictures.
BESIDE = 1.0
#: Evaluations of a final run, the last one included.
LOOKS = 10
#: The least number of steps of the shortest trial of the slowest arm.
LEAST = 20


@dataclass(frozen=True)
class Division:
    """What each arm may spend.

    Attributes:
        tuning: training seconds for the trials of an arm.
        final: training seconds of each final run.
        rungs: of the tuning.
        beside: seconds of the whole that are no training: evaluations, files, measuring.
        wall: seconds of the whole, with so many workers.
    """

    tuning: float
    final: float
    rungs: Rungs
    beside: float
    wall: float


def divide(
    budget: float,
    paces: Mapping[str, Pace],
    *,
    trials: int,
    seeds: int,
    share: float = 0.5,
    workers: int = 1,
    spent: float = 0.0,
) -> Division:
    """Divide a budget.

    Args:
        budget: seconds of wall time for the whole.
        paces: of each arm.
        trials: of each arm, at least.
        seeds: final runs of each arm.
        share: of the training seconds that go to tuning.
        workers: runs at a time.
        spent: seconds that are gone already: for measuring, say.

    Raises:
        UserError: a value is out of its range, or the budget is too small for so many arms, trials and seeds.
    """
    if not 0 < share < 1:
        raise UserError(f"tuning must be a share between 0 and 1, got {share:g}")
    if seeds < 2:
        raise UserError("seeds must be at least 2: one run has no interval")
    evaluation = max(pace.evaluation for pace in paces.values())
    beside = per_arm = 0.0
    for _ in range(3):  # how many trials there are says how much is no training, and the other way about
        per_arm = ((budget - spent) * workers - beside) / len(paces)
        if per_arm <= 0:
            break
        final = (1 - share) * per_arm / seeds
        rungs = Rungs.within(share * per_arm, final, trials)
        runs = sum(rungs.counts)
        beside = len(paces) * (runs * (BESIDE + evaluation) + seeds * (BESIDE + (LOOKS + 2) * evaluation))
    if per_arm <= 0 or rungs.lengths[0] < LEAST * max(pace.seconds for pace in paces.values()):
        need = _least(paces, trials, seeds, share, workers, evaluation) + spent
        raise UserError(
            f"budget={budget:.0f} seconds is too little for {len(paces)} optimizers, {trials} trials and {seeds} seeds "
            f"of each: give {math.ceil(need / 60)}m or more, fewer of them, or more workers"
        )
    wall = spent + (len(paces) * per_arm + beside) / workers
    return Division(share * per_arm, final, rungs, beside, wall)


def _least(paces: Mapping[str, Pace], trials: int, seeds: int, share: float, workers: int, evaluation: float) -> float:
    """About what budget would do: the shortest trial has `LEAST` steps of the slowest arm."""
    shortest = LEAST * max(pace.seconds for pace in paces.values())
    rungs = Rungs.within(1.0, (1 - share) / share / seeds, trials)
    tuning = shortest / rungs.lengths[0]
    runs = sum(rungs.counts)
    beside = runs * (BESIDE + evaluation) + seeds * (BESIDE + (LOOKS + 2) * evaluation)
    return 1.1 * len(paces) * (tuning / share + beside) / workers


def steps_of(seconds: float, pace: Pace) -> int:
    """Optimizer steps that take so many training seconds."""
    return max(1, round(seconds / pace.seconds))
