"""Lines and planes in the space of a model's weights: points at coordinates, and coordinates of points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def dot(one: Weights, other: Weights) -> float:
    """The inner product, in float64; what `other` does not name counts as zero."""
    return math.fsum(float(t.double().flatten() @ other[n].double().flatten()) for n, t in one.items() if n in other)


def difference(one: Weights, other: Weights) -> dict[str, Tensor]:
    """``one - other`` in float64."""
    return {name: tensor.double() - other[name].double() for name, tensor in one.items()}


@dataclass(frozen=True)
class Projection:
    """A point as a plane sees it.

    Attributes:
        coordinates: of the nearest point of the plane.
        cosine: between the way from the origin to the point and the plane: 1 for a point of the plane.
        left_out: share of that way's squared length that is at right angles to the plane: ``1 - cosine^2``.
        distance: from the plane.
    """

    coordinates: tuple[float, ...]
    cosine: float
    left_out: float
    distance: float


@dataclass(frozen=True)
class Plane:
    """Points ``origin + x d_1 (+ y d_2)``; a line has one direction.

    Attributes:
        origin: weights by name.
        directions: one or two, by the same names; weights that one does not name stay.
    """

    origin: Weights
    directions: tuple[Weights, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.directions) <= 2:
            raise ValueError(f"directions must be one or two, got {len(self.directions)}")
        for direction in self.directions:
            for name, tensor in direction.items():
                if name not in self.origin or tensor.shape != self.origin[name].shape:
                    raise ValueError(f"directions must have the weights' names and shapes, and {name} does not")

    def at(self, coordinates: Iterable[float]) -> dict[str, Tensor]:
        """The weights at coordinates, one for each direction."""
        values = {name: tensor.clone() for name, tensor in self.origin.items()}
        for x, direction in zip(coordinates, self.directions, strict=True):
            for name, tensor in direction.items():
                values[name].add_(tensor.to(values[name]), alpha=x)
        return values

    def project(self, weights: Weights) -> Projection:
        """The coordinates of a point, and how far it is from the plane.

        Raises:
            ValueError: the directions are parallel, or one is zero.
        """
        way = difference(weights, self.origin)
        gram = torch.tensor([[dot(a, b) for b in self.directions] for a in self.directions], dtype=torch.float64)
        if torch.linalg.cond(gram) > 1e12:
            raise ValueError("directions must be independent, and these are parallel or zero")
        seen = torch.tensor([dot(direction, way) for direction in self.directions], dtype=torch.float64)
        coordinates = torch.linalg.solve(gram, seen)
        length, inside = dot(way, way), max(float(coordinates @ seen), 0.0)
        # The rest is worked out as a vector: as a difference of squared lengths it would lose half of the digits.
        rest = {name: tensor.clone() for name, tensor in way.items()}
        for x, direction in zip(coordinates.tolist(), self.directions, strict=True):
            for name, tensor in direction.items():
                rest[name].sub_(tensor.double(), alpha=x)
        outside = dot(rest, rest)
        cosine = math.sqrt(min(inside / length, 1.0)) if length else 1.0
        left_out = outside / length if length else 0.0
        return Projection(tuple(coordinates.tolist()), cosine, left_out, math.sqrt(outside))
