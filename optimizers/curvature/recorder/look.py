"""What a probe's passes show of a layer, and the verdict on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import probe
from ..layers import Layer
from ..probe import Layout
from .passes import Record


@dataclass
class Look:
    """What a probe's passes show of a layer.

    Attributes:
        energies: squared output gradients by leading dimension, by call and pass; None where none came.
        totals: what the rows of the first pass add up to, in tensors shaped like the parameters.
        size: of the summands, to tell rounding by.
        coarse: the dtype that the sums are as precise as.
        wrong: rows have other shapes than the layer's.
    """

    energies: list[list[Tensor | None]]
    totals: list[Tensor] = field(default_factory=list)
    size: float = 0.0
    coarse: torch.dtype = torch.float64
    wrong: bool = False

    def take(self, records: Sequence[Record], found: Sequence[Tensor | None], first: bool) -> None:
        """Take in the output gradients of a pass; they are not kept."""
        for record, g, energies in zip(records, found, self.energies, strict=True):
            if g is None:
                energies.append(None)
                continue
            self.coarse = max(self.coarse, g.dtype, record.layer.parameters[0].dtype, key=tolerance_of)
            g = record.gradient(g)
            energies.append(probe.energy(g, record.layer.leading(record.x, g)))
            if not first:
                continue
            x, g = record.input(), g.to(record.dtype)
            if not record.layer.leading(record.x, g):
                x, g = x.unsqueeze(0), g.unsqueeze(0)
            try:
                totals = record.layer.total(x, g)
            except (RuntimeError, IndexError):  # its weight was used in another way
                self.wrong = True
                continue
            self.totals = [a + b for a, b in zip(self.totals, totals, strict=True)] if self.totals else totals
            self.size = (self.size**2 + float(x.double().square().sum() * g.double().square().sum())) ** 0.5

    def sized(self, layouts: Sequence[Layout], sizes: Tensor) -> bool:
        """Whether rows are as many times those of the two halves as their examples were in a third pass.

        Args:
            layouts: one a call.
            sizes: of the examples.
        """
        for layout, (one, other, last) in zip(layouts, self.energies, strict=True):
            like = next((energy for energy in (one, other, last) if energy is not None), None)
            if like is None:
                continue
            none = torch.zeros_like(like)
            halves = (none if one is None else one) + (none if other is None else other)  # which have no row in common
            right = halves * by_example(sizes.square(), layout, halves.shape[layout.axis], len(sizes), halves)
            if probe.distance([none if last is None else last], [right]) > 2 * tolerance_of(self.coarse):
                return False
        return True

    def reproduces(self, layer: Layer, by_weight: dict[Tensor, Tensor | None]) -> bool:
        """Whether the rows add up to what autograd gives the parameters, but for rounding."""
        if self.wrong or not self.totals:
            return not self.wrong
        pairs = [
            (total, torch.zeros_like(total) if (right := by_weight[p]) is None else right)
            for p, total in zip(layer.parameters, self.totals, strict=True)
            if p in by_weight
        ]
        if not pairs:
            return True
        if probe.distance([a for a, _ in pairs], [b for _, b in pairs]) <= tolerance_of(self.coarse):
            return True
        off = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs) ** 0.5
        return off <= 100 * torch.finfo(self.coarse).eps * self.size  # it cancels out: what is left is rounding


def tolerance_of(dtype: torch.dtype) -> float:
    """Relative distance that is rounding where a dtype is the coarsest."""
    return probe.TOLERANCE.get(dtype, 1e-1)


@dataclass
class Verdict:
    """How a layer's rows are read, or why they are not.

    Attributes:
        layouts: one a call; a single one serves for any number of calls.
        reason: why there is none.
        signature: of the calls that it was found on.
        tries: how often the layer was looked at.
        rest: passes until it is looked at again, where nothing was found out.
    """

    layouts: list[Layout]
    reason: str | None
    signature: tuple[int, ...]
    tries: int = 1
    rest: int = 0

    def of(self, calls: int) -> list[Layout]:
        """The layouts of so many calls; of another number if they are not alike."""
        return self.layouts * calls if len(self.layouts) == 1 else self.layouts


def by_example(values: Tensor, layout: Layout, size: int, examples: int, like: Tensor) -> Tensor:
    """A value for each example, along its rows of a tensor."""
    by_row = values[layout.labels(size, examples)].to(like)
    return by_row.view([-1 if axis == layout.axis else 1 for axis in range(like.dim())])
