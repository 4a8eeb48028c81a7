"""The jobs of a sweep: each is tried, what becomes of it is recorded, and a table says it at the end."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from training.command.words import complain, is_mendable, say
from training.errors import ProcessLost, UserError
from training.loop.launch import is_main
from training.loop.signals import Interrupted
from training.runs.claims import release, turn
from training.runs.folder import PLAN, RunFolder, atomic_file, unwritable
from training.runs.record import RunConfig
from training.settings.composition import Sweep
from training.show import heart, report

Train = Callable[[RunConfig], tuple[dict[str, Any], Path]]
#: A job's label and its summary.
Row = tuple[str, dict[str, Any]]


def launch(train: Train, sweep: Sweep, rows: list[Row]) -> None:
    """Run the jobs of a sweep one after the other.

    Args:
        train: trains and returns the summary and the run folder.
        sweep: whose jobs.
        rows: is given the jobs that have come to an end, as they do.

    Raises:
        Interrupted: a signal asked to stop.
    """
    write_plan(sweep)
    labels, began = sweep.labels, time.monotonic()
    for done, index in enumerate(sweep.due, start=1):
        label = labels[index] or "run 1"
        building = partial("{}: its data, its model, its optimizer".format, label)
        with _threads(sweep.threads), report.in_brief(), heart.at(building):
            rows.append((label, perform(train, sweep, index)))
        rest = report.rest(began, done, len(sweep.due))
        say(report.outcome(f"{index + 1} of {len(labels)}{rest}", *rows[-1]))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Within it, torch has so many threads; None: those it has."""
    if count is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def perform(train: Train, sweep: Sweep, index: int) -> dict[str, Any]:
    """Compose a job and run it; see `attempt`."""
    try:
        run = sweep.job(index)
    except UserError as error:  # of two values that only together are wrong
        complain(error)
        note(sweep.folder, "refused", sweep.labels[index], str(error))
        return {"status": "failed", "error": str(error)}
    return attempt(train, run)


def attempt(train: Train, run: RunConfig) -> dict[str, Any]:
    """Run a job of a sweep; a failure is recorded, so that the next one can be run.

    Args:
        train: trains and returns the summary and the run folder.
        run: what to train.

    Returns:
        The summary.

    Raises:
        Interrupted: a signal asked to stop.
        ProcessLost: another of several processes has ended, or gives no answer.
        UserError: nothing can be written where the sweep is.
    """
    from training.runs.resume import job_name, sweep_folder  # with torch, for which help does not wait

    try:
        summary, _ = train(run)
    except (Interrupted, ProcessLost):  # what is left of several processes could not train the next job either
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is recorded and said
        summary = record_failure(run, error)
        complain(error)
    finally:
        release()
    if run.sweep is not None and (folder := sweep_folder(run)).name != job_name(run):
        note(run.sweep, "found", run.label, folder.name)
    return summary


def collect(sweep: Sweep, since: float) -> list[Row]:
    """What became of the jobs of a sweep that were run in other processes, from their folders.

    Args:
        sweep: that a plugin of Hydra's has launched.
        since: when, in seconds of the clock; of values that a sweeper has drawn, the folders tell which were new.
    """
    from training.runs.resume import sweep_folder  # see attempt

    if not sweep.commands:
        ended = [path for path in sweep.folder.glob("*/summary.json") if path.stat().st_mtime >= since]
        return [(path.parent.name, RunFolder(path.parent).read_summary() or {}) for path in sorted(ended)]
    rows = []
    for index in sweep.due:
        run = sweep.job(index)
        summary = RunFolder(sweep_folder(run)).read_summary()
        rows.append((run.label or run.job_id, summary or {"status": "unfinished"}))
    return rows


def record_failure(run: RunConfig, error: Exception) -> dict[str, Any]:
    """Write that a job of a sweep failed into its `summary.json`, unless the trainer has said how it ended.

    Rank 0 alone writes, and nothing where another process trains.

    Args:
        run: its configuration.
        error: the sentence of a `UserError`, or the trace of a bug, is what is recorded.

    Returns:
        The summary.

    Raises:
        UserError: nothing can be written there.
    """
    from training.runs.resume import ENDED, claim_job  # see attempt

    text = str(error) if is_mendable(error) else "".join(traceback.format_exception(error))
    failed = {"status": "failed", "config_id": run.id}
    if not is_main():
        return failed | {"error": text}
    path, claimed = claim_job(run)
    if not claimed:
        return failed | {"error": text}
    folder = RunFolder(path) if RunFolder(path).config_file.exists() else RunFolder.fill(path, run.to_yaml())
    summary = folder.read_summary() or {}
    if summary.get("status") == "diverged":  # which the trainer has said
        return summary
    if summary.get("status") in ENDED:  # what failed now is not the run
        return failed | {"error": text}
    if summary.get("status") != "failed":
        summary |= failed
    summary |= {"error": text}
    folder.write_summary(summary)
    return summary


def metric(run: RunConfig, summary: dict[str, Any], rows: Sequence[Row]) -> float:
    """What a sweeper optimizes: the monitored metric of a job, the worst possible if it failed, NaN if none is known.

    Args:
        run: the job.
        summary: what became of it.
        rows: the jobs before it, one of which may know what the metric is.
    """
    monitor = summary.get("monitor") or run.values["trainer"].get("monitor") or monitored(rows)
    if monitor is None:
        return float("nan")
    value = (summary.get("best") or {}).get(monitor)
    worst = float("-inf") if monitor.endswith("accuracy") else float("inf")
    return float(value) if isinstance(value, int | float) else worst


def monitored(rows: Sequence[Row]) -> str | None:
    """The metric that chose the best weights of a sweep's jobs; a task names it, so a job must have started."""
    return next((summary["monitor"] for _, summary in rows if "monitor" in summary), None)


def show(rows: Sequence[Row]) -> None:
    """The table of a sweep's jobs, and why some of them failed."""
    if rows and is_main():
        report.say("", report.sweep_table(rows, monitored(rows) or "val/loss"))
        say("\n".join([*report.failure_lines(rows)]))


# -- what is planned ---------------------------------------------------------------------------------------------------


def write_plan(sweep: Sweep) -> None:
    """Say in a sweep's folder which jobs this launch has, for those who watch.

    Raises:
        UserError: the folder cannot be written.
    """
    if is_main():
        _update(sweep.folder, lambda plan: plan if plan.get("jobs") == sweep.labels else {"jobs": sweep.labels})


def note(folder: Path, what: str, label: str, text: str) -> None:
    """Add to a sweep's plan what its folders do not tell of a job.

    Args:
        folder: of the sweep.
        what: "found": another sweep's folder is this job's; "refused": it does not compose.
        label: of the job.
        text: name of the folder, or the sentence.

    Raises:
        UserError: the folder cannot be written.
    """
    if is_main():
        _update(folder, lambda plan: plan | {what: plan.get(what, {}) | {label: text}})


def _update(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / PLAN
    try:
        with turn(folder):
            plan = json.loads(path.read_text()) if path.exists() else {}
            if (new := change(plan)) != plan:
                with atomic_file(path) as file:
                    file.write((json.dumps(new, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(unwritable(folder, error)) from error
