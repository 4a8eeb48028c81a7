"""The leading singular triples of any operator: power iteration, and a Golub-Kahan-Lanczos process."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .algebra import Triple, combined, irregular_matrix, reciprocal, scaled, svd
from .operators import Operator

# What parts two singular values, 1 - (s'/s)^2, is never taken for less: the pairs of equal ones cannot be told apart.
_RESOLVED = 1e-3

# Chance, for a random start, that an antisymmetric pair which belongs to the wanted is given up.
_MISSED = 0.01

# Steps through a space that an irregular matrix opened, before what it holds counts as known.
_EXPLORED = 8


def power(
    operator: Operator,
    rank: int,
    starts: Sequence[Tensor],
    rivals: Tensor | None = None,
    *,
    tolerance: float,
    max_iterations: int,
) -> list[Triple]:
    """Power iteration on ``Z^T Z``, one triple after the other, each deflated before the next.

    A small step alone would not tell a vector that has arrived from one on its slow way between two close singular
    values; the ratio of successive steps does.

    Args:
        operator: Z; deflated by what is found.
        rank: how many triples.
        starts: a right factor ``[groups, o, o]`` a layer of the operator.
        rivals: singular values ``[groups, k]`` found elsewhere, descending; a search that cannot beat the last of them
            is given up early. None: there are none.
        tolerance: see ``leading_pairs``.
        max_iterations: see ``leading_pairs``.
    """
    size = max(start.shape[-1] for start in starts) ** 2
    noise = torch.zeros(sum(map(len, starts)), dtype=torch.float64, device=starts[0].device)
    if rivals is not None:
        noise = operator.precision * rivals[:, 0]
    found: list[Triple] = []
    while len(found) < rank:
        v = operator.start(_roughened(starts, operator.kind) if operator.deflated else starts)
        v = scaled(v, reciprocal(operator.norm(v)))
        step, done = torch.full_like(noise, torch.inf), torch.zeros_like(noise, dtype=torch.bool)
        for steps in range(1, max_iterations + 1):
            u = operator.left(v)
            u = scaled(u, reciprocal(operator.norm(u)))
            image = operator.right(u)
            sigma = operator.norm(image)
            previous, v = v, scaled(image, reciprocal(sigma))
            noise = torch.maximum(noise, operator.precision * sigma)
            before, step = step, operator.norm(v - previous)
            separation = (1 - step / before).clamp(min=_RESOLVED)
            unsolved = sigma * step > tolerance * separation * sigma + noise  # so written, NaN ends it too
            done = done | ~unsolved | _hopeless(sigma, rivals, _share(steps, size, krylov=False))
            if bool(done.all()):
                break
        operator.deflate(scaled(u, sigma), v)
        found.append((sigma, u, v))
    return found


def lanczos(
    operator: Operator,
    rank: int,
    starts: Sequence[Tensor],
    rivals: Tensor | None = None,
    *,
    tolerance: float,
    max_iterations: int,
    krylov: int,
) -> list[Triple]:
    """Golub-Kahan-Lanczos bidiagonalization (1965) with full reorthogonalization.

    A full basis is compressed to its leading triples and grown again (Baglama and Reichel, 2005). ``projected`` is
    ``U^T Z V``, taken from the orthogonalization itself, so neither this restart nor a breakdown is a special case.
    Where a Krylov space is exhausted, a fixed irregular matrix opens another; if Z maps that to nothing, all is found.

    Args:
        operator: Z.
        rank: see ``power``.
        starts: see ``power``.
        rivals: see ``power``.
        tolerance: see ``leading_pairs``.
        max_iterations: see ``leading_pairs``.
        krylov: see ``leading_pairs``.
    """
    size = max(start.shape[-1] for start in starts) ** 2
    v = operator.start(_roughened(starts, operator.kind) if operator.deflated or rank > 1 else starts)
    v = scaled(v, reciprocal(operator.norm(v)))
    groups, k = len(v), 0
    rights = v.new_empty(groups, krylov, *v.shape[1:])
    lefts = rights[:, :0]
    projected = torch.zeros(groups, krylov, krylov, dtype=torch.float64, device=v.device)
    scale = v.new_zeros(groups) if rivals is None else rivals[:, 0].to(v.dtype)
    broken = exhausted = done = torch.zeros(groups, dtype=torch.bool, device=v.device)
    unexplored = torch.zeros(groups, device=v.device)
    for _ in range(max(max_iterations, rank)):
        rights[:, k] = v
        u = operator.left(v)
        if not k:
            lefts = u.new_empty(groups, krylov, *u.shape[1:])
        u, coefficients, alpha = _orthonormalize(operator, u, lefts[:, :k], scale)
        lefts[:, k] = u
        projected[:, :k, k] = coefficients
        projected[:, k, k] = alpha
        exhausted = exhausted | (broken & (alpha == 0))
        scale = torch.maximum(scale, alpha)
        k += 1

        v, _, beta = _orthonormalize(operator, operator.right(u), rights[:, :k], scale)
        scale = torch.maximum(scale, beta)
        broken = beta == 0
        x, sigma, y = svd(projected[:, :k, :k])
        wanted = sigma[:, :rank]
        following = torch.nn.functional.pad(sigma, (0, 1))[:, 1 : rank + 1]
        separation = (1 - (following * reciprocal(wanted)).square()).clamp(min=_RESOLVED)
        residual = beta.unsqueeze(1) * x[:, k - 1, :rank].abs()
        unsolved = residual > tolerance * separation * wanted + operator.precision * sigma[:, :1]  # False for NaN
        given_up = exhausted | _hopeless(wanted[:, 0], rivals, _share(k, size, krylov=True))
        unexplored = torch.where(broken, _EXPLORED, unexplored - 1)
        if k >= rank:
            done = done | given_up | ~(unsolved.any(1) | (unexplored > 0))  # for good, whatever others still need
            if bool(done.all()):
                break
        stuck = broken & ~done
        if bool(stuck.any()):
            needed = stuck.split([len(start) for start in starts])
            fresh = operator.fresh(
                [
                    irregular_matrix(start, operator.kind, k) if bool(some.any()) else torch.zeros_like(start)
                    for start, some in zip(starts, needed, strict=True)
                ]
            )
            fresh, _, _ = _orthonormalize(operator, fresh, rights[:, :k], operator.norm(fresh))
            v = torch.where(stuck.view(-1, *[1] * (v.dim() - 1)), fresh, v)
        if k == krylov:
            k = (rank + krylov) // 2
            lefts[:, :k], rights[:, :k] = combined(lefts, x[..., :k].mT), combined(rights, y[..., :k].mT)
            projected.zero_().diagonal(dim1=1, dim2=2)[:, :k] = sigma[:, :k]
            x = y = torch.eye(k, dtype=projected.dtype, device=v.device).expand(groups, k, k)
    left, right = (combined(basis[:, :k], c[..., :rank].mT) for basis, c in ((lefts, x), (rights, y)))
    return [(sigma[:, j], left[:, j], right[:, j]) for j in range(rank)]


def _orthonormalize(operator: Operator, vector: Tensor, basis: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What of a vector is not in the basis, normalized; its coefficients in the basis; and its norm.

    The first and the last are zero where the norm is rounding against ``scale``.
    """
    coefficients = operator.inner(basis, vector)
    vector = vector - combined(basis, coefficients)
    again = operator.inner(basis, vector)  # twice is enough
    vector = vector - combined(basis, again)
    norm = operator.norm(vector)
    norm = torch.where(norm <= operator.precision * scale, 0, norm)
    return scaled(vector, reciprocal(norm)), coefficients + again, norm


def _hopeless(sigma: Tensor, rivals: Tensor | None, share: float) -> Tensor:
    """Whether an estimate of the leading singular value, surely that share of it (squared), is below all rivals."""
    if rivals is None:
        return torch.zeros_like(sigma, dtype=torch.bool)
    return sigma.square() < share * rivals[:, -1].square()


def _share(steps: int, n: int, *, krylov: bool) -> float:
    """What share of the largest eigenvalue of ``Z^T Z`` is found after some steps from a random start.

    By Kuczynski and Wozniakowski (1992, "Estimating the largest eigenvalue by the power and Lanczos algorithms with a
    random start"), who bound how likely it is to find less: ``1.648 sqrt(n) exp(-(2 steps - 1) sqrt(1 - share))`` in a
    Krylov space, ``0.824 sqrt(n) share^(steps - 1/2)`` by the power iteration.

    Args:
        steps: dimension of the Krylov space, or number of power iterations.
        n: dimension of the space.
        krylov: which of the two.
    """
    if krylov:
        return max(0.0, 1 - (math.log(1.648 * n**0.5 / _MISSED) / (2 * steps - 1)) ** 2)
    return min(1.0, (_MISSED / (0.824 * n**0.5)) ** (1 / (steps - 0.5)))


def _roughened(starts: Sequence[Tensor], kind: int) -> list[Tensor]:
    """Starts with a little of the irregular matrix mixed in.

    Structure may keep a positive semi-definite start from ever reaching an indefinite pair: with one example, for one,
    Z takes the identity to matrices that are diagonal in the singular basis of that example's gradient.
    """
    return [start + 0.1 * start.norm(dim=(1, 2), keepdim=True) * irregular_matrix(start, kind) for start in starts]
