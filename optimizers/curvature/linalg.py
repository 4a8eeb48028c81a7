"""Damped inverses and eigendecompositions that do not fail; pure functions of batches of symmetric matrices.

Every function takes ``[n, d, d]`` and also says how many of the n had to be repaired: a factor that is not positive
definite to working precision is decomposed in float64 and its eigenvalues are floored.
"""

from __future__ import annotations

import torch
from torch import Tensor


def symmetrize(matrices: Tensor) -> Tensor:
    """``(M + Mᵀ) / 2``."""
    return (matrices + matrices.mT) / 2


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and eigenvectors; where the plain routine fails, in float64 and slightly shifted.

    Returns:
        ``[n, d]`` and ``[n, d, d]``; NaN for a matrix that defeats both.
    """
    try:
        return torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError:
        results = [_eigh_one(matrix) for matrix in matrices]
        return torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])


def _eigh_one(matrix: Tensor) -> tuple[Tensor, Tensor]:
    double = matrix.double()
    scale = double.diagonal().abs().mean().clamp(min=torch.finfo(torch.float64).tiny)
    for shift in (0.0, 1e-12, 1e-9):  # a shift moves the eigenvalues and splits exact multiplicities by rounding
        try:
            values, vectors = torch.linalg.eigh(double + shift * scale * torch.eye(len(matrix)).to(double))
        except torch.linalg.LinAlgError:
            continue
        return (values - shift * scale).to(matrix.dtype), vectors.to(matrix.dtype)
    return matrix.new_full(matrix.shape[:1], float("nan")), torch.full_like(matrix, float("nan"))


def damped(matrices: Tensor, damping: Tensor) -> Tensor:
    """``M + damping I``: a copy.

    Args:
        matrices: ``[n, d, d]``.
        damping: ``[n]``.
    """
    result = matrices.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    return result


def cholesky(matrices: Tensor, damping: Tensor) -> tuple[Tensor, int]:
    """Lower Cholesky factors of ``M + damping I``.

    A matrix without one has its eigenvalues floored: negative ones at 0 before damping, all of them at the largest
    times the machine epsilon after it.

    Args:
        matrices: ``[n, d, d]``, symmetric.
        damping: ``[n]``, at least 0.

    Returns:
        The factors and the number of matrices that were repaired.
    """
    shifted = damped(matrices, damping)
    factors, info = torch.linalg.cholesky_ex(shifted)
    bad = info.nonzero().flatten().tolist()  # waits for the device, once a refresh
    eps = torch.finfo(matrices.dtype).eps
    for i in bad:
        values, vectors = eigh(matrices[i : i + 1].double())
        values = values.clamp(min=0) + damping[i].double()
        floor = 4 * matrices.shape[-1] * eps * values.amax().clamp(min=torch.finfo(matrices.dtype).tiny / eps)
        repaired = (vectors * values.clamp(min=floor).unsqueeze(-2)) @ vectors.mT
        factors[i] = torch.linalg.cholesky_ex(symmetrize(repaired))[0][0].to(matrices.dtype)
    return factors, len(bad)


def pencil(matrices: Tensor, factors: Tensor, twisted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and vectors of ``M = L^-1 C L^-ᵀ`` in the coordinates of C.

    Args:
        matrices: C ``[n, d, d]``, symmetric, or antisymmetric where ``twisted``.
        factors: L ``[n, d, d]``, lower triangular.
        twisted: bool ``[n, 1, 1]``; None: all are symmetric.

    Returns:
        s ``[n, d]`` with ``M = Q diag(s) Qᵀ`` (where twisted, its singular values: ``M Mᵀ = Q diag(s²) Qᵀ``),
        ``L^-ᵀ Q``, and ``L^-ᵀ M Q`` where anything is twisted.
    """
    half = torch.linalg.solve_triangular(factors, matrices, upper=False)
    whitened = torch.linalg.solve_triangular(factors, half.mT, upper=False).mT
    target = whitened if twisted is None else torch.where(twisted, whitened @ whitened.mT, whitened)
    values, vectors = eigh(symmetrize(target))
    basis = torch.linalg.solve_triangular(factors.mT, vectors, upper=True)
    if twisted is None:
        return values, basis, basis
    values = torch.where(twisted[..., 0], values.clamp(min=0).sqrt(), values)
    return values, basis, torch.linalg.solve_triangular(factors.mT, whitened @ vectors, upper=True)


def leading_pencil(
    matrices: Tensor, factors: Tensor, rank: int, twisted: Tensor | None, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of ``pencil`` that belongs to the eigenvalues of largest magnitude, by subspace iteration.

    Args:
        matrices: see ``pencil``.
        factors: see ``pencil``.
        rank: how many.
        twisted: see ``pencil``.
        start: what an earlier call returned second, for similar matrices: one step is then enough; None: from a fixed
            irregular basis, in several.

    Returns:
        See ``pencil``; ``rank`` columns.
    """

    def whitened(basis: Tensor) -> Tensor:  # M Q
        half = matrices @ torch.linalg.solve_triangular(factors.mT, basis, upper=True)
        return torch.linalg.solve_triangular(factors, half, upper=False)

    def target(basis: Tensor) -> Tensor:  # M Q, or M Mᵀ Q = -M M Q
        image = whitened(basis)
        return image if twisted is None else torch.where(twisted, -whitened(image), image)

    if start is None:
        generator = torch.Generator(matrices.device).manual_seed(rank)
        shape = (*matrices.shape[:-1], rank)
        basis = torch.randn(shape, generator=generator, dtype=matrices.dtype, device=matrices.device)
    else:
        basis = factors.mT @ start
    for _ in range(4 if start is None else 1):
        basis = torch.linalg.qr(target(basis))[0]
    values, vectors = eigh(symmetrize(basis.mT @ target(basis)))
    vectors = basis @ vectors
    found = torch.linalg.solve_triangular(factors.mT, vectors, upper=True)
    if twisted is None:
        return values, found, found
    values = torch.where(twisted[..., 0], values.clamp(min=0).sqrt(), values)
    return values, found, torch.linalg.solve_triangular(factors.mT, whitened(vectors), upper=True)
