"""A small real run (digits, a net with dropout and BatchNorm), in this process or, as a script, in others.

python -m tests.training.small_run '{"folder": "...", "max_steps": 20}'
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from data import DataModule, digits
from models import build_model, mlp
from optimizers import EKFAC, KFAC, AdaFisher, AdaFisherW, AdaHessian, Deflation, build_optimizer
from optimizers.averaging import EMA, ScheduleFree
from optimizers.step_length import Graft, Normalized
from tests.conftest import START
from tests.survival.conftest import places
from training import (
    Interrupted,
    RunFolder,
    Trainer,
    UserError,
    World,
    loggers,
    schedules,
    seed_everything,
    session,
    tasks,
)
from training.callbacks import Callback, EarlyStopping
from training.loop.distributed import barrier
from training.runs import checkpoints
from training.runs.run import Run
from training.show.trajectory import Trajectory
from training.show.watching.diagnostics import CurvatureDiagnostics

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4}),
    "adam": (torch.optim.Adam, {"lr": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3}),
    "adafisher": (AdaFisher, {"lr": 1e-3, "update_every": 3}),
    "adafisherw": (AdaFisherW, {"lr": 1e-3, "update_every": 3}),
    "adahessian": (AdaHessian, {"lr": 0.05, "hessian_every": 2}),
    "kfac": (KFAC, {"lr": 0.02, "damping": 0.1, "update_every": 2, "refresh_every": 3}),
    # Moments between two refreshes, or in a basis that follows an earlier one, would be taken in a null space too,
    # whose basis differs from one launch to another.
    "ekfac": (EKFAC, {"lr": 0.02, "damping": 0.1, "update_every": 2, "refresh_every": 2, "basis": "eigh"}),
    "deflation": (
        Deflation,
        {"lr": 0.02, "damping": 0.1, "update_every": 2, "refresh_every": 3, "batch_fraction": 0.5},
    ),
}
AROUND: dict[str, Any] = {
    "ema": partial(EMA, decay=0.9, calibrate=3),
    "free": partial(ScheduleFree, warmup=4, calibrate=3),
    "graft": Graft,
    "normalized": partial(Normalized, hold=True),
}
SCHEDULES = {"none": schedules.none, "cosine": partial(schedules.cosine, warmup=0.2), "onecycle": schedules.onecycle}


class Cast(nn.Module):
    """Brings the data set's float32 images to the model's dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.dtype)


class SignalAt(Callback):
    """Sends this process a signal in the course of a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def on_fit_start(self, run: Run) -> None:
        self.on_step(run)

    def on_step(self, run: Run) -> None:
        if run.step == self.step - 1 and not run.resumed:
            os.kill(os.getpid(), self.number)


class Slow(Callback):
    """Makes steps long enough to be hit by a signal, and says when training is under way."""

    announced = False

    def on_step(self, run: Run) -> None:
        if not self.announced and run.world.is_main:
            sys.stdout.write("training\n")
            sys.stdout.flush()
        self.announced = True
        time.sleep(0.01)


def small_data(world: World | None = None, **options: Any) -> DataModule:
    world = world or World()
    place = {"device": world.device, "rank": world.rank, "world_size": world.world_size}
    return digits(**({"batch_size": 16, "eval_batch_size": 50, "limit_train": 0.2} | options), **place)


def small_model(data: DataModule, dropout: float = 0.2, batch_norm: bool = True, float64: bool = False) -> nn.Module:
    seed_everything(1)
    model = build_model(mlp, data.facts, hidden=[16, 12], dropout=dropout, batch_norm=batch_norm)
    return nn.Sequential(Cast(torch.float64), model.double()) if float64 else model


def fit(
    folder: Path | str,
    *,
    resume: bool | dict[str, Any] = False,
    optimizer: str = "sgd",
    around: str = "",
    lr: float | None = None,
    schedule: str = "cosine",
    callbacks: list[Callback] | None = None,
    writers: list[loggers.Logger] | None = None,
    world: World | None = None,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    config: Mapping[str, Any] = MappingProxyType({}),
    **trainer: Any,
) -> tuple[dict[str, Any], nn.Module]:
    """Train in a folder, from its newest checkpoint if told to resume; returns the summary and the model.

    ``around``: names of what goes around the optimizer, from the inside.
    """
    folder, world = Path(folder), world or World()
    settings = {"max_steps": 20, "eval_every_epochs": None, "eval_every_steps": 5, "log_every_steps": 3,
                "checkpoint_every_epochs": None, "checkpoint_every_steps": 4, "deterministic": False}  # fmt: skip
    if trainer.keys() & {"max_epochs", "max_time"}:
        del settings["max_steps"]
    loop = Trainer(**(settings | trainer))
    sets = small_data(world, **(data or {}))
    task = tasks.build(sets.task, sets.facts, loop.label_smoothing)
    net = small_model(sets, **(model or {})).to(world.device)
    kind, options = OPTIMIZERS[optimizer]
    options = options | ({} if lr is None else {"lr": lr})
    built = build_optimizer(kind, net, likelihood=task.likelihood, **options)
    for name in around.split():
        built = AROUND[name](built)
    state: dict[str, Any] | None = resume if isinstance(resume, dict) else None
    if resume is True:
        found = checkpoints.latest(folder / "checkpoints")
        state = found[1] if found else None
    if (folder / "config.yaml").exists():
        run_folder = RunFolder.open(folder)
    else:
        run_folder = RunFolder.create(folder, "optimizer:\n  name: small\n")
    summary = loop.fit(
        net, built, sets, task, folder=run_folder, schedule=SCHEDULES[schedule], world=world, callbacks=callbacks,
        loggers=[loggers.JSONLines(), loggers.TensorBoard()] if writers is None else writers, resume=state,
        config={"optimizer": {"name": optimizer, "lr": options["lr"], "betas": [0.9, 0.99]}, "seed": 1, **config},
        config_id="abc",
    )  # fmt: skip
    if hasattr(built, "close"):
        built.close()
    return summary, net


def final_state(folder: Path) -> dict[str, Any]:
    """The newest step checkpoint without what may differ between two runs of the same: clocks and file offsets."""
    found = checkpoints.latest(folder / "checkpoints")
    assert found is not None
    state = dict(found[1])
    state["latest"] = {k: v for k, v in state["latest"].items() if not k.startswith("time/")}
    for key in ("clocks", "loggers"):
        del state[key]
    return state


def events(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    times = ("time/", "seconds", "wall")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(times)} for line in lines]


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Where two nested structures differ, bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b):
            yield path
    elif isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            yield f"{path}: {a.keys() ^ b.keys()}"
        for key in a.keys() & b.keys():
            yield from differences(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            yield f"{path}: length {len(a)} and {len(b)}"
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from differences(x, y, f"{path}[{i}]")
    elif a != b:
        yield f"{path}: {a!r} and {b!r}"


def run_one(arguments: dict[str, Any], world: World) -> int:
    """One run from its JSON description; returns an exit code and leaves each rank's weights in the folder."""
    slow, patience = arguments.pop("slow", False), arguments.pop("patience", None)
    every = arguments.pop("snapshots_every", None)
    signal_at, signal_rank = arguments.pop("signal_at", None), arguments.pop("signal_rank", 0)
    callbacks: list[Callback] = [Slow()] if slow else []
    callbacks += [EarlyStopping(patience=patience)] if patience else []
    callbacks += [Trajectory(every_steps=every)] if every else []
    callbacks += [CurvatureDiagnostics(watch)] if (watch := arguments.pop("watch", None)) else []
    callbacks += [SignalAt(signal_at)] if signal_at is not None and world.rank == signal_rank else []
    try:
        _, model = fit(**arguments, world=world, callbacks=callbacks)
    except Interrupted as stop:
        return stop.exit_code
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    torch.save(model.state_dict(), Path(arguments["folder"]) / f"rank{world.rank}.pt")
    return 0


def _rank(rank: int, body: Callable[..., None], argument: Any, variables: list[dict[str, str]]) -> None:
    os.environ.update(variables[rank])
    torch.set_num_threads(1)
    with session("cpu") as world:
        body(argument, world)


def two_processes(body: Callable[..., None], argument: Any) -> None:
    """Call `body(argument, world)` in two processes that have met; fails on any one's exit code."""
    mp.start_processes(_rank, args=(body, argument, places()), nprocs=2, start_method=START)


def several(runs: list[dict[str, Any]], world: World) -> list[int]:
    """Several runs in one process: their exit codes."""
    codes = []
    for arguments in runs:
        if world.is_main:
            Path(arguments["folder"]).mkdir(parents=True, exist_ok=True)
            (Path(arguments["folder"]) / "config.yaml").touch()
        barrier(world)
        codes.append(run_one(arguments, world))
    return codes


def as_they_end(argument: tuple[list[dict[str, Any]], list[int]], world: World) -> None:
    """Several runs, and the codes with which they have to end."""
    runs, codes = argument
    assert several(runs, world) == codes


def main() -> int:
    """Several runs in one process: their exit codes are printed; a single run's is the process's."""
    torch.set_num_threads(1)
    described = json.loads(sys.argv[1])
    with session("cpu") as world:
        if isinstance(described, dict):
            return run_one(described, world)
        codes = several(described, world)
        if world.is_main:
            sys.stdout.write(f"{codes}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
