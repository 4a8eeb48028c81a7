"""Pieces that operators, solvers and the compression of rearranged blocks share, over stacks ``[groups, ...]``.

Decompositions answer NaN where their matrix is not finite, which LAPACK would refuse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import linalg

Pairs = list[tuple[Tensor, Tensor]]  # (left [groups, d, d], right [groups, o, o]), the leading one first
Triple = tuple[Tensor, Tensor, Tensor]  # singular value [groups], left and right vectors of norm one (or zero)


def scaled(vector: Tensor, factor: Tensor) -> Tensor:
    """A vector of each group times the group's number."""
    return vector * factor.view(-1, *[1] * (vector.dim() - 1)).to(vector.dtype)


def reciprocal(value: Tensor) -> Tensor:
    """1 / value, and 0 of 0."""
    return torch.where(value == 0, 0, 1 / value)


def combined(basis: Tensor, coefficients: Tensor) -> Tensor:
    """Linear combinations of ``[groups, k, ...]``: one of ``[groups, k]`` coefficients, or n of ``[groups, n, k]``."""
    rows = coefficients if coefficients.dim() == 3 else coefficients.unsqueeze(1)
    sums = (rows.to(basis.dtype) @ basis.flatten(2)).unflatten(2, basis.shape[2:])
    return sums if coefficients.dim() == 3 else sums.squeeze(1)


def irregular_matrix(like: Tensor, kind: int, draw: int = 0) -> Tensor:
    """A matrix of norm one and of a kind that, for all that data know of it, has a part in every direction.

    Args:
        like: gives shape, dtype and device.
        kind: 1 for a symmetric matrix, -1 for an antisymmetric one.
        draw: each gives another.
    """
    k = torch.arange(1, like.shape[-1] + 1, dtype=torch.float64, device=like.device)
    matrix = (math.sqrt(1 + draw) * torch.outer(k, k)).cos()
    if kind < 0:
        matrix = matrix.triu(1) - matrix.triu(1).mT
    return (matrix / matrix.norm()).to(like).expand_as(like)


def gram_matrix(rows: Tensor) -> Tensor:
    """Inner products of rows ``[groups, n, d]``, in double precision."""
    rows = rows.double()
    return rows @ rows.mT


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; NaN where the matrix is not finite, which LAPACK would refuse."""
    finite = matrix.isfinite().all(-1).all(-1)
    values, vectors = linalg.eigh(torch.where(finite.view(-1, 1, 1), matrix, 0))
    return torch.where(finite.view(-1, 1), values, torch.nan), vectors


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors, singular values, right vectors (in columns); NaN where the matrix is not finite."""
    finite = matrix.isfinite().all(-1).all(-1)
    left, values, right = torch.linalg.svd(torch.where(finite.view(-1, 1, 1), matrix, 0))
    return left, torch.where(finite.view(-1, 1), values, torch.nan), right.mT
