"""Where an approximation is wrong: its curvature and its step along the eigenvectors of the exact block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.fisher import reading
from analysis.fisher.blocks import ExactBlock
from analysis.fisher.measure import Direction, Problem, exact, see
from analysis.fisher.methods import Method
from optimizers.curvature.layers import AffineLayer

#: Eigenvalues below this share of the largest are left out: they are rounding, or nearly.
SMALLEST = 1e-6


@dataclass(frozen=True)
class Profile:
    """A method along the eigenvectors q of a layer's exact block F: its approximation M, and the step d that it takes.

    Attributes:
        layer: its name.
        method: its name.
        eigenvalues: of F, ``qᵀ F q``, the largest first.
        ratios: ``qᵀ M q / qᵀ F q``: the curvature that M sees, in units of what there is.
        steps: ``qᵀ d``, d at its best length in the quadratic model of the layer.
        best: ``qᵀ (F + lambda I)^-1 g``, the natural gradient.
    """

    layer: str
    method: str
    eigenvalues: Tensor
    ratios: Tensor
    steps: Tensor
    best: Tensor

    def by_decades(self) -> Binned:
        """Quarters of a decade of eigenvalues, the largest first."""
        places = (4 * self.eigenvalues.log10()).round().to(torch.int64)
        curvatures, lengths = [], []
        kept = places.unique(sorted=True).flip(0).tolist()
        for place in kept:
            own = places == place
            curvatures.append(float(self.ratios[own].median()))
            lengths.append(float(self.steps[own].norm() / self.best[own].norm()))
        return Binned(self.layer, self.method, [10 ** (place / 4) for place in kept], curvatures, lengths)


@dataclass(frozen=True)
class Binned:
    """A profile by quarters of a decade of eigenvalues, which is what is drawn.

    Attributes:
        layer: its name.
        method: its name.
        eigenvalues: the middles of the quarters that have some, the largest first.
        curvatures: there, the median of what the method sees, in units of what there is.
        lengths: there, of its step at its best length, in units of the natural gradient's.
    """

    layer: str
    method: str
    eigenvalues: list[float]
    curvatures: list[float]
    lengths: list[float]


def profiles(problem: Problem, methods: Iterable[Method]) -> list[Profile]:
    """A profile a layer and method; of methods that keep no approximation of F, none.

    Args:
        problem: where.
        methods: which.
    """
    truth, damping = exact(problem), problem.settings.damping
    kept = {method.name: see(problem, method) for method in methods}
    found = []
    for layer in truth.affine():

        def matrix(entries: Direction, layer: AffineLayer = layer) -> Tensor:
            own = [entries[name] for name in truth.names[layer.name]]
            return layer.to_matrix(own[0], own[1] if len(own) > 1 else None)

        block = ExactBlock(truth.samples[layer.name])
        values, vectors = torch.linalg.eigh(block.gram)  # q = S u / sqrt(s)
        few = values > SMALLEST * values[-1]
        values, vectors = values[few].flip(0), vectors[:, few].flip(1)
        gradient = matrix(truth.gradient)
        best = (vectors.mT @ block.dots(gradient)) / values.sqrt() / (values + damping)
        for name, seen in kept.items():
            own = None if seen.curvature is None else reading.approximation(seen.curvature, layer)
            if own is None:
                continue
            along = ((vectors.mT @ own.kernel(block.a, block.g)) * vectors.mT).sum(1) / values
            step = matrix(seen.direction)
            image = block.dots(step)
            length = (gradient * step).sum() / (image.square().sum() + damping * step.square().sum())
            steps = length * (vectors.mT @ image) / values.sqrt()
            found.append(Profile(layer.name, name, values, along / values, steps, best))
    return found
