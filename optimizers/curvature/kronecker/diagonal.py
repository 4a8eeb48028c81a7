"""The exact diagonal, damped: what layers that multiply or look up have in place of Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..approximations import Diagonal, statistics_dtype
from ..layers import Layer
from ..spectra import Spectrum
from .invertible import Invertible
from .options import Counts, Factors, Options


class ExactDiagonal(Invertible, Diagonal):
    """The exact Fisher diagonal of norms and Embedding, damped by Tikhonov."""

    def __init__(self, layer: Layer, options: Options) -> None:
        super().__init__(layer)
        self.options = options

    def invert(self, factors: Factors, damping: Tensor, counts: Counts, last: Factors | None = None) -> Factors:
        """See Invertible."""
        return {"W": 1 / (factors["D"] + damping.unsqueeze(-1))}

    def solve(self, cache: Factors, matrix: Tensor) -> Tensor:
        """See Invertible."""
        return cache["W"].to(matrix.dtype) * matrix

    def squared(self, factors: Factors, cache: Factors, damping: Tensor, matrix: Tensor) -> Tensor:
        """See Invertible."""
        return (matrix.square() / cache["W"]).sum(1)

    def mean_eigenvalue(self, factors: Factors) -> Tensor:
        """See Invertible."""
        return factors["D"].mean(1)

    def spectrum(self, factors: Factors, cache: Factors, damping: Tensor) -> Spectrum | None:
        """See Approximation."""
        return Spectrum(factors["D"], damping.unsqueeze(-1))

    def cache_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See Invertible."""
        return {"W": (self.shapes()["D"], statistics_dtype(self.layer.parameters[0]))}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See Approximation."""
        return {"D": (1, *super().shapes()["D"])}

    def estimate(self, gradient_scale: float, examples: int) -> Factors:
        """See Approximation."""
        return {"D": super().estimate(gradient_scale, examples)["D"].unsqueeze(0)}

    def diagonal(self, factors: Factors) -> list[Tensor]:
        """See Approximation."""
        return super().diagonal({"D": factors["D"][0]})

    def to_matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """See Invertible."""
        return torch.cat([t.reshape(1, -1) for t in tensors], dim=1)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """See Invertible."""
        return super().diagonal({"D": matrix[0]})
