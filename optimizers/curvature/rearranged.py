"""The leading Kronecker pairs of a Fisher block: singular pairs of its rearrangement, found without ever forming it.

For an affine layer with inputs ``a_it`` and output gradients ``g_it`` (example i of m, shared position t of T) the
Fisher block is ``F = (1/m) sum_i vec(V_i) vec(V_i)^T`` with ``V_i = sum_t g_it a_it^T``, in row-major order of the
``[o, d]`` weight matrix. Van Loan and Pitsianis (1993, "Approximation with Kronecker products") reorder its entries so
that a Kronecker product becomes a matrix of rank one, ``Z(S (x) R) = vec(R) vec(S)^T``; here

    Z(F) = (1/m) sum_i sum_{t,t'} vec(a_it a_it'^T) vec(g_it g_it'^T)^T,

so the leading singular triples of Z(F) are the best sum of Kronecker products in the Frobenius norm. *Left* always
means the side of the inputs, ``[d, d]``, *right* that of the gradients, ``[o, o]``: ``F ~ sum_k right_k (x) left_k``.
Z commutes with transposition, so both factors of a pair are symmetric, or both are antisymmetric. The first pair of a
positive semi-definite block is symmetric and semi-definite itself (Perron and Frobenius), and so are all that one
position gives, sums of ``a a^T`` and ``g g^T``; with more positions an antisymmetric pair may be the next best. The two
kinds never mix, so each is solved for in its own space, and the largest singular values of both are taken.

Solvers see Z through an ``Operator``: its products, an inner product, and vectors whose form is the operator's own:

- ``Locations``: matrices; ``Z v = (1/m) sum_i A_i^T (mask * (G_i v G_i^T)) A_i``;
- ``ExampleGradients``: matrices, all pairs of positions; ``Z v = (1/m) sum_i V_i^T v V_i``;
- ``GramCoefficients``: every vector reached is ``sum_i A_i^T M_i A_i`` (or ``sum_i G_i^T N_i G_i``), so the ``M_i``
  stand for it, and the products need only the Gram matrices of all inputs and of all gradients.

With one position a layer the last is closed form in two m x m matrices: all pairs at once, at about the cost of forming
the factors. ``cheapest_form`` decides by counting operations.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Pairs = list[tuple[Tensor, Tensor]]  # (left [groups, d, d], right [groups, o, o]), the leading one first
Terms = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[float]]  # lefts, rights and weights of a sum of products

SOLVERS = ("gram", "power", "lanczos")
FORMS = ("closed", "coefficients", "gradients", "locations")

# The cost model of ``cheapest_form``, in floating-point operations.
_PRODUCTS = 24  # products of a typical solve
_CALL = 5e6  # what the tensor calls around one product cost, however small it is
_DENSE = 30  # of a dense decomposition of an n x n matrix, times n^3
_DOUBLE = 2  # double against single precision

# Singular values below this multiple of the first are rounding in the closed form, which squares them.
_NEGLIGIBLE = 1e-6

# What parts two singular values, 1 - (s'/s)^2, is never taken for less: the pairs of equal ones cannot be told apart.
_RESOLVED = 1e-3

# Chance, for a random start, that an antisymmetric pair which belongs to the wanted is given up.
_MISSED = 0.01

# Steps through a space that an irregular matrix opened, before what it holds counts as known.
_EXPLORED = 8

# Symmetric pairs go before antisymmetric ones whose singular value is greater by no more than this.
_TIE = 1e-6

# Entries whose products are summed in their own precision.
_CHUNK = 32768

# Columns of a block of a symmetric product; of its blocks, those below the diagonal are copied.
_BLOCK = 256


# --- the operator, in three forms -------------------------------------------------------------------------------------


class Operator(ABC):
    """The rearranged block Z as a linear map between spaces of symmetric matrices, less what was deflated.

    Attributes:
        precision: relative size below which a norm is rounding.
        kind: of the matrices: 1 for symmetric, -1 for antisymmetric.
    """

    precision: float

    def __init__(self) -> None:
        self.kind = 1
        self._found: tuple[Tensor, Tensor] | None = None

    def antisymmetric(self) -> Operator:
        """The same Z between spaces of antisymmetric matrices, where symmetric pairs need no deflation."""
        other = copy.copy(self)
        other.kind, other._found = -1, None
        return other

    @property
    def deflated(self) -> bool:
        """Whether anything was subtracted: the singular pairs are indefinite then."""
        return self._found is not None

    def deflate(self, u: Tensor, v: Tensor) -> None:
        """Subtract ``u v^T`` from the operator, for good."""
        u, v = u.unsqueeze(1), v.unsqueeze(1)
        if self._found is not None:
            u, v = torch.cat([self._found[0], u], dim=1), torch.cat([self._found[1], v], dim=1)
        self._found = u, v

    def left(self, v: Tensor) -> Tensor:
        """The left vector ``Z v`` of a right vector."""
        product = self._left(v)
        if self._found is None:
            return product
        lefts, rights = self._found
        return product - _combine(lefts, self.inner(rights, v))

    def right(self, u: Tensor) -> Tensor:
        """The right vector ``Z^T u`` of a left vector."""
        product = self._right(u)
        if self._found is None:
            return product
        lefts, rights = self._found
        return product - _combine(rights, self.inner(lefts, u))

    def norm(self, vector: Tensor) -> Tensor:
        """Norms ``[groups]``."""
        return self.inner(vector.unsqueeze(1), vector).squeeze(1).clamp(min=0).sqrt()

    def _projected(self, matrix: Tensor) -> Tensor:
        # An iteration would let the other kind grow out of rounding.
        return (matrix + self.kind * matrix.mT) / 2

    @abstractmethod
    def _left(self, v: Tensor) -> Tensor:
        """``Z v`` before any deflation."""

    @abstractmethod
    def _right(self, u: Tensor) -> Tensor:
        """``Z^T u`` before any deflation."""

    @abstractmethod
    def start(self, matrices: Sequence[Tensor]) -> Tensor:
        """A right vector to start from, made of a ``[groups, o, o]`` matrix a layer, of the operator's kind."""

    def fresh(self, matrices: Sequence[Tensor]) -> Tensor:
        """A right vector like ``start``, in which small singular pairs have as large a part as others."""
        return self.start(matrices)

    @abstractmethod
    def inner(self, basis: Tensor, vector: Tensor) -> Tensor:
        """Inner products ``[groups, k]`` of the vectors of a basis ``[groups, k, ...]`` with one of their kind."""

    @abstractmethod
    def kfac(self) -> tuple[Tensor, Tensor]:
        """K-FAC's factors as vectors: left ``mean_{i,t} a a^T``, right ``mean_i sum_t g g^T`` (arXiv 1503.05671)."""

    @abstractmethod
    def left_matrices(self, u: Tensor) -> list[Tensor]:
        """A left vector as ``[groups, d, d]`` of each layer."""

    @abstractmethod
    def right_matrices(self, v: Tensor) -> list[Tensor]:
        """A right vector as ``[groups, o, o]`` of each layer."""


class _Matrices(Operator):
    """Vectors are the matrices themselves, of one layer."""

    def __init__(self, a: Tensor, g: Tensor) -> None:
        super().__init__()
        self.examples, self.positions = a.shape[1:3]
        self._a, self._g = a.contiguous(), g.contiguous()
        self._a_rows, self._g_rows = self._a.flatten(1, 2), self._g.flatten(1, 2)
        self.precision = 20 * torch.finfo(a.dtype).eps

    def start(self, matrices: Sequence[Tensor]) -> Tensor:
        """See Operator."""
        (matrix,) = matrices
        return self._projected(matrix.to(self._g))

    def inner(self, basis: Tensor, vector: Tensor) -> Tensor:
        """See Operator."""
        return (basis.flatten(2) @ vector.flatten(1).unsqueeze(-1)).squeeze(-1)

    def kfac(self) -> tuple[Tensor, Tensor]:
        """See Operator."""
        left = self._a_rows.mT @ self._a_rows / self._a_rows.shape[1]
        return left, self._g_rows.mT @ self._g_rows / self.examples

    def left_matrices(self, u: Tensor) -> list[Tensor]:
        """See Operator."""
        return [u]

    def right_matrices(self, v: Tensor) -> list[Tensor]:
        """See Operator."""
        return [v]


class Locations(_Matrices):
    """Products through the positions of each example; the only matrix form that can leave pairs of them out.

    Args:
        a: inputs ``[groups, m, T, d]``.
        g: output gradients ``[groups, m, T, o]``.
        mask: which pairs of positions count, ``[T, T]``; None for all.
    """

    def __init__(self, a: Tensor, g: Tensor, mask: Tensor | None = None) -> None:
        super().__init__(a, g)
        self._mask = mask

    def _left(self, v: Tensor) -> Tensor:
        return self._product(v, self._g, self._g_rows, self._a, self._a_rows)

    def _right(self, u: Tensor) -> Tensor:
        return self._product(u, self._a, self._a_rows, self._g, self._g_rows)

    def _product(self, matrix: Tensor, source: Tensor, source_rows: Tensor, to: Tensor, to_rows: Tensor) -> Tensor:
        images = (source_rows @ matrix).view_as(source) @ source.mT
        images = images if self._mask is None else images * self._mask
        return self._projected(to_rows.mT @ (images @ to).view_as(to_rows)) / self.examples


class ExampleGradients(_Matrices):
    """Products through the gradient ``V_i`` of each example.

    Args:
        a: inputs ``[groups, m, T, d]``.
        g: output gradients ``[groups, m, T, o]``.
    """

    def __init__(self, a: Tensor, g: Tensor) -> None:
        super().__init__(a, g)
        gradients = (self._g.mT @ self._a).transpose(1, 2).contiguous()  # [groups, o, m, d]
        # Two views of the same memory, so that either product is two plain multiplications without a transposed copy.
        self._wide, self._tall = gradients.flatten(2), gradients.flatten(1, 2)

    def _left(self, v: Tensor) -> Tensor:
        return self._projected(self._tall.mT @ (v @ self._wide).view_as(self._tall)) / self.examples

    def _right(self, u: Tensor) -> Tensor:
        return self._projected((self._tall @ u).view_as(self._wide) @ self._wide.mT) / self.examples


class GramCoefficients(Operator):
    """Vectors are pairs, stacked as ``[groups, 2, m, T, T]``: their coefficients, and their *images*.

    The image of ``V = sum_i G_i^T N_i G_i`` at example j is ``G_j V G_j^T = sum_i K_ji N_i K_ij`` with the blocks
    ``K_ji = G_j G_i^T`` of the Gram matrix, and likewise on the left. With it, the inner product of V and V' is
    ``sum_j <N_j, image'_j>``, and ``Z V`` has the coefficients ``mask * image_j / m``. Always in double precision: the
    norm of a small vector is the root of a difference.

    Several layers with equal m and T share the leading dimension: small problems are mostly overhead one by one.

    Args:
        layers: inputs ``[groups, m, T, d]`` and output gradients ``[groups, m, T, o]`` of each layer.
        mask: which pairs of positions count, ``[T, T]``; None for all.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], mask: Tensor | None = None) -> None:
        super().__init__()
        self._a, self._g = ([rows.contiguous() for rows in side] for side in zip(*layers, strict=True))
        self._groups = [len(rows) for rows in self._a]
        self.examples, self.positions = self._a[0].shape[1:3]
        self._mask = mask
        self._a_gram, self._g_gram = (torch.cat([self._blocks(x) for x in side]) for side in (self._a, self._g))
        self.precision = torch.finfo(torch.float64).eps ** 0.5

    def _blocks(self, rows: Tensor) -> Tensor:
        """The Gram matrix by columns of blocks, ``[groups, m, mT, T]``; its squared entries where T is 1."""
        gram = _gram(rows.flatten(1, 2))
        if self.positions == 1:
            return gram.square()
        return gram.unflatten(2, (self.examples, self.positions)).transpose(1, 2).contiguous()

    def _vector(self, coefficients: Tensor, blocks: Tensor) -> Tensor:
        return torch.stack([coefficients, self._images(coefficients, blocks)], dim=1)

    def _images(self, coefficients: Tensor, blocks: Tensor) -> Tensor:
        m, t = self.examples, self.positions
        if t == 1:
            return (blocks @ coefficients.flatten(2)).view_as(coefficients)
        half = (blocks @ coefficients).unflatten(2, (m, t))  # K_ji N_i as [groups, i, j, T, T]
        return half.permute(0, 2, 3, 1, 4).flatten(3) @ blocks

    def start(self, matrices: Sequence[Tensor]) -> Tensor:
        """See Operator. A matrix need not be of the form that coefficients can stand for; ``Z^T Z`` of it is."""
        return self._right(self._to(self._images_of(matrices), self._a_gram))

    def fresh(self, matrices: Sequence[Tensor]) -> Tensor:
        """See Operator. Of a small pair, ``Z^T Z`` would leave the square of its singular value, which is rounding."""
        return self._vector(self._projected(self._images_of(matrices)), self._g_gram)

    def _images_of(self, matrices: Sequence[Tensor]) -> Tensor:
        """``G_i V G_i^T`` of right matrices V."""
        pairs = zip(self._g, matrices, strict=True)
        return torch.cat([(g @ matrix.to(g).unsqueeze(1) @ g.mT).double() for g, matrix in pairs])

    def _left(self, v: Tensor) -> Tensor:
        return self._to(v[:, 1], self._a_gram)

    def _right(self, u: Tensor) -> Tensor:
        return self._to(u[:, 1], self._g_gram)

    def _to(self, images: Tensor, blocks: Tensor) -> Tensor:
        images = images if self._mask is None else images * self._mask
        return self._vector(self._projected(images) / self.examples, blocks)

    def inner(self, basis: Tensor, vector: Tensor) -> Tensor:
        """See Operator."""
        return (basis[:, :, 0].flatten(2) @ vector[:, 1].flatten(1).unsqueeze(-1)).squeeze(-1)

    def kfac(self) -> tuple[Tensor, Tensor]:
        """See Operator."""
        m, t = self.examples, self.positions
        identity = torch.eye(t, dtype=torch.float64, device=self._a_gram.device).expand(len(self._a_gram), m, t, t)
        return self._vector(identity / (m * t), self._a_gram), self._vector(identity / m, self._g_gram)

    def left_matrices(self, u: Tensor) -> list[Tensor]:
        """See Operator."""
        return self._matrices(u, self._a)

    def right_matrices(self, v: Tensor) -> list[Tensor]:
        """See Operator."""
        return self._matrices(v, self._g)

    def _matrices(self, vector: Tensor, layers: list[Tensor]) -> list[Tensor]:
        pairs = zip(vector[:, 0].split(self._groups), layers, strict=True)
        weighted = [(rows, (coefficients.to(rows) @ rows).flatten(1, 2)) for coefficients, rows in pairs]
        return [rows.flatten(1, 2).mT @ products for rows, products in weighted]


# --- solvers: the leading singular triples of any operator ------------------------------------------------------------

Triple = tuple[Tensor, Tensor, Tensor]  # singular value [groups], left and right vectors of norm one (or zero)


def _power(
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
        v = _scaled(v, _inverse(operator.norm(v)))
        step, done = torch.full_like(noise, torch.inf), torch.zeros_like(noise, dtype=torch.bool)
        for steps in range(1, max_iterations + 1):
            u = operator.left(v)
            u = _scaled(u, _inverse(operator.norm(u)))
            image = operator.right(u)
            sigma = operator.norm(image)
            previous, v = v, _scaled(image, _inverse(sigma))
            noise = torch.maximum(noise, operator.precision * sigma)
            before, step = step, operator.norm(v - previous)
            separation = (1 - step / before).clamp(min=_RESOLVED)
            unsolved = sigma * step > tolerance * separation * sigma + noise  # so written, NaN ends it too
            done = done | ~unsolved | _hopeless(sigma, rivals, _share(steps, size, krylov=False))
            if bool(done.all()):
                break
        operator.deflate(_scaled(u, sigma), v)
        found.append((sigma, u, v))
    return found


def _lanczos(
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
        rank: see ``_power``.
        starts: see ``_power``.
        rivals: see ``_power``.
        tolerance: see ``leading_pairs``.
        max_iterations: see ``leading_pairs``.
        krylov: see ``leading_pairs``.
    """
    size = max(start.shape[-1] for start in starts) ** 2
    v = operator.start(_roughened(starts, operator.kind) if operator.deflated or rank > 1 else starts)
    v = _scaled(v, _inverse(operator.norm(v)))
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
        x, sigma, y = _svd(projected[:, :k, :k])
        wanted = sigma[:, :rank]
        following = torch.nn.functional.pad(sigma, (0, 1))[:, 1 : rank + 1]
        separation = (1 - (following * _inverse(wanted)).square()).clamp(min=_RESOLVED)
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
                    _irregular(start, operator.kind, k) if bool(some.any()) else torch.zeros_like(start)
                    for start, some in zip(starts, needed, strict=True)
                ]
            )
            fresh, _, _ = _orthonormalize(operator, fresh, rights[:, :k], operator.norm(fresh))
            v = torch.where(stuck.view(-1, *[1] * (v.dim() - 1)), fresh, v)
        if k == krylov:
            k = (rank + krylov) // 2
            lefts[:, :k], rights[:, :k] = _combine(lefts, x[..., :k].mT), _combine(rights, y[..., :k].mT)
            projected.zero_().diagonal(dim1=1, dim2=2)[:, :k] = sigma[:, :k]
            x = y = torch.eye(k, dtype=projected.dtype, device=v.device).expand(groups, k, k)
    left, right = (_combine(basis[:, :k], c[..., :rank].mT) for basis, c in ((lefts, x), (rights, y)))
    return [(sigma[:, j], left[:, j], right[:, j]) for j in range(rank)]


def _orthonormalize(operator: Operator, vector: Tensor, basis: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What of a vector is not in the basis, normalized; its coefficients in the basis; and its norm.

    The first and the last are zero where the norm is rounding against ``scale``.
    """
    coefficients = operator.inner(basis, vector)
    vector = vector - _combine(basis, coefficients)
    again = operator.inner(basis, vector)  # twice is enough
    vector = vector - _combine(basis, again)
    norm = operator.norm(vector)
    norm = torch.where(norm <= operator.precision * scale, 0, norm)
    return _scaled(vector, _inverse(norm)), coefficients + again, norm


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


def _order(symmetric: Tensor, antisymmetric: Tensor, rank: int, settled: int = 0) -> Tensor:
    """Which ``[groups, rank]`` of the singular values ``[groups, k]`` of both kinds, side by side, lead.

    Args:
        symmetric: descending.
        antisymmetric: descending.
        rank: how many.
        settled: how many of the symmetric ones come first, whatever their size.
    """
    keys = torch.cat([symmetric, antisymmetric * (1 - _TIE)], dim=1)
    keys[:, :settled] = torch.inf
    return keys.argsort(dim=1, descending=True, stable=True)[:, :rank]


def _merged(symmetric: list[Triple], antisymmetric: list[Triple], settled: int) -> list[tuple[Triple, Tensor]]:
    """The leading triples of both kinds, as many as there are symmetric ones, and the kind of each, ``[groups]``."""
    triples, rank = symmetric + antisymmetric, len(symmetric)
    sigmas = [torch.stack([triple[0] for triple in some], dim=1) for some in (symmetric, antisymmetric)]
    merged = []
    for chosen in _order(sigmas[0], sigmas[1], rank, settled).T.tolist():
        parts = zip(*[[part[group] for part in triples[j]] for group, j in enumerate(chosen)], strict=True)
        sigma, u, v = (torch.stack(part) for part in parts)
        merged.append(((sigma, u, v), sigma.new_tensor([1 if j < rank else -1 for j in chosen])))
    return merged


def _closed(
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
    values, x = _eigh(half.mT @ right_gram @ half)
    sigma = values[:, -found:].flip(-1).clamp(min=0).sqrt().unsqueeze(1)
    x = x[..., -found:].flip(-1)
    scale = torch.where(sigma > _NEGLIGIBLE * sigma[..., :1], 1 / sigma, 0 * sigma)
    right = half @ x * scale.sqrt()
    left = core @ right_gram @ right * scale
    sign = torch.where((traces.unsqueeze(1) @ left) < 0, -1.0, 1.0)
    vectors = [torch.nn.functional.pad((x * sign).mT, (0, 0, 0, rank - found)) for x in (left, right)]
    return torch.nn.functional.pad(sigma.squeeze(1), (0, rank - found)), vectors[0], vectors[1]


# --- small pieces -----------------------------------------------------------------------------------------------------


def _scaled(vector: Tensor, factor: Tensor) -> Tensor:
    """A vector of each group times the group's number."""
    return vector * factor.view(-1, *[1] * (vector.dim() - 1)).to(vector.dtype)


def _inverse(value: Tensor) -> Tensor:
    """1 / value, and 0 of 0."""
    return torch.where(value == 0, 0, 1 / value)


def _combine(basis: Tensor, coefficients: Tensor) -> Tensor:
    """Linear combinations of ``[groups, k, ...]``: one of ``[groups, k]`` coefficients, or n of ``[groups, n, k]``."""
    rows = coefficients if coefficients.dim() == 3 else coefficients.unsqueeze(1)
    sums = (rows.to(basis.dtype) @ basis.flatten(2)).unflatten(2, basis.shape[2:])
    return sums if coefficients.dim() == 3 else sums.squeeze(1)


def _irregular(like: Tensor, kind: int, draw: int = 0) -> Tensor:
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


def _roughened(starts: Sequence[Tensor], kind: int) -> list[Tensor]:
    """Starts with a little of the irregular matrix mixed in.

    Structure may keep a positive semi-definite start from ever reaching an indefinite pair: with one example, for one,
    Z takes the identity to matrices that are diagonal in the singular basis of that example's gradient.
    """
    return [start + 0.1 * start.norm(dim=(1, 2), keepdim=True) * _irregular(start, kind) for start in starts]


def _gram(rows: Tensor) -> Tensor:
    rows = rows.double()
    return rows @ rows.mT


def _root(gram: Tensor) -> Tensor:
    """R with ``R R^T = gram``: Cholesky, with a ridge of the size of rounding, or by eigenvalues where that fails."""
    ridge = 8 * torch.finfo(gram.dtype).eps * gram.diagonal(dim1=1, dim2=2).sum(-1)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    root, failures = torch.linalg.cholesky_ex(gram + ridge.view(-1, 1, 1) * identity)
    if not bool(failures.any()):
        return root
    values, vectors = _eigh(gram)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(1)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; NaN where the matrix is not finite, which LAPACK would refuse."""
    finite = matrix.isfinite().all(-1).all(-1)
    values, vectors = torch.linalg.eigh(torch.where(finite.view(-1, 1, 1), matrix, 0))
    return torch.where(finite.view(-1, 1), values, torch.nan), vectors


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors, singular values, right vectors (in columns); NaN where the matrix is not finite."""
    finite = matrix.isfinite().all(-1).all(-1)
    left, values, right = torch.linalg.svd(torch.where(finite.view(-1, 1, 1), matrix, 0))
    return left, torch.where(finite.view(-1, 1), values, torch.nan), right.mT


# --- the public functions ---------------------------------------------------------------------------------------------


def cheapest_form(m: int, positions: int, d: int, o: int, *, masked: bool = False, solver: str = "gram") -> str:
    """The form of Z that solves one layer with the fewest floating-point operations.

    Counted are the set-up and the products of a typical solve (``_PRODUCTS``), each with a fixed price for being called
    at all, which decides between the closed form and an iteration on small problems.

    Args:
        m: examples.
        positions: shared positions T.
        d: inputs of the layer, bias entry included.
        o: outputs of the layer.
        masked: whether pairs of positions are left out, which ``gradients`` cannot do.
        solver: see ``leading_pairs``; ``lanczos`` bars the closed form, ``power`` all that rests on Gram matrices.

    Returns:
        One of ``FORMS``.
    """
    n = m * positions
    gram = _DOUBLE * 2 * n * n * (d + o)
    image = 2 * m * m if positions == 1 else 4 * n * n * positions
    costs = {
        "closed": gram + _DOUBLE * _DENSE * m**3 if positions == 1 else float("inf"),
        "coefficients": gram + _PRODUCTS * (_CALL + _DOUBLE * image),
        "gradients": 2 * n * d * o + _PRODUCTS * (_CALL + 2 * m * d * o * (d + o)),
        "locations": _PRODUCTS * (_CALL + 2 * n * (d * d + o * o + positions * (d + o))),
    }
    barred = {"gram": (), "lanczos": FORMS[:1], "power": FORMS[:2]}[solver]
    allowed = [f for f in FORMS if not (masked and f == "gradients") and f not in barred]
    return min(allowed, key=costs.__getitem__)


def leading_pairs(
    a: Tensor,
    g: Tensor,
    rank: int,
    *,
    solver: str = "gram",
    corrected: bool = False,
    mask: Tensor | None = None,
    start: Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 200,
    krylov: int = 20,
    form: str | None = None,
) -> Pairs:
    """The leading Kronecker pairs of one layer's Fisher block: ``F ~ sum_k right_k (x) left_k``.

    A pair carries ``sqrt(sigma)`` in either factor. Both are symmetric or, from the second pair on (of a corrected
    block, from the first), both antisymmetric, exactly, entry by entry. A symmetric left factor's trace is not
    negative; that makes both factors of the first pair positive semi-definite wherever F is. Of an antisymmetric left
    factor, the largest entry is above the diagonal. The first pair of a block that is not corrected is the best
    symmetric one; only a mask can make F so indefinite that an antisymmetric one were better. Samples that hold fewer
    than ``rank`` pairs (one example, a dead layer) fill up with zeros, and statistics that are not finite give NaN:
    neither is an error.

    Args:
        a: inputs ``[groups, m, T, d]``.
        g: gradients of the per-example loss by the outputs, ``[groups, m, T, o]``.
        rank: how many pairs.
        solver: ``gram`` (the cheapest form; Lanczos where it is not closed), ``lanczos`` (always), or ``power``, the
            published iteration on matrices.
        corrected: of ``F - G (x) A`` instead, with the K-FAC factors of these very samples: KFAC-corrected's residual.
        mask: which pairs of positions count, boolean and symmetric ``[T, T]``; None for all. See ``location_mask``.
        start: a positive semi-definite right factor for iterations to start from, ``[o, o]`` or ``[groups, o, o]``;
            None for the identity. Where pairs may be indefinite, a little of a fixed irregular matrix is mixed in.
        tolerance: iterations end when the error of every wanted triple is this small against its singular value. It is
            estimated by the residual, divided by what parts the triple from the next, as far as that can be told.
        max_iterations: of the power iteration, a pair; of Lanczos, in all. The best so far is returned then.
        krylov: vectors that Lanczos keeps on either side before it restarts.
        form: one of ``FORMS``; None for the cheapest.

    Returns:
        ``rank`` pairs (left ``[groups, d, d]``, right ``[groups, o, o]``), the leading one first.

    Raises:
        ValueError: a setting out of its range, or tensors that do not fit together.
    """
    return leading_pairs_many(
        [(a, g)],
        rank,
        solver=solver,
        corrected=corrected,
        masks=[mask],
        starts=[start],
        tolerance=tolerance,
        max_iterations=max_iterations,
        krylov=krylov,
        form=form,
    )[0]


@torch.no_grad()
def leading_pairs_many(
    layers: Sequence[tuple[Tensor, Tensor]],
    rank: int,
    *,
    solver: str = "gram",
    corrected: bool = False,
    masks: Sequence[Tensor | None] | None = None,
    starts: Sequence[Tensor | None] | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 200,
    krylov: int = 20,
    form: str | None = None,
) -> list[Pairs]:
    """``leading_pairs`` of several layers; their small closed-form problems are solved in one batch.

    Args:
        layers: ``(a, g)`` of each layer.
        rank: see ``leading_pairs``.
        solver: see ``leading_pairs``.
        corrected: see ``leading_pairs``.
        masks: one a layer.
        starts: one a layer.
        tolerance: see ``leading_pairs``.
        max_iterations: see ``leading_pairs``.
        krylov: see ``leading_pairs``.
        form: see ``leading_pairs``.

    Returns:
        The pairs of each layer.

    Raises:
        ValueError: a setting out of its range, or tensors that do not fit together.
    """
    _check_settings(rank, solver, tolerance, max_iterations, krylov, form)
    masks = masks if masks is not None else [None] * len(layers)
    starts = starts if starts is not None else [None] * len(layers)
    solve: Callable[..., list[Triple]] = partial(_lanczos, krylov=krylov) if solver != "power" else _power
    solve = partial(solve, tolerance=tolerance, max_iterations=max_iterations)
    found: dict[int, Pairs] = {}
    batches: dict[tuple[Any, ...], list[int]] = {}
    for index, ((a, g), mask, start) in enumerate(zip(layers, masks, starts, strict=True)):
        _check_sample(a, g, mask, start, form)
        m, t, d, o = *a.shape[1:], g.shape[-1]
        chosen = form or cheapest_form(m, t, d, o, masked=mask is not None, solver=solver)
        # Small problems gain by company: those of one position, whose size is m alone.
        together = chosen == "closed" or (chosen == "coefficients" and t == 1 and mask is None)
        batches.setdefault((chosen, m, a.device) if together else (chosen, index), []).append(index)
    for (chosen, *_), indices in batches.items():
        members, mask = [layers[i] for i in indices], masks[indices[0]]
        if chosen == "closed":
            pairs = _closed_pairs(members, [masks[i] for i in indices], rank, corrected)
        else:
            given = [
                (torch.eye(g.shape[-1]) if start is None else start).to(g).expand(len(g), *2 * g.shape[-1:])
                for (_, g), start in zip(members, (starts[i] for i in indices), strict=True)
            ]
            pairs = _iterated_pairs(chosen, members, mask, given, rank, corrected, solve)
        found.update(zip(indices, pairs, strict=True))
    return [found[index] for index in range(len(layers))]


def compress(lefts: Sequence[Tensor], rights: Sequence[Tensor], weights: Sequence[float], rank: int) -> Pairs:
    """The best sum of ``rank`` Kronecker products for ``sum_i weights_i right_i (x) left_i``, a handful of terms.

    This averages curvature over steps: ``rho * old + (1 - rho) * new``, both sums of Kronecker products, is one of
    twice the terms. Only their inner products enter the decomposition. Scale and signs are those of ``leading_pairs``,
    and the first pair of positive semi-definite terms is positive semi-definite.

    A term whose left factor is antisymmetric, exactly, is taken to be antisymmetric in both factors; all others are
    taken to be symmetric. The two kinds are orthogonal, and are decomposed apart, so that each pair combines terms of
    one kind only and is of that kind as exactly as they are.

    Args:
        lefts: matrices ``[groups, d, d]``.
        rights: matrices ``[groups, o, o]``.
        weights: one a term.
        rank: how many pairs.

    Returns:
        ``rank`` pairs (left ``[groups, d, d]``, right ``[groups, o, o]``), the leading one first; zero beyond the
        rank of the sum.

    Raises:
        ValueError: no terms, lists of different lengths, or a rank below 1.
    """
    return compress_many([(lefts, rights, weights)], rank)[0]


@torch.no_grad()
def compress_many(layers: Sequence[Terms], rank: int) -> list[Pairs]:
    """``compress`` of several layers; the small problems of those with equally many terms are solved in one batch.

    Args:
        layers: lefts, rights and weights of each layer.
        rank: see ``compress``.

    Returns:
        The pairs of each layer.

    Raises:
        ValueError: no terms, lists of different lengths, or a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    alike: dict[tuple[int, torch.device], list[int]] = {}
    for index, (lefts, rights, weights) in enumerate(layers):
        if not lefts or not len(lefts) == len(rights) == len(weights):
            raise ValueError(
                f"lefts, rights and weights must be as many as there are terms, "
                f"got {len(lefts)}, {len(rights)} and {len(weights)}"
            )
        alike.setdefault((len(lefts), lefts[0].device), []).append(index)
    found: dict[int, Pairs] = {}
    for indices in alike.values():
        found.update(zip(indices, _compressed([layers[i] for i in indices], rank), strict=True))
    return [found[index] for index in range(len(layers))]


def location_mask(height: int, width: int, radius: int) -> Tensor:
    """Which pairs of positions of a ``height x width`` image lie within a radius, rows and columns each.

    Args:
        height: rows of positions.
        width: columns of positions.
        radius: largest distance that counts, in either direction of the grid.

    Returns:
        Boolean ``[T, T]`` with ``T = height * width``, positions in row-major order.

    Raises:
        ValueError: an empty grid or a negative radius.
    """
    for name, value, least in (("height", height, 1), ("width", width, 1), ("radius", radius, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    rows, columns = torch.arange(height), torch.arange(width)
    near_rows = (rows.unsqueeze(1) - rows).abs() <= radius
    near_columns = (columns.unsqueeze(1) - columns).abs() <= radius
    near = near_rows.view(height, 1, height, 1) & near_columns.view(1, width, 1, width)
    return near.reshape(height * width, height * width)


def _check_settings(
    rank: int, solver: str, tolerance: float, max_iterations: int, krylov: int, form: str | None
) -> None:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if tolerance <= 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    if krylov < rank + 2:
        raise ValueError(f"krylov must be at least rank + 2 = {rank + 2}, got {krylov}")
    if form not in (None, *FORMS):
        raise ValueError(f"form must be one of {', '.join(FORMS)} or None, got {form!r}")
    if form == "closed" and solver != "gram":
        raise ValueError(f"form 'closed' is the gram solver's, got solver {solver!r}")


def _check_sample(a: Tensor, g: Tensor, mask: Tensor | None, start: Tensor | None, form: str | None) -> None:
    if a.dim() != 4 or not a.numel():
        raise ValueError(f"a must be [groups, m, T, d] and not empty, got {tuple(a.shape)}")
    if g.dim() != 4 or g.shape[:3] != a.shape[:3] or not g.numel():
        raise ValueError(f"g must be [groups, m, T, o] with the groups, m and T of a, got {tuple(g.shape)}")
    t, o = a.shape[2], g.shape[-1]
    if mask is not None and mask.shape != (t, t):
        raise ValueError(f"mask must be [T, T] = {(t, t)}, got {tuple(mask.shape)}")
    if start is not None and start.shape[-2:] != (o, o):
        raise ValueError(f"start must end in [o, o] = {(o, o)}, got {tuple(start.shape)}")
    if form == "closed" and t != 1:
        raise ValueError(f"form 'closed' is for one position, got T = {t}")
    if form == "gradients" and mask is not None:
        raise ValueError("form 'gradients' sums over all positions, so it takes no mask")


def _iterated_pairs(
    form: str,
    layers: list[tuple[Tensor, Tensor]],
    mask: Tensor | None,
    starts: list[Tensor],
    rank: int,
    corrected: bool,
    solve: Callable[..., list[Triple]],
) -> list[Pairs]:
    """The leading pairs of layers that share an operator (of one layer, but for ``coefficients``)."""
    # Gradients shrink by many orders of magnitude in training, and Z holds their fourth powers.
    sizes = [g.abs().amax((1, 2, 3), keepdim=True) for _, g in layers]
    sizes = [torch.where(size == 0, 1, size) for size in sizes]
    operator = _operator(form, [(a, g / size) for (a, g), size in zip(layers, sizes, strict=True)], mask)
    if corrected:
        operator.deflate(*operator.kfac())
    triples = solve(operator, rank, starts)
    a, g = layers[0]
    if a.shape[2] > 1 and min(a.shape[-1], g.shape[-1]) > 1 and (corrected or rank > 1):
        rivals = torch.stack([sigma for sigma, _, _ in triples], dim=1)
        settled = 0 if corrected else 1
        irregular = [_irregular(start, -1) for start in starts]
        others = solve(operator.antisymmetric(), rank - settled, irregular, rivals)
        ranked = _merged(triples, others, settled)
    else:
        ranked = [(triple, torch.ones_like(triple[0])) for triple in triples]
    pairs = [_pair(operator, triple, kinds, sizes) for triple, kinds in ranked]
    return [list(of_layer) for of_layer in zip(*pairs, strict=True)]


def _operator(form: str, layers: list[tuple[Tensor, Tensor]], mask: Tensor | None) -> Operator:
    if form == "coefficients":
        return GramCoefficients(layers, mask)
    ((a, g),) = layers
    return ExampleGradients(a, g) if form == "gradients" else Locations(a, g, mask)


def _pair(operator: Operator, triple: Triple, kinds: Tensor, sizes: list[Tensor]) -> Pairs:
    """A triple's matrices, one (left, right) a layer of the operator."""
    sigma, u, v = triple
    pairs = []
    for size, root, kind, left, right in zip(
        sizes,
        sigma.sqrt().split([len(size) for size in sizes]),
        kinds.split([len(size) for size in sizes]),
        operator.left_matrices(u),
        operator.right_matrices(v),
        strict=True,
    ):
        left, right = _mirrored(left, kind), _mirrored(right, kind)
        factor = root * size.flatten() * _signs(left, kind)
        pairs.append((_scaled(left, factor), _scaled(right, factor)))
    return pairs


def _signs(left: Tensor, kinds: Tensor) -> Tensor:
    """The sign of each group's pair: of the left factor's trace, or of its largest entry above the diagonal."""
    signs = torch.where(left.diagonal(dim1=1, dim2=2).sum(-1) < 0, -1, 1)
    if bool((kinds < 0).any()):
        largest = left.flatten(1).argmax(1)  # of an antisymmetric matrix also the largest in size
        below = largest // left.shape[-1] > largest % left.shape[-1]
        signs = torch.where(kinds < 0, torch.where(below, -1, 1), signs)
    return signs


def _closed_pairs(
    layers: list[tuple[Tensor, Tensor]], masks: list[Tensor | None], rank: int, corrected: bool
) -> list[Pairs]:
    """One position a layer: Z = P C Q^T with columns ``vec(a_i a_i^T)`` and ``vec(g_i g_i^T)``, and C diagonal.

    K-FAC's own product is ``P (1 1^T / m^2) Q^T``, so what it leaves has the C of a covariance.
    """
    lefts, rights = ([_gram(rows.squeeze(2)) for rows in side] for side in zip(*layers, strict=True))
    groups, m = [len(gram) for gram in lefts], lefts[0].shape[-1]
    identity = torch.eye(m, dtype=torch.float64, device=lefts[0].device)
    cores = [identity / m if mask is None else identity * mask / m for mask in masks]
    core = torch.cat([core.expand(n, m, m) for core, n in zip(cores, groups, strict=True)])
    core = core - 1 / m**2 if corrected else core
    left, right = torch.cat(lefts), torch.cat(rights)
    traces = left.diagonal(dim1=1, dim2=2)
    _, left_c, right_c = _closed(left.square(), right.square(), core, traces, rank)
    return [
        [(_weighted(a, x[:, k]), _weighted(g, y[:, k])) for k in range(rank)]
        for (a, g), x, y in zip(layers, left_c.split(groups), right_c.split(groups), strict=True)
    ]


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """``sum_i weights_i rows_i rows_i^T`` of ``[groups, m, 1, n]``, exactly symmetric."""
    rows = rows.squeeze(2)
    weighted = (rows * weights.unsqueeze(-1).to(rows.dtype)).mT
    n = rows.shape[-1]
    total = rows.new_empty(len(rows), n, n)
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        for left, right, result in zip(weighted, rows, total, strict=True):
            torch.mm(left[start:stop], right[:, start:], out=result[start:stop, start:])
    return _mirrored(total)


def _mirrored(matrix: Tensor, kinds: Tensor | None = None) -> Tensor:
    """A matrix, given above its diagonal and around it, made exactly symmetric or of ``kinds [groups]``, in place."""
    kind = None if kinds is None else kinds.to(matrix).view(-1, 1, 1)
    n = matrix.shape[-1]
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        square, below = matrix[:, start:stop, start:stop], matrix[:, stop:, start:stop]
        mirror = square.mT if kind is None else kind * square.mT
        square.copy_(square.add(mirror).mul_(0.5))
        below.copy_(matrix[:, start:stop, stop:].mT)
        if kind is not None:
            below.mul_(kind)
    return matrix


def _compressed(layers: list[Terms], rank: int) -> list[Pairs]:
    """``compress_many`` of layers with equally many terms."""
    all_lefts = [lefts for lefts, _, _ in layers]
    left_gram, right_gram = _inner_products(all_lefts), _inner_products([rights for _, rights, _ in layers])
    traces = torch.cat([_per_term([x.diagonal(dim1=1, dim2=2).sum(-1) for x in lefts]) for lefts in all_lefts]).double()
    groups = [len(lefts[0]) for lefts in all_lefts]
    rows = [list(weights) for (_, _, weights), n in zip(layers, groups, strict=True) for _ in range(n)]
    weights = left_gram.new_tensor(rows)
    other = torch.cat([_antisymmetric(lefts) for lefts in all_lefts])
    mixed = bool(other.any())
    if not mixed:
        _, left_c, right_c = _closed(left_gram, right_gram, weights.diag_embed(), traces, rank)
        kinds = torch.ones_like(left_c[..., 0])
    else:
        cores = torch.cat([(weights * ~other).diag_embed(), (weights * other).diag_embed()])
        sigma, left_c, right_c = _closed(
            left_gram.repeat(2, 1, 1), right_gram.repeat(2, 1, 1), cores, traces.repeat(2, 1), rank
        )
        order = _order(sigma[: len(other)], sigma[len(other) :], rank)
        chosen = order.unsqueeze(-1).expand(-1, -1, weights.shape[1])
        left_c, right_c = (torch.cat(c.chunk(2), dim=1).gather(1, chosen) for c in (left_c, right_c))
        kinds = torch.where(order < rank, 1.0, -1.0)
    found = []
    split = (part.split(groups) for part in (left_c, right_c, kinds))
    for (lefts, rights, _), x, y, kind in zip(layers, *split, strict=True):
        pairs = list(zip(_weighted_sums(lefts, x), _weighted_sums(rights, y), strict=True))
        if mixed:  # traces have settled the signs of symmetric pairs only
            signs = [_signs(left, kind[:, k]) for k, (left, _) in enumerate(pairs)]
            pairs = [(_scaled(left, s), _scaled(right, s)) for (left, right), s in zip(pairs, signs, strict=True)]
        found.append(pairs)
    return found


def _antisymmetric(matrices: Sequence[Tensor]) -> Tensor:
    """Which of some ``[groups, n, n]`` matrices are exactly antisymmetric: ``[groups, number of them]``."""
    found = _per_term([(matrix.diagonal(dim1=1, dim2=2) == 0).all(1) for matrix in matrices])
    if bool(found.any()):  # hardly ever for another reason
        found = _per_term([(matrix == -matrix.mT).all(2).all(1) for matrix in matrices])
    return found


def _inner_products(layers: Sequence[Sequence[Tensor]]) -> Tensor:
    """``[sum of groups, k, k]`` of k terms ``[groups, n, n]`` a layer, the long sums in double precision."""
    k = len(layers[0])
    rows, columns = torch.triu_indices(k, k, device=layers[0][0].device)
    places = list(zip(rows.tolist(), columns.tolist(), strict=True))
    sums = []
    for terms in layers:
        if _plain(terms[0]):
            chunks = zip(*(x.reshape(-1).split(_CHUNK) for x in terms), strict=True)
            parts = torch.stack([torch.dot(chunk[i], chunk[j]) for chunk in chunks for i, j in places])
            sums.append(parts.double().view(1, -1, len(places)).sum(1))
        else:
            sums.append(_per_term([(terms[i] * terms[j]).sum(2) for i, j in places]).double().sum(2))
    upper = torch.cat(sums)
    gram = upper.new_empty(len(upper), k, k)
    gram[:, rows, columns] = gram[:, columns, rows] = upper
    return gram


def _weighted_sums(terms: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """``sum_k weights_jk terms_k`` of ``[groups, j, k]`` weights, an entry and its mirror image treated alike."""
    if not _plain(terms[0]):
        columns = weights.to(terms[0].dtype)[..., None, None]
        return [
            torch.stack([x * columns[:, j, k] for k, x in enumerate(terms)]).sum(0) for j in range(weights.shape[1])
        ]
    sums = []
    for row in weights[0].tolist():
        total = terms[0] * row[0]
        for term, weight in zip(terms[1:], row[1:], strict=True):
            total.add_(term, alpha=weight)
        sums.append(total)
    return sums


def _plain(term: Tensor) -> bool:
    """Whether numbers are quicker than tensors of a number each group: for one group, where reading them is free."""
    return len(term) == 1 and term.device.type == "cpu"


def _per_term(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values), dim=1)
