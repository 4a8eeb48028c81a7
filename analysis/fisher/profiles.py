"""Where an approximation is wrong: its curvature along the eigenvectors of the exact block, from the largest on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.fisher import reading
from analysis.fisher.blocks import ExactBlock
from analysis.fisher.measure import Problem, exact, see
from analysis.fisher.methods import Method

#: Eigenvalues below this share of the largest are left out: they are rounding, or nearly.
SMALLEST = 1e-6


@dataclass(frozen=True)
class Profile:
    """An approximation M of a layer's block F along the eigenvectors q of F.

    Attributes:
        layer: its name.
        method: its name.
        eigenvalues: of F, ``qᵀ F q``, the largest first.
        ratios: ``qᵀ M q / qᵀ F q``: 1 where M is right, above where its steps are too short, below where too long.
    """

    layer: str
    method: str
    eigenvalues: Tensor
    ratios: Tensor


def profiles(problem: Problem, methods: Iterable[Method]) -> list[Profile]:
    """A profile a layer and method; of methods that keep no approximation of F, none.

    Args:
        problem: where.
        methods: which.
    """
    truth = exact(problem)
    kept = {method.name: see(problem, method).curvature for method in methods}
    found = []
    for layer in truth.affine():
        block = ExactBlock(truth.samples[layer.name])
        values, vectors = torch.linalg.eigh(block.gram)  # q = S u / sqrt(s)
        few = values > SMALLEST * values[-1]
        values, vectors = values[few].flip(0), vectors[:, few].flip(1)
        for name, curvature in kept.items():
            own = None if curvature is None else reading.approximation(curvature, layer)
            if own is not None:
                along = ((vectors.mT @ own.kernel(block.a, block.g)) * vectors.mT).sum(1) / values
                found.append(Profile(layer.name, name, values, along / values))
    return found
