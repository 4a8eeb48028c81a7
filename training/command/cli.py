"""The command line around Hydra: what is asked for is run, and the exit code says what became of it."""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

from training.command import jobs, slurm, workers
from training.command.jobs import Row, Train
from training.command.words import as_started, complain, mutter, on_main, say
from training.command.workers import relayed
from training.loop.launch import leave_word
from training.loop.signals import CTRL_C, REQUEUE, Interrupted, StopSignals
from training.runs.claims import release
from training.runs.record import RunConfig
from training.settings.composition import Sweep, prepare
from training.settings.own import reachable
from training.show import heart

# Hydra would print exceptions in its own way and exit; with this they reach `main`.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")
# And torch's C++ would fill the screen about a process that is lost, which is told of in a sentence.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Its profiler would call it an error that a machine has no GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

__all__ = ["main", "on_main", "run_job", "say"]

# Objects made between two looks for garbage. Loading torch and building a run make hundreds of thousands that stay,
# which Python would look through again every 700: a quarter of the seconds until the first step.
PATIENCE = 50_000

# Jobs of the sweep that runs in this process, in order.
_rows: list[Row] = []


def main(train: Train, job: Callable[[], Any], argv: Sequence[str] | None = None) -> int:
    """Run what a command line asks for.

    Args:
        train: trains and returns the summary and the run folder.
        job: the same as a job of Hydra's, which `hydra.main` made: for sweeps that a plugin of Hydra's launches, and
            for what there is to show.
        argv: arguments; None for those of the process.

    Returns:
        The exit code: 0, 1 for an error, 75 or 130 for a run that a signal stopped (it can be resumed).
    """
    given = list(sys.argv[1:] if argv is None else argv)
    program, thresholds = sys.argv, gc.get_threshold()
    _rows.clear()
    try:
        gc.set_threshold(PATIENCE, *thresholds[1:])
        with StopSignals(command=True), reachable():
            _run(train, job, given)
    except Interrupted as stop:
        return _stopped(stop)
    except KeyboardInterrupt:
        return CTRL_C
    except SystemExit as stop:  # --help, a job of Hydra's that a signal stopped
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:  # noqa: BLE001 - the last resort: whatever it is, it is shown, and the exit code says so
        complain(error)
        return 1
    finally:
        gc.set_threshold(*thresholds)
        sys.argv = program
        jobs.show(_rows)
    return int(any(summary.get("status") == "failed" for _, summary in _rows))


def _run(train: Train, job: Callable[[], Any], given: list[str]) -> None:
    asked = prepare(given, say)
    if isinstance(asked, RunConfig):
        try:
            with heart.beating(), heart.at(lambda: "preparing the run: its data, its model, its optimizer"):
                train(asked)
        finally:
            release()
        return
    if isinstance(asked, Sweep) and asked.queue is not None:
        slurm.launch(given, asked, _rows)
        return
    if isinstance(asked, Sweep) and asked.native:
        say(f"sweep of {len(asked.commands)} in {asked.folder}")
        if asked.workers > 1:
            workers.launch(train, asked, _rows)
            return
        with heart.beating():
            jobs.launch(train, asked, _rows)
        return
    sys.argv = [sys.argv[0], *(asked.arguments if isinstance(asked, Sweep) else asked)]
    began = time.time()
    around = _wrapped if {"-h", "--help"} & set(given) else relayed if isinstance(asked, Sweep) else nullcontext
    with around():
        job()
    if isinstance(asked, Sweep) and not _rows:  # they were run elsewhere
        _rows.extend(jobs.collect(asked, began))


def _stopped(stop: Interrupted) -> int:
    """Say that a run was stopped, and can be resumed; the exit code."""
    mutter(str(stop))
    if stop.exit_code == REQUEUE:
        leave_word(stop.exit_code)
    return stop.exit_code


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
    """Run a job that a plugin of Hydra's has launched; a failure is recorded and the sweep goes on.

    Args:
        train: trains and returns the summary and the run folder.
        run: what to train.

    Returns:
        The monitored metric, for sweepers; see `jobs.metric`.

    Raises:
        SystemExit: a signal stopped the run.
    """
    if multiprocessing.current_process().name != "MainProcess":
        os.environ["TTY_COMPATIBLE"] = "0"  # to rich: several bars on one terminal are none
    say(f"\nrun {len(_rows) + 1}: {run.label}")
    try:
        summary = jobs.attempt(train, run)
    except Interrupted as stop:
        raise SystemExit(_stopped(stop)) from stop  # no Exception: Hydra would go on with the sweep's next job
    _rows.append((run.label or run.job_id, summary))
    return jobs.metric(run, summary, _rows)
