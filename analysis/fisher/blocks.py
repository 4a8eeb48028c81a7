"""A layer's exact Fisher block and its damped inverse, by the gradients of single examples that it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from analysis.fisher.operators import KroneckerSum, Operator, Term, operator_norm
from optimizers.curvature.layers import AffineLayer
from optimizers.curvature.samples import Samples


@dataclass(frozen=True)
class Errors:
    """How far an approximation is from what it approximates, in units of that one's own norm.

    Attributes:
        frobenius: in the Frobenius norm.
        operator: in the operator norm.
        bound: of the relative error of the operator norm's error, which is found by iteration.
    """

    frobenius: float
    operator: float
    bound: float


class ExactBlock:
    """``F = S Sᵀ`` of an affine layer, S having a column ``V_i = sum_t g_it a_itᵀ`` for each draw i.

    The draws are those of ``ExactNaturalGradient``: an example's sampled score, or each column of the root of its
    likelihood's Fisher matrix. With ``K = Sᵀ S = U diag(s) Uᵀ``, of the size of their number k,

        |F|_F² = sum_i s_i²,                     <F, M> = tr(Sᵀ M S),
        B = (F + L I)^-1 = (I - S (K + L I)^-1 Sᵀ) / L,
        |B|_F² = sum_i (s_i + L)^-2 + (p - k) / L²,      <B, M> = (tr M - <(K + L I)^-1, Sᵀ M S>) / L.

    Args:
        samples: of the layer, from an optimizer that keeps them.

    Raises:
        ValueError: the layer is not affine, or has no samples.
    """

    def __init__(self, samples: Samples) -> None:
        layer, factors = samples.layer, samples.factors
        if not isinstance(layer, AffineLayer):
            raise ValueError(f"layer {layer.name!r} must be affine (Linear or a convolution) to have a matrix")
        if not factors:
            raise ValueError(f"layer {layer.name!r} must be reached by the loss to have a Fisher block")
        self.shape = (layer.groups, layer.d_out, layer.columns)
        if "V" in factors:  # of several calls: each row of the matrix is a position
            self.a = factors["V"].double().view(-1, *self.shape).transpose(0, 1)
            rows = torch.eye(layer.d_out, dtype=torch.float64)
            self.g = rows.expand(layer.groups, self.a.shape[1], -1, -1)
        else:
            self.a = layer.inputs(factors["x"].double())
            self.g = layer.gradients(factors["g"].double())

    @property
    def size(self) -> int:
        """How many parameters there are."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    @cached_property
    def _rows(self) -> Tensor | None:
        """The V_i themselves, where positions are many and they fit; products with them are faster then."""
        examples, shared = self.g.shape[1:3]
        if shared == 1 or examples * self.size > 2**26:
            return None
        return (self.g.mT @ self.a).transpose(0, 1).flatten(1)

    @cached_property
    def gram(self) -> Tensor:
        """K."""
        if self._rows is not None:
            return self._rows @ self._rows.mT
        if self.g.shape[2] == 1:
            a, g = self.a.squeeze(2), self.g.squeeze(2)
            return ((a @ a.mT) * (g @ g.mT)).sum(0)
        return KroneckerSum(Term(torch.ones(self.shape, dtype=torch.float64))).kernel(self.a, self.g)

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.gram)
        return values.clamp(min=0), vectors

    def dots(self, matrix: Tensor) -> Tensor:
        """``Sᵀ d``, of d in the shape of the parameter matrix."""
        if self._rows is not None:
            return self._rows @ matrix.flatten()
        return ((self.g @ matrix.unsqueeze(1)) * self.a).sum((0, 2, 3))

    def combine(self, weights: Tensor) -> Tensor:
        """``S w``, in the shape of the parameter matrix."""
        if self._rows is not None:
            return (weights @ self._rows).view(self.shape)
        weighted = self.g * weights.view(1, -1, 1, 1)
        return weighted.flatten(1, 2).mT @ self.a.flatten(1, 2)

    def apply(self, matrix: Tensor) -> Tensor:
        """``F d``."""
        return self.combine(self.dots(matrix))

    def solve(self, matrix: Tensor, damping: float) -> Tensor:
        """``(F + damping I)^-1 d``."""
        values, vectors = self._eigen
        inside = vectors @ ((vectors.mT @ self.dots(matrix)) / (values + damping))
        return (matrix - self.combine(inside)) / damping

    def errors(self, approximation: Operator, tolerance: float = 1e-2) -> Errors:
        """Of an approximation of F.

        Args:
            approximation: of it.
            tolerance: see ``operator_norm``.
        """
        values = self._eigen[0]
        own = float(values.square().sum())
        inner = float(approximation.kernel(self.a, self.g, single=True).sum())
        apart = own - 2 * inner + approximation.squared_norm()
        norm, bound = operator_norm(lambda v: self.apply(v) - approximation.apply(v), self.shape, tolerance)
        return Errors(_ratio(max(apart, 0.0) ** 0.5, own**0.5), _ratio(norm, float(values[-1])), bound)

    def inverse_errors(self, approximation: Operator, damping: float, tolerance: float = 1e-2) -> Errors:
        """Of an approximation of ``(F + damping I)^-1``.

        Args:
            approximation: of it.
            damping: lambda.
            tolerance: see ``operator_norm``.
        """
        values, vectors = self._eigen
        own = float((values + damping).square().reciprocal().sum()) + (self.size - len(values)) / damping**2
        weights = (vectors / (values + damping)) @ vectors.mT
        seen = float((weights * approximation.kernel(self.a, self.g)).sum())
        inner = (approximation.trace() - seen) / damping
        apart = own - 2 * inner + approximation.squared_norm()
        norm, bound = operator_norm(
            lambda v: self.solve(v, damping) - approximation.apply(v), self.shape, tolerance
        )
        smallest = 0.0 if self.size > len(values) else float(values[-self.size])
        return Errors(_ratio(max(apart, 0.0) ** 0.5, own**0.5), norm * (smallest + damping), bound)


def _ratio(error: float, size: float) -> float:
    return error / size if size else (0.0 if error == 0 else float("inf"))
