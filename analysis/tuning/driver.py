"""The tuning of several arms at once: wave by wave, all arms' trials of a wave in one list."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.tuning.points import SAMPLERS
from analysis.tuning.rungs import Rungs
from analysis.tuning.search import UNITS, Arm, Choice, Search
from analysis.tuning.trials import Book, Outcome, Trial
from training.errors import UserError, did_you_mean

#: Runs what lists of overrides ask for, each behind its name and a colon, and gives their summaries in the same order;
#: what has ended it runs no more.
Run = Callable[[Sequence[Sequence[str]]], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Plan:
    """What a tuning is to do.

    Attributes:
        folder: of its record, which is made if it is missing.
        rungs: how the budget of an arm is divided; the same for all.
        metric: of the validation set, which decides at the end of a trial; None: that which chooses best weights.
        sampler: halton | sobol, the same points for all arms; tpe, by Optuna.
        seed: of the points.
        unit: steps | epochs, what trials are as long as.
        common: what the record is to keep of what all runs have in common, since another value is another tuning.
    """

    folder: Path
    rungs: Rungs
    metric: str | None = None
    sampler: str = "halton"
    seed: int = 0
    unit: str = "steps"
    common: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.metric is not None and not self.metric.startswith("val/"):
            raise UserError(f"metric must be of the validation set, val/..., which alone decides, got {self.metric}")
        if self.sampler not in SAMPLERS:
            known = ", ".join(SAMPLERS)
            raise UserError(f"sampler must be one of {known}, got {self.sampler}{did_you_mean(self.sampler, SAMPLERS)}")
        if self.unit not in UNITS:
            raise UserError(f"unit must be one of {', '.join(UNITS)}, got {self.unit}")


def tune(
    arms: Mapping[str, Arm],
    plan: Plan,
    run: Run,
    tell: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
    begin: Callable[[Sequence[Trial]], None] = lambda trials: None,
) -> dict[str, Choice]:
    """Tune arms, all with the same budget.

    An arm is charged the steps that its trials made, times its pace. Launched again with the same folder, it goes on
    where it was, by the paces that it began with. What `run` has ended but this has not written down, it is asked for
    again.

    Args:
        arms: by name.
        plan: what is to be done.
        run: runs the trials of a wave; see `Run`. Each is given a budget, and all else that is common to them by `run`.
        tell: hears what became of a wave.
        begin: hears of a wave before it is run.

    Returns:
        What is chosen, by arm.

    Raises:
        UserError: the folder holds another tuning, a run was cut off, or not one trial could begin.
    """
    book = Book(plan.folder)
    paces = book.settle(_asked(arms, plan), {name: arm.pace for name, arm in arms.items()})
    searches = {
        name: Search(
            name=name,
            arm=replace(arm, pace=paces[name]),
            rungs=plan.rungs,
            unit=plan.unit,
            sampler=plan.sampler,
            seed=plan.seed,
            journal=plan.folder / f"optuna_{name}.log",
        )
        for name, arm in arms.items()
    }
    for search in searches.values():
        search.check()
    while wave := [trial for name, search in searches.items() for trial in search.due(book.of(name))]:
        begin(wave)
        named = {trial.overrides: trial.name for trial in reversed(wave)}  # two points may be the same values
        rows = list(dict.fromkeys(trial.overrides for trial in wave))
        summaries = run([(f"{named[row]}:", *row) for row in rows])
        if len(summaries) != len(rows):
            raise UserError(f"{len(rows)} trials were to be run, and {len(summaries)} came to an end: launch again")
        ended = []
        for trial in wave:
            summary = _placed(summaries[rows.index(trial.overrides)], plan.folder)
            ended.append(Outcome.of(trial, summary, plan.unit, paces[trial.arm], plan.metric))
        if all(outcome.stillborn for outcome in ended) and not any(book.of(name) for name in arms):
            raise UserError(f"no trial could begin: {ended[0].error or 'see the runs of ' + str(plan.folder)}")
        book.add(ended)
        tell(ended)
    return {name: search.choice(book.of(name)) for name, search in searches.items()}


def _asked(arms: Mapping[str, Arm], plan: Plan) -> dict[str, Any]:
    """All that decides which trials there are, but the paces."""
    return {
        "metric": plan.metric,
        "sampler": plan.sampler,
        "seed": plan.seed,
        "unit": plan.unit,
        "rungs": {"lengths": plan.rungs.lengths, "counts": plan.rungs.counts},
        "common": sorted(plan.common),
        "arms": {
            name: {
                "overrides": arm.overrides,
                "start": {key: str(value) for key, value in arm.configured.items()},
                "space": {key.name: str(key) for key in arm.space.keys},
            }
            for name, arm in arms.items()
        },
    }


def _placed(summary: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A summary whose folder is given from the tuning's."""
    place = summary.get("folder")
    return {**summary, "folder": Path(os.path.relpath(place, folder)).as_posix() if place else ""}
