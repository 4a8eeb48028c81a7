"""Ordinary steps queue their work and never wait for the device."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from optimizers import CurvatureOptimizer
from scripts.gpu.nets import NEVER, build, interval, prepare, train_step
from scripts.gpu.running import expect
from tests.optimizers.problems import PROBLEMS

ROOT = Path(__file__).resolve().parents[2]


def our_frame(stack: traceback.StackSummary) -> str:
    """``file:line function`` of the innermost frame of this project in a stack, as a path inside of it."""
    for frame in reversed(stack):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts and frame.name not in ("showwarning", "our_frame"):
            return f"{path.relative_to(ROOT)}:{frame.lineno} {frame.name}"
    return "no line of this project"


@contextmanager
def waits() -> Iterator[list[str]]:
    """In the block, collect the lines of this project that make the host wait for the device."""
    found: list[str] = []

    def showwarning(message: Warning | str, *_rest: Any, **_named: Any) -> None:
        if "synchronizing" in str(message):
            found.append(our_frame(traceback.extract_stack()))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = showwarning  # restored by catch_warnings
        yield found


@contextmanager
def sync_warnings(mode: str) -> Iterator[None]:
    """Let torch say when the host waits for the device: ``warn`` or ``error``."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_sync(name: str, device: torch.device, nets: list[str]) -> str | dict[str, Any]:
    """Forward, backward and step of ordinary steps queue their work and do not wait."""
    offenders: dict[str, list[str]] = {}
    for net in nets:
        model, batch = prepare(PROBLEMS[net], device)
        # SGD is the control: the loop and the model alone.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01) if name == "sgd" else build(name, model)
        for _ in range(7):  # the last two updates and refreshes are behind, allocations and handles made
            train_step(optimizer, model, batch)
        if isinstance(optimizer, CurvatureOptimizer):
            interval(optimizer, NEVER, NEVER)
        train_step(optimizer, model, batch)
        torch.cuda.synchronize()
        with waits() as control, sync_warnings("warn"):
            batch[0].sum().item()
        expect(bool(control), "torch did not tell of a synchronisation made on purpose: nothing can be concluded")
        with waits() as found, sync_warnings("warn"):
            for _ in range(3):
                train_step(optimizer, model, batch)
        if found:
            offenders[net] = [f"{found.count(line)}x {line}" for line in dict.fromkeys(found)]
            continue
        with sync_warnings("error"):  # what a thread of autograd's says may not reach the collector
            train_step(optimizer, model, batch)
    lines = [f"{net}: {', '.join(found)}" for net, found in offenders.items()]
    expect(not offenders, "waits in three ordinary steps: " + "; ".join(lines))
    return f"{', '.join(nets)}: none in three ordinary steps"
