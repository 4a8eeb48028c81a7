"""Vectors of the size of the model, or of a part of it, and what blocks make of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..curvature.approximations import statistics_dtype
from .learned_inverses import LearnedInverse

#: Tensors by parameter: a vector of the size of the model, or of a part of it.
Vector = dict[Tensor, Tensor]


def filled(block: LearnedInverse, values: list[float]) -> list[Tensor]:
    """Tensors shaped like a block's parameters, each full of one value."""
    return [
        torch.full_like(p, value, dtype=statistics_dtype(p))
        for p, value in zip(block.layer.parameters, values, strict=True)
    ]


def matrices(blocks: Sequence[LearnedInverse], vector: Vector) -> list[Tensor]:
    """A vector in the shape that each block acts on; zero where it has no entry."""
    return [
        block.to_matrix([vector[p] if p in vector else torch.zeros_like(p) for p in block.layer.parameters])
        for block in blocks
    ]


def vector(blocks: Sequence[LearnedInverse], matrices: Sequence[Tensor]) -> Vector:
    """The entries of matrices, one a block, that belong to trainable parameters."""
    return {
        p: entry
        for block, matrix in zip(blocks, matrices, strict=True)
        for p, entry in zip(block.layer.parameters, block.from_matrix(matrix), strict=True)
        if p.requires_grad
    }


def dot(a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
    """Inner product of two vectors, on the device of the first tensor."""
    products = [(x * y).sum() for x, y in zip(a, b, strict=True)]
    return torch.stack([t.to(products[0].device) for t in products]).sum()


def norm(vector: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of a vector; of zero the smallest number, by which one may divide."""
    norms = torch._foreach_norm(list(vector))
    norm = torch.stack([n.to(norms[0].device) for n in norms]).norm()
    return norm.clamp(min=torch.finfo(norm.dtype).tiny)
