"""What came of the runs at default values: a page of tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from analysis import pages
from optimizers.table import present
from scripts.problems import catalogue
from scripts.problems.catalogue import LEARNED, SPLIT, Problem
from scripts.problems.cells import FACTORS, SEEDS, cell, problem_config
from scripts.problems.outcomes import Outcome, number, read

#: What a default may be worse by than the best of these rates: points of accuracy, and share of the loss.
NEAR_ACCURACY, NEAR_LOSS = 0.02, 0.05
REFERENCE = "adam"


class Results:
    """The results of default values (or of others in their place), to be looked up.

    Args:
        outcomes: by key.
        options: other values than the defaults, see ``options_of``.
        split: test | val: the set whose values are looked up.
    """

    def __init__(self, outcomes: Mapping[str, Outcome], options: Sequence[str] = (), split: str = "test") -> None:
        if split == "val":
            outcomes = {key: replace(it, value=it.val) for key, it in outcomes.items()}
        self.split = split
        self.found: dict[tuple[str, str, int, float], Outcome] = {}
        pairs = {(it.optimizer, it.problem) for it in outcomes.values() if it.problem in catalogue.PROBLEMS}
        names = [name for name, _, _ in present()]
        for optimizer, problem in sorted(pairs):
            for seed in SEEDS if optimizer in names else ():
                for factor in FACTORS if seed == SEEDS[0] else (1.0,):
                    what = cell(catalogue.PROBLEMS[problem], optimizer, seed, factor, options)
                    if what.key in outcomes:
                        self.found[optimizer, problem, seed, factor] = outcomes[what.key]
        at_default = {(key[0], key[1]) for key in self.found if key[3] == 1}
        self.optimizers = [name for name in names if any(optimizer == name for optimizer, _ in at_default)]
        seen = {problem for _, problem in at_default}
        self.problems = [it for name, it in catalogue.PROBLEMS.items() if name in seen]

    def seeds(self, optimizer: str, problem: Problem) -> list[Outcome]:
        """The runs of a pair at default values, a seed each."""
        keys = ((optimizer, problem.name, seed, 1.0) for seed in SEEDS)
        return [self.found[key] for key in keys if key in self.found]

    def mean(self, optimizer: str, problem: Problem) -> float | None:
        """Over the seeds; None if there is none or one of them has not come to an end."""
        values = [it.value for it in self.seeds(optimizer, problem)]
        return fmean(value for value in values if value is not None) if values and None not in values else None

    def learned(self, optimizer: str, problem: Problem) -> bool:
        """Whether every seed did."""
        return all(it.learned for it in self.seeds(optimizer, problem))

    def best_rate(self, optimizer: str, problem: Problem) -> tuple[float, float] | None:
        """Factor and value of the best of the five learning rates; None unless all were tried and one came through."""
        tried = [self.found.get((optimizer, problem.name, SEEDS[0], factor)) for factor in FACTORS]
        if any(it is None for it in tried):
            return None
        values = [(it.factor, it.value) for it in tried if it is not None and it.value is not None]
        # Of equals that nearest to the default.
        values.sort(key=lambda pair: (_loss(problem, pair[1]), abs(math.log(pair[0]))))
        return values[0] if values else None


def _title(problem: Problem) -> str:
    return problem.name if problem.tuning else f"{problem.name} *"


def _loss(problem: Problem, value: float) -> float:
    """Less is better."""
    return -value if problem.metric == "accuracy" else value


def _near(problem: Problem, value: float, best: float) -> bool:
    """Whether a default is close enough to the best."""
    if problem.metric == "accuracy":
        return value >= best - NEAR_ACCURACY - 1e-12
    return value <= best * (1 + NEAR_LOSS)


def _value(results: Results, optimizer: str, problem: Problem) -> str:
    outcomes = results.seeds(optimizer, problem)
    if not outcomes:
        return ""
    mean = results.mean(optimizer, problem)
    if mean is None:
        ends = [it.status for it in outcomes if it.value is None]
        return f"**{ends[0]}**" if len(outcomes) == 1 else f"**{ends[0]}** {len(ends)}/{len(outcomes)}"
    text = number(problem, mean)
    return text if results.learned(optimizer, problem) else f"**{text}**"


def _distance(results: Results, optimizer: str, problem: Problem) -> str:
    best, own = results.best_rate(optimizer, problem), results.found.get((optimizer, problem.name, SEEDS[0], 1.0))
    if best is None:
        tried = all((optimizer, problem.name, SEEDS[0], factor) in results.found for factor in FACTORS)
        return "**none**" if tried else ""
    factor, value = best
    if own is None or own.value is None:
        return f"**{own.status if own else ''}** x{factor:g}"
    if problem.metric == "accuracy":
        text = f"{100 * (own.value - value):+.1f}"
    else:
        text = f"{100 * (own.value / value - 1):+.1f} %"
    text = f"0 x{factor:g}" if factor == 1 else f"{text} x{factor:g}"
    return text if _near(problem, own.value, value) else f"**{text}**"


def _beside(results: Results, optimizer: str, problem: Problem) -> bool | None:
    """Whether an optimizer reaches what the reference does; None where it cannot be said."""
    if not results.seeds(optimizer, problem) or not results.seeds(REFERENCE, problem):
        return None
    own, its = results.mean(optimizer, problem), results.mean(REFERENCE, problem)
    return own is not None and (its is None or _loss(problem, own) <= _loss(problem, its))


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, a line each, and an empty one."""
    return [*pages.table(titles, rows).splitlines(), ""]


def page(results: Results, options: Sequence[str] = (), notes: str = "") -> str:
    """The tables as a page of docs/results.

    Args:
        results: what is known.
        options: see ``options_of``.
        notes: the page's last section, from ``NOTES`` on.
    """
    known, problems = results.optimizers, results.problems
    titles = ["optimizer", *map(_title, problems)]
    lines = ["# Optimizers at their default values", ""]
    if options:
        lines += [f"With `{' '.join(options)}` in place of the default values of the optimizers that have them.", ""]
    seeds, sets = ", ".join(map(str, SEEDS)), {"test": "test", "val": "validation"}[results.split]
    lines += [
        "Made by `python scripts/studies/defaults.py`, which runs what is missing: every number is a run of `train.py`",
        "with the values of `configs/optimizer` and the default schedule (a cosine over the budget, for the GPT after",
        f"a warm-up), at equal steps for all. Values are of the {sets} sets, after the last step: accuracy in percent",
        "(more is better) or the loss (less is better), means over the seeds",
        f"{seeds}, or those that were run. **Bold**: a run diverged, was broken off, or has learned nothing, which is",
        "to say that its accuracy is below the one in the next table, or its loss not below",
        f"{LEARNED:g} of the best constant output's.", "",
        "Default values may be chosen on six of the problems, by their validation sets; the others, marked *, are held",
        f"out. {SPLIT}", "",
    ]  # fmt: skip
    rows = []
    for it in problems:
        config = problem_config(it.name).values
        least = f"{100 * it.least:g} %" if it.metric == "accuracy" else ""
        rows.append([_title(it), it.title, str(it.steps), str(config["dataset"]["batch_size"]), it.metric, least])
    lines += markdown(["problem", "what it is", "steps", "batch", "measured", "at least"], rows)
    lines += ["## At default values", ""]
    lines += markdown(titles, [[name, *(_value(results, name, it) for it in problems)] for name in known])
    counted = [(name, it) for name in known for it in problems if results.seeds(name, it)]
    failed = [(name, it) for name, it in counted if not results.learned(name, it)]
    lines += [f"{len(failed)} of {len(counted)} cells do not learn." if counted else "Nothing was run.", ""]
    lines += _rates(results) + _reference(results) + _costs(results)
    return "\n".join(lines) + (f"\n{notes}" if notes else "")


def _rates(results: Results) -> list[str]:
    problems = [it for it in results.problems if it.rates]
    rows = [[name, *(_distance(results, name, it) for it in problems)] for name in results.optimizers]
    rows = [row for row in rows if any(row[1:])]
    if not rows:
        return []
    lines = [
        "## Beside their own best learning rate", "",
        f"Seed 0 at {', '.join(f'{factor:g}' for factor in FACTORS)} times the default rate: the default's distance to "
        "the best of the five (in points of accuracy, or percent of the loss), and where that is. **Bold**: it is",
        f"farther than {100 * NEAR_ACCURACY:g} points or {100 * NEAR_LOSS:g} %.",
        "",
    ]  # fmt: skip
    lines += markdown(["optimizer", *map(_title, problems)], rows)
    entries = [text for row in rows for text in row[1:] if text]
    far = sum(text.startswith("**") for text in entries)
    return [*lines, f"{len(entries) - far} of {len(entries)} are near their best.", ""]


def _reference(results: Results) -> list[str]:
    rows = []
    for name in results.optimizers:
        verdicts = {it: _beside(results, name, it) for it in results.problems}
        reached = {it for it, verdict in verdicts.items() if verdict}
        short = [it.name for it, verdict in verdicts.items() if verdict is False]
        sides = []
        for tuning in (True, False):
            these = [it for it, verdict in verdicts.items() if it.tuning == tuning and verdict is not None]
            sides.append(f"{len(reached & set(these))} of {len(these)}")
        if name != REFERENCE and (reached or short):
            rows.append([name, *sides, f"{len(reached)} of {len(reached) + len(short)}", ", ".join(short)])
    if not rows:
        return []
    lines = ["## Beside Adam at its default values", "", "On how many problems the mean reaches Adam's.", ""]
    return lines + markdown(["optimizer", "to choose by", "held out", "together", "short of Adam on"], rows)


def _costs(results: Results) -> list[str]:
    lines = [
        "## Seconds of a run", "",
        "Training alone, on one thread beside other work: an order of magnitude, no benchmark.", "",
    ]  # fmt: skip
    rows = []
    for name in results.optimizers:
        seconds = [[it.seconds for it in results.seeds(name, problem)] for problem in results.problems]
        rows.append([name, *(f"{fmean(some):.3g}" if some else "" for some in seconds)])
    return lines + markdown(["optimizer", *map(_title, results.problems)], rows) if rows else []


def write_page(path: Path, options: Sequence[str] = (), split: str = "test") -> Path:
    """Write the tables of a results file beside it.

    Args:
        path: of the results.
        options: see ``options_of``.
        split: test | val: of which sets.
    """
    results = Results(read(path), options, split)
    return pages.write_page(path.with_suffix(".md"), lambda notes: page(results, options, notes))
