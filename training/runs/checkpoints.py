"""Checkpoints: written whole or not at all, verified when read, holding all that a run needs to go on bit for bit."""

from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from optimizers.wrapper import check_wrappers
from training.errors import UserError
from training.loop import rng
from training.loop.distributed import broadcast_object, gather_objects
from training.runs.averaging import leave
from training.runs.folder import atomic_file, sync_folder
from training.runs.run import Run
from training.tasks.players import members

#: Raised whenever what a checkpoint holds changes its meaning.
FORMAT = 1

log = logging.getLogger(__name__)

Part = TypeVar("Part")


class CheckpointError(UserError):
    """A checkpoint that cannot be used, and why."""


# -- files -----------------------------------------------------------------------------------------------------------


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file to make or replace.
        state: tensors, primitives and containers of them.
    """
    with atomic_file(path) as file:
        torch.save(state, file)


def link(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, atomically and without writing it again where the disk has links."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        with source.open("rb") as read, atomic_file(target) as write:
            shutil.copyfileobj(read, write)
        return
    temporary.replace(target)
    sync_folder(target.parent)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint after checking every byte of it against its checksums.

    Args:
        path: a file that ``save`` wrote.

    Returns:
        The state, on the CPU.

    Raises:
        CheckpointError: where there is none, it is damaged, or it is none of ours.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise CheckpointError(f"The checkpoint {path} is damaged (checksum of {broken!r}): use an earlier one.")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint {path}.") from error
    except pickle.UnpicklingError as error:  # with every checksum right
        raise CheckpointError(
            f"{path} holds other objects than tensors and is not a checkpoint of a Curvlab run: give a file of its "
            "checkpoints/ folder."
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"The checkpoint {path} is damaged ({str(error).splitlines()[0]}): use an earlier one."
        ) from error
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path} is not a checkpoint of a Curvlab run: give a file of its checkpoints/ folder.")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}: use the one that wrote it."
        )
    return state


def step_file(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step goes."""
    return folder / f"step_{step:08d}.pt"


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the step checkpoints, newest first."""
    found = ((re.fullmatch(r"step_(\d+)\.pt", p.name), p) for p in folder.glob("step_*.pt"))
    return sorted(((int(m[1]), p) for m, p in found if m), reverse=True)


def latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest step checkpoint that can be read, with its state; a warning for each broken one passed over.

    Args:
        folder: a run's ``checkpoints`` folder.
    """
    for _, path in _by_step(folder):
        try:
            return path, load(path)
        except CheckpointError as error:
            log.warning("%s Trying the one before.", error)
    return None


def rotate(folder: Path, keep: int, newest: int | None = None) -> None:
    """Delete step checkpoints beyond the ``keep`` newest, and what a killed process left half-written.

    Args:
        folder: a run's ``checkpoints`` folder.
        keep: how many stay.
        newest: the step just saved. Later ones belong to a past that the run was taken back from (broken files, or a
            resume from an earlier checkpoint) and are deleted too.
    """
    ours = _by_step(folder)
    kept = [p for step, p in ours if newest is None or step <= newest][:keep]
    for path in (*(p for _, p in ours if p not in kept), *folder.glob(".*.pt.*.tmp")):
        path.unlink(missing_ok=True)


# -- content ---------------------------------------------------------------------------------------------------------


def capture(run: Run) -> dict[str, Any]:
    """All that ``restore`` needs to go on from here. Every rank must call it; what differs between them is gathered.

    Within ``averaged``, the model is what is evaluated.

    Tensors are the run's own, not copies: save the state before the next step.
    """
    for logger in run.loggers:
        logger.flush()
    # Of averaged weights: what is evaluated is the checkpoint's model, and its optimizer has the weights of training.
    aside = {} if run.training_buffers is None else {"training_buffers": run.training_buffers}
    mine = {"rng": rng.get_state(run.world.device), "window": run.window.state_dict()}
    return {
        "format": FORMAT,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.scaler.state_dict(),
        "counters": {
            "step": run.step,
            "epoch": run.position[0],
            "batch": run.position[1],
            "tick": run.tick,
            "window_steps": run.window_steps,
        },
        "last_step": {"lr": run.lr, "grad_norm": None if run.grad_norm is None else run.grad_norm.detach()},
        "budget": {"ticks": run.budget.ticks},
        "ranks": gather_objects(mine, run.world),
        "clocks": run.clock.state_dict(),
        "best": run.best,
        "latest": run.latest,
        "evaluated": run.evaluated,
        "callbacks": {name: state for name, callback in named(run.callbacks) if (state := callback.state_dict())},
        "loggers": {name: state for name, logger in named(run.loggers) if (state := logger.state_dict())},
        "config_id": run.config_id,
        **aside,
    }


def restore(run: Run, state: dict[str, Any]) -> None:
    """Put a run that was just built back where ``capture`` saw it.

    Raises:
        CheckpointError: if the model or the optimizer is another than the checkpoint's.
    """
    counters = state["counters"]
    try:
        run.model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise CheckpointError(
            f"The checkpoint is of another model ({_reason(error)}): resume with the run's own settings."
        ) from error
    stretched = state["budget"]["ticks"] != run.budget.ticks
    if stretched:
        log.warning("The budget is not the checkpoint's: the schedule goes on at its place in the new one.")
        run.budget.replay(run.scheduler, counters["tick"])
    try:
        for name, one in members(run.optimizer).items():
            check_wrappers(one, state["optimizer"][name] if name else state["optimizer"])
        run.optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"The checkpoint is of another optimizer ({error}): resume with the run's own settings."
        ) from error
    if stretched:
        for group, rate in zip(run.optimizer.param_groups, run.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
    else:
        run.scheduler.load_state_dict(state["scheduler"])
    if run.scaler.is_enabled() and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    run.step, run.tick, run.window_steps = counters["step"], counters["tick"], counters["window_steps"]
    run.lr, run.grad_norm = state["last_step"]["lr"], state["last_step"]["grad_norm"]
    if run.position != (counters["epoch"], counters["batch"]):
        raise CheckpointError(
            f"The checkpoint is at batch {counters['batch']} of epoch {counters['epoch']}, and with these settings "
            f"step {run.step} is not: resume with the run's own batch size, data limits and accumulation."
        )
    leave(run, state.get("training_buffers", {}))
    run.clock.load_state_dict(state["clocks"])
    run.latest, run.evaluated = state["latest"], state["evaluated"]
    run.best = broadcast_object(_read_best(run, state["best"]) if run.world.is_main else None, run.world)
    for kind, parts in (("callbacks", named(run.callbacks)), ("loggers", named(run.loggers))):
        for name, part in parts:
            if name in state[kind]:
                part.load_state_dict(state[kind][name])
    _restore_ranks(run, state["ranks"])


def _read_best(run: Run, recorded: dict[str, Any] | None) -> dict[str, Any] | None:
    """The best evaluation so far: what best.pt says of itself, which may be newer than the checkpoint resumed from."""
    path = run.folder.checkpoints / "best.pt"
    try:
        best = load(path)["best"] if recorded or path.exists() else None
    except CheckpointError as error:
        log.warning("%s The best weights are chosen anew from here on.", error)
        return None
    return best if best and best["metric"] == run.monitor else None


def _restore_ranks(run: Run, ranks: list[dict[str, Any]]) -> None:
    """Random states and running sums, each rank's own; with another number of ranks, as well as it can be done."""
    rank, size = run.world.rank, run.world.world_size
    rng.set_state(ranks[min(rank, len(ranks) - 1)]["rng"], run.world.device)
    if len(ranks) == size:
        run.window.load_state_dict(ranks[rank]["window"])
        return
    log.warning(
        "The checkpoint is of %d process(es), this run has %d: dropout draws other masks from here on.",
        len(ranks),
        size,
    )
    rng.part_ways(rank, run.step)
    if rank == 0:
        run.window.load_state_dict({key: sum(r["window"][key] for r in ranks) for key in ranks[0]["window"]})


def _reason(error: Exception) -> str:
    """The part of torch's load error that names the tensor."""
    lines = str(error).splitlines()
    return lines[min(1, len(lines) - 1)].strip().rstrip(".")


def named(parts: Iterable[Part]) -> list[tuple[str, Part]]:
    """Callbacks or loggers with the names their state is saved under: the class, numbered from the second on."""
    counts: dict[str, int] = {}
    result = []
    for part in parts:
        kind = type(part).__name__
        counts[kind] = counts.get(kind, 0) + 1
        result.append((kind if counts[kind] == 1 else f"{kind}-{counts[kind]}", part))
    return result
