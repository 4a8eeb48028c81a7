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


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` over stacks ``[n, ...]``."""
    return torch.mm(a[0], b[0]).unsqueeze(0) if len(a) == 1 else torch.bmm(a, b)


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and eigenvectors; where the plain routine fails, in float64 and slightly shifted.

    It fails with an error, or without a word: LAPACK's may return NaN for a finite matrix with many tiny eigenvalues.

    Returns:
        ``[n, d]`` and ``[n, d, d]``; NaN for a matrix that defeats both.
    """
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError:
        results = [_eigh_one(matrix) for matrix in matrices]
        return torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])
    for i in _failed(vectors.flatten(-2)):
        values[i], vectors[i] = _eigh_one(matrices[i])
    return values, vectors


def eigvalsh(matrices: Tensor) -> Tensor:
    """Eigenvalues alone (ascending), ``[n, d]``; where the plain routine fails, those of ``eigh``."""
    try:
        values = torch.linalg.eigvalsh(matrices)
    except torch.linalg.LinAlgError:
        return eigh(matrices)[0]
    return eigh(matrices)[0] if _failed(values) else values


def _failed(found: Tensor) -> list[int]:
    """Which rows have what is not finite."""
    return [] if bool(found.isfinite().all()) else (~found.isfinite().all(-1)).nonzero().flatten().tolist()


def _eigh_one(matrix: Tensor) -> tuple[Tensor, Tensor]:
    double = matrix.double()
    scale = double.diagonal().abs().mean().clamp(min=torch.finfo(torch.float64).tiny)
    for shift in (0.0, 1e-12, 1e-9):  # a shift moves the eigenvalues and splits exact multiplicities by rounding
        try:
            values, vectors = torch.linalg.eigh(double + shift * scale * torch.eye(len(matrix)).to(double))
        except torch.linalg.LinAlgError:
            continue
        if bool(vectors.isfinite().all()):
            return (values - shift * scale).to(matrix.dtype), vectors.to(matrix.dtype)
    return matrix.new_full(matrix.shape[:1], float("nan")), torch.full_like(matrix, float("nan"))


def smallest(matrices: Tensor, tolerance: float = 0.01, block: int = 4, steps: int = 12) -> tuple[Tensor, Tensor]:
    """The smallest eigenvalue, and an eigenvector of it.

    Those of large matrices come from a block Krylov space of the inverse, for the price of a Cholesky factorization.
    What is not an eigenvector of some matrix as near as ``tolerance`` is decomposed after all.

    Args:
        matrices: ``[n, d, d]``, symmetric and positive semi-definite.
        tolerance: in mean eigenvalues.
        block: how many vectors the iteration starts from.
        steps: of the iteration.

    Returns:
        ``[n]`` and ``[n, d]``.
    """
    n, d, _ = matrices.shape
    if d <= 2 * block * steps:
        values, vectors = eigh(matrices)
        return values[:, 0], vectors[..., 0]
    traces = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    roots, failed = torch.linalg.cholesky_ex(damped(matrices, 4 * torch.finfo(matrices.dtype).eps * traces))
    generator = torch.Generator(matrices.device).manual_seed(d)
    start = torch.randn(d, block, generator=generator, dtype=matrices.dtype, device=matrices.device)
    krylov = [start.expand(n, d, block)]
    for _ in range(steps):
        half = torch.linalg.solve_triangular(roots, krylov[-1], upper=False)
        krylov.append(torch.linalg.qr(torch.linalg.solve_triangular(roots.mT, half, upper=True))[0])
    basis = torch.linalg.qr(torch.cat(krylov[1:], -1))[0]
    vectors = basis @ eigh(symmetrize(basis.mT @ (matrices @ basis)))[1][..., :1]
    images = matrices @ vectors
    values = (vectors * images).sum(-2)
    found = (failed == 0) & ((images - values.unsqueeze(-2) * vectors).norm(dim=(-2, -1)) <= tolerance / d * traces)
    values, vectors = values[:, 0], vectors[..., 0]
    for i in (~found).nonzero().flatten().tolist():
        exact = eigh(matrices[i : i + 1])
        values[i], vectors[i] = exact[0][0, 0], exact[1][0, :, 0]
    return values, vectors


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


# -- orthogonal bases --------------------------------------------------------------------------------------------------
#
# A basis of d dimensions is a matrix Q ``[n, d, d]``, or a product of r < d / 2 Householder reflections in its compact
# form ``Q = I - Z Yᵀ``, kept as ``[Y, Z]``, ``[n, d, 2 r]``: orthogonal to rounding by its making, at 2 r / d of the
# operations a product. Its first r columns are those that were asked for, the others complete them somehow.


def turned(matrix: Tensor, basis: Tensor, *, left: bool = False, back: bool = False) -> Tensor:
    """Rows in a basis, ``M Q``, or, on the ``left``, columns, ``Qᵀ M``.

    Args:
        matrix: ``[n, rows, d]``; on the left ``[n, d, columns]``.
        basis: a matrix or reflections, see above.
        left: turn columns.
        back: out of the basis: ``M Qᵀ``, on the left ``Q M``.

    Returns:
        A new tensor.
    """
    if basis.shape[-1] == basis.shape[-2]:
        turn = basis.mT if left != back else basis
        return product(turn, matrix) if left else product(matrix, turn)
    outer, inner = basis.chunk(2, dim=-1)[:: -1 if back else 1]
    if left:
        return _less(matrix, outer, product(inner.mT, matrix))
    return _less(matrix, product(matrix, inner), outer.mT)


def _less(matrix: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``M - a b`` over stacks."""
    if len(matrix) == 1:
        return torch.addmm(matrix[0], a[0], b[0], alpha=-1).unsqueeze(0)
    return torch.baddbmm(matrix, a, b, alpha=-1)


def as_matrix(basis: Tensor) -> Tensor:
    """A basis as the matrix Q that it is."""
    n, d, wide = basis.shape
    if wide == d:
        return basis
    return turned(torch.eye(d, dtype=basis.dtype, device=basis.device).repeat(n, 1, 1), basis)


def leading_columns(basis: Tensor) -> Tensor:
    """The columns of Q that were asked for: all of a matrix, the first r of r reflections."""
    d, wide = basis.shape[-2:]
    if wide == d:
        return basis
    y, z = basis.chunk(2, dim=-1)
    columns = -z @ y[:, : wide // 2].mT
    columns.diagonal(dim1=-2, dim2=-1).add_(1)
    return columns


def overlaps(new: Tensor, old: Tensor) -> Tensor:
    """``Q_newᵀ Q_old``, of two bases of one form."""
    d, wide = new.shape[-2:]
    if wide == d:
        return product(new.mT, old)
    (y_new, z_new), (y, z) = new.chunk(2, dim=-1), old.chunk(2, dim=-1)
    # (I - Y' Z'ᵀ) (I - Z Yᵀ)
    rest = _less(z, y_new, product(z_new.mT, z))
    result = product(torch.cat([y_new, rest], -1), torch.cat([z_new, y], -1).mT).neg_()
    result.diagonal(dim1=-2, dim2=-1).add_(1)
    return result


def orthonormal(columns: Tensor) -> Tensor:
    """The basis whose first columns are the orthonormal factor of ``[n, d, d]`` or ``[n, d, r]``, r < d / 2.

    It is Q of their QR decomposition, as a matrix or as the reflections that LAPACK makes it of.
    """
    d, r = columns.shape[-2:]
    if r == d:
        return torch.linalg.qr(columns)[0]
    packed, tau = torch.geqrf(columns)
    y = packed.tril(-1)
    y.diagonal(dim1=-2, dim2=-1).fill_(1)
    # A column that is zero below its diagonal is not reflected at all. Z = Y T with T^-1 + T^-ᵀ = Yᵀ Y.
    idle = tau == 0
    y.masked_fill_(idle.unsqueeze(-2), 0)
    inverse = (y.mT @ y).triu(1)
    inverse.diagonal(dim1=-2, dim2=-1).copy_(torch.where(idle, 1, 1 / tau))
    z = torch.linalg.solve_triangular(inverse, y, upper=True, left=False)
    return torch.cat([y, z], -1)


def eigenbasis(matrices: Tensor, rank: int) -> Tensor:
    """The basis of eigenvectors, by ``eigh``; of fewer than all, those of the largest eigenvalues come first.

    Args:
        matrices: ``[n, d, d]``, symmetric.
        rank: d, or how many, less than d / 2.

    Returns:
        NaN where ``eigh`` says so.
    """
    vectors = eigh(matrices)[1]
    return vectors if rank == vectors.shape[-1] else orthonormal(vectors.flip(-1)[..., :rank])


def iterated(matrices: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration: ``QR((M + shift I) Q)``, the columns sorted by their Rayleigh quotients first.

    The shift is small and leaves the vectors of zero eigenvalues where they are; rounding alone would move them.

    Args:
        matrices: ``[n, d, d]``, symmetric and positive semi-definite.
        basis: the last one.

    Returns:
        The next one, and of the last one ``[n]`` what share of ``|M Q|²`` lies off the diagonal of ``Qᵀ M Q`` (Q: its
        leading columns): 0 for eigenvectors.
    """
    columns = leading_columns(basis)
    images = product(matrices, columns)
    quotients = (columns * images).sum(-2)
    squares = images.square().sum((-2, -1))
    off = 1 - quotients.square().sum(-1) / squares.where(squares > 0, 1)
    shift = 0.03 * torch.finfo(matrices.dtype).eps ** 0.5 * quotients.amax(-1)
    images.addcmul_(columns, shift.view(-1, 1, 1))
    order = quotients.argsort(dim=-1, descending=True, stable=True)
    images = images.gather(-1, order.unsqueeze(-2).expand_as(images))
    return orthonormal(images), torch.where(squares > 0, off, torch.zeros_like(off))
