"""Every optimizer at its default values on twelve small problems: what it reaches, and how far that is from its best.

    CURVLAB_DATA=datasets python scripts/defaults.py
    python scripts/defaults.py set=tuning seeds=[0] rates=false optimizers=[kfac] options=[momentum=0] results=try.jsonl
    python scripts/defaults.py report=true

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

import argparse
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from optimizers.table import present
from scripts.problems import CONFIGS, LEARNED, PROBLEMS, SPLIT, Problem
from train import train
from training.callbacks import Callback
from training.errors import UserError, did_you_mean
from training.loop.signals import CTRL_C, Interrupted
from training.runs import resume
from training.runs.finite import Diverged
from training.runs.folder import atomic_file
from training.runs.record import RunConfig, replace_folder
from training.runs.run import Run
from training.settings.composition import compose

DATA = "datasets"  # what stands for the folder of the data sets, wherever it is
RESULTS = "docs/results/defaults.jsonl"
SEEDS = (0, 1, 2)
#: Of the default learning rate: what each optimizer is tried at to see how far from its best the default is.
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
#: What a default may be worse by than the best of these rates: points of accuracy, and share of the loss.
NEAR_ACCURACY, NEAR_LOSS = 0.02, 0.05
REFERENCE = "adam"
NOTES = "## Notes"


Chosen = TypeVar("Chosen")


@dataclass
class Choices:
    """``key=value`` on the command line; see this file's beginning."""

    set: str = "all"
    problems: list[str] = field(default_factory=lambda: [*PROBLEMS])
    optimizers: list[str] = field(default_factory=lambda: [name for name, _, _ in present()])
    seeds: list[int] = field(default_factory=lambda: [*SEEDS])
    rates: bool = True
    options: list[str] = field(default_factory=list)
    results: str = RESULTS
    data: str = field(default_factory=lambda: os.environ.get("CURVLAB_DATA", DATA))
    limit: float = 600.0
    report: bool = False
    split: str = "test"


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        problem: what is learned.
        optimizer: its name in the table.
        seed: of everything random.
        factor: of the default learning rate.
        config: the whole configuration.
    """

    problem: Problem
    optimizer: str
    seed: int
    factor: float
    config: RunConfig

    @property
    def key(self) -> str:
        """What this very run is known by: all that has a part in what comes of it."""
        return f"{self.problem.name} {self.optimizer} {self.config.job_id}"

    def __str__(self) -> str:
        """In a line of progress."""
        rate = "" if self.factor == 1 else f", rate x {self.factor:g}"
        return f"{self.problem.name} {self.optimizer}, seed {self.seed}{rate}"


@dataclass
class Outcome:
    """What came of a cell: a line of the results.

    Attributes:
        key: the cell's.
        problem: name.
        optimizer: name.
        seed: of the run.
        factor: of the default learning rate.
        lr: the learning rate.
        options: those that are not the defaults.
        status: finished | diverged | broken off | failed.
        value: of the test set, what the problem is measured by; None unless finished.
        val: the same of the validation set, which is what to choose by.
        plateau: loss of the best constant output, where the data set knows it.
        steps: taken.
        seconds: of training.
        wall: of everything, reading the data included.
        error: why it did not finish.
        commit: of the code; with a + where files differed from it.
    """

    key: str
    problem: str
    optimizer: str
    seed: int
    factor: float
    lr: float
    options: list[str]
    status: str
    value: float | None = None
    val: float | None = None
    plateau: float | None = None
    steps: int = 0
    seconds: float = 0.0
    wall: float = 0.0
    error: str | None = None
    commit: str | None = None

    @property
    def learned(self) -> bool:
        """Whether the run shows that something was learned."""
        return self.value is not None and PROBLEMS[self.problem].learned(self.value, self.plateau)


class TimeLimit(Callback):
    """Breaks a run off.

    Args:
        seconds: after which.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self._end = seconds, math.inf

    def on_fit_start(self, run: Run) -> None:
        """See Callback."""
        self._end = time.monotonic() + self.seconds

    def on_step(self, run: Run) -> None:
        """See Callback."""
        if time.monotonic() > self._end and not run.done:
            run.stop(f"{self.seconds:g} seconds have passed")


# -- what there is to run ----------------------------------------------------------------------------------------------


@cache
def problem_config(name: str) -> RunConfig:
    """The configuration of a problem, with the data in the folder ``DATA``."""
    problem = PROBLEMS[name]
    return compose(
        [
            f"hydra.searchpath=['file://{CONFIGS}']", f"paths.data={DATA}", "name=cell", "logger=quiet",
            "callbacks=none", "trainer.device=cpu", "trainer.max_epochs=null", f"trainer.max_steps={problem.steps}",
            "trainer.eval_every_epochs=null", f"trainer.eval_every_steps={problem.steps}",
            "trainer.checkpoint_every_epochs=null", *problem.overrides,
        ]
    )  # fmt: skip


@cache
def optimizer_node(name: str, options: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of an optimizer.

    Args:
        name: in the table.
        options: other values than the defaults, ``key=value`` each.

    Raises:
        UserError: a value is refused.
    """
    return compose([f"optimizer={name}", *(f"optimizer.{option}" for option in options)]).values["optimizer"]


def options_of(name: str, given: Sequence[str]) -> tuple[str, ...]:
    """Those of the options on the command line that are for one optimizer.

    Args:
        name: in the table.
        given: ``option=value`` for all that have the option, or ``optimizer.option=value`` for one.
    """
    known = optimizer_node(name)
    kept = []
    for text in given:
        key, _, value = text.partition("=")
        owner, _, option = key.rpartition(".")
        if owner == name or (not owner and option in known):
            kept.append(f"{option}={value}")
    return tuple(kept)


def cell(problem: Problem, optimizer: str, seed: int, factor: float = 1.0, options: Sequence[str] = ()) -> Cell:
    """One run of an optimizer on a problem.

    Args:
        problem: one of ``PROBLEMS``, or like them.
        optimizer: its name in the table.
        seed: of everything random.
        factor: of its learning rate.
        options: see ``options_of``.
    """
    base = problem_config(problem.name)
    node = dict(optimizer_node(optimizer, options_of(optimizer, options)))
    if factor != 1 and node["lr"] != "auto":
        node["lr"] = float(f"{factor * node['lr']:.6g}")
    values = {**base.values, "optimizer": node, "seed": seed}
    return Cell(problem, optimizer, seed, factor, RunConfig(values, {**base.choices, "optimizer": optimizer}))


def cells(choices: Choices) -> Iterator[Cell]:
    """What is to be run, in this order: all with the first seed, then with the next; the other learning rates last."""
    problems = [PROBLEMS[name] for name in choices.problems if choices.set in ("all", _side(PROBLEMS[name]))]
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


# -- running it --------------------------------------------------------------------------------------------------------


def run(what: Cell, data: Path, limit: float = math.inf, options: Sequence[str] = ()) -> Outcome:
    """Train one cell, as train.py would; nothing of the run folder stays.

    Args:
        what: the cell.
        data: folder of the data sets.
        limit: seconds after which to break it off.
        options: those of ``what`` that are not the defaults, for the record.

    Raises:
        Interrupted: a signal asked to stop.
    """
    node = what.config.values["optimizer"]
    kept = list(options_of(what.optimizer, options))
    outcome = Outcome(what.key, what.problem.name, what.optimizer, what.seed, what.factor, node["lr"], kept, "failed")
    start = time.perf_counter()
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            summary, _ = train(_placed(what.config, what.problem, data, Path(folder), limit))
        except Interrupted:
            raise
        except Diverged as error:
            outcome.status, outcome.error = "diverged", _sentence(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other cells are run
            outcome.error = _sentence(error)
        finally:
            resume.release()
        summary = summary or _left(Path(folder))
    outcome.wall = round(time.perf_counter() - start, 3)
    commit, _, changes = (summary.get("git_commit") or "").partition("+")
    outcome.commit = f"{commit[:8]}{'+' if changes else ''}" or None
    outcome.steps, outcome.plateau = summary.get("steps", 0), summary.get("plateau")
    outcome.seconds = round((summary.get("seconds") or {}).get("training", 0.0), 3)
    if summary.get("status") == "stopped_early":
        outcome.status, outcome.error = "broken off", summary["stop_reason"]
    elif summary.get("status") == "finished":
        value, val = (summary["final"][f"{split}/{what.problem.metric}"] for split in ("test", "val"))
        if math.isfinite(value):
            outcome.status, outcome.value, outcome.val = "finished", value, val
        else:  # the trainer asks the validation set alone
            outcome.status, outcome.error = "diverged", f"the test set's {what.problem.metric} is {value}"
    return outcome


def _placed(config: RunConfig, problem: Problem, data: Path, folder: Path, limit: float) -> RunConfig:
    """The configuration with the folders of this machine; what is made rather than read stays for the next run."""
    made = Path(tempfile.gettempdir()) / "curvlab-problems"
    place = str(data if problem.folder else made)
    dataset = replace_folder(config.values["dataset"], DATA, place)
    values = config.values | {"dataset": dataset, "paths": {"data": place, "runs": str(folder), "sweeps": str(folder)}}
    if limit < math.inf:
        values["callbacks"] = {"limit": {"_target_": f"{TimeLimit.__module__}.TimeLimit", "seconds": limit}}
    return RunConfig(values, config.choices)


def _left(folder: Path) -> dict[str, Any]:
    """The summary of a run that ended in an exception, if it came so far."""
    found = next(folder.rglob("summary.json"), None)
    return {} if found is None else json.loads(found.read_text())


def _sentence(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read(path: Path) -> dict[str, Outcome]:
    """The results by key; a line that a kill cut short is none, and the last of several of a cell counts."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            outcome = Outcome(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[outcome.key] = outcome
    return found


def append(path: Path, outcome: Outcome) -> None:
    """Add a line to the results; it is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(vars(outcome), allow_nan=False) + "\n"
    with path.open("a+b") as file:
        if file.tell() and _last_byte(path) != b"\n":
            line = "\n" + line  # what a kill cut short stays alone in its line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def run_missing(todo: Iterable[tuple[Cell, Sequence[str]]], path: Path, data: Path, limit: float = math.inf) -> bool:
    """Run what is missing; whether all of it came to a result.

    Args:
        todo: cells, each with the options that are not the defaults.
        path: of the results.
        data: folder of the data sets.
        limit: seconds after which to break a run off.
    """
    absent = {name: problem.folder for name, problem in PROBLEMS.items() if problem.folder}
    absent = {name: folder for name, folder in absent.items() if not (data / folder).is_dir()}
    wanted, options = {}, {}
    for what, given in todo:
        wanted[what.key], options[what.key] = what, given
    for name in dict.fromkeys(what.problem.name for what in wanted.values() if what.problem.name in absent):
        print(f"{name}: no data: there is no folder {absent[name]} in {data} (give data=FOLDER)", flush=True)
    known = read(path)
    here = [what for what in wanted.values() if what.problem.name not in absent]
    missing = [what for what in here if known.get(what.key, _NOTHING).status == "failed"]
    print(f"{len(missing)} of {len(here)} cells are to be run; results: {path}", flush=True)
    good = True
    for done, what in enumerate(missing):
        known = read(path)  # again: another process may have done it
        if known.get(what.key, _NOTHING).status == "failed":
            outcome = run(what, data, limit, options[what.key])
            append(path, outcome)
            known[what.key] = outcome
            good &= outcome.status != "failed"
            gc.collect()  # of the models that hooks and optimizers refer to in circles
        left = _duration(_seconds_left(missing[done + 1 :], known))
        print(f"[{done + 1}/{len(missing)}, {left} left] {what}: {_described(known[what.key])}", flush=True)
    return good


_NOTHING = Outcome("", "", "", 0, 1.0, 0.0, [], "failed")


def _seconds_left(missing: Sequence[Cell], known: Mapping[str, Outcome]) -> float:
    """By what is known of the same pair, else of the same problem, else of anything."""
    seconds: dict[tuple[str, ...], list[float]] = {}
    for it in known.values():
        for group in ((it.problem, it.optimizer), (it.problem,), ()):
            seconds.setdefault(group, []).append(it.wall)
    total = 0.0
    for what in missing:
        groups = ((what.problem.name, what.optimizer), (what.problem.name,), ())
        total += fmean(next((seconds[group] for group in groups if group in seconds), [0.0]))
    return total


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _described(outcome: Outcome) -> str:
    if outcome.value is None:
        return f"{outcome.status} after {outcome.steps} steps, {outcome.wall:.1f} s ({outcome.error})"
    learned = "" if outcome.learned else " (does not learn)"
    problem = PROBLEMS[outcome.problem]
    val = "" if outcome.val is None else f" (validation {_number(problem, outcome.val)})"
    return f"{_number(problem, outcome.value)}{val}{learned}, {outcome.wall:.1f} s"


# -- what came of it ---------------------------------------------------------------------------------------------------


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
        pairs = {(it.optimizer, it.problem) for it in outcomes.values() if it.problem in PROBLEMS}
        names = [name for name, _, _ in present()]
        for optimizer, problem in sorted(pairs):
            for seed in SEEDS if optimizer in names else ():
                for factor in FACTORS if seed == SEEDS[0] else (1.0,):
                    what = cell(PROBLEMS[problem], optimizer, seed, factor, options)
                    if what.key in outcomes:
                        self.found[optimizer, problem, seed, factor] = outcomes[what.key]
        at_default = {(key[0], key[1]) for key in self.found if key[3] == 1}
        self.optimizers = [name for name in names if any(optimizer == name for optimizer, _ in at_default)]
        self.problems = [it for name, it in PROBLEMS.items() if any(problem == name for _, problem in at_default)]

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


def _number(problem: Problem, value: float) -> str:
    return f"{100 * value:.1f}" if problem.metric == "accuracy" else f"{value:.4g}"


def _value(results: Results, optimizer: str, problem: Problem) -> str:
    outcomes = results.seeds(optimizer, problem)
    if not outcomes:
        return ""
    mean = results.mean(optimizer, problem)
    if mean is None:
        ends = [it.status for it in outcomes if it.value is None]
        return f"**{ends[0]}**" if len(outcomes) == 1 else f"**{ends[0]}** {len(ends)}/{len(outcomes)}"
    text = _number(problem, mean)
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
    rule = ["---", *("---:" for _ in titles[1:])]
    return [f"| {' | '.join(line)} |" for line in (titles, rule, *rows)] + [""]


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
        "Made by `python scripts/defaults.py`, which runs what is missing: every number is a run of `train.py` with",
        "the values of `configs/optimizer` and the default schedule (a cosine over the budget, for the GPT after a",
        f"warm-up), at equal steps for all. Values are of the {sets} sets, after the last step: accuracy in percent",
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
    target = path.with_suffix(".md")
    before = target.read_text(encoding="utf-8") if target.exists() else ""
    notes = before[before.index(NOTES) :] if NOTES in before else ""
    text = page(Results(read(path), options, split), options, notes)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as file:
        file.write(text.encode())
    return target


# -- the command line --------------------------------------------------------------------------------------------------


def given_to(kind: type[Chosen], given: Sequence[str]) -> Chosen:
    """The choices of a command line; those of ``problems`` and ``optimizers`` exist.

    Args:
        kind: their dataclass.
        given: ``key=value``.

    Raises:
        UserError: one of them does not exist, or has a value of another type.
    """
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.from_dotlist([*given])))
    except OmegaConfBaseException as error:
        known = ", ".join(vars(kind()))
        raise UserError(f"{str(error).splitlines()[0]} (choices are {known}; see --help)") from error
    assert isinstance(merged, kind)
    known_names = {"problems": [*PROBLEMS], "optimizers": [name for name, _, _ in present()]}
    for key, names in known_names.items():
        for name in getattr(merged, key):
            if name not in names:
                raise UserError(f"{key} has no {name!r}{did_you_mean(name, names)}")
    return merged


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


def command(about: str | None, argv: Sequence[str] | None, work: Callable[[list[str]], tuple[Path, bool]]) -> int:
    """A command line of ``key=value``; returns the exit code.

    Args:
        about: what ``--help`` prints.
        argv: None: the process's.
        work: of the ``key=value``; returns the page that it wrote, and whether all cells came to a result.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("choices", nargs="*", metavar="key=value", help="see above")
    given = parser.parse_args(argv).choices
    torch.set_num_threads(1)
    try:
        target, good = work(given)
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    except Interrupted as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return CTRL_C
    print(f"{target} is written")
    return int(not good)


if __name__ == "__main__":
    if hasattr(os, "nice"):
        os.nice(10)  # it runs for hours beside other work
    sys.exit(main())
