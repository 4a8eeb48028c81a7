"""Averages over ranks, and work that one rank does for all: the only file of the optimizers that talks to others.

Nothing happens at world size 1. What travels together is one buffer for each dtype, and each owner where there are any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .packing import Form, mirror_, pack_, packed_size, unpack_

#: Dimensions of what ``gather`` takes, at most.
DIMS = 8


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


def total(numbers: Tensor) -> Tensor:
    """A tensor's sum over ranks, another tensor."""
    if world_size() == 1:
        return numbers
    numbers = numbers.clone()
    dist.all_reduce(numbers)
    return numbers


def before(count: int, device: torch.device) -> int:
    """How many the lower ranks have, where this one has ``count``.

    Args:
        count: of this rank.
        device: that ranks exchange tensors on.
    """
    if world_size() == 1:
        return 0
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = count
    dist.all_reduce(counts)
    return int(counts[: rank()].sum())


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


def largest(numbers: Sequence[Sequence[int]], device: torch.device) -> list[list[int]]:
    """The largest of each number over ranks.

    Args:
        numbers: as many on every rank.
        device: that ranks exchange tensors on.
    """
    if world_size() == 1:
        return [list(row) for row in numbers]
    found = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


# -- what belongs to one rank ------------------------------------------------------------------------------------------


def _buckets(tensors: Sequence[Tensor], owners: Sequence[int]) -> Iterator[tuple[int, torch.dtype, list[int]]]:
    """Owner, dtype and indices of what travels together, in an order that is the same on every rank."""
    found: dict[tuple[int, torch.dtype], list[int]] = {}
    for index, (tensor, owner) in enumerate(zip(tensors, owners, strict=True)):
        found.setdefault((owner, tensor.dtype), []).append(index)
    for (owner, dtype), indices in found.items():
        yield owner, dtype, indices


def _split(flat: Tensor, tensors: Sequence[Tensor], forms: Sequence[Form]) -> Sequence[Tensor]:
    return flat.split(_sizes(tensors, forms))


def _sizes(tensors: Sequence[Tensor], forms: Sequence[Form]) -> list[int]:
    return [packed_size(t.shape, form) for t, form in zip(tensors, forms, strict=True)]


def collect_(tensors: Sequence[Tensor], owners: Sequence[int], forms: Sequence[Form], weights: Sequence[float]) -> None:
    """Replace each tensor, in place, by its mean over ranks, at its owner alone: elsewhere it stays as it is.

    Args:
        tensors: the same shapes and dtypes, in the same order, on every rank.
        owners: the rank that each of them belongs to.
        forms: what of each has to travel.
        weights: see ``average_``.
    """
    here = rank()
    for owner, dtype, indices in _buckets(tensors, owners):
        own, kinds = [tensors[i] for i in indices], [forms[i] for i in indices]
        flat = own[0].new_empty(sum(_sizes(own, kinds)) + len(own))
        flat[-len(own) :] = torch.tensor([weights[i] for i in indices], dtype=dtype)
        for part, tensor, form, i in zip(_split(flat[: -len(own)], own, kinds), own, kinds, indices, strict=True):
            pack_(part, tensor, form).mul_(weights[i])
        dist.reduce(flat, owner)
        if owner == here:
            means = _split(flat[: -len(own)], own, kinds)
            sums = flat[-len(own) :].clamp(min=torch.finfo(dtype).tiny)
            for tensor, mean, count, form in zip(own, means, sums, kinds, strict=True):
                unpack_(tensor, mean.div_(count), form)


def spread_(tensors: Sequence[Tensor], owners: Sequence[int], forms: Sequence[Form]) -> None:
    """Give every rank, in place, what the owner of each tensor has: the same bits everywhere.

    Args:
        tensors: the same shapes and dtypes, in the same order, on every rank; filled in, but at the owner.
        owners: the rank that each of them belongs to.
        forms: what of each has to travel; the owner's own becomes exactly so symmetric.
    """
    for owner, _, indices in _buckets(tensors, owners):
        Parcel([tensors[i] for i in indices], owner, [forms[i] for i in indices]).arrive()


def send(tensors: Sequence[Tensor], owners: Sequence[int], forms: Sequence[Form]) -> list[Parcel]:
    """Begin ``spread_``: what is sent may be read by nobody, nor changed, before all parcels have arrived.

    Args:
        tensors: see ``spread_``.
        owners: see ``spread_``.
        forms: see ``spread_``.

    Returns:
        One for each owner and dtype; every rank lets them arrive.
    """
    return [
        Parcel([tensors[i] for i in indices], owner, [forms[i] for i in indices])
        for owner, _, indices in _buckets(tensors, owners)
    ]


class Parcel:
    """Tensors of one owner and dtype, on their way to all ranks.

    Args:
        tensors: see ``spread_``.
        owner: whose they are.
        forms: see ``spread_``.
    """

    def __init__(self, tensors: Sequence[Tensor], owner: int, forms: Sequence[Form]) -> None:
        self._mine = owner == rank()
        flat = tensors[0].new_empty(sum(_sizes(tensors, forms)))
        self._parts = list(zip(tensors, _split(flat, tensors, forms), forms, strict=True))
        for tensor, part, form in self._parts if self._mine else ():
            pack_(part, tensor, form)
        under_way = dist.broadcast(flat, owner, async_op=True)
        assert under_way is not None  # None is for processes outside the group
        self._under_way = under_way

    def arrive(self) -> None:
        """Wait for it, and unpack it."""
        self._under_way.wait()
        for tensor, part, form in self._parts:
            if not self._mine:
                unpack_(tensor, part, form)
            elif form == "symmetric":
                mirror_(tensor)


class _Lengths:
    """How long tensors are along dimension 1 on each rank: one exchange for all of them.

    Args:
        tensors: the same ones, in the same order, on every rank, which may differ in that length; one that brings
            nothing takes over the other dimensions of those that do.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        mine = torch.tensor([[*t.shape, *[0] * (DIMS - t.dim())] for t in tensors], device=tensors[0].device)
        shapes = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(shapes, mine)
        known = torch.stack(shapes).transpose(0, 1).tolist()  # [tensor][rank]
        self._shapes: list[list[list[int]]] = []
        for tensor, by_rank in zip(tensors, known, strict=True):
            rest = next((shape[2:] for shape in by_rank if shape[1]), by_rank[0][2:])[: tensor.dim() - 2]
            self._shapes.append([[shape[0], shape[1], *rest] for shape in by_rank])

    def count(self, indices: Sequence[int], source: int) -> int:
        """Numbers that some tensors have on a rank."""
        return sum(torch.Size(self._shapes[i][source]).numel() for i in indices)

    def joined(self, sources: Sequence[Tensor], indices: Sequence[int]) -> dict[int, Tensor]:
        """Some tensors of all ranks, of what came from each of them."""
        pieces: dict[int, list[Tensor]] = {i: [] for i in indices}
        for source, flat in enumerate(sources):
            parts = flat.split([self.count([i], source) for i in indices])
            for i, part in zip(indices, parts, strict=True):
                pieces[i].append(part.view(self._shapes[i][source]))
        return {i: torch.cat(parts, dim=1) for i, parts in pieces.items()}


def _by_dtype(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        yield [i for i, t in enumerate(tensors) if t.dtype == dtype]


def gather(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor of all ranks, one behind the other along dimension 1; ranks may differ in its length there.

    Args:
        tensors: of at least two dimensions; the same ones, in the same order, on every rank.
    """
    if world_size() == 1 or not tensors:
        return list(tensors)
    lengths = _Lengths(tensors)
    found: dict[int, Tensor] = {}
    for indices in _by_dtype(tensors):
        counts = [lengths.count(indices, source) for source in range(world_size())]
        flat = torch.cat([tensors[i].reshape(-1) for i in indices])
        padded = torch.cat([flat, flat.new_zeros(max(counts) - len(flat))])
        sources = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(sources, padded)
        found |= lengths.joined([t[:count] for t, count in zip(sources, counts, strict=True)], indices)
    return [found[i] for i in range(len(tensors))]


def gather_to(tensors: Sequence[Tensor], owners: Sequence[int]) -> list[Tensor | None]:
    """``gather`` to one rank each.

    Args:
        tensors: see ``gather``.
        owners: the rank that each of them is brought to.

    Returns:
        None for what was brought to another one.
    """
    if world_size() == 1 or not tensors:
        return list(tensors)
    lengths, here, ranks = _Lengths(tensors), rank(), range(world_size())
    found: dict[int, Tensor] = {}
    for indices in _by_dtype(tensors):
        parcels = [[i for i in indices if owners[i] == r] for r in ranks]
        flat = torch.cat([tensors[i].reshape(-1) for parcel in parcels for i in parcel])
        taken = [lengths.count(parcels[here], source) for source in ranks]
        received = flat.new_empty(sum(taken))
        dist.all_to_all_single(received, flat, taken, [lengths.count(parcel, here) for parcel in parcels])
        found |= lengths.joined(received.split(taken), parcels[here])
    return [found.get(i) for i in range(len(tensors))]
