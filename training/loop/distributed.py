"""Which of the cooperating processes this one is, and the few words they exchange. One process is the same code."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from training.errors import ProcessLost, UserError
from training.loop import watch
from training.loop.heap import keep_freed
from training.loop.launch import Place, place

# How many times this process has joined the others; the same on every rank.
_sessions = itertools.count()


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: number of processes.
        local_rank: rank among the processes of this machine; its GPU's index.
        device: where this process computes.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes."""
        return self.rank == 0


@contextmanager
def session(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun or srun started; alone, no process group is made.

    Args:
        device: "auto" (a GPU where there is one), "cpu", "cuda", or any name torch knows ("cuda:1", "mps").

    Yields:
        The world; its process group (gloo on CPUs, NCCL on GPUs) is destroyed on the way out.

    Raises:
        ValueError: for a device name torch does not know.
        UserError: for a device this machine lacks, an environment that says too little of the other processes, or what
            another process failed with.
        ProcessLost: another process ended without a word, or gives no answer.
    """
    here = place()
    world = World(here.rank, here.world_size, here.local_rank, choose(device, here))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        keep_freed()
    if world.world_size == 1:
        yield world
        return
    # Control messages are tensors on the CPU and go over gloo: they never wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    # A sweep joins once a job, over one store: without a prefix of its own, a job may read the addresses of the last.
    # So may the processes that torchrun has started again, in whose store are the addresses of the dead.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    watch.die_with_launcher()
    try:
        with watch.meeting():
            store = dist.PrefixStore(f"attempt-{attempt}/session-{next(_sessions)}", _store(here))
            dist.init_process_group(
                backend, store=store, rank=here.rank, world_size=here.world_size, timeout=watch.timeout()
            )
    except (dist.DistError, RuntimeError) as error:
        raise ProcessLost(
            f"only some of {here.world_size} processes came within {watch.timeout().total_seconds():g} s "
            f"({watch.TIMEOUT}), or one of them ended ({_first_line(error)}): start them anew"
        ) from error
    with watch.Watch(store, here.rank, here.world_size):
        yield from _joined(world)


def _first_line(error: Exception) -> str:
    """What torch says first, before the trace of its own."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _joined(world: World) -> Iterator[World]:
    try:
        if world.device.type == "cuda":
            gpu = torch.cuda.get_device_properties(world.device)
            refuse_sharing(gather_objects(f"{socket.gethostname()} {gpu.uuid}", world))
        yield world
    except Exception as error:
        if (reason := watch.explained(error)) is not error:
            raise reason from error
        raise
    finally:
        dist.destroy_process_group()


def remember(name: str, value: str) -> None:
    """Keep a word for the processes that torchrun starts in place of these, if one of them fails (--max-restarts)."""
    if (here := place()).world_size > 1:
        _store(here).set(name, value)


def recall(name: str) -> str | None:
    """What these processes' predecessors have kept under a name; None where there were none, or they kept nothing."""
    here = place()
    if here.world_size == 1 or not _store(here).check([name]):
        return None
    return _store(here).get(name).decode()


@lru_cache(maxsize=1)
def _store(here: Place) -> dist.Store:
    """Where the processes meet. One for as long as the process lives: rank 0 of srun's would else close a sweep's."""
    url = "env://" if here.address is None else f"tcp://{here.address}"
    return next(dist.rendezvous(url, here.rank, here.world_size, timeout=watch.timeout()))[0]


def refuse_sharing(gpus: Sequence[str]) -> None:
    """Complain where two ranks were given the same GPU, in which NCCL would fail with a word of its own.

    Args:
        gpus: a name of each rank's.

    Raises:
        UserError: where a name is there twice.
    """
    if len(set(gpus)) < len(gpus):
        raise UserError(
            f"{len(gpus)} processes share {len(set(gpus))} GPU(s): start one for each GPU (srun: --ntasks-per-node=N "
            "--gpus-per-node=N, where N is the same), or set trainer.device=cpu."
        )


def choose(name: str, here: Place) -> torch.device:
    """The device of a name.

    Args:
        name: "auto", or what torch knows.
        here: this process among others.

    Raises:
        ValueError: torch knows no such device.
        UserError: this machine has none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or another name torch knows, got {name!r}") from error
    if device.type == "meta":
        raise UserError("device=meta holds shapes and no numbers: set trainer.device=cpu.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "device=cuda, but torch sees no GPU here: set trainer.device=cpu, or install a CUDA build of torch."
            )
        if device.index is None:
            # SLURM may show each task its own GPU alone (--gpus-per-task=1), which is the first one then.
            alone = here.address is not None and torch.cuda.device_count() == 1
            device = torch.device("cuda", 0 if alone else here.local_rank)
        elif here.world_size > 1:
            raise UserError(f"device={name} names one GPU for {here.world_size} processes: set trainer.device=cuda.")
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"device={device} is not there, torch sees {torch.cuda.device_count()} GPU(s): start fewer processes, "
                "or set trainer.device=cpu."
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps, but this machine has none: set trainer.device=cpu.")
    return device


def broadcast_object(value: Any, world: World) -> Any:
    """Rank 0's value, on every rank. The value must pickle."""
    if world.world_size == 1:
        return value
    box = [value]
    with watch.exchange():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any, world: World) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank."""
    if world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    with watch.exchange():
        dist.all_gather_object(values, value)
    return values


def maximum(values: list[float], world: World) -> list[float]:
    """Element-wise maximum over ranks, exchanged between the hosts alone: cheap enough for every step."""
    if world.world_size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    with watch.exchange():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.world_size > 1:
        maximum([0.0], world)


def broadcast_buffers(model: nn.Module, world: World) -> None:
    """Give every rank the buffers of rank 0 (BatchNorm's running statistics), as DDP does before a forward pass."""
    if world.world_size > 1:
        with watch.exchange():
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
