"""What comes of a run, and running all that is missing."""

from __future__ import annotations

import gc
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from scripts.problems import catalogue
from scripts.problems.catalogue import Problem
from scripts.problems.cells import DATA, Cell, options_of
from train import train
from training.callbacks import Callback
from training.loop.signals import Interrupted
from training.runs import resume
from training.runs.finite import Diverged
from training.runs.record import RunConfig, replace_folder
from training.runs.run import Run
from training.show import heart

Record = TypeVar("Record")


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
        return self.value is not None and catalogue.PROBLEMS[self.problem].learned(self.value, self.plateau)


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
    outcome.status, outcome.error, summary = attempt(
        lambda folder: _placed(what.config, what.problem, data, folder, limit)
    )
    outcome.wall = round(time.perf_counter() - start, 3)
    outcome.commit = commit_of(summary)
    outcome.steps, outcome.plateau = summary.get("steps", 0), summary.get("plateau")
    outcome.seconds = round((summary.get("seconds") or {}).get("training", 0.0), 3)
    if outcome.status == "finished":
        value, val = (summary["final"][f"{split}/{what.problem.metric}"] for split in ("test", "val"))
        if math.isfinite(value):
            outcome.value, outcome.val = value, val
        else:  # the trainer asks the validation set alone
            outcome.status, outcome.error = "diverged", f"the test set's {what.problem.metric} is {value}"
    return outcome


def attempt(placed: Callable[[Path], RunConfig]) -> tuple[str, str | None, dict[str, Any]]:
    """Train as train.py would; nothing of the run folder stays.

    Args:
        placed: the configuration of a run in a folder.

    Returns:
        How it ended (finished | diverged | broken off | failed), why it is not finished, and the summary, {} if it did
        not come so far.

    Raises:
        Interrupted: a signal asked to stop.
    """
    status, why = "failed", None
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            summary, _ = train(placed(Path(folder)))
        except Interrupted:
            raise
        except Diverged as error:
            status, why = "diverged", _sentence(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other cells are run
            why = _sentence(error)
        finally:
            resume.release()
        summary = summary or _left(Path(folder))
    if summary.get("status") == "stopped_early":
        status, why = "broken off", summary["stop_reason"]
    elif summary.get("status") == "finished":
        status = "finished"
    return status, why, summary


def commit_of(summary: Mapping[str, Any]) -> str | None:
    """The commit of a run's code, with a + where files differed from it."""
    commit, _, changes = (summary.get("git_commit") or "").partition("+")
    return f"{commit[:8]}{'+' if changes else ''}" or None


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
    return {outcome.key: outcome for outcome in records(path, Outcome)}


def records(path: Path, kind: Callable[..., Record]) -> Iterator[Record]:
    """The lines of a file of results, in order; what a kill cut short is left out.

    Args:
        path: of the results; there may be none yet.
        kind: their dataclass.

    Yields:
        A line's record.
    """
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield kind(**json.loads(line))
        except (ValueError, TypeError):
            continue


def append(path: Path, outcome: object) -> None:
    """Add a line to the results, of a dataclass; it is on the disk when this returns."""
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
    absent = {name: problem.folder for name, problem in catalogue.PROBLEMS.items() if problem.folder}
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
            with heart.working(f"[{done + 1}/{len(missing)}] {what}"):
                outcome = run(what, data, limit, options[what.key])
            append(path, outcome)
            known[what.key] = outcome
            good &= outcome.status != "failed"
            gc.collect()  # of the models that hooks and optimizers refer to in circles
        left = duration(_seconds_left(missing[done + 1 :], known))
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


def duration(seconds: float) -> str:
    """Seconds as hours and minutes, the latter rounded up."""
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _described(outcome: Outcome) -> str:
    if outcome.value is None:
        return f"{outcome.status} after {outcome.steps} steps, {outcome.wall:.1f} s ({outcome.error})"
    learned = "" if outcome.learned else " (does not learn)"
    problem = catalogue.PROBLEMS[outcome.problem]
    val = "" if outcome.val is None else f" (validation {number(problem, outcome.val)})"
    return f"{number(problem, outcome.value)}{val}{learned}, {outcome.wall:.1f} s"


def number(problem: Problem, value: float) -> str:
    """A value as a table has it."""
    return f"{100 * value:.1f}" if problem.metric == "accuracy" else f"{value:.4g}"
