"""Gram form: all pairs at once where a layer has one position, in closed form in two Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .algebra import Pairs, eigh, gram_matrix
from .kinds import BLOCK, mirrored

# Singular values below this multiple of the first are rounding in the closed form, which squares them.
_NEGLIGIBLE = 1e-6


def closed_pairs(
    layers: list[tuple[Tensor, Tensor]], masks: list[Tensor | None], rank: int, corrected: bool
) -> list[Pairs]:
    """One position a layer: Z = P C Q^T with columns ``vec(a_i a_i^T)`` and ``vec(g_i g_i^T)``, and C diagonal.

    K-FAC's own product is ``P (1 1^T / m^2) Q^T``, so what it leaves has the C of a covariance.
    """
    lefts, rights = ([gram_matrix(rows.squeeze(2)) for rows in side] for side in zip(*layers, strict=True))
    groups, m = [len(gram) for gram in lefts], lefts[0].shape[-1]
    identity = torch.eye(m, dtype=torch.float64, device=lefts[0].device)
    cores = [identity / m if mask is None else identity * mask / m for mask in masks]
    core = torch.cat([core.expand(n, m, m) for core, n in zip(cores, groups, strict=True)])
    core = core - 1 / m**2 if corrected else core
    left, right = torch.cat(lefts), torch.cat(rights)
    traces = left.diagonal(dim1=1, dim2=2)
    _, left_c, right_c = closed_form(left.square(), right.square(), core, traces, rank)
    return [
        [(_weighted(a, x[:, k]), _weighted(g, y[:, k])) for k in range(rank)]
        for (a, g), x, y in zip(layers, left_c.split(groups), right_c.split(groups), strict=True)
    ]


def closed_form(
    left_gram: Tensor, right_gram: Tensor, core: Tensor, traces: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All leading singular pairs of ``P C Q^T`` from the Gram matrices ``P^T P`` and ``Q^T Q``, in double precision.

    With ``P^T P = R R^T``, ``P = U R^T`` for a U of orthonormal columns, and the left singular vectors are U times the
    eigenvectors x of ``R^T C (Q^T Q) C^T R``. The rest follows by products, never by inverses of R or of a Gram matrix:
    the right vector is ``Q n`` with ``n = C^T R x / sigma``, the left one ``P m`` with ``m = C (Q^T Q) n / sigma``.

    Args:
        left_gram: ``[n, m, m]``; the leading dimension is a batch of problems.
        right_gram: ``[n, m, m]``.
        core: C, ``[n, m, m]``.
        traces: of the matrices that the columns of P stand for, ``[n, m]``: they settle the sign.
        rank: how many pairs.

    Returns:
        Singular values ``[n, rank]``, and coefficients of the left and of the right vectors, ``[n, rank, m]``, each
        times ``sqrt(sigma)``; zero beyond the numerical rank.
    """
    found = min(rank, left_gram.shape[-1])
    half = core.mT @ _root(left_gram)
    values, x = eigh(half.mT @ right_gram @ half)
    sigma = values[:, -found:].flip(-1).clamp(min=0).sqrt().unsqueeze(1)
    x = x[..., -found:].flip(-1)
    scale = torch.where(sigma > _NEGLIGIBLE * sigma[..., :1], 1 / sigma, 0 * sigma)
    right = half @ x * scale.sqrt()
    left = core @ right_gram @ right * scale
    sign = torch.where((traces.unsqueeze(1) @ left) < 0, -1.0, 1.0)
    vectors = [torch.nn.functional.pad((x * sign).mT, (0, 0, 0, rank - found)) for x in (left, right)]
    return torch.nn.functional.pad(sigma.squeeze(1), (0, rank - found)), vectors[0], vectors[1]


def _root(gram: Tensor) -> Tensor:
    """R with ``R R^T = gram``: Cholesky, with a ridge of the size of rounding, or by eigenvalues where that fails."""
    ridge = 8 * torch.finfo(gram.dtype).eps * gram.diagonal(dim1=1, dim2=2).sum(-1)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    root, failures = torch.linalg.cholesky_ex(gram + ridge.view(-1, 1, 1) * identity)
    if not bool(failures.any()):
        return root
    values, vectors = eigh(gram)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(1)


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """``sum_i weights_i rows_i rows_i^T`` of ``[groups, m, 1, n]``, exactly symmetric."""
    rows = rows.squeeze(2)
    weighted = (rows * weights.unsqueeze(-1).to(rows.dtype)).mT
    n = rows.shape[-1]
    total = rows.new_empty(len(rows), n, n)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        for left, right, result in zip(weighted, rows, total, strict=True):
            torch.mm(left[start:stop], right[:, start:], out=result[start:stop, start:])
    return mirrored(total)
