"""How wide the range of learning rates is at which an optimizer is about as good as at its best.

    python scripts/studies/robustness.py
    python scripts/studies/robustness.py optimizers=[kfac] problems=[digits_mlp] results=try.jsonl

Each optimizer is run on each problem (those of scripts/problems.py) at 2^k times its default rate, k from -8 to 8, at
its default values and at those of BEFORE, at equal steps. A range is measured in octaves around the best rate, as far
as the mean over the seeds at every rate in it is within two percent of the best (points of accuracy, or percent of the
loss). Runs that are there are not run again, and the table is written beside the results.

    optimizers=[...]  of the table (python -m optimizers)
    problems=[...]    by name; data as for scripts/studies/defaults.py
    seeds=[0,1,2]     of the runs
    results=...       docs/results/robustness.jsonl unless given
    data=FOLDER       of the data sets; $CURVLAB_DATA or datasets unless given
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

from analysis.sensitivity import near_best
from scripts.problems.arguments import command, given_to
from scripts.problems.catalogue import PROBLEMS
from scripts.problems.cells import SEEDS, Cell, cell
from scripts.problems.outcomes import Outcome, read, run_missing
from scripts.problems.tables import markdown
from training.runs.folder import atomic_file

#: The published rule with the values that were the defaults: each new direction is held, whatever momentum makes of it.
BEFORE = ("kl_of=direction", "kl_unit=observation", "kl_clip=1e-2", "damping=1e-2", "early_updates=false")
OCTAVES = tuple(range(-8, 9))
NEAR = 0.02


@dataclass
class Choices:
    """``key=value`` on the command line; see this file's beginning."""

    optimizers: list[str] = field(default_factory=lambda: ["kfac", "ekfac", "kpsvd", "deflation", "exact_ng"])
    problems: list[str] = field(default_factory=lambda: ["digits_mlp", "deep_relu"])
    seeds: list[int] = field(default_factory=lambda: [*SEEDS])
    results: str = "docs/results/robustness.jsonl"
    data: str = field(default_factory=lambda: os.environ.get("CURVLAB_DATA", "datasets"))


def cells(choices: Choices) -> Iterator[tuple[Cell, tuple[str, ...]]]:
    """What there is to run, each with the options that are not the defaults."""
    for seed, problem in product(choices.seeds, choices.problems):
        for optimizer, options, octave in product(choices.optimizers, ((), BEFORE), OCTAVES):
            yield cell(PROBLEMS[problem], optimizer, seed, 2.0**octave, options), options


def means(
    found: dict[str, Outcome], problem: str, optimizer: str, options: Sequence[str], seeds: Sequence[int]
) -> list[float | None]:
    """The means over the seeds by rate; None where a run is missing or did not come to an end."""
    result: list[float | None] = []
    for octave in OCTAVES:
        runs = [found.get(cell(PROBLEMS[problem], optimizer, seed, 2.0**octave, options).key) for seed in seeds]
        values = [run.value for run in runs if run is not None and run.value is not None]
        result.append(fmean(values) if len(values) == len(seeds) else None)
    return result


def page(found: dict[str, Outcome], choices: Choices) -> str:
    """The table."""
    rows = []
    for problem in choices.problems:
        accuracy = PROBLEMS[problem].metric == "accuracy"
        for optimizer in choices.optimizers:
            texts, octaves = [], []
            for options in (BEFORE, ()):
                values = means(found, problem, optimizer, options, choices.seeds)
                if not any(value is not None for value in values):
                    break
                low, place, high = near_best(values, accuracy, NEAR)
                best = values[place]
                assert best is not None
                open_ends = ((low, low == 0), (high, high == len(values) - 1))
                ends = [f"{'beyond ' if beyond else ''}x2^{OCTAVES[i]}" for i, beyond in open_ends]
                texts += [f"{100 * best:.1f}" if accuracy else f"{best:.4g}", f"{high - low} ({' to '.join(ends)})"]
                octaves.append(high - low)
            if len(octaves) == 2:
                rows.append([problem, optimizer, *texts, f"{octaves[1] - octaves[0]:+d}"])
    titles = ["problem", "optimizer", "best before", "octaves before", "best now", "octaves now", "wider by"]
    lines = [
        "# How wide the range of good learning rates is", "",
        "Made by `python scripts/studies/robustness.py`: "
        f"rates from 2^{OCTAVES[0]} to 2^{OCTAVES[-1]} times the default,",
        f"means over the seeds {', '.join(map(str, choices.seeds))}, test sets, steps and problems of "
        "[defaults.md](defaults.md). A range is within",
        f"{100 * NEAR:g} points (or percent of the loss) of the best, \"beyond\" where it goes on past the rates that "
        "were tried. Before:",
        f"`{' '.join(BEFORE)}`. Now: the default values.", "",
    ]  # fmt: skip
    return "\n".join([*lines, *markdown(titles, rows)])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return command(__doc__, argv, lambda given: _main(given_to(Choices, given)))


def _main(choices: Choices) -> tuple[Path, bool]:
    good = run_missing(cells(choices), Path(choices.results), Path(choices.data))
    return write(choices), good


def write(choices: Choices) -> Path:
    """Write the page of what is in the file of results, beside it.

    Args:
        choices: of a command line.
    """
    path = Path(choices.results)
    target = path.with_suffix(".md")
    with atomic_file(target) as file:
        file.write(page(read(path), choices).encode())
    return target


if __name__ == "__main__":
    sys.exit(main())
