"""What a block offers that a step is preconditioned with: an average over steps, and a damped solve.

Solves work on *stacks*: blocks of equal shapes lie side by side in one leading dimension ``n`` (and so do the groups of
a grouped convolution), whatever the number of layers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .options import Counts, Factors, Options


class Invertible:
    """What a block offers on top of an Approximation: an average over steps and a damped solve on stacks."""

    factors: Factors
    options: Options

    #: Whether the inverse follows every update of the factors rather than every refresh.
    inverts_on_update: bool = False

    @classmethod
    def average_all(cls, blocks: Sequence[Invertible], new: Sequence[Factors], keep: Sequence[float]) -> None:
        """``factors = keep * factors + (1 - keep) * new`` of several blocks of this kind, as the approximation has it.

        Args:
            blocks: to be changed.
            new: this step's factors, one a block.
            keep: weight of the past, one a block.
        """
        for block, estimate, share in zip(blocks, new, keep, strict=True):
            for key, value in estimate.items():
                if key in block.factors:
                    block.factors[key].lerp_(value, 1 - share)
                else:
                    block.factors[key] = value

    def rebase(self, counts: Counts) -> None:
        """On a refresh, before inverting: renew what the factors are expressed in.

        Args:
            counts: where repairs are counted.
        """

    def moments(self, gradient_scale: float, examples: int) -> Factors:
        """Factors that could only be estimated once the basis was known; arguments as of ``estimate``."""
        return {}

    @abstractmethod
    def invert(self, factors: Factors, damping: Tensor, counts: Counts, last: Factors | None = None) -> Factors:
        """What ``solve`` needs.

        Args:
            factors: stacked.
            damping: one a stacked matrix ``[n]``.
            counts: where repairs are counted.
            last: what the last refresh returned for the same blocks, for iterations to start from.
        """

    @abstractmethod
    def solve(self, cache: Factors, matrix: Tensor) -> Tensor:
        """The damped inverse times a stacked gradient ``[n, d_out, columns]``, in the gradient's shape and dtype."""

    @abstractmethod
    def squared(self, factors: Factors, cache: Factors, damping: Tensor, matrix: Tensor) -> Tensor:
        """``xᵀ (F + damping) x`` of a stacked ``x [n, d_out, columns]``: ``[n]``.

        Args:
            factors: stacked, of which the cache was made.
            cache: see ``invert``.
            damping: as of ``invert``.
            matrix: x.
        """

    @abstractmethod
    def mean_eigenvalue(self, factors: Factors) -> Tensor:
        """Of each stacked matrix's F, ``[n]``."""

    @abstractmethod
    def cache_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of the cache of this one block."""

    def optional_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of what the cache has beside ``cache_shapes`` where the factors ask for it."""
        return {}

    @abstractmethod
    def to_matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like the layer's parameters, as this block's share of a stack."""

    @abstractmethod
    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """Inverse of ``to_matrix``."""
