"""What one backward pass leaves of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .affine import AffineLayer
from .layer import ElementwiseLayer, Layer


class Flow:
    """What one backward pass leaves of a layer: its calls, the examples in front.

    An example's gradient is the sum over the calls and over the positions within each: so calls are further positions.

    Attributes:
        layer: the adapter.
        calls: ``(x, g)`` a time that the pass came through: prepared input, gradient by the output.
        when: which pass it is: examples shown up to the end of its batch, and its index among those over the batch.
    """

    def __init__(self, layer: Layer, calls: Sequence[tuple[Tensor, Tensor]], when: tuple[int, int] = (0, 0)) -> None:
        self.layer, self.calls, self.when = layer, list(calls), when

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return len(self.calls[0][1])

    def scaled(self, factor: float) -> Flow:
        """With all gradients times a factor."""
        return self if factor == 1.0 else Flow(self.layer, [(x, g * factor) for x, g in self.calls], self.when)

    def inputs(self) -> Tensor:
        """Of an affine layer, ``a`` as ``[groups, examples, shared, columns]``."""
        return _joined([self._affine.inputs(x) for x, _ in self.calls])

    def gradients(self) -> Tensor:
        """Of an affine layer, ``g`` as ``[groups, examples, shared, d_out]``."""
        return _joined([self._affine.gradients(g) for _, g in self.calls])

    def input_square_sums(self) -> tuple[Tensor, int]:
        """See AffineLayer."""
        sums, counts = zip(*(self._affine.input_square_sums(x) for x, _ in self.calls), strict=True)
        return sum(sums[1:], start=sums[0]), sum(counts)

    def gradient_square_sums(self) -> Tensor:
        """See AffineLayer."""
        sums = [self._affine.gradient_square_sums(g) for _, g in self.calls]
        return sum(sums[1:], start=sums[0])

    def square_sums(self) -> list[Tensor]:
        """Of an elementwise layer; see there."""
        assert isinstance(self.layer, ElementwiseLayer)
        return self.layer.square_sums(self.calls)

    def grid(self) -> tuple[int, int] | None:
        """The grid that the positions lie on; None: there are several."""
        return self._affine.grid(self.calls[0][1]) if len(self.calls) == 1 else None

    def rows(self) -> Tensor:
        """Each example's gradient, one a row, in the order of the matrix or of the parameters."""
        rows = [self.layer.example_rows(x, g) for x, g in self.calls]
        return sum(rows[1:], start=rows[0])

    @property
    def _affine(self) -> AffineLayer:
        assert isinstance(self.layer, AffineLayer)
        return self.layer


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
