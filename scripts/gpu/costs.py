"""Times and memory: of real models by phase, and of decompositions."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from optimizers import CurvatureOptimizer
from optimizers.curvature import linalg
from scripts import benchmark
from scripts.gpu.nets import NEVER, interval
from scripts.gpu.running import expect


class Marks:
    """Points in time on the device's own clock, read when all is done, so that nothing waits in between."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def __call__(self) -> None:
        """Note the time."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between each mark and the next."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [before.elapsed_time(after) for before, after in pairs]
        return [1e3 * (after - before) for before, after in pairs]


def step_times(arm: benchmark.Arm, device: torch.device, budget: float) -> dict[str, float]:
    """Median milliseconds of a step and of its parts, from as many steps as fit into so many seconds (2 to 20)."""
    start = benchmark.now(arm.batches[0][0])
    arm.run(lambda: None)
    first = benchmark.now(arm.batches[0][0]) - start
    marks = Marks(device)
    repeats = min(max(int(budget / max(first, 1e-6)), 2), 20)
    for _ in range(repeats):
        arm.run(marks)
    times = marks.milliseconds()
    columns = [times[index::4] for index in range(3)]
    whole = [sum(times[4 * index : 4 * index + 3]) for index in range(repeats)]
    forward, backward, update = (statistics.median(column) for column in columns)
    return {"ms": statistics.median(whole), "forward": forward, "backward": backward, "step": update}


def measure(entry: str, settings: benchmark.Options, device: torch.device, budget: float) -> dict[str, Any]:
    """Times by phase and peak memory of one optimizer on one model."""
    on_gpu = device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    model, likelihood, batches = benchmark.make_model(settings)
    optimizer = benchmark.make_optimizer(entry, model, likelihood)
    arm = benchmark.Arm(entry, model, optimizer, likelihood, batches)
    row: dict[str, Any] = {"optimizer": entry, "parameters": sum(p.numel() for p in model.parameters())}
    ours = isinstance(optimizer, CurvatureOptimizer)
    updates = optimizer.update_every if isinstance(optimizer, CurvatureOptimizer) else 1
    refreshes = getattr(optimizer, "refresh_every", None) if ours else None
    for _ in range(2):  # the first update and refresh, allocations, the choice of kernels
        arm.run(lambda: None)
    phases = {"ordinary": (NEVER, NEVER)}
    if ours:
        phases["update"] = (1, NEVER)
        if refreshes is not None:
            phases |= {"refresh": (NEVER, 1), "both": (1, 1)}
    for phase, (update, refresh) in phases.items():
        if isinstance(optimizer, CurvatureOptimizer):
            interval(optimizer, update, refresh)
        row[phase] = step_times(arm, device, budget / len(phases))
    plain = row["ordinary"]["ms"]
    row |= {"update_every": updates, "refresh_every": refreshes, "amortised": plain}
    if ours:
        row["amortised"] += (row["update"]["ms"] - plain) / updates
        row["curvature_bytes"] = optimizer.coverage().bytes if isinstance(optimizer, CurvatureOptimizer) else 0
    if refreshes is not None:
        row["amortised"] += (row["refresh"]["ms"] - plain) / refreshes
    row["memory"] = torch.cuda.max_memory_allocated(device) - before if on_gpu else None
    row["finite"] = all(bool(p.isfinite().all()) for p in model.parameters())
    expect(row["finite"], "weights are no longer finite after random batches at a tiny learning rate")
    return row


def time_linalg(size: int, batch: int, device: torch.device, budget: float) -> dict[str, Any]:
    """Milliseconds of the decompositions of a batch of matrices, and of their product for comparison."""
    generator = torch.Generator().manual_seed(size)
    roots = torch.randn(batch, size, size, generator=generator).to(device)
    matrices = linalg.symmetrize(roots @ roots.mT / size)
    damping = torch.full((batch,), 1e-2, device=device)
    lower, _ = linalg.cholesky(matrices, damping)
    work: dict[str, Callable[[], object]] = {
        "product": lambda: matrices @ matrices,
        "cholesky": lambda: linalg.cholesky(matrices, damping),
        "cholesky_inverse": lambda: torch.cholesky_inverse(linalg.cholesky(matrices, damping)[0]),
        "eigh": lambda: linalg.eigh(matrices),
        "pencil": lambda: linalg.pencil(matrices, lower, None),
    }
    row: dict[str, Any] = {"size": size, "batch": batch}
    for name, function in work.items():
        function()
        start = benchmark.now(matrices)
        function()
        first = benchmark.now(matrices) - start
        marks = Marks(device)
        marks()
        for _ in range(min(max(int(budget / len(work) / max(first, 1e-6)), 1), 20)):
            function()
            marks()
        row[name] = statistics.median(marks.milliseconds())
    return row
