"""Matrices over one layer's parameters, as factors: what they do, and norms and inner products in closed form.

All of them act on ``[groups, d_out, columns]``, the layer's parameter matrix, and are symmetric. None is ever formed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

#: Numbers that a temporary tensor may hold.
ROOM = 2**23

#: Up to this size vectors of a Lanczos process are kept and made orthogonal to each other.
KEPT = 2**16


class Operator(ABC):
    """A symmetric matrix over the parameter matrix ``[groups, d_out, columns]`` of a layer."""

    @abstractmethod
    def apply(self, matrix: Tensor) -> Tensor:
        """Its product with a vector, which has the shape of the parameter matrix."""

    @abstractmethod
    def squared_norm(self) -> float:
        """Its squared Frobenius norm."""

    @abstractmethod
    def trace(self) -> float:
        """Its trace."""

    @abstractmethod
    def kernel(self, a: Tensor, g: Tensor, single: bool = False) -> Tensor:
        """``Sᵀ M S`` for S with a column ``sum_t g_it a_itᵀ`` an example i.

        Args:
            a: ``[groups, examples, shared, columns]``.
            g: ``[groups, examples, shared, d_out]``.
            single: its diagonal alone is worked out.

        Returns:
            ``[examples, examples]``, or ``[examples]``.
        """


@dataclass(frozen=True)
class Term:
    """``(L_G (x) L_A) diag(W) (R_G (x) R_A)ᵀ``, group by group.

    Attributes:
        weights: W, ``[groups, p, q]``, or of a W that is ``w_G w_Aᵀ`` these two, ``[groups, p]`` and ``[groups, q]``.
        left: L_G ``[groups, d_out, p]`` and L_A ``[groups, columns, q]``; None: the identity.
        right: R_G and R_A likewise.
    """

    weights: Tensor | tuple[Tensor, Tensor]
    left: tuple[Tensor | None, Tensor | None] = (None, None)
    right: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def whole(self) -> Tensor:
        """W."""
        if isinstance(self.weights, Tensor):
            return self.weights
        return self.weights[0].unsqueeze(-1) * self.weights[1].unsqueeze(-2)


class KroneckerSum(Operator):
    """A sum of terms: products of Kronecker factors, diagonals, and diagonals in Kronecker-factored bases.

    Args:
        terms: of which the sum is symmetric.
    """

    def __init__(self, *terms: Term) -> None:
        self.terms = terms

    def apply(self, matrix: Tensor) -> Tensor:
        """See Operator."""
        total = torch.zeros_like(matrix)
        for term in self.terms:
            inside = _turned(_turned(matrix, term.right[1]).mT, term.right[0]).mT * term.whole
            total += _turned(_turned(inside, _flipped(term.left[1])).mT, _flipped(term.left[0])).mT
        return total

    def squared_norm(self) -> float:
        """See Operator."""
        return sum(float((one.whole * _overlap(one, two)).sum()) for one, two in product(self.terms, self.terms))

    def trace(self) -> float:
        """See Operator."""
        total = 0.0
        for term in self.terms:
            whole = term.whole
            g, a = (_traces(*pair, size) for pair, size in zip(_sides(term), whole.shape[1:], strict=True))
            total += float((g.unsqueeze(-1) * whole * a.unsqueeze(-2)).sum())
        return total

    def kernel(self, a: Tensor, g: Tensor, single: bool = False) -> Tensor:
        """See Operator."""
        total = g.new_zeros(g.shape[1] if single else (g.shape[1], g.shape[1]))
        for term in self.terms:
            equal = term.left[0] is term.right[0] and term.left[1] is term.right[1]
            lefts = [_turned(t, m) for t, m in zip((g, a), term.left, strict=True)]
            rights = lefts if equal else [_turned(t, m) for t, m in zip((g, a), term.right, strict=True)]
            if g.shape[2] == 1 and not isinstance(term.weights, Tensor):
                total += _separate(lefts, rights, term.weights, single)
                continue
            whole = term.whole
            width = max(1, ROOM // (a.shape[0] * a.shape[1] * whole.shape[2]))
            for start in range(0, whole.shape[1], width):
                some = slice(start, start + width)
                left = _examples(lefts, some)
                right = (left if equal else _examples(rights, some)) * whole[:, some].unsqueeze(1)
                if single:
                    total += (left * right).sum((0, 2, 3))
                else:
                    total += left.transpose(0, 1).flatten(1) @ right.transpose(0, 1).flatten(1).mT
        return total


class Scaled(Operator):
    """``diag(D) (M_G (x) M_A) diag(D)`` with symmetric M_G and M_A, group by group: FishLeg's form.

    Args:
        scale: D, ``[groups, d_out, columns]``.
        g: M_G.
        a: M_A.
    """

    def __init__(self, scale: Tensor, g: Tensor, a: Tensor) -> None:
        self.scale, self.g, self.a = scale, g, a

    def apply(self, matrix: Tensor) -> Tensor:
        """See Operator."""
        return self.scale * (self.g @ (self.scale * matrix) @ self.a)

    def squared_norm(self) -> float:
        """See Operator."""
        squares = self.scale.square()
        return float((squares * (self.g.square() @ squares @ self.a.square())).sum())

    def trace(self) -> float:
        """See Operator."""
        diagonals = [m.diagonal(dim1=-2, dim2=-1) for m in (self.g, self.a)]
        return float((diagonals[0].unsqueeze(-1) * self.scale.square() * diagonals[1].unsqueeze(-2)).sum())

    def kernel(self, a: Tensor, g: Tensor, single: bool = False) -> Tensor:
        """See Operator."""
        examples, some = g.shape[1], max(1, ROOM // self.scale.numel())

        def scaled(start: int) -> Tensor:
            part = slice(start, start + some)
            return (g[:, part].mT @ a[:, part]).transpose(0, 1) * self.scale  # [examples, groups, d_out, columns]

        rows = []
        for start in range(0, examples, some):
            inside = scaled(start)
            moved = (self.g @ inside @ self.a).flatten(1)
            if single:
                rows.append((inside.flatten(1) * moved).sum(1))
            else:
                rows.append(torch.cat([moved @ scaled(s).flatten(1).mT for s in range(0, examples, some)], 1))
        return torch.cat(rows)


def operator_norm(
    apply: Callable[[Tensor], Tensor], shape: tuple[int, ...], tolerance: float = 1e-2, limit: int = 60
) -> tuple[float, float]:
    """The largest magnitude of an eigenvalue of a symmetric matrix, by a Lanczos process.

    It stops where an eigenvalue is known to ``tolerance``, after ``limit`` products, or when as many products as the
    matrix has rows have told everything. What it finds is never too large but for rounding.

    Args:
        apply: the product with a vector of the shape.
        shape: of the vectors.
        tolerance: bound of the relative error.
        limit: of products.

    Returns:
        The norm, and the bound of its relative error that was reached.
    """
    size = torch.Size(shape).numel()
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    most = min(limit, size)
    # Without the others, rounding brings eigenvalues that are known back: none is lost, and none is made up.
    whole = size <= KEPT
    basis = torch.zeros(most if whole else 2, size, dtype=torch.float64)
    basis[0] = vector / vector.norm()
    diagonal: list[float] = []
    below: list[float] = []
    largest, bound = 0.0, 0.0
    for count in range(1, most + 1):
        last = basis[(count - 1) % len(basis)]
        image = apply(last.view(shape)).flatten()
        diagonal.append(float(image @ last))
        known = basis[:count] if whole else basis
        for _ in range(2):  # once would leave what rounding has made of it
            image = image - known.mT @ (known @ image)
        length = float(image.norm())
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if below:
            off = torch.tensor(below, dtype=torch.float64)
            matrix += torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(matrix)
        place = int(values.abs().argmax())
        largest = abs(float(values[place]))
        bound = length * abs(float(vectors[-1, place])) / largest if largest else 0.0
        scale = max(map(abs, [*diagonal, *below]), default=0.0)
        if length <= 1e-14 * scale or (bound <= tolerance and count > 3) or count == most:
            break
        basis[count % len(basis)] = image / length
        below.append(length)
    return largest, bound


def _turned(rows: Tensor, matrix: Tensor | None) -> Tensor:
    """``[groups, ..., d]`` times ``[groups, d, r]``; None: as it is."""
    if matrix is None:
        return rows
    flat = rows.reshape(len(rows), -1, rows.shape[-1])
    return torch.bmm(flat, matrix).view(*rows.shape[:-1], matrix.shape[-1])


def _flipped(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.mT


def _sides(term: Term) -> list[tuple[Tensor | None, Tensor | None]]:
    """``(L_G, R_G)`` and ``(L_A, R_A)``."""
    return list(zip(term.left, term.right, strict=True))


def _traces(left: Tensor | None, right: Tensor | None, size: int) -> Tensor:
    """``l_p . r_p`` of two matrices' columns, ``[groups or 1, p]``."""
    if left is None and right is None:
        return torch.ones(1, size, dtype=torch.float64)
    if left is None or right is None:
        one = left if right is None else right
        assert one is not None
        return one.diagonal(dim1=-2, dim2=-1)
    return (left * right).sum(-2)


def _gram(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    """``oneᵀ two``; None: the identity."""
    if one is None:
        return two
    return one.mT if two is None else one.mT @ two


def _overlap(one: Term, two: Term) -> Tensor:
    """``(K_G W K_Aᵀ)`` of the second term's W, with K the products of both terms' left and of both right factors."""
    result = two.whole
    for side in (0, 1):
        grams = [_gram(a[side], b[side]) for a, b in ((one.left, two.left), (one.right, two.right))]
        if all(gram is None for gram in grams):
            continue
        if grams[0] is None or grams[1] is None:  # of the identity's entries, the diagonal alone is not zero
            known = grams[0] if grams[1] is None else grams[1]
            assert known is not None
            both = torch.diag_embed(known.diagonal(dim1=-2, dim2=-1))
        else:
            both = grams[0] * grams[1]
        result = both @ result if side == 0 else result @ both.mT
    return result


def _examples(parts: list[Tensor], some: slice) -> Tensor:
    """``sum_t g_t a_tᵀ`` by example, of some rows: ``[groups, examples, rows, columns]``."""
    g, a = parts
    return g[..., some].mT @ a


def _separate(lefts: list[Tensor], rights: list[Tensor], weights: tuple[Tensor, Tensor], single: bool) -> Tensor:
    """The kernel of one position and weights ``w_G w_Aᵀ``: a product of what either side makes."""
    sides = []
    for left, right, weight in zip(lefts, rights, weights, strict=True):
        scaled, other = left.squeeze(2) * weight.unsqueeze(1), right.squeeze(2)
        sides.append((scaled * other).sum(-1) if single else scaled @ other.mT)
    return (sides[0] * sides[1]).sum(0)
