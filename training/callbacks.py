"""What may happen beside the training loop: stopping early, drawing curves, profiling."""

from __future__ import annotations

import logging
from typing import Any

import torch

from training.runs.folder import atomic_file
from training.runs.run import Callback, Run
from training.show.pictures import check_resolution
from training.tasks.task import Task

__all__ = ["Callback", "CurvePlots", "EarlyStopping", "Profiler"]

log = logging.getLogger(__name__)


class EarlyStopping(Callback):
    """Ends a run whose validation metric no longer improves.

    Args:
        metric: "val/loss", "val/accuracy", ...; None: the one that chooses the best weights.
        patience: evaluations without improvement after which to stop.
        min_delta: what counts as an improvement is larger than this.

    Raises:
        ValueError: for a value out of its range.
    """

    def __init__(self, metric: str | None = None, patience: int = 10, min_delta: float = 0.0) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if min_delta < 0:
            raise ValueError(f"min_delta must be at least 0, got {min_delta}")
        self.metric, self.patience, self.min_delta = metric, patience, min_delta
        self.best: float | None = None
        self.waited = 0

    def check(self, task: Task) -> None:
        """See Callback."""
        known = [f"val/{name}" for name in task.metrics]
        if self.metric is not None and self.metric not in known:
            raise ValueError(f"metric must be one of {', '.join(known)}, got {self.metric!r}")

    def on_fit_start(self, run: Run) -> None:
        """See Callback."""
        self._decide(run)  # a run that was stopped early stays so when it is resumed

    def on_evaluation(self, run: Run, values: dict[str, float]) -> None:
        """See Callback."""
        metric = self.metric or run.monitor
        value = values[metric] if run.task.metrics[metric.partition("/")[2]] == "max" else -values[metric]
        if self.best is None or value > self.best + self.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        self._decide(run)

    def _decide(self, run: Run) -> None:
        if self.waited >= self.patience:
            run.stop(f"{self.metric or run.monitor} has not improved for {self.waited} evaluations")

    def state_dict(self) -> dict[str, Any]:
        """See Callback."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Callback."""
        self.best, self.waited = state["best"], state["waited"]


class CurvePlots(Callback):
    """Draws the run's curves into its folder as PNG files when it ends.

    Args:
        dpi: resolution.
    """

    def __init__(self, dpi: int = 120) -> None:
        check_resolution(dpi)
        self.dpi = dpi

    def on_fit_end(self, run: Run, summary: dict[str, Any]) -> None:
        """See Callback."""
        if not run.world.is_main or not run.folder.metrics_file.exists():
            return
        from training.show.curves import (
            plot_run,  # matplotlib takes a while to import, and most runs are shorter without it
        )

        for name, figure in plot_run(run.folder.metrics_file).items():
            with atomic_file(run.folder.path / f"{name.replace('/', '_')}.png") as file:
                figure.savefig(file, format="png", dpi=self.dpi)


class Profiler(Callback):
    """Watches a few early steps with torch's profiler: a table in train.log, ``trace.json`` for chrome://tracing.

    Args:
        skip: steps to let pass first, while caches fill.
        steps: steps to watch.
    """

    def __init__(self, skip: int = 3, steps: int = 5) -> None:
        self.skip, self.steps = skip, steps
        self._profiler: torch.profiler.profile | None = None

    def on_fit_start(self, run: Run) -> None:
        """See Callback."""
        if not run.world.is_main:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if run.world.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        schedule = torch.profiler.schedule(wait=self.skip - 1, warmup=1, active=self.steps, repeat=1)

        def report(profiler: torch.profiler.profile) -> None:
            order = "self_cuda_time_total" if len(activities) > 1 else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=order, row_limit=25)
            log.info("profile of %d steps:\n%s", self.steps, table)
            profiler.export_chrome_trace(str(run.folder.path / "trace.json"))

        self._profiler = torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=report)
        self._profiler.start()

    def on_step(self, run: Run) -> None:
        """See Callback."""
        if self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        """See Callback."""
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()  # reports what it has seen, if the run was shorter than it meant to watch
