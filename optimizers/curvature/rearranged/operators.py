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
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .algebra import combined, gram_matrix


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
        return product - combined(lefts, self.inner(rights, v))

    def right(self, u: Tensor) -> Tensor:
        """The right vector ``Z^T u`` of a left vector."""
        product = self._right(u)
        if self._found is None:
            return product
        lefts, rights = self._found
        return product - combined(rights, self.inner(lefts, u))

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
        gram = gram_matrix(rows.flatten(1, 2))
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
