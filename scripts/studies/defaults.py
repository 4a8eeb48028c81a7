"""Every optimizer at its default values on twelve small problems: what it reaches, and how far that is from its best.

    CURVLAB_DATA=datasets python scripts/studies/defaults.py
    python scripts/studies/defaults.py set=tuning seeds=[0] rates=false optimizers=[kfac] results=try.jsonl
    python scripts/studies/defaults.py report=true

A cell is one run of train.py: an optimizer on a problem (scripts/problems.py) with a seed, at equal steps for all and
the default schedule. Cells that are missing are run, one after the other on one thread, and each is a line of the
results file as soon as it is done. A second call goes on with what is missing, and a cell whose configuration has
changed (an optimizer's default, say) is missing. At the end the tables of the results are written beside them:
FILE.jsonl, FILE.md. What stands in that file from the line "## Notes" on stays.

    set=all           tuning | held_out | all: of the problems, those that values are chosen on, or the others
    problems=[...]    some of them by name
    optimizers=[...]  some of the table's (python -m optimizers)
    seeds=[0,1,2]     of the runs
    rates=true        also run each optimizer at five learning rates on six of the problems, with seed 0
    options=[...]     other values than the defaults, for all chosen optimizers that have the option (momentum=0) or for
                      one (kfac.momentum=0); with results=FILE of their own
    results=...       docs/results/defaults.jsonl unless given
    data=FOLDER       of the data sets; $CURVLAB_DATA or datasets unless given; problems without data are passed over
    limit=600         seconds after which a run is broken off, which is a result, too
    report=false      true: run nothing, write the tables of what is there
    split=test        val: the tables are of the validation sets, which is what to choose values by

A run that diverges is a result; one that ends in another error is reported, and tried again by the next call. Several
processes may share a results file, each with a choice of its own (set=tuning and set=held_out, say).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

from optimizers.table import present
from scripts.problems import catalogue
from scripts.problems.arguments import command, given_to
from scripts.problems.catalogue import Problem
from scripts.problems.cells import DATA, FACTORS, SEEDS, Cell, cell, optimizer_node, options_of, problem_config
from scripts.problems.outcomes import Outcome, _placed, append, read, run, run_missing
from scripts.problems.tables import Results, markdown, page, write_page
from training.errors import UserError, did_you_mean

__all__ = [
    "FACTORS",
    "SEEDS",
    "Cell",
    "Outcome",
    "Results",
    "_placed",
    "append",
    "cell",
    "cells",
    "chosen",
    "main",
    "markdown",
    "optimizer_node",
    "options_of",
    "page",
    "problem_config",
    "read",
    "run",
    "run_missing",
    "write_page",
]

RESULTS = "docs/results/defaults.jsonl"


@dataclass
class Choices:
    """``key=value`` on the command line; see this file's beginning."""

    set: str = "all"
    problems: list[str] = field(default_factory=lambda: [*catalogue.PROBLEMS])
    optimizers: list[str] = field(default_factory=lambda: [name for name, _, _ in present()])
    seeds: list[int] = field(default_factory=lambda: [*SEEDS])
    rates: bool = True
    options: list[str] = field(default_factory=list)
    results: str = RESULTS
    data: str = field(default_factory=lambda: os.environ.get("CURVLAB_DATA", DATA))
    limit: float = 600.0
    report: bool = False
    split: str = "test"


def cells(choices: Choices) -> Iterator[Cell]:
    """What is to be run, in this order: all with the first seed, then with the next; the other learning rates last."""
    named = [catalogue.PROBLEMS[name] for name in choices.problems]
    problems = [problem for problem in named if choices.set in ("all", _side(problem))]
    for seed in choices.seeds:
        for problem in problems:
            for optimizer in choices.optimizers:
                yield cell(problem, optimizer, seed, options=choices.options)
    for problem in problems if choices.rates else ():
        for optimizer in choices.optimizers if problem.rates else ():
            for factor in FACTORS:
                yield cell(problem, optimizer, SEEDS[0], factor, choices.options)


def _side(problem: Problem) -> str:
    return "tuning" if problem.tuning else "held_out"


def chosen(given: Sequence[str]) -> Choices:
    """The choices of the command line.

    Raises:
        UserError: one of them does not exist, or does not go with another.
    """
    merged = given_to(Choices, given)
    if merged.set not in ("tuning", "held_out", "all"):
        raise UserError(f"set must be tuning, held_out or all, got {merged.set!r}")
    if merged.split not in ("test", "val"):
        raise UserError(f"split must be test or val, got {merged.split!r}")
    if merged.split == "val" and merged.results == RESULTS:
        raise UserError(f"split=val needs results=FILE of its own: the tables beside {RESULTS} are of the test sets")
    if not merged.limit > 0:
        raise UserError(f"limit must be above 0, got {merged.limit:g}")
    if merged.options and merged.results == RESULTS:
        raise UserError(f"options need results=FILE of their own: {RESULTS} is of default values")
    for text in merged.options:
        owner = text.partition("=")[0].rpartition(".")[0]
        users = [name for name in merged.optimizers if options_of(name, [text])]
        if "=" not in text or not users:
            raise UserError(f"options: {text!r} is of no chosen optimizer: write OPTION=VALUE or NAME.OPTION=VALUE")
        if owner and owner not in merged.optimizers:
            raise UserError(f"options: {owner!r} is no chosen optimizer{did_you_mean(owner, merged.optimizers)}")
    return merged


def _main(choices: Choices) -> tuple[Path, bool]:
    path = Path(choices.results)
    todo = ((what, choices.options) for what in cells(choices))
    good = choices.report or run_missing(todo, path, Path(choices.data), choices.limit)
    return write_page(path, choices.options, choices.split), good


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 1 if a cell ended in an error other than divergence."""
    return command(__doc__, argv, lambda given: _main(chosen(given)))


if __name__ == "__main__":
    if hasattr(os, "nice"):
        os.nice(10)  # it runs for hours beside other work
    sys.exit(main())
