"""Training moves every tensor, a saved state goes on, micro-batches are one batch; compiled; the trainer's tests."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.gpu.nets import TOLERANCE, apart, build, differences, make_scaler, prepare, train_step, weights
from scripts.gpu.running import Skipped, expect
from tests.optimizers.problems import PROBLEMS
from training.loop.rng import deterministic

ROOT = Path(__file__).resolve().parents[2]


def check_trains(name: str, precision: str, device: torch.device, nets: list[str], steps: int) -> str:
    """Every trainable tensor moves, all stay finite, and the loss falls."""
    told = []
    for net in nets:
        model, batch = prepare(PROBLEMS[net], device, examples=32)
        optimizer, scaler = build(name, model), make_scaler(device, precision)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        losses = torch.stack([train_step(optimizer, model, batch, precision, scaler) for _ in range(steps)]).tolist()
        still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
        wild = [n for n, p in model.named_parameters() if not bool(p.isfinite().all())]
        expect(not wild, f"{net}: not finite: {', '.join(wild)}")
        expect(not still, f"{net}: did not move: {', '.join(still)}")
        expect(losses[-1] < losses[0], f"{net}: the loss went from {losses[0]:.4g} to {losses[-1]:.4g}")
        expect(optimizer.rejected == 0, f"{net}: {optimizer.rejected} statistics were not finite")
        told.append(f"{net} {losses[0]:.3g} to {losses[-1]:.3g}")
    return "loss of " + ", ".join(told)


def check_continues(name: str, precision: str, device: torch.device, nets: list[str], steps: int) -> str:
    """A run that is saved and loaded half-way into fresh objects ends as one that is not, bit for bit."""
    with deterministic(True), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for net in nets:
            model, batch = prepare(PROBLEMS[net], device)
            optimizer, scaler = build(name, model), make_scaler(device, precision)
            for _ in range(steps):
                train_step(optimizer, model, batch, precision, scaler)
            file = io.BytesIO()
            parts: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(parts | {"scaler": scaler.state_dict() if scaler else {}}, file)
            file.seek(0)
            saved = torch.load(file, map_location="cpu", weights_only=True)
            twin, _ = prepare(PROBLEMS[net], device)
            twin.load_state_dict(saved["model"])
            second, second_scaler = build(name, twin), make_scaler(device, precision)
            second.load_state_dict(saved["optimizer"])
            if second_scaler is not None:
                second_scaler.load_state_dict(saved["scaler"])
            for _ in range(steps):
                train_step(optimizer, model, batch, precision, scaler)
            for _ in range(steps):
                train_step(second, twin, batch, precision, second_scaler)
            found = list(differences(model.state_dict(), twin.state_dict(), "model"))
            found += list(differences(optimizer.state_dict(), second.state_dict(), "optimizer"))
            loose = sorted({str(w.message).split(".")[0] for w in caught if "deterministic" in str(w.message)})
            hint = f" (torch says: {'; '.join(loose)})" if loose else ""
            expect(not found, f"{net}: {len(found)} differences, such as {', '.join(found[:3])}{hint}")
    return f"{', '.join(nets)}: {steps} + {steps} steps"


def check_micro(name: str, precision: str, device: torch.device, nets: list[str], steps: int) -> str:
    """Three micro-batches take the steps of one batch."""
    told = []
    # So many examples that factors have full rank: in a null space no basis is the right one.
    for net in nets:
        ends = []
        for micro in (1, 3):
            dtype = torch.float64 if precision == "fp64" else torch.float32
            model, batch = prepare(PROBLEMS[net], device, dtype, examples=96)
            start = weights(model)
            optimizer, scaler = build(name, model), make_scaler(device, precision)
            for _ in range(steps):
                train_step(optimizer, model, batch, precision, scaler, micro)
            ends.append(weights(model))
        far, limit = apart(ends[1], ends[0], start), TOLERANCE[precision]
        expect(far <= limit, f"{net}: {far:.1e} of the distance apart ({limit:.0e} may be)")
        told.append(f"{net} {far:.1e}")
    return "apart by " + ", ".join(told)


def check_compile(name: str, device: torch.device, net: str, backend: str, steps: int) -> str:
    """Steps of a compiled model are those of the plain one; a method that cannot must say so."""
    import torch._dynamo

    torch._dynamo.reset()
    ends = []
    for compiled in (False, True):
        model, batch = prepare(PROBLEMS[net], device)
        start = weights(model)
        forward: Any = torch.compile(model, backend=backend) if compiled else model
        optimizer = build(name, forward)
        try:
            for _ in range(steps):
                train_step(optimizer, forward, batch)
        except RuntimeError as error:
            if optimizer.needs_graph and "compile" in str(error):
                return f"refused: {str(error).splitlines()[0][:200]}"
            raise
        ends.append(weights(model))
    far = apart(ends[1], ends[0], start)
    expect(far <= TOLERANCE["fp32"], f"{net}: {far:.1e} of the distance apart")
    return f"{net} ({backend}): apart by {far:.1e} after {steps} steps"


def check_trainer(seconds: Callable[[], float]) -> str:
    """The trainer's tests that need a GPU, in a process of their own."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/training/test_cuda.py", "--tb=short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds(), 30.0))
    lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
    told = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    expect(done.returncode == 0, "\n".join([lines[-1], *told, *lines[-30:]]))
    return lines[-1]
