"""The search of one arm: which trials are next and what is chosen, both functions of the outcomes so far alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from analysis.tuning.points import Points, points
from analysis.tuning.rungs import Rungs
from analysis.tuning.space import RATE, Space
from analysis.tuning.trials import Outcome, Trial
from training.errors import UserError

#: What a trial's length may be counted in, and the least difference of two lengths.
UNITS = {"steps": 1.0, "epochs": 0.01}
#: The least length of a trial, in least differences.
LEAST = 5
#: How many times the planned number of points an arm may try in place of those that end early.
MOST = 5


@dataclass(frozen=True)
class Arm:
    """What is tuned.

    Attributes:
        overrides: that make a run one of this arm: `optimizer=kfac`.
        space: what is searched.
        pace: training seconds a step; 1 where budgets are counted in steps or epochs.
        start: what the arm is configured with, by key of the space, where that is not what the optimizer's file says.
    """

    overrides: tuple[str, ...]
    space: Space
    pace: float = 1.0
    start: dict[str, Any] = field(default_factory=dict)

    @property
    def configured(self) -> dict[str, Any]:
        """The values of trial 0, by key of the space."""
        return self.space.defaults | self.start


@dataclass(frozen=True)
class Choice:
    """What the tuning of an arm comes to.

    Attributes:
        overrides: the chosen values, to be added to the arm's own; none if the arm stays as it is configured.
        values: likewise, by key, with those of trial 0 for it.
        trial: number of the point.
        rung: number of the rung that decided; less than the last one if nothing came to an end there.
        trials: how many runs were made.
        charged: what they took, by the arm's pace.
        value: the monitored metric of the validation set; None if no trial came to an end.
        val_loss: the validation loss.
        rate_inside: whether a lower and a higher rate than the chosen one were tried.
        at_edge: keys whose chosen value is the least or the largest that was tried, with which of them: `lr high`.
        lost: how many trials diverged or failed.
        error: why the first of those failed that did; "" otherwise.
    """

    overrides: tuple[str, ...]
    values: dict[str, Any]
    trial: int
    rung: int
    trials: int
    charged: float
    value: float | None
    val_loss: float | None
    rate_inside: bool
    at_edge: list[str]
    lost: int
    error: str = ""


@dataclass(frozen=True)
class Search:
    """The search of one arm.

    Attributes:
        name: of the arm.
        arm: it.
        rungs: how its budget is divided.
        unit: steps | epochs, what a trial's length is counted in.
        sampler: halton | sobol | tpe.
        seed: of the points.
        journal: see `points`.
    """

    name: str
    arm: Arm
    rungs: Rungs
    unit: str = "steps"
    sampler: str = "halton"
    seed: int = 0
    journal: Path | None = None

    @cached_property
    def points(self) -> Points:
        """Where the trials lie."""
        space = self.arm.space
        return points(self.sampler, len(space.keys), space.unit(self.arm.configured), self.seed, self.journal)

    def length(self, rung: int) -> float:
        """Steps or epochs of a trial of a rung; what fills the budget has those of the first, a quarter of the only."""
        lengths, quantum = self.rungs.lengths, UNITS[self.unit]
        filler = lengths[0] if len(lengths) > 1 else lengths[0] / 4
        whole = math.floor((lengths[rung] if rung < len(lengths) else filler) / self.arm.pace / quantum + 1e-6)
        return round(max(whole, 1) * quantum, 2)

    def cost(self, rung: int) -> float:
        """What a trial of a rung is charged if it comes to an end."""
        return self.length(rung) * self.arm.pace

    def check(self) -> None:
        """Raise a sentence where the first trials would be no trials, or there are no such points.

        Raises:
            UserError: the budget is too small for the pace, or a sampler is not installed.
        """
        _ = self.points
        if self.rungs.lengths[0] < self.arm.pace * UNITS[self.unit] * LEAST:
            raise UserError(
                f"{self.name}: the first trials would be of {self.rungs.lengths[0] / self.arm.pace:.2g} {self.unit}, "
                "too short to tell anything: give a larger budget, fewer trials or fewer rungs"
            )

    def due(self, outcomes: Sequence[Outcome]) -> list[Trial]:
        """The trials that are to be run next, all at once; none when the budget is spent.

        A rung may spend its share of the budget and what those before it left; what trials that ended early leave,
        the next points take, or the next best ones. What the last rung leaves and is too short for another of its
        trials goes to further points of the first one's length (a quarter of the only one's), which can no longer be
        chosen: so arms of equal budgets are charged equally.

        Args:
            outcomes: of all trials of this arm so far, in any order.
        """
        last = len(self.rungs.lengths)
        left = 0.0
        if sum(one.stillborn for one in outcomes) == len(outcomes) >= self.rungs.counts[0]:
            return []  # it cannot be trained at all
        for rung in range(last):
            here = [one for one in outcomes if one.trial.rung == rung]
            left += self.rungs.share(rung) - sum(one.charged for one in here)
            cost = self.cost(rung)
            want = math.floor((left + self.rungs.slack(cost)) / cost + 1e-9)
            taken = {one.trial.trial for one in here}
            if chosen := self._candidates(rung, outcomes, taken, want):
                return chosen
        left -= sum(one.charged for one in outcomes if one.trial.rung == last)
        want = math.floor(left / self.cost(last) + 0.5)
        return self._new(last, outcomes, {one.trial.trial for one in outcomes}, want)

    def choice(self, outcomes: Sequence[Outcome]) -> Choice:
        """What is chosen: the best of the last rung in which a trial came to an end; trial 0 if none ever did.

        Args:
            outcomes: of all trials.
        """
        last = len(self.rungs.lengths)
        refused = {one.trial.trial for one in outcomes if one.lost}
        winner: Outcome | None = None
        for rung in reversed(range(last)):
            here = [o for o in outcomes if o.trial.rung == rung and not o.lost]
            # Who diverges in a longer run has shown more than in a shorter one, unless all have.
            here = [o for o in here if o.trial.trial not in refused] or here
            if here:
                winner = min(here, key=Outcome.order)
                break
        configured = self.arm.configured
        values = (winner.trial.values if winner else {}) or configured
        tried = [one.trial.values or configured for one in outcomes]
        keys = self.arm.space.keys
        edges = {key.name: key.edge(values.get(key.name), [one.get(key.name) for one in tried]) for key in keys}
        searched = RATE in edges
        return Choice(
            overrides=tuple(self.arm.space.overrides(winner.trial.values)) if winner else (),
            values=values,
            trial=winner.trial.trial if winner else 0,
            rung=winner.trial.rung if winner else 0,
            trials=len(outcomes),
            charged=sum(one.charged for one in outcomes),
            value=winner.value if winner else None,
            val_loss=winner.val_loss if winner else None,
            rate_inside=winner is not None and (not searched or edges[RATE] is None),
            at_edge=[f"{name.lstrip('+')} {end}" for name, end in edges.items() if end],
            lost=sum(one.lost for one in outcomes),
            error=next((one.error for one in outcomes if one.lost and one.error), ""),
        )

    def _candidates(self, rung: int, outcomes: Sequence[Outcome], taken: set[int], want: int) -> list[Trial]:
        """Trials of a rung that are not taken: new points in the first one, then the best of the rung before."""
        if rung == 0:
            return self._new(0, outcomes, taken, want)
        before = [one for one in outcomes if one.trial.rung == rung - 1 and not one.lost]
        best = sorted(before, key=Outcome.order)
        left = [one.trial for one in best if one.trial.trial not in taken]
        return [self._trial(rung, one.trial, one.values) for one in left[: max(want, 0)]]

    def _new(self, rung: int, outcomes: Sequence[Outcome], taken: set[int], want: int) -> list[Trial]:
        """The next points, of which there are a few times as many as planned: those that fail at once cost nothing.

        A point that comes to the values of an earlier one is left out, and counts as having come to what that one did.
        """
        told = {one.trial.trial: one.badness for one in outcomes if one.trial.rung == 0}
        space, seen, trials = self.arm.space, dict[str, int](), list[Trial]()
        for number in range(MOST * self.rungs.counts[0] + 1):
            if len(trials) >= want or number > self.points.ready(told):
                break
            values = space.point(self.points.point(number, told)) if number else {}
            twin = seen.setdefault(repr(space.overrides(values or self.arm.configured)), number)
            if twin != number:
                told |= {number: told[twin]} if twin in told else {}
            elif number not in taken:
                trials.append(self._trial(rung, number, values))
        return trials

    def _trial(self, rung: int, number: int, values: dict[str, Any]) -> Trial:
        length = self.length(rung)
        budget = f"trainer.max_{self.unit}={length:g}" if self.unit == "epochs" else f"trainer.max_steps={length:.0f}"
        return Trial(
            self.name, rung, number, length, values, (*self.arm.overrides, *self.arm.space.overrides(values), budget)
        )
