"""How wide the range of learning rates is at which an optimizer is about as good as at its best.

    python scripts/robustness.py
    python scripts/robustness.py optimizers=[kfac] problems=[digits_mlp] results=try.jsonl

Each optimizer is run on each problem (those of scripts/problems.py) at 2^k times its default rate, k from -5 to 8, at
its default values and at those of BEFORE, at equal steps. A range is measured in octaves around the best rate, as far
as every rate in it is within two percent of the best (points of accuracy, or percent of the loss). Runs that are there
are not run again, and the table is written beside the results.

    optimizers=[...]  of the table (python -m optimizers)
    problems=[...]    by name; data as for scripts/defaults.py
    results=...       docs/results/robustness.jsonl unless given
    data=FOLDER       of the data sets; $CURVLAB_DATA or datasets unless given
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scripts.defaults import Cell, Outcome, append, cell, markdown, read, run
from scripts.problems import PROBLEMS
from training.errors import UserError
from training.run_folder import atomic_file

#: The published rule with the values that were the defaults: each new direction is held, whatever momentum makes of it.
BEFORE = ("kl_of=direction", "kl_unit=observation", "kl_clip=1e-2", "damping=1e-2", "early_updates=false")
OCTAVES = tuple(range(-5, 9))
NEAR = 0.02


@dataclass
class Choices:
    """``key=value`` on the command line; see this file's beginning."""

    optimizers: list[str] = field(default_factory=lambda: ["kfac", "ekfac", "kpsvd", "deflation", "exact_ng"])
    problems: list[str] = field(default_factory=lambda: ["digits_mlp", "deep_relu"])
    results: str = "docs/results/robustness.jsonl"
    data: str = field(default_factory=lambda: os.environ.get("CURVLAB_DATA", "datasets"))


def cells(choices: Choices) -> Iterator[tuple[Cell, tuple[str, ...]]]:
    """What there is to run, each with the options that are not the defaults."""
    for problem in choices.problems:
        for optimizer in choices.optimizers:
            for options in ((), BEFORE):
                for octave in OCTAVES:
                    yield cell(PROBLEMS[problem], optimizer, 0, 2.0**octave, options), options


def width(values: Sequence[float | None], accuracy: bool) -> tuple[int, int]:
    """Octaves down and up from the best of values at rates an octave apart, as far as all of them are near it.

    Args:
        values: by rate, ascending; None where a run did not come to an end.
        accuracy: more is better, and near is meant in points; otherwise less is, and in shares of the best.
    """
    scores = [None if value is None else -value if accuracy else value for value in values]
    best = min(score for score in scores if score is not None)
    limit = best + NEAR if accuracy else best * (1 + NEAR)
    place = low = high = scores.index(best)

    def near(index: int) -> bool:
        score = scores[index] if 0 <= index < len(scores) else None
        return score is not None and score <= limit + 1e-12

    while near(low - 1):
        low -= 1
    while near(high + 1):
        high += 1
    return place - low, high - place


def page(found: dict[str, Outcome], choices: Choices) -> str:
    """The table."""
    rows = []
    for problem in choices.problems:
        accuracy = PROBLEMS[problem].metric == "accuracy"
        for optimizer in choices.optimizers:
            texts, octaves = [], []
            for options in (BEFORE, ()):
                keys = [cell(PROBLEMS[problem], optimizer, 0, 2.0**k, options).key for k in OCTAVES]
                values = [found[key].value if key in found else None for key in keys]
                if not any(value is not None for value in values):
                    break
                down, up = width(values, accuracy)
                place = next(i for i, v in enumerate(values) if v == (max if accuracy else min)(
                    v for v in values if v is not None
                ))  # fmt: skip
                best = values[place]
                assert best is not None
                ends = [(place - down, place > down), (place + up, place + up < len(values) - 1)]
                inside = [f"{'' if closed else 'beyond '}x2^{OCTAVES[i]}" for i, closed in ends]
                texts += [f"{100 * best:.1f}" if accuracy else f"{best:.4g}", f"{down + up} ({' to '.join(inside)})"]
                octaves.append(down + up)
            if len(octaves) == 2:
                rows.append([problem, optimizer, *texts, f"{octaves[1] - octaves[0]:+d}"])
    titles = ["problem", "optimizer", "best before", "octaves before", "best now", "octaves now", "wider by"]
    lines = [
        "# How wide the range of good learning rates is", "",
        f"Made by `python scripts/robustness.py`: rates from 2^{OCTAVES[0]} to 2^{OCTAVES[-1]} times the default,",
        "seed 0, test sets, steps and problems of [defaults.md](defaults.md). A range is within "
        f"{100 * NEAR:g} points (or",
        "percent of the loss) of the best, \"beyond\" where it goes on past the rates that were tried. Before:",
        f"`{' '.join(BEFORE)}`. Now: the default values.", "",
    ]  # fmt: skip
    return "\n".join([*lines, *markdown(titles, rows)])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("choices", nargs="*", metavar="key=value", help="see above")
    given = parser.parse_args(argv).choices
    torch.set_num_threads(1)
    try:
        try:
            merged = OmegaConf.merge(OmegaConf.structured(Choices), OmegaConf.from_dotlist(given))
        except OmegaConfBaseException as error:
            raise UserError(f"{str(error).splitlines()[0]} (choices are {', '.join(vars(Choices()))})") from error
        choices = OmegaConf.to_object(merged)
        assert isinstance(choices, Choices)
        path = Path(choices.results)
        known = read(path)
        todo = [(what, options) for what, options in cells(choices) if what.key not in known]
        for done, (what, options) in enumerate(todo):
            outcome = run(what, Path(choices.data), options=options)
            append(path, outcome)
            known[what.key] = outcome
            print(f"[{done + 1}/{len(todo)}] {what} {' '.join(options)}: {outcome.value} {outcome.status}", flush=True)
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    with atomic_file(path.with_suffix(".md")) as file:
        file.write(page(known, choices).encode())
    print(f"{path.with_suffix('.md')} is written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
