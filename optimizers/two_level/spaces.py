"""Coarse spaces: vectors with one layer's entries each, and the Galerkin matrix of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature import linalg
from ..natural_gradient import Stack, stacked

#: Ridges on the coarse matrix, its diagonal scaled to ones, in rounding errors of its entries: the first that will do.
RIDGES = (1.0, 1e2, 1e4)


@dataclass
class CoarseSpace:
    """Vectors with one layer's entries each, and the Galerkin matrix ``R0 (F + L) R0ᵀ`` of them, decomposed.

    Attributes:
        vectors: ``[k][stack]``: the k-th vector of each layer, in the shape of a stacked gradient.
        images: ``Sᵀ R0ᵀ [m, n]``, with F = S Sᵀ.
        root: Cholesky factor of the matrix, its diagonal scaled to ones.
        scale: by which its rows and columns were.
    """

    vectors: list[list[Tensor]]
    images: Tensor
    root: Tensor
    scale: Tensor

    def solve(self, right: Tensor) -> Tensor:
        """Coefficients of the vectors, ``[k, layers]``, for the right-hand side ``[n]``."""
        solved = torch.cholesky_solve((right * self.scale).unsqueeze(-1), self.root).squeeze(-1)
        return (solved * self.scale).view(len(self.vectors), -1)


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def plus(first: Tensor, second: Tensor, factors: Tensor, out: Tensor | None = None) -> Tensor:
    """Each layer's part of a stacked tensor plus a number of its own times that of another one; ``out``: the first."""
    flat = first.reshape(len(factors), -1)
    into = None if out is None else flat
    return torch.addcmul(flat, second.reshape(flat.shape), factors.to(flat).unsqueeze(1), out=into).view(first.shape)


def smoothest(stack: Stack) -> Tensor:
    """Each block's eigenvector of its smallest eigenvalue: in one of its groups, the product of the factors' own."""
    count = len(stack.blocks)
    values: list[Tensor] = []
    vectors: list[Tensor] = []
    keys = ["G", "A"] if "A" in stack.blocks[0].factors else ["D"]
    for key in keys:
        factor = stacked([block.factors[key] for block in stack.blocks])
        if factor.dim() == 3:
            smallest, vector = linalg.smallest(factor)
            values.append(smallest.clamp(min=0))
            vectors.append(vector)
        else:
            smallest, where = factor.min(1)
            values.append(smallest)
            vectors.append(torch.zeros_like(factor).scatter_(1, where.unsqueeze(1), 1.0))
    if len(keys) == 1:
        return vectors[0]
    value = (values[0] * values[1]).view(count, -1)
    first = torch.zeros_like(value).scatter_(1, value.argmin(1, keepdim=True), 1.0)
    return first.view(-1, 1, 1) * vectors[0].unsqueeze(-1) * vectors[1].unsqueeze(-2)
