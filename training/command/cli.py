"""The command line around Hydra: one line and an exit code for what a user can mend, a trace for a bug."""

from __future__ import annotations

import io
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from training.errors import UserError
from training.loop.launch import is_main, leave_word
from training.loop.signals import CTRL_C, REQUEUE, Interrupted
from training.runs.folder import RunFolder
from training.runs.record import RunConfig
from training.settings.composition import prepare
from training.show import report

if TYPE_CHECKING:
    from training.loop.distributed import World

# Hydra would print exceptions in its own way and exit; with this they reach `main`.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

T = TypeVar("T")
Train = Callable[[RunConfig], tuple[dict[str, Any], Path]]

# Jobs of the sweep that runs in this process: name and summary, in order.
_rows: list[tuple[str, dict[str, Any]]] = []


def is_mendable(error: object) -> bool:
    """Whether an exception is one that a user can mend: a sentence, no trace."""
    data = sys.modules.get("data")  # before it is imported, with torch, no exception is one of its own
    return isinstance(error, UserError) or (data is not None and isinstance(error, data.DataError))


def main(train: Train, job: Callable[[], Any], argv: Sequence[str] | None = None) -> int:
    """Run what a command line asks for.

    Args:
        train: trains and returns the summary and the run folder.
        job: the same as a job of Hydra's, which `hydra.main` made: for sweeps, and for what there is to show.
        argv: arguments; None for those of the process.

    Returns:
        The exit code: 0, 1 for an error, 75 or 130 for a run that a signal stopped (it can be resumed).
    """
    given = list(sys.argv[1:] if argv is None else argv)
    program = sys.argv
    _rows.clear()
    try:
        prepared = prepare(given)
        if isinstance(prepared, RunConfig):
            run_job(train, prepared)
            return 0
        sys.argv = [program[0], *prepared]
        with _wrapped() if {"-h", "--help"} & set(given) else nullcontext():
            job()
    except KeyboardInterrupt:
        return CTRL_C
    except SystemExit as stop:  # --help, a run that a signal stopped
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:  # noqa: BLE001 - the last resort: whatever it is, it is shown, and the exit code says so
        _complain(error)
        return 1
    finally:
        sys.argv = program
        _close_sweep()
    return int(any(summary.get("status") == "failed" for _, summary in _rows))


@contextmanager
def _wrapped() -> Iterator[None]:
    """Within it, long printed lines go on in the next one: Hydra's help lists all choices of a group in one line."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in as_started(printed.getvalue()).splitlines():
            sys.stdout.write(textwrap.fill(line, 120, subsequent_indent="  ", break_on_hyphens=False) + "\n")


def run_job(train: Train, run: RunConfig) -> float:
    """Run a job; in a sweep a failure is recorded and the sweep goes on.

    Args:
        train: trains and returns the summary and the run folder.
        run: what to train.

    Returns:
        The monitored metric, for sweepers: the worst possible for a run that failed, NaN while none is known.

    Raises:
        SystemExit: a signal stopped the run.
    """
    from training.runs.resume import release  # with torch, for which help does not wait

    summary: dict[str, Any]
    if run.sweep is not None:
        say(f"\nrun {len(_rows) + 1}: {run.label}")
    try:
        summary, _ = train(run)
    except Interrupted as stop:
        if is_main():
            sys.stderr.write(f"{stop}\n")
        if stop.exit_code == REQUEUE:
            leave_word(stop.exit_code)
        raise SystemExit(stop.exit_code) from stop  # no Exception: Hydra would go on with the sweep's next job
    except Exception as error:
        if run.sweep is None:
            raise
        summary = record_failure(run, error)
        _complain(error)
    finally:
        release()
    if run.sweep is not None:
        _rows.append((run.label or run.job_id, summary))
    monitor = summary.get("monitor") or run.values["trainer"].get("monitor") or _monitor()
    if monitor is None:
        return float("nan")
    value = (summary.get("best") or {}).get(monitor)
    worst = float("-inf") if monitor.endswith("accuracy") else float("inf")
    return float(value) if isinstance(value, int | float) else worst


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
    from training.runs.resume import claim_job  # see run_job

    text = str(error) if is_mendable(error) else "".join(traceback.format_exception(error))
    failed = {"status": "failed", "config_id": run.id}
    if not is_main():
        return failed | {"error": text}
    path, claimed = claim_job(run)
    if not claimed:
        return failed | {"error": text}
    folder = RunFolder(path) if RunFolder(path).config_file.exists() else RunFolder.fill(path, run.to_yaml())
    summary = folder.read_summary() or {}
    if summary.get("status") not in ("diverged", "failed"):
        summary |= failed
    summary |= {} if summary["status"] == "diverged" else {"error": text}
    folder.write_summary(summary)
    return summary


def _monitor() -> str | None:
    """The metric that chose the best weights of this sweep's jobs; a task names it, so a job must have started."""
    return next((summary["monitor"] for _, summary in _rows if "monitor" in summary), None)


def _close_sweep() -> None:
    """The table of a sweep's jobs, and why some of them failed."""
    if _rows and is_main():
        report.say("", report.sweep_table(_rows, _monitor() or "val/loss"))
        say("\n".join([*report.failure_lines(_rows)]))


def say(text: str) -> None:
    """A line on the terminal, from rank 0 alone; "" says nothing."""
    if text and is_main():
        report.say(text)


def on_main(world: World, function: Callable[[], T]) -> T:
    """The result of a function that rank 0 alone calls, on every rank; its sentence, if it ends in one, too."""
    from training.loop.distributed import broadcast_object

    outcome: Any = None
    if world.is_main:
        try:
            outcome = function()
        except Exception as error:
            if not is_mendable(error):
                raise
            outcome = error
    outcome = broadcast_object(outcome, world)
    if is_mendable(outcome):
        raise outcome
    return outcome


def _complain(error: Exception) -> None:
    """One line on stderr for what a user can mend, the trace of anything else; `CURVLAB_DEBUG=1` shows it always."""
    if not is_mendable(error) or os.environ.get("CURVLAB_DEBUG") == "1":
        traceback.print_exception(error)
    if is_mendable(error) and is_main():
        sys.stderr.write(f"error: {as_started(' '.join(str(error).split()))}\n")


def as_started(text: str) -> str:
    """A text that names `train.py`, as it is where that runs as the command `curvlab`, which says so by a variable."""
    if "CURVLAB_COMMAND" not in os.environ:
        return text
    text = re.sub(r"(torchrun \S+) train\.py", r"\1 -m curvlab", text)
    return re.sub(r"(python )?(?<![\w./])train\.py", "curvlab", text)
