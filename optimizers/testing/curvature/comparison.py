"""What was recorded of a layer against the gradients of single examples, and what is wrong with it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...base import CurvatureOptimizer
from ..recording import Recording, exact
from .case import Case
from .report import LayerCheck

#: Below this share of a larger one a gradient is rounding, and only its absolute error counts.
NEGLIGIBLE = 1e-6


@dataclass
class Errors:
    """Of a layer: see LayerCheck; and the references by example in the order of its block, of a small one."""

    reproduced: float = 0.0
    apart: float = 0.0
    gradients: list[Tensor] = field(default_factory=list)
    wrong: str = ""


def compare(
    case: Case, recording: Recording, reduction: str, dense_limit: int, tolerance: float
) -> tuple[dict[str, Errors], dict[str, float]]:
    """What was recorded of every layer, against the references; and the norms of the loss's gradients by parameter."""
    references = case.references(reduction)
    total = next(references)
    reached = {key: float(g.norm()) for key, g in total.items()}
    everything = math.hypot(*reached.values())
    errors = {name: Errors() for name, shown in recording.shown.items() if shown}
    sums: dict[str, Tensor] = {}
    singles: dict[str, list[tuple[float, float]]] = {}  # (error, size) of each example's gradient by parameter
    for i, reference in enumerate(references):
        for name, found in errors.items():
            keys = recording.names(name)
            try:
                gradients = recording.gradients(name, i)
            except (ValueError, RuntimeError, IndexError) as error:
                found.wrong = f"its examples cannot be told apart ({str(error).splitlines()[0]})"
                continue
            for key, value in zip(keys, gradients, strict=True):
                if key in reference:  # the others are frozen
                    sums[key] = sums[key] + value if key in sums else value
                    error_size = float((value - reference[key]).norm())
                    singles.setdefault(key, []).append((error_size, float(reference[key].norm())))
            small = sum(g.numel() for g in gradients) <= dense_limit
            if small and all(key in reference for key in keys):
                found.gradients.append(recording.layers[name].vector([reference[key] for key in keys]))
    unit = recording.examples if reduction == "mean" else 1
    for name, found in errors.items():
        own = [key for key in recording.names(name) if key in singles]
        layer_size = math.hypot(*(reached[key] for key in own)) * unit
        # A share of the layer's gradient that is rounding: of attention's key bias, say, on which nothing depends.
        eps = torch.finfo(recording.layers[name].parameters[0].dtype).eps
        negligible = max(NEGLIGIBLE, 100 * eps / tolerance) * layer_size
        negligible = max(negligible, NEGLIGIBLE**2 * everything * unit)
        for key in own:
            apart = float((sums[key] - total[key] * unit).norm())
            found.reproduced = max(found.reproduced, relative(apart, max(reached[key] * unit, negligible)))
            # What an example's gradient is small beside the others' of is rounding, too.
            usual = math.hypot(*(size for _, size in singles[key])) / recording.examples**0.5
            floor = max(1e-3 * usual, negligible / recording.examples)
            for apart, size in singles[key]:
                found.apart = max(found.apart, relative(apart, max(size, floor)))
    return errors, reached


def relative(error: float, size: float) -> float:
    """An error in units of what it is an error of; zero where there is none, infinite where nothing should be."""
    if error == 0:
        return 0.0
    return error / size if size > 0 and math.isfinite(error) else math.inf


def judge_layer(
    line: LayerCheck,
    case: Case,
    recording: Recording,
    found: Errors | None,
    reached: dict[str, float],
    tolerance: float,
) -> None:
    """Say of a layer with a block what was found, and what is wrong with it."""
    own = [reached[key] for key in recording.names(line.module) if key in reached]
    if not own:
        line.reason = line.reason or "frozen"
    elif found is None:
        if any(own) and not line.reason:
            line.wrong = "it has a gradient, and nothing was recorded of it"
        elif not line.reason:
            line.reason = "the loss does not reach it"
    elif not line.reason:
        line.wrong = found.wrong
        if found.wrong:
            return
        line.reproduced = found.reproduced
        line.apart = None if case.mixed else found.apart
        if not found.reproduced <= tolerance:
            line.wrong = "what was recorded does not add up to the gradient of its parameters"
        elif line.apart is not None and not line.apart <= tolerance:
            line.wrong = "it adds up, and gradients of single examples are others'"


def distance(matrix: Tensor, gradients: Tensor, optimizer: CurvatureOptimizer, name: str) -> float:
    """Of a layer's block from the mean of the gradients' outer products; of a diagonal from the diagonal of that."""
    fisher = gradients.T @ gradients / len(gradients)
    if exact(optimizer, name) == "diagonal" or not bool((matrix - matrix.diagonal().diag()).any()):
        matrix, fisher = matrix.diagonal(), fisher.diagonal()
    return relative(float((matrix - fisher).norm()), float(fisher.norm()))
