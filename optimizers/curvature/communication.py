"""Averaging over ranks: the only file of the optimizers that talks to other processes; nothing at world size 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together (1 without a process group)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this process is."""
    return dist.get_rank() if world_size() > 1 else 0


def average_(tensors: Sequence[Tensor], weight: Tensor | None = None) -> None:
    """Replace each tensor, in place, by its mean over ranks: one all-reduce a dtype.

    Args:
        tensors: the same shapes, in the same order, on every rank.
        weight: for each tensor, how much this rank's value counts ([len(tensors)]; default 1 each). A rank that has
            nothing to say passes zeros with weight 0; where all weights are 0 the result is 0.
    """
    if world_size() == 1 or not tensors:
        return
    weights = [torch.ones((), device=t.device) for t in tensors] if weight is None else list(weight)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        chosen = [(t, w.to(t)) for t, w in zip(tensors, weights, strict=True) if t.dtype == dtype]
        flat = torch.cat([(t * w).flatten() for t, w in chosen] + [torch.stack([w for _, w in chosen])])
        dist.all_reduce(flat)
        total = flat[-len(chosen) :].clamp(min=torch.finfo(dtype).tiny)
        offset = 0
        for (tensor, _), count in zip(chosen, total, strict=True):
            tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor) / count)
            offset += tensor.numel()


def anywhere(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Which of these flags are up on some rank.

    Args:
        flags: as many on every rank.
        device: that ranks exchange tensors on.
    """
    if world_size() == 1:
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.int64, device=device)
    dist.all_reduce(counts)
    return (counts > 0).tolist()


def gather(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor of all ranks, one behind the other along dimension 1; ranks may differ in its length there.

    Args:
        tensors: of at least two dimensions; the same ones, in the same order, on every rank.
    """
    if world_size() == 1:
        return list(tensors)
    gathered = []
    for tensor in tensors:
        length = torch.tensor([tensor.shape[1]], device=tensor.device)
        lengths = [torch.zeros_like(length) for _ in range(world_size())]
        dist.all_gather(lengths, length)
        longest = max(int(n) for n in lengths)
        padded = tensor.new_zeros(tensor.shape[0], longest, *tensor.shape[2:])
        padded[:, : tensor.shape[1]] = tensor
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        gathered.append(torch.cat([part[:, : int(n)] for part, n in zip(parts, lengths, strict=True)], dim=1))
    return gathered
