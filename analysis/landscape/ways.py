"""The ways of several optimizers in one plane: the two directions along which their snapshots differ most.

The plane is that of the principal components of all snapshots of all runs, each counted once, around the mean of some:
of the starts, of the ends, or of all. A component's share is of the sum of squared distances to that point. Parameters
are looked at one after the other, so that never all snapshots of all weights are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from analysis.landscape.plane import Plane, Projection
from training.show.snapshots import Snapshot

Through = Literal["start", "end", "mean"]


class Series(Protocol):
    """Snapshots of one run, as `training.show.snapshots.Snapshots` reads them from its file."""

    @property
    def steps(self) -> Sequence[int]: ...  # noqa: D102 - see Snapshots
    @property
    def names(self) -> Sequence[str]: ...  # noqa: D102
    def series(self, name: str, indices: Sequence[int] | None = None) -> Tensor: ...  # noqa: D102
    def chosen(self, indices: Sequence[int]) -> Iterator[Snapshot]: ...  # noqa: D102
    def digest(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Way:
    """Some of a run's snapshots.

    Attributes:
        label: what the run is called.
        source: its snapshots.
        indices: of those that count, ascending.
    """

    label: str
    source: Series
    indices: tuple[int, ...]

    @classmethod
    def of(cls, label: str, source: Series, most: int = 40) -> Way:
        """A path of at most so many snapshots, the first and the last among them and the others evenly spread."""
        if most < 2:
            raise ValueError(f"snapshots must be at least 2 a run, got {most}")
        count = len(source.steps)
        chosen = np.linspace(0, count - 1, min(most, count)).round().astype(int)
        return cls(label, source, tuple(sorted(set(chosen.tolist()))))

    @property
    def steps(self) -> list[int]:
        """Optimizer steps of its snapshots."""
        return [self.source.steps[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Snapshot]:
        return self.source.chosen(self.indices)


@dataclass(frozen=True)
class Principal:
    """The plane of several ways.

    Attributes:
        plane: with directions of length 1.
        explained: share of each direction, and of those that follow them (at most ten in all), largest first.
        projections: of every snapshot, by way.
    """

    plane: Plane
    explained: tuple[float, ...]
    projections: tuple[tuple[Projection, ...], ...]


def principal_plane(ways: Sequence[Way], through: Through = "start") -> Principal:
    """The plane that is nearest to the snapshots of some runs, of those through a point.

    Signs are chosen so that the last snapshot of the first way has coordinates that are not negative.

    Args:
        ways: of models with the same parameters.
        through: the plane's origin: the ``start`` of the runs (the mean of theirs, if they began at several points),
            the mean of their ``end``s, or the ``mean`` of all snapshots.

    Raises:
        ValueError: there is no such origin, their parameters differ, or fewer than three snapshots differ.
    """
    if through not in get_args(Through):
        raise ValueError(f"through must be one of {', '.join(get_args(Through))}, got {through!r}")
    names = list(ways[0].source.names)
    for way in ways:
        if list(way.source.names) != names:
            raise ValueError(f"runs must have the same model, and the parameters of {way.label} have other names")
    ends = np.cumsum([0, *map(len, ways)]).tolist()
    count = ends[-1]
    middle = {"start": ends[:-1], "end": [end - 1 for end in ends[1:]], "mean": list(range(count))}[through]
    gram = torch.zeros(count, count, dtype=torch.float64)
    for name in names:
        centred, _ = _centred(ways, name, middle)
        gram += centred @ centred.T
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    if count < 3 or values[1] <= 1e-12 * values[0] or values[0] == 0:
        raise ValueError(
            "runs must have at least three snapshots that lie on no line to make a plane: train for longer, or with a "
            "smaller callbacks.trajectory.every_steps"
        )
    last = len(ways[0]) - 1
    vectors = vectors[:, :2] * torch.where(vectors[last, :2] < 0, -1.0, 1.0)
    origin: dict[str, Tensor] = {}
    directions: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name in names:
        centred, mean = _centred(ways, name, middle)
        shape, kind = mean.shape, mean.dtype
        origin[name] = mean
        for k, direction in enumerate(directions):
            direction[name] = (centred.T @ vectors[:, k] / values[k].sqrt()).reshape(shape).to(kind)
    coordinates = vectors * values[:2].sqrt()
    lengths, inside = gram.diagonal(), coordinates.square().sum(1)
    shares = torch.where(lengths > 0, (inside / lengths).clamp(max=1.0), 1.0)  # the origin is a point of the plane
    left = (lengths - inside).clamp(min=0)
    seen = [
        Projection(tuple(coordinates[i].tolist()), float(shares[i].sqrt()), float(1 - shares[i]), float(left[i].sqrt()))
        for i in range(count)
    ]
    explained = tuple((values[:10] / values.sum()).tolist())
    projections = tuple(tuple(seen[a:b]) for a, b in pairwise(ends))
    return Principal(Plane(origin, directions), explained, projections)


def _centred(ways: Sequence[Way], name: str, middle: list[int]) -> tuple[Tensor, Tensor]:
    """One parameter in all snapshots, ``[snapshots, entries]`` in float64, less the mean of some, and that mean."""
    series = [way.source.series(name, way.indices) for way in ways]
    if len({each.shape[1:] for each in series}) > 1:
        raise ValueError(f"runs must have the same model, and {name} has another shape in one of them")
    stacked = torch.cat(series)
    flat = stacked.double().flatten(1)
    mean = flat[middle].mean(0).to(stacked.dtype)
    return flat - mean.double(), mean.reshape(stacked.shape[1:])
