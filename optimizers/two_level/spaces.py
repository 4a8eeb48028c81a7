"""Coarse spaces: vectors with one layer's entries each, and the Galerkin matrix of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..curvature import linalg
from ..curvature.kronecker import Factors
from ..natural_gradient import Stack, stacked

#: Ridges on the coarse matrix, its diagonal scaled to ones, in rounding errors of its entries: the first that will do.
RIDGES = (1.0, 1e2, 1e4)

#: What processors multiply at once in bfloat16: so many rows and columns.
TILE = 16


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
    return torch.addcmul(first, second, factors.to(first.dtype).view(-1, *(1,) * (first.dim() - 1)), out=out)


def dots(count: int, left: Tensor, right: Tensor) -> Tensor:
    """Inner products of two stacked tensors of so many layers, ``[count]``."""
    return torch.bmm(left.reshape(count, 1, -1), right.reshape(count, -1, 1)).view(count)


def narrowed(cache: Factors) -> Factors:
    """Inverses of a damped product in bfloat16, zeros behind them up to a multiple of ``TILE`` in each dimension.

    Processors multiply whole tiles faster than what they have to cut to size, by a fifth.
    """
    found = {}
    for key, tensor in cache.items():
        if key[0] == "W":  # of eigenvalues, and the bases are as wide as it is
            found[key] = tensor
            continue
        by_rows = tensor.mT if key in ("A", "G") and tensor.dim() == 3 else tensor  # which is the same inverse
        sizes = [size for d in reversed(tensor.shape[1:]) for size in (0, tiled(d) - d)]
        found[key] = by_rows.bfloat16() if "W" in cache else F.pad(by_rows.bfloat16(), sizes)
    return found


def tiled(size: int) -> int:
    """The next multiple of ``TILE``."""
    return -(-size // TILE) * TILE


def smoother(stack: Stack, cache: Factors) -> Callable[[Tensor], Tensor]:
    """``v -> P^-1 v`` for stacked vectors, with P^-1 as the stack has it or ``narrowed``."""
    solve = stack.blocks[0].solve
    if cache is stack.cache or "W" in cache:
        return partial(solve, cache)

    def smoothed(vectors: Tensor) -> Tensor:
        rows, columns = vectors.shape[-2:]
        wide = vectors.new_zeros(*vectors.shape[:-2], tiled(rows), tiled(columns), dtype=torch.bfloat16)
        wide[..., :rows, :columns] = vectors
        return solve(cache, wide)[..., :rows, :columns].to(vectors.dtype)

    return smoothed


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
