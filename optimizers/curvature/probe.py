"""Whose gradient is whose: which rows of a layer belong to which example, found out rather than assumed.

Seeds are sent back from the outputs of some examples alone. Where a layer's rows lie along the examples, the gradients
by its outputs are zero on the rows of all others, and the rows that remain reproduce the gradient of its weight. The
examples are split at random into two parts with a pass each, so that a wrong reading of the rows has to be wrong about
many of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .layers import Layer

#: Share of the squared gradients that may lie on rows of other examples: rounding.
LEAK = 1e-9
#: Relative distance between the gradient of a weight and what the recorded rows make of it, by the coarsest dtype.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}

AROUND = "its rows do not reproduce its gradient: its weight is used outside of the layer, or changed before it is used"
AMBIGUOUS = "its rows can be read in two ways: examples cannot be told apart"
MIXED = (
    "rows of one example hold gradients of others: examples are mixed, regrouped or share the input (hand over outputs "
    "[batch, ..., features]; what does not count is said by -100 or mask=)"
)
UNFIT = (
    "no dimension of its rows belongs to the examples: an input that all examples share, or gathered rows (hand over "
    "outputs [batch, ..., features]; what does not count is said by -100 or mask=)"
)
DEAD = "no gradient has come through it yet"


@dataclass(frozen=True)
class Layout:
    """Where the examples are among a layer's leading dimensions.

    Attributes:
        axis: the dimension.
        split: it is the examples' own (``whole``), or has an example's rows behind one another (``slow``: the example's
            index varies slowest) or a row of each example in turn (``fast``). ``one``: there is one example, and all
            rows are its.
    """

    axis: int
    split: Literal["whole", "slow", "fast", "one"]

    def parts(self, size: int, examples: int) -> tuple[int, int, int] | None:
        """(rows before, examples, rows after) that a dimension of this size is made of; None if it is not."""
        if self.split == "one":
            return None
        if size == 0 or size % examples or (size != examples and self.split == "whole"):
            return None
        more = size // examples
        return (more, examples, 1) if self.split == "fast" else (1, examples, more)

    def labels(self, size: int, examples: int) -> Tensor:
        """Which example each index of the dimension belongs to."""
        index = torch.arange(size)
        return index // (size // examples) if self.split == "slow" else index % examples


def candidates(sizes: Sequence[int], examples: int) -> list[Layout]:
    """All layouts that leading dimensions of these sizes allow."""
    if examples == 1:
        return [Layout(0, "one")]
    found: list[Layout] = []
    for axis, size in enumerate(sizes):
        if size == examples:
            found.append(Layout(axis, "whole"))
        elif size and size % examples == 0:
            found += [Layout(axis, "slow"), Layout(axis, "fast")]
    return found


def arranged(layer: Layer, x: Tensor, g: Tensor, layout: Layout, examples: int) -> list[tuple[Tensor, Tensor]] | None:
    """A call's prepared input and output gradient with the examples in front; None where the layout does not fit."""
    leading = layer.leading(x, g)
    if leading == 0:
        return [(x.unsqueeze(0), g.unsqueeze(0))] if examples == 1 else None
    if layout.split == "one":
        if examples != 1:
            return None
        if leading == 1:  # the layer's own dimension of rows: images, or vectors
            return layer.arranged(x, g, 0, (1, 1, len(g)))
        return [(x.unsqueeze(0), g.unsqueeze(0))]
    if layout.axis >= leading:
        return None
    parts = layout.parts(g.shape[layout.axis], examples)
    return None if parts is None else layer.arranged(x, g, layout.axis, parts)


def judged(energies: Sequence[Tensor], parts: Sequence[Tensor], examples: int, lenient: bool) -> Layout | str:
    """The layout of a call, or why there is none (``DEAD``: nothing is known).

    Args:
        energies: squared output gradients by leading dimensions ``[...]``, one tensor a pass.
        parts: which examples had seeds, bool ``[examples]``, one a pass.
        examples: how many there are.
        lenient: batch statistics that cannot be held mix examples a little: the best reading will do.
    """
    fitting = candidates(energies[0].shape, examples)
    if not fitting:
        return UNFIT
    total = sum((energy.sum() for energy in energies), start=energies[0].new_zeros(()))
    if not 0 < float(total) < float("inf"):  # nothing, or an overflow
        return DEAD
    if examples == 1:
        return fitting[0]
    leaks, checked = [], []
    for layout in fitting:
        if layout.split != "whole" and not _offsets_covered(energies, layout, examples):
            continue
        checked.append(layout)
        others = energies[0].new_zeros(())
        for energy, part in zip(energies, parts, strict=True):
            by_index = energy.movedim(layout.axis, 0).flatten(1).sum(1) if energy.dim() > 1 else energy
            owners = layout.labels(len(by_index), examples).to(by_index.device)
            others = others + (by_index * ~part.to(by_index.device)[owners]).sum()
        leaks.append(float(others / total))
    if not checked:
        return UNFIT
    clean = [layout for layout, leak in zip(checked, leaks, strict=True) if leak <= LEAK]
    if len(clean) > 1:
        return AMBIGUOUS
    if clean:
        return clean[0]
    best = min(range(len(leaks)), key=leaks.__getitem__)
    # Chance puts half of the gradient on rows of the examples without seeds.
    return checked[best] if lenient and leaks[best] < 0.25 and sorted(leaks)[1:2] != [leaks[best]] else MIXED


def _offsets_covered(energies: Sequence[Tensor], layout: Layout, examples: int) -> bool:
    """Whether every place in an example has a gradient in some example.

    Where a few rows of many were chosen, as many as there are examples, the others could be read as theirs by chance.
    """
    size = energies[0].shape[layout.axis]
    total = sum((energy for energy in energies), start=torch.zeros_like(energies[0])).movedim(layout.axis, 0)
    by_row = total.reshape(size, -1).sum(1)
    by_place = by_row.view(examples, -1).sum(0) if layout.split == "slow" else by_row.view(-1, examples).sum(1)
    return bool((by_place > 0).all())


def energy(g: Tensor, leading: int) -> Tensor:
    """Squares of an output gradient by its leading dimensions."""
    own = list(range(leading, g.dim()))
    return torch.linalg.vector_norm(g.detach(), dim=own, dtype=torch.float64).square() if own else g.double().square()


def distance(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Norm of the difference, relative to that of what is right; 0 where both are zero."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, right, strict=True))
    size = sum(float(b.double().square().sum()) for b in right)
    if difference == 0:
        return 0.0
    return (difference / size) ** 0.5 if size > 0 else float("inf")
