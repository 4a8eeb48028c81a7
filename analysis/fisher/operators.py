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
ROOM = 2**25


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
        weights: W, ``[groups, p, q]``.
        left: L_G ``[groups, d_out, p]`` and L_A ``[groups, columns, q]``; None: the identity.
        right: R_G and R_A likewise.
    """

    weights: Tensor
    left: tuple[Tensor | None, Tensor | None] = (None, None)
    right: tuple[Tensor | None, Tensor | None] = (None, None)


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
            inside = _turned(_turned(matrix, term.right[1]).mT, term.right[0]).mT * term.weights
            total += _turned(_turned(inside, _flipped(term.left[1])).mT, _flipped(term.left[0])).mT
        return total

    def squared_norm(self) -> float:
        """See Operator."""
        return sum(float((one.weights * _overlap(one, two)).sum()) for one, two in product(self.terms, self.terms))

    def trace(self) -> float:
        """See Operator."""
        total = 0.0
        for term in self.terms:
            g, a = (_traces(*pair, size) for pair, size in zip(_sides(term), term.weights.shape[1:], strict=True))
            total += float((g.unsqueeze(-1) * term.weights * a.unsqueeze(-2)).sum())
        return total

    def kernel(self, a: Tensor, g: Tensor, single: bool = False) -> Tensor:
        """See Operator."""
        total = g.new_zeros(g.shape[1] if single else (g.shape[1], g.shape[1]))
        for term in self.terms:
            equal = term.left[0] is term.right[0] and term.left[1] is term.right[1]
            lefts = [_turned(t, m) for t, m in zip((g, a), term.left, strict=True)]
            rights = lefts if equal else [_turned(t, m) for t, m in zip((g, a), term.right, strict=True)]
            width = max(1, ROOM // (a.shape[0] * a.shape[1] * term.weights.shape[2]))
            for start in range(0, term.weights.shape[1], width):
                some = slice(start, start + width)
                left = _examples(lefts, some)
                right = (left if equal else _examples(rights, some)) * term.weights[:, some].unsqueeze(1)
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
    apply: Callable[[Tensor], Tensor], shape: tuple[int, ...], tolerance: float = 1e-3, limit: int = 100
) -> tuple[float, float]:
    """The largest magnitude of an eigenvalue of a symmetric matrix, by a Lanczos process with reorthogonalisation.

    It stops where an eigenvalue is known to ``tolerance``, after ``limit`` products, or when as many products as the
    matrix has rows have told everything. What it finds is never too large.

    Args:
        apply: the product with a vector of the shape.
        shape: of the vectors.
        tolerance: bound of the relative error.
        limit: of products.

    Returns:
        The norm, and the bound of its relative error that was reached.
    """
    size = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    basis = [vector / vector.norm()]
    diagonal: list[float] = []
    below: list[float] = []
    largest, bound = 0.0, 0.0
    for count in range(1, min(limit, size) + 1):
        image = apply(basis[-1].view(shape)).flatten()
        diagonal.append(float(image @ basis[-1]))
        known = torch.stack(basis)
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
        whole = max(map(abs, [*diagonal, *below]), default=0.0)
        if length <= 1e-14 * whole or (bound <= tolerance and count > 3) or count == size:
            break
        basis.append(image / length)
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
    result = two.weights
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
