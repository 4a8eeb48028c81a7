"""When a run writes its checkpoints: the step's, and that of the best weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from training.loop import watch
from training.runs.checkpoints.files import best_file, link, rotate, save, step_file, steps
from training.runs.checkpoints.state import capture
from training.runs.run import Run

log = logging.getLogger(__name__)


def store(run: Run, keep: int) -> None:
    """Write the step checkpoint of where the run is, and let go of old ones. Every rank must call it.

    Args:
        run: under way; within ``averaged``.
        keep: how many step checkpoints stay.

    Raises:
        WriteError: it cannot be written; those before it stay.
    """
    folder, began = run.folder.checkpoints, time.perf_counter()
    path = step_file(folder, run.step)
    state = capture(run) if run.best_written != run.step else None
    if run.world.is_main:
        if state is None:  # it was written a moment ago
            link(best_file(folder), path)
        else:
            save(path, state)
            took, size = time.perf_counter() - began, path.stat().st_size
            log.info("%s: %.1f MB written in %.2f s", path.name, size / 1e6, took)
        tidy(run, keep, aside=True)
    watch.saved(step_file(folder, run.step))


def tidy(run: Run, keep: int, aside: bool = False) -> None:
    """Let go of checkpoints that the run's last one has made superfluous; see ``rotate``.

    Args:
        run: whose last step has a checkpoint.
        keep: how many step checkpoints stay.
        aside: whether those that were set aside go, too.
    """
    best = run.best["step"] if run.best else None
    planned = run.saving.due if run.alarm.never and (run.saving.steps or run.saving.epochs) else None
    rotate(run.folder.checkpoints, keep, newest=run.step, best=best, aside=aside, planned=planned)


def store_best(run: Run, before: Mapping[str, Any] | None) -> None:
    """Write ``best.pt``: the run's best weights, which are those of now. Every rank must call it.

    Args:
        run: under way; within ``averaged``.
        before: the best evaluation until now, whose weights stay as long as a step checkpoint knows no better ones.

    Raises:
        WriteError: it cannot be written; the one before it stays.
    """
    folder = run.folder.checkpoints
    state = capture(run)
    if run.world.is_main:
        best = best_file(folder)
        if before is not None and best.exists() and any(step >= before["step"] for step, _ in steps(folder)):
            link(best, best_file(folder, before["step"]))
        save(best, state)
    run.best_written = run.step
