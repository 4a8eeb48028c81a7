"""Blocks of one kind and shape side by side, and products of what is stacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..base import real
from ..curvature.approximations import Approximation, statistics_dtype
from ..curvature.kronecker import Counts, Factors, Invertible

#: Wider matrices than this keep a processor busy one by one.
LARGE = 512


class Block(Invertible, Approximation):
    """For type hints: an approximation with a damped solve."""


def stacked(tensors: list[Tensor]) -> Tensor:
    """Tensors ``[groups, ...]`` side by side; a single one as it is."""
    if len(tensors) == 1:
        return tensors[0]
    # What LAPACK lays out by columns stays so: products round by the layout, and a resumed run stacks what was saved.
    if all(t.dim() > 2 and t.mT.is_contiguous() and not t.is_contiguous() for t in tensors):
        return torch.cat([t.mT for t in tensors]).mT
    return torch.cat(tensors)


class Stack:
    """Blocks of one kind and shape: inverted and solved side by side, in one leading dimension.

    Attributes:
        blocks: its members.
        cache: what their solves need, stacked.
    """

    def __init__(self, blocks: list[Block], cache: Factors) -> None:
        self.blocks, self.cache = blocks, cache

    @classmethod
    def build(cls, blocks: list[Block], damping: Tensor, counts: Counts, last: list[Factors] | None) -> Stack:
        """Invert the blocks' factors.

        Args:
            blocks: of one kind and shape.
            damping: one a stacked matrix.
            counts: where repairs are counted.
            last: each block's share of the last cache, if all have one.
        """
        factors = cls(blocks, {}).factors()
        before = None if last is None else {key: stacked([part[key] for part in last]) for key in last[0]}
        cache = blocks[0].invert(factors, damping, counts, before)
        for key, tensor in factors.items():
            if cache.get(key) is tensor:  # what the solve uses as it is need not be kept twice
                for block, part in zip(blocks, tensor.chunk(len(blocks)), strict=True):
                    block.factors[key] = part
        return cls(blocks, cache)

    @classmethod
    def received(cls, blocks: list[Block], cache: Factors) -> Stack:
        """A stack whose inverses another rank has made.

        Args:
            blocks: its members.
            cache: what ``build`` made there, but for the factors that are everywhere.
        """
        dtype = blocks[0].options.solve_dtype
        shared: Factors = {}
        for key in blocks[0].everywhere:
            if key in blocks[0].factors:
                shared[key] = whole = stacked([block.factors[key] for block in blocks])
                if dtype is not None:
                    shared[key] = whole.to(dtype)
                    continue
                for block, part in zip(blocks, whole.chunk(len(blocks)), strict=True):
                    block.factors[key] = part
        return cls(blocks, shared | cache)

    def factors(self) -> Factors:
        """Its blocks' factors, stacked."""
        return {key: stacked([block.factors[key] for block in self.blocks]) for key in self.blocks[0].factors}

    def members(self) -> Iterator[tuple[Block, Factors]]:
        """Each block with its share of the cache, as views."""
        for i, block in enumerate(self.blocks):
            yield block, {key: t.chunk(len(self.blocks))[i] for key, t in self.cache.items()}

    def finite(self) -> list[bool]:
        """Whether each block's cache is; waits for the device."""
        # Not of t.flatten(1), which would transpose what LAPACK has laid out by columns.
        sums = [t.sum(tuple(range(1, t.dim())), dtype=torch.float32) for t in self.cache.values()]
        return [bool(part.isfinite().all()) for part in torch.stack(sums).sum(0).cpu().chunk(len(self.blocks))]


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of stacked tensors ``[n, ...]``, in the precision of statistics."""
    dtype = statistics_dtype(left)
    left, right = left.to(dtype), right.to(dtype)
    if len(left) == 1:
        return torch.dot(left.flatten(), right.flatten()).view(1)
    return (left * right).flatten(1).sum(1)


def sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of two tensors of a shape, in the precision of statistics; of complex ones, its real part."""
    left, right = real([left, right])
    dtype = statistics_dtype(left)
    return (left.to(dtype) * right.to(dtype)).sum()


def reader(entries: Mapping[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    """What a parameter has in some entries; zeros if it has nothing."""
    return lambda p: entries[p] if p in entries else torch.zeros_like(p)


def kind_of(block: Block, tensors: Factors) -> Any:
    """What blocks must have in common to share a stack; large ones gain nothing by it and go alone."""
    alone = block.layer.name if max(size for t in tensors.values() for size in t.shape) > LARGE else ""
    shapes = ((key, t.shape, t.dtype) for key, t in sorted(tensors.items()))
    return (type(block), alone, block.owner, block.layer.parameters[0].device, *shapes)


def gradients_of(block: Block) -> list[Tensor]:
    """Gradients of a block's parameters; zeros where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in block.layer.parameters]
