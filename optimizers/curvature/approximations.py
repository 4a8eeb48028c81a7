"""Block approximations: what is kept of a layer's Fisher block, how a step estimates it, what it looks like densely.

A block goes through the same life in every method: ``accumulate`` in each backward pass of a step, ``estimate`` once at
its end (a dict of factors), and an average over steps that the optimizer keeps in ``factors``. With ``g`` the gradient
of the *per-example* loss, the estimated Fisher block is ``E[(sum_t a_t (x) g_t)(sum_t a_t (x) g_t)^T]``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from . import communication
from .layers import AffineLayer, ElementwiseLayer, Flow, Layer
from .packing import Form
from .spectra import Spectrum


def absent(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What a rank has in the place of a factor that another one keeps: its shape and dtype, and no numbers.

    Whatever is worked out of it has no numbers, either, and cannot be read: nothing comes of it unnoticed.
    """
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """Curvature is accumulated in float32, or float64 where the model is; never in half precision."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class Approximation(ABC):
    """Curvature of one layer.

    Attributes:
        layer: the layer's adapter.
        factors: the running averages, by name; empty until the first update.
        owner: the rank that keeps them and does the work on them; elsewhere they are ``absent``. None: every rank does.
    """

    #: Whether ``estimate_all`` brings the ranks' samples together itself, so that estimates need no averaging.
    gathers: bool = False

    #: Names of factors that every rank has, whoever the owner is.
    everywhere: tuple[str, ...] = ()

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.factors: dict[str, Tensor] = {}
        self.owner: int | None = None
        self._sums: dict[str, Tensor] = {}

    @property
    def mine(self) -> bool:
        """Whether this rank keeps the factors."""
        return self.owner is None or self.owner == communication.rank()

    def form(self, key: str) -> Form:
        """What has to travel between ranks of a factor, or of what is worked out of factors, by its name."""
        return "full"

    def cost(self) -> float:
        """Operations that one round of work on the factors takes, about, by which it is shared out among ranks.

        A function of shapes alone; of a block that does not say otherwise, one an entry.
        """
        return float(sum(math.prod(shape) for shape in self.shapes().values()))

    @property
    def observed(self) -> bool:
        """Whether a backward pass came through since the last ``reset``."""
        return bool(self._sums)

    def reset(self) -> None:
        """Drop what was accumulated in this step."""
        self._sums.clear()

    def accumulate(self, flow: Flow) -> None:
        """Add what one backward pass leaves of the layer, with gradients of the step's loss."""
        for key, value in self._statistics(flow):
            self._sums[key] = self._sums[key] + value if key in self._sums else value

    @abstractmethod
    def _statistics(self, flow: Flow) -> list[tuple[str, Tensor]]:
        """Sums to accumulate, by name."""

    @abstractmethod
    def estimate(self, gradient_scale: float, examples: int) -> dict[str, Tensor]:
        """The step's factors.

        Args:
            gradient_scale: what turns an observed gradient into one of the per-example loss.
            examples: how many examples the step's statistics were summed over.
        """

    @classmethod
    def estimate_all(
        cls, blocks: Sequence[Approximation], gradient_scale: float, examples: int
    ) -> dict[str, dict[str, Tensor]]:
        """The step's factors of several blocks of this kind by layer name; zeros for one that this rank did not see."""
        return {
            block.layer.name: block.estimate(gradient_scale, examples) if block.observed else block.zeros()
            for block in blocks
        }

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors, known before the first step: what memory will be used and what ranks exchange."""

    def zeros(self) -> dict[str, Tensor]:
        """Factors of nothing: what a rank that did not see the layer brings to the exchange."""
        weight = self.layer.parameters[0]
        dtype = statistics_dtype(weight)
        return {key: torch.zeros(shape, dtype=dtype, device=weight.device) for key, shape in self.shapes().items()}

    @abstractmethod
    def diagonal(self, factors: dict[str, Tensor]) -> list[Tensor]:
        """The diagonal that ``factors`` stand for, one tensor for each of the layer's parameters, in its shape."""

    def spectrum(self, factors: dict[str, Tensor], cache: dict[str, Tensor], damping: Tensor) -> Spectrum | None:
        """The block's eigenvalues, where the method has them or can tell them cheaply.

        Args:
            factors: of this block.
            cache: what its solve takes.
            damping: lambda, one a matrix of the block.
        """
        return None

    def floored(self, cache: dict[str, Tensor]) -> Tensor | None:
        """Share of the directions in which the inverse has a least eigenvalue in place of a smaller one.

        Args:
            cache: what the block's solve takes.

        Returns:
            None where nothing is floored.
        """
        return None

    def to_dense(self) -> Tensor:
        """The block as a matrix in the row-major order of the ``[d_out, d_in (+ 1)]`` weight matrix, bias last."""
        return torch.diag(self.layer.vector(self.diagonal(self.factors)))


class KroneckerDiagonal(Approximation):
    """``diag(A) (x) diag(G)`` of an affine layer: AdaFisher's block (arXiv 2405.16397, section 3).

    ``H = mean_{i,t} a_it^2`` over examples and positions, ``S = mean_i sum_t g_it^2``: for a layer without shared
    positions, the diagonals of K-FAC's factors; with them, those under K-FAC's *expand* setting.
    """

    layer: AffineLayer

    def _statistics(self, flow: Flow) -> list[tuple[str, Tensor]]:
        squares, count = flow.input_square_sums()
        return [
            ("H", squares),
            ("count", squares.new_tensor(float(count))),
            ("S", flow.gradient_square_sums()),
        ]

    def estimate(self, gradient_scale: float, examples: int) -> dict[str, Tensor]:
        """See Approximation."""
        return {
            "H": self._sums["H"] / self._sums["count"],
            "S": self._sums["S"] * (gradient_scale**2 / examples),
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See Approximation."""
        return {"H": (self.layer.groups, self.layer.columns), "S": (self.layer.groups, self.layer.d_out)}

    def diagonal(self, factors: dict[str, Tensor]) -> list[Tensor]:
        """See Approximation."""
        return self.layer.from_matrix(factors["S"].unsqueeze(-1) * factors["H"].unsqueeze(-2))


class Diagonal(Approximation):
    """The exact diagonal of the Fisher block of an elementwise layer, all parameters in one vector ``D``."""

    layer: ElementwiseLayer

    def _statistics(self, flow: Flow) -> list[tuple[str, Tensor]]:
        return [("D", torch.cat([t.flatten() for t in flow.square_sums()]))]

    def estimate(self, gradient_scale: float, examples: int) -> dict[str, Tensor]:
        """See Approximation."""
        return {"D": self._sums["D"] * (gradient_scale**2 / examples)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See Approximation."""
        return {"D": (sum(p.numel() for p in self.layer.parameters),)}

    def diagonal(self, factors: dict[str, Tensor]) -> list[Tensor]:
        """See Approximation."""
        return self.layer.tensors(factors["D"])
