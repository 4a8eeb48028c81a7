"""How the budget of an arm is divided: into rungs, each of fewer and longer trials, the last as long as a final run.

Every rung trains anew: its schedule spans its own length. What a trial of a rung is worth is so known at its end, and
no trial is judged half-way along a schedule that was made for longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from training.errors import UserError

#: How many trials the first rung has at least, unless a command says so.
TRIALS = 8
#: The share of an arm's budget by which its last trial may exceed it.
SLACK = 0.02


@dataclass(frozen=True)
class Rungs:
    """The rungs of one arm; the same for all arms, in what budgets are counted in.

    Attributes:
        lengths: of a trial of each rung, in training seconds by the arm's own pace, or in steps or epochs.
        counts: how many trials each rung has if all of them come to an end.
        full: whether a trial of the last rung is as long as a final run.
    """

    lengths: tuple[float, ...]
    counts: tuple[int, ...]
    full: bool = True

    @property
    def total(self) -> float:
        """What an arm may spend."""
        return sum(count * length for count, length in zip(self.counts, self.lengths, strict=True))

    def share(self, rung: int) -> float:
        """What a rung may spend if those before it spent theirs."""
        return self.counts[rung] * self.lengths[rung]

    def slack(self, cost: float) -> float:
        """By how much a trial of this cost may exceed what is left: half of it, or `SLACK` of all."""
        return min(cost / 2, SLACK * self.total)

    @classmethod
    def counted(cls, trials: int, length: float, rungs: int, eta: float) -> Rungs:
        """So many trials at first, the last rung of a given length: what it takes follows.

        Args:
            trials: of the first rung.
            length: of a final run.
            rungs: how many.
            eta: by which a rung is longer, and has fewer trials, than the one before.

        Raises:
            UserError: a rung would have no trial, or one of these is out of its range.
        """
        _check(trials, rungs, eta)
        if length <= 0:
            raise UserError(f"a final run must be longer than {length:g}")
        return cls(_lengths(length, rungs, eta), _counts(trials, rungs, eta))

    @classmethod
    def within(
        cls, budget: float, final: float | None, trials: int = TRIALS, eta: float = 3.0, rungs: int | None = None
    ) -> Rungs:
        """Rungs that take a given budget, the last one as long as a final run where that allows it.

        With more than the least number of trials takes, there are more of them; what then is left makes the earlier
        rungs longer. With less, all rungs are shorter.

        Args:
            budget: of an arm, in training seconds.
            final: seconds of a final run; None: what the budget makes of it.
            trials: of the first rung, at least.
            eta: by which a rung is longer, and has fewer trials, than the one before.
            rungs: how many; None: two, or as many more as let so many trials fit into the budget.

        Raises:
            UserError: a rung would have no trial, or one of these is out of its range.
        """
        if not budget > 0 or (final is not None and not final > 0):
            raise UserError("budget and the length of a final run must be positive")
        most = max(1, 1 + int(math.log(trials, eta))) if trials > 1 and eta > 1 else 1
        _check(trials, rungs or 1, eta)
        if rungs is None:
            depths = [depth for depth in range(2, most + 1) if _cost(trials, depth, eta) * (final or 0.0) <= budget]
            rungs = depths[0] if depths else most
        if final is None:
            final = budget / _cost(trials, rungs, eta)
        if (cost := _cost(trials, rungs, eta) * final) > budget * (1 + 1e-9):
            return cls(_lengths(final * budget / cost, rungs, eta), _counts(trials, rungs, eta), full=False)
        while _cost(trials + 1, rungs, eta) * final <= budget * (1 + 1e-9):
            trials += 1
        lengths, counts = _lengths(final, rungs, eta), _counts(trials, rungs, eta)
        if rungs == 1:
            return cls(lengths, counts)
        # What is left, less than another trial takes, makes the earlier rungs longer.
        early = sum(count * length for count, length in zip(counts[:-1], lengths[:-1], strict=True))
        more = min((budget - counts[-1] * final) / early, eta)
        return cls((*(length * more for length in lengths[:-1]), final), counts)


def _check(trials: int, rungs: int, eta: float) -> None:
    if trials < 1 or rungs < 1 or not eta > 1:
        raise UserError("trials and rungs must be at least 1, and eta above 1")
    if int(trials / eta ** (rungs - 1)) < 1:
        fewest = math.ceil(eta ** (rungs - 1))
        raise UserError(f"{rungs} rungs, each {eta:g} times as long, need {fewest} trials: give more, or fewer rungs")


def _lengths(last: float, rungs: int, eta: float) -> tuple[float, ...]:
    return tuple(last / eta ** (rungs - 1 - rung) for rung in range(rungs))


def _counts(trials: int, rungs: int, eta: float) -> tuple[int, ...]:
    return tuple(max(1, int(trials / eta**rung + 1e-9)) for rung in range(rungs))


def _cost(trials: int, rungs: int, eta: float) -> float:
    """Of all rungs, in final runs."""
    return sum(c * length for c, length in zip(_counts(trials, rungs, eta), _lengths(1.0, rungs, eta), strict=True))
