"""Positive matrices over one layer's parameters that are learned: Q of the natural gradient ``Q g``.

Each has the product with Q and the gradient of ``<D, Q U>`` by what Q is made of, which is all that learning it takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..curvature.approximations import statistics_dtype
from ..curvature.layers import AffineLayer, Layer

#: Factors, or their gradients, by name.
Factors = dict[str, Tensor]

#: Processors multiply matrices faster whose rows are a multiple of so many numbers long; narrow ones gain nothing.
ALIGNED, NARROW = 8, 64


class LearnedInverse(ABC):
    """A positive matrix Q over one layer's parameters, with the gradient of ``<D, Q U>`` by what it is made of.

    Attributes:
        layer: the layer's adapter.
        factors: λ by name.
        first: Adam's first moments of λ.
        second: Adam's second moments of λ.
        updates: how many updates λ has had.
        squares: mean of the squared gradients seen in the warm-up, as a matrix; None outside of it.
    """

    #: Nothing is gathered in backward passes.
    observed: bool = False

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        weight = layer.parameters[0]
        dtype = statistics_dtype(weight)
        self.factors = {k: torch.zeros(s, dtype=dtype, device=weight.device) for k, s in self.shapes().items()}
        self.first = {key: torch.zeros_like(t) for key, t in self.factors.items()}
        self.second = {key: torch.zeros_like(t) for key, t in self.factors.items()}
        self.updates = 0
        self.squares: Tensor | None = None

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors."""

    @abstractmethod
    def to_matrix(self, tensors: list[Tensor]) -> Tensor:
        """Tensors shaped like the layer's parameters in the one shape that Q acts on."""

    @abstractmethod
    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """Inverse of ``to_matrix``."""

    @abstractmethod
    def set_diagonal(self, values: Tensor) -> None:
        """Make Q the diagonal matrix of positive ``values`` (as a matrix: see ``to_matrix``)."""

    @abstractmethod
    def apply(self, u: Tensor) -> Tensor:
        """``Q U``."""

    @abstractmethod
    def vjp(self, u: Tensor) -> tuple[Tensor, Callable[[Tensor], Factors]]:
        """``Q U``, and the function from D to the gradient of ``<D, Q U>`` by each factor."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Q as a matrix in the row-major order of the ``[d_out, d_in (+ 1)]`` weight matrix, bias last."""

    @abstractmethod
    def refresh(self) -> None:
        """Work out again what is kept of the factors: they have changed."""

    def kept_bytes(self) -> int:
        """Bytes besides the factors: Adam's moments and what ``refresh`` keeps."""
        return 2 * sum(t.numel() * t.element_size() for t in self.factors.values())


class LearnedKronecker(LearnedInverse):
    """``Q U = A * (RᵀR (A * U) LLᵀ)`` with an elementwise A: the block of an affine layer (section 4.2 of the paper).

    The two products ``RᵀR`` and ``LLᵀ`` are kept, so that a step multiplies twice and not four times.

    Args:
        layer: of parameters ``[groups, d_out, columns]``.
        max_factor_dim: a wider L or R is left out (it is the identity; A alone acts on that side); None: none is.
    """

    layer: AffineLayer

    def __init__(self, layer: AffineLayer, max_factor_dim: int | None) -> None:
        self._limit = float("inf") if max_factor_dim is None else max_factor_dim
        # Columns are filled up with zeros: A is zero there, and the gradient of L, so L stays the identity.
        self._width = -(-layer.columns // ALIGNED) * ALIGNED if layer.columns > NARROW else layer.columns
        self._grams: Factors = {}
        super().__init__(layer)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See LearnedInverse."""
        groups, rows, width = self.layer.groups, self.layer.d_out, self._width
        shapes: dict[str, tuple[int, ...]] = {}
        if self.layer.columns <= self._limit:
            shapes["L"] = (groups, width, width)
        if rows <= self._limit:
            shapes["R"] = (groups, rows, rows)
        return shapes | {"A": (groups, rows, width)}

    def to_matrix(self, tensors: list[Tensor]) -> Tensor:
        """See LearnedInverse."""
        matrix = self.layer.to_matrix(tensors[0], tensors[1] if len(tensors) > 1 else None)
        missing = self._width - self.layer.columns
        return (F.pad(matrix, (0, missing)) if missing else matrix).to(self.factors["A"].dtype)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """See LearnedInverse."""
        return self.layer.from_matrix(matrix[..., : self.layer.columns])

    def set_diagonal(self, values: Tensor) -> None:
        """See LearnedInverse."""
        columns = slice(self.layer.columns)
        self.factors["A"].zero_()[..., columns] = values[..., columns].sqrt()
        for key in self.factors.keys() - {"A"}:
            factor = self.factors[key]
            factor.copy_(torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device))
            self._grams[key] = factor.clone()  # no need to multiply

    def refresh(self) -> None:
        """See LearnedInverse."""
        if "L" in self.factors:
            self._grams["L"] = self.factors["L"] @ self.factors["L"].mT
        if "R" in self.factors:
            self._grams["R"] = self.factors["R"].mT @ self.factors["R"]

    def _left(self, x: Tensor) -> Tensor:
        return self._grams["R"] @ x if "R" in self._grams else x

    def _right(self, x: Tensor) -> Tensor:
        return x @ self._grams["L"] if "L" in self._grams else x

    def apply(self, u: Tensor) -> Tensor:
        """See LearnedInverse."""
        a = self.factors["A"]
        return a * self._right(self._left(a * u))

    def vjp(self, u: Tensor) -> tuple[Tensor, Callable[[Tensor], Factors]]:
        """See LearnedInverse.

        With ``X = A * U`` and ``E = A * D`` the product is ``<E, RᵀR X LLᵀ>``: bilinear in X and E, and linear in the
        two Gram matrices, whose gradients G reach R as ``R (G + Gᵀ)`` and L as ``(G + Gᵀ) L``.
        """
        a = self.factors["A"]
        x = a * u
        left = self._left(x)
        both = self._right(left)

        def gradients(d: Tensor) -> Factors:
            e = a * d
            right = self._right(e)
            found = {"A": d * both + u * self._left(right)}
            if "L" in self.factors:
                gram = left.mT @ e
                found["L"] = (gram + gram.mT) @ self.factors["L"]
            if "R" in self.factors:
                gram = right @ x.mT
                found["R"] = self.factors["R"] @ (gram + gram.mT)
            return {key: found[key] for key in self.factors}

        return a * both, gradients

    def to_dense(self) -> Tensor:
        """See LearnedInverse."""
        columns = self.layer.columns
        identities = {"R": torch.eye(self.layer.d_out), "L": torch.eye(columns)}
        blocks = []
        for group, a in enumerate(self.factors["A"][..., :columns]):
            right, left = (
                self._grams[key][group, :size, :size] if key in self._grams else identities[key].to(a)
                for key, size in (("R", self.layer.d_out), ("L", columns))
            )
            blocks.append(a.reshape(-1, 1) * torch.kron(right.contiguous(), left.contiguous()) * a.reshape(1, -1))
        return torch.block_diag(*blocks)

    def kept_bytes(self) -> int:
        """See LearnedInverse."""
        return super().kept_bytes() + sum(t.numel() * t.element_size() for t in self._grams.values())


class LearnedDiagonal(LearnedInverse):
    """``Q U = D * D * U``: the block of an elementwise layer (norms, Embedding), all parameters in one vector."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See LearnedInverse."""
        return {"D": (sum(p.numel() for p in self.layer.parameters),)}

    def to_matrix(self, tensors: list[Tensor]) -> Tensor:
        """See LearnedInverse."""
        return torch.cat([t.flatten() for t in tensors]).to(self.factors["D"].dtype)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """See LearnedInverse."""
        parameters = self.layer.parameters
        pieces = matrix.split([p.numel() for p in parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]

    def set_diagonal(self, values: Tensor) -> None:
        """See LearnedInverse."""
        self.factors["D"].copy_(values.sqrt())

    def refresh(self) -> None:
        """See LearnedInverse. Nothing is."""

    def apply(self, u: Tensor) -> Tensor:
        """See LearnedInverse."""
        return self.factors["D"].square().mul_(u)

    def vjp(self, u: Tensor) -> tuple[Tensor, Callable[[Tensor], Factors]]:
        """See LearnedInverse."""
        return self.apply(u), lambda d: {"D": 2 * self.factors["D"] * u * d}

    def to_dense(self) -> Tensor:
        """See LearnedInverse."""
        return torch.diag(self.factors["D"].square())


def descend_blocks(
    blocks: Sequence[LearnedInverse], gradients: Sequence[Factors], lr: float, betas: tuple[float, ...], eps: float
) -> None:
    """Adam's step of λ, in place.

    Args:
        blocks: to be changed; ``refresh`` is the caller's to call.
        gradients: by factor, one dictionary a block.
        lr: learning rate.
        betas: decays of the two moments.
        eps: Adam's epsilon.
    """
    names = [(block, key) for block in blocks for key in block.factors]
    found = [g[key] for block, g in zip(blocks, gradients, strict=True) for key in block.factors]
    for block in blocks:
        block.updates += 1
    (beta1, beta2), counts = betas, [block.updates for block, _ in names]
    first, second = [block.first[key] for block, key in names], [block.second[key] for block, key in names]
    torch._foreach_lerp_(first, found, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, found, found, value=1 - beta2)
    # Bias corrections in the scalars alone: sqrt(v / c) + eps = (sqrt(v) + eps sqrt(c)) / sqrt(c).
    roots = [(1 - beta2**n) ** 0.5 for n in counts]
    denominators = torch._foreach_sqrt(second)
    torch._foreach_add_(denominators, [eps * root for root in roots])
    rates = [-lr * root / (1 - beta1**n) for root, n in zip(roots, counts, strict=True)]
    torch._foreach_addcdiv_([block.factors[key] for block, key in names], first, denominators, rates)
