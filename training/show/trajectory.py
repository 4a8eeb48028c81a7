"""The way of a run's weights: light snapshots every so many steps, for pictures of where optimizers go."""

from __future__ import annotations

import logging
import math
from typing import Any

from training.errors import UserError
from training.runs.averaging import averaged
from training.runs.run import Callback, Run
from training.show.snapshots import NAME, Layout, Writer

log = logging.getLogger(__name__)

MB = 1e6


class Trajectory(Callback):
    """Stores the model every so many steps, and at the end, in the run folder's ``trajectory.snapshots``.

    The first snapshot takes four bytes a weight, each further one two: float16 differences to what the one before gives
    back, so that a weight is off by at most 2^-11 of how far it moved in between (see ``training.show.snapshots``).
    What the file will take is in ``train.log`` before the first step. ``scripts/landscape.py`` draws it.

    Where an average of the weights is evaluated (``averaging=ema``), it is what is stored, with the statistics of
    BatchNorm that belong to it: what checkpoints hold as the model, and what validation measures. Training goes the
    same way with this and without, bit for bit; a run that is taken back forgets the snapshots of what it discards.

    Args:
        every_steps: how often. The first snapshot is of the beginning, the last of the end.
        limit_mb: what the file may take, in units of 10^6 bytes. A budget of steps or epochs that would need more is
            refused; one of seconds, whose steps nobody knows, stops storing there, with a warning.

    Raises:
        ValueError: for a value out of its range.
    """

    def __init__(self, every_steps: int = 50, limit_mb: float = 1000.0) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps must be at least 1, got {every_steps}")
        if not 0 < limit_mb < math.inf:
            raise ValueError(f"limit_mb must be above 0, got {limit_mb}")
        self.every_steps, self.limit_mb = every_steps, limit_mb
        self._writer: Writer | None = None
        self._offset = 0
        self._full = False

    def on_fit_start(self, run: Run) -> None:
        """See Callback.

        Raises:
            UserError: the snapshots of the whole run would take more than the limit.
        """
        if not run.world.is_main:
            return
        self._foretell(run)
        path, offset = run.folder.path / NAME, self._offset if run.resumed else 0
        try:
            self._writer = Writer(path, run.model, offset)
        except UserError as error:
            if not offset or isinstance(error, OSError):
                raise
            log.warning("%s They begin anew.", error)
            self._writer = Writer(path, run.model)
        if not run.resumed:  # no average differs from the weights yet
            self._append(run)

    def _foretell(self, run: Run) -> None:
        layout, steps = Layout.of(run.model), run.budget.total_steps
        if steps is None:
            text = f"{layout.first / MB:.3g} MB, {layout.frame / MB:.3g} MB each, up to {self.limit_mb:g} MB"
            log.info("trajectory: snapshots every %d steps: %s", self.every_steps, text)
            return
        count = steps // self.every_steps + 1 + (steps % self.every_steps > 0)
        need = layout.size(count) / MB
        if need > self.limit_mb:
            room = (self.limit_mb * MB - layout.first) / layout.frame - 1
            advice = f"raise every_steps to {math.ceil(steps / room)}" if room >= 1 else f"it takes {need:.3g} MB"
            raise UserError(
                f"callbacks.trajectory: {count} snapshots take {need:.4g} MB, and limit_mb is {self.limit_mb:g}: "
                f"{advice}, or raise limit_mb"
            )
        log.info("trajectory: at most %d snapshots, %.3g MB", count, need)

    def on_step(self, run: Run) -> None:
        """See Callback."""
        if run.step % self.every_steps == 0:
            self._take(run)

    def on_fit_end(self, run: Run, summary: dict[str, Any]) -> None:
        """See Callback."""
        if summary["status"] != "diverged" and run.step % self.every_steps:
            self._take(run)

    def _take(self, run: Run) -> None:
        with run.clock.count("other"), averaged(run):  # which every rank must enter
            if self._writer is not None:
                self._append(run)

    def _append(self, run: Run) -> None:
        assert self._writer is not None
        if self._writer.step == run.step or self._full:
            return
        if self._writer.size + self._writer.layout.frame > self.limit_mb * MB and self._writer.size:
            self._full = True
            log.warning("trajectory: limit_mb is reached at step %d, and no later snapshot is stored.", run.step)
        elif not self._writer.append(run.model, run.step, run.epoch):
            log.warning("trajectory: a weight is not finite at step %d, of which there is no snapshot.", run.step)

    def close(self) -> None:
        """See Callback."""
        if self._writer is not None:
            self._writer.close()

    def state_dict(self) -> dict[str, Any]:
        """See Callback."""
        return {} if self._writer is None else {"offset": self._writer.offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Callback."""
        self._offset = state["offset"]
