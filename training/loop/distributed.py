"""Which of the cooperating processes this one is, and the few words they exchange. One process is the same code."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from training.errors import UserError

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
    """Join the processes that torchrun started; alone, no process group is made.

    Args:
        device: "auto" (a GPU where there is one), "cpu", "cuda", or any name torch knows ("cuda:1", "mps").

    Yields:
        The world; its process group (gloo on CPUs, NCCL on GPUs) is destroyed on the way out.

    Raises:
        ValueError: for a device name torch does not know.
        UserError: for a device this machine lacks, or half a torchrun environment.
    """
    size = _from_environment("WORLD_SIZE", 1)
    rank, local_rank = (_from_environment(n, 0 if size == 1 else None) for n in ("RANK", "LOCAL_RANK"))
    world = World(rank, size, local_rank, _choose(device, local_rank, size))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if size == 1:
        yield world
        return
    # Control messages are tensors on the CPU and go over gloo: they never wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    # A sweep joins once a job, over one store: without a prefix of its own, a job may read the addresses of the last.
    store, _, _ = next(dist.rendezvous("env://", rank, size))
    store = dist.PrefixStore(f"session-{next(_sessions)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def _from_environment(name: str, default: int | None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        raise UserError(
            f"The environment says WORLD_SIZE={os.environ.get('WORLD_SIZE')} but {name}={text}: start several "
            "processes with `torchrun --nproc-per-node=N train.py ...`, or unset these variables to train in one."
        )
    return int(text)


def _choose(name: str, local_rank: int, world_size: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or another name torch knows, got {name!r}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "device=cuda, but torch sees no GPU here: set trainer.device=cpu, or install a CUDA build of torch."
            )
        if device.index is None:
            device = torch.device("cuda", local_rank)
        elif world_size > 1:
            raise UserError(f"device={name} names one GPU for {world_size} processes: set trainer.device=cuda.")
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
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any, world: World) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank."""
    if world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def maximum(values: list[float], world: World) -> list[float]:
    """Element-wise maximum over ranks, exchanged between the hosts alone: cheap enough for every step."""
    if world.world_size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.world_size > 1:
        maximum([0.0], world)


def broadcast_buffers(model: nn.Module, world: World) -> None:
    """Give every rank the buffers of rank 0 (BatchNorm's running statistics), as DDP does before a forward pass."""
    if world.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
