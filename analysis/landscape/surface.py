"""Surfaces of the loss: around a model along random directions, or under the ways of several optimizers."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from analysis.landscape.directions import Unit, Vectors, lengths, random_direction
from analysis.landscape.losses import Examples, Format, Ground, Point, Statistics
from analysis.landscape.plane import Plane, dot
from analysis.landscape.survey import survey
from analysis.landscape.ways import Principal, Through, Way, principal_plane
from training.show.snapshots import state
from training.tasks.task import Task


@dataclass(frozen=True)
class Track:
    """The way of one run over a surface, a value a snapshot.

    Attributes:
        label: what the run is called.
        steps: optimizer steps.
        coordinates: of the nearest points of the plane, ``[snapshots, 2]``.
        cosine: between the way from the plane's origin to the snapshot and the plane.
        left_out: share of that way's squared length that the plane does not show, ``1 - cosine^2``.
        distance: of the snapshot from the plane.
        projected: metrics at the nearest points of the plane.
        true: metrics of the snapshots themselves.
    """

    label: str
    steps: np.ndarray
    coordinates: np.ndarray
    cosine: np.ndarray
    left_out: np.ndarray
    distance: np.ndarray
    projected: dict[str, np.ndarray]
    true: dict[str, np.ndarray]


@dataclass(frozen=True)
class Surface:
    """Metrics over a line or a grid of points, and the ways of runs over it.

    Attributes:
        title: of what.
        notes: how: directions, BatchNorm, examples.
        axes: what the coordinates are, one or two.
        x: first coordinates.
        y: second ones; empty for a line.
        values: of each metric, ``[len(y), len(x)]``, or ``[len(x)]`` of a line.
        tracks: ways of runs.
        explained: by principal directions: share of each, largest first; empty for random ones.
    """

    title: str
    notes: tuple[str, ...]
    axes: tuple[str, ...]
    x: np.ndarray
    y: np.ndarray
    values: dict[str, np.ndarray]
    tracks: tuple[Track, ...] = ()
    explained: tuple[float, ...] = ()

    def metric(self, name: str) -> np.ndarray:
        """The values of a metric.

        Raises:
            ValueError: the task has no such metric.
        """
        if name not in self.values:
            raise ValueError(f"metric must be one of {', '.join(self.values)}, got {name!r}")
        return self.values[name]


def around(
    model: nn.Module,
    task: Task,
    examples: Examples,
    *,
    label: str,
    dimensions: int = 2,
    span: float = 1.0,
    resolution: int = 51,
    seed: int = 0,
    normalise: Unit = "filter",
    vectors: Vectors = "ignore",
    statistics: Statistics = "estimated",
    calibrate: int = 500,
    precision: Format = "fp32",
    folder: Path | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Surface:
    """A model's losses along one random direction, or over the plane of two, around its weights.

    The directions are drawn one after the other: the line lies in the plane of the same seed. They are nearly at right
    angles, and a note says how nearly.

    Args:
        model: at the middle; it is as it was afterwards.
        task: says what is measured.
        examples: on which.
        label: what the model is called.
        dimensions: 1 or 2.
        span: coordinates reach from ``-span`` to ``span``; at 1, weights have been changed by their own length.
        resolution: points along each direction.
        seed: of the directions.
        normalise: see `random_direction`.
        vectors: see `random_direction`.
        statistics: of BatchNorm, see `Ground`.
        calibrate: examples that they are estimated on.
        precision: of the forward passes, see `Ground`.
        folder: see `survey`.
        workers: see `survey`.
        progress: see `survey`.

    Raises:
        ValueError: for a value out of its range.
    """
    if dimensions not in (1, 2):
        raise ValueError(f"dims must be 1 or 2, got {dimensions}")
    if not span > 0:
        raise ValueError(f"span must be above 0, got {span}")
    drawn = tuple(random_direction(model, seed + 1000 * k, normalise, vectors) for k in range(dimensions))
    if any(lengths(direction) == 0 for direction in drawn):
        raise ValueError("vectors must be scale for this model, which has no weights but biases and norms")
    plane = Plane(state(model)[0], drawn)
    ground = Ground(model, task, examples, plane, (), statistics, calibrate, precision)
    along = _steps(-span, span, resolution)
    by = {"filter": "filter-normalised", "layer": "layer-normalised", "none": "not normalised"}[normalise]
    biases = "biases and norms " + ("left out" if vectors == "ignore" else "scaled to their own length")
    names: tuple[str, ...] = ("random direction",)
    notes = [f"random direction{'s' if dimensions == 2 else ''}: {by}, {biases}, seed {seed}"]
    if dimensions == 2:
        names = ("random direction 1", "random direction 2")
        notes.append(f"cosine between them {dot(*drawn) / lengths(drawn[0]) / lengths(drawn[1]):.2g}")
    options: dict[str, Any] = {"folder": folder, "workers": workers, "progress": progress}
    return _map_out(ground, f"around {label}", notes, names, along, along if dimensions == 2 else None, None, options)


def under(
    model: nn.Module,
    task: Task,
    examples: Examples,
    ways: Sequence[Way],
    *,
    label: str,
    through: Through = "start",
    margin: float = 0.2,
    resolution: int = 51,
    statistics: Statistics = "estimated",
    calibrate: int = 500,
    precision: Format = "fp32",
    folder: Path | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Surface:
    """The losses in the plane that is nearest to the ways of some runs, and those of their snapshots.

    Args:
        model: of the runs; its own weights do not matter, its statistics do where they are fixed. It is as it was
            afterwards.
        task: says what is measured.
        examples: on which.
        ways: the runs' snapshots.
        label: what the surface is of.
        through: origin of the plane, see `principal_plane`.
        margin: how far the grid reaches beyond the ways, as a share of their extent.
        resolution: points along each direction.
        statistics: of BatchNorm, see `Ground`.
        calibrate: examples that they are estimated on.
        precision: of the forward passes, see `Ground`.
        folder: see `survey`.
        workers: see `survey`.
        progress: see `survey`.

    Raises:
        ValueError: for a value out of its range, or runs of different models.
    """
    if not margin >= 0:
        raise ValueError(f"margin must be at least 0, got {margin}")
    principal = principal_plane(ways, through)
    ground = Ground(model, task, examples, principal.plane, ways, statistics, calibrate, precision)
    spots = np.array([p.coordinates for projections in principal.projections for p in projections])
    low, high = spots.min(0), spots.max(0)
    room = margin * (high - low).max()  # the same on all sides, so that a way that is nearly a line has some, too
    x, y = (_steps(low[k] - room, high[k] + room, resolution) for k in range(2))
    first, second = principal.explained[:2]
    axes = (f"principal direction 1 ({first:.1%} of the variance)", f"principal direction 2 ({second:.1%})")
    origin = {"start": "the start", "end": "the mean of the ends", "mean": "the mean of all snapshots"}[through]
    notes = [f"plane through {origin}, with {first + second:.1%} of the variance of {len(spots)} snapshots around it"]
    options: dict[str, Any] = {"folder": folder, "workers": workers, "progress": progress}
    return _map_out(ground, f"under {label}", notes, axes, x, y, principal, options)


def _steps(low: float, high: float, resolution: int) -> np.ndarray:
    if resolution < 2:
        raise ValueError(f"resolution must be at least 2, got {resolution}")
    return np.linspace(low, high, resolution)


def _map_out(
    ground: Ground,
    title: str,
    notes: list[str],
    axes: tuple[str, ...],
    x: np.ndarray,
    y: np.ndarray | None,
    principal: Principal | None,
    options: dict[str, Any],
) -> Surface:
    points: list[Point] = []
    if y is None:
        points += [("plane", (float(a),)) for a in x]
    else:
        points += [("plane", (float(a), float(b))) for b in y for a in x]
    projections = principal.projections if principal else ()
    points += [("plane", p.coordinates) for own in projections for p in own]
    points += [("snapshot", (k, number)) for k, own in enumerate(projections) for number in range(len(own))]
    found = survey(ground, points, **options)
    table = {name: np.array([values[name] for values in found]) for name in found[0]}
    count, spots = len(x) * (1 if y is None else len(y)), sum(map(len, projections))
    shape = (len(x),) if y is None else (len(y), len(x))
    tracks, at = [], count
    for way, own in zip(ground.ways, projections, strict=True):
        here = slice(at, at + len(own))
        there = slice(at + spots, at + spots + len(own))
        track = Track(
            label=way.label,
            steps=np.array(way.steps),
            coordinates=np.array([p.coordinates for p in own]),
            cosine=np.array([p.cosine for p in own]),
            left_out=np.array([p.left_out for p in own]),
            distance=np.array([p.distance for p in own]),
            projected={name: values[here] for name, values in table.items()},
            true={name: values[there] for name, values in table.items()},
        )
        tracks.append(track)
        at += len(own)
    if ground.has_batch_norm:
        notes = [*notes, _statistics(ground)]
    rounded = ", in bfloat16" if ground.precision == "bf16" else ""
    notes = [*notes, f"{ground.examples.num_examples} examples{rounded}"]
    surface = {name: values[:count].reshape(shape) for name, values in table.items()}
    explained = principal.explained if principal else ()
    return Surface(
        title, tuple(notes), axes, x, y if y is not None else np.array([]), surface, tuple(tracks), explained
    )


def _statistics(ground: Ground) -> str:
    if ground.statistics == "fixed":
        return "BatchNorm statistics fixed" + (", of snapshots their own" if ground.ways else "")
    return f"BatchNorm statistics re-estimated at each point on {ground.calibrated} examples"


def to_csv(surface: Surface) -> str:
    """A line a point: coordinates and metrics."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(surface.values)
    writer.writerow(["x", *(["y"] if len(surface.y) else []), *names])
    for place in np.ndindex(surface.values[names[0]].shape):
        spot = [surface.x[place[-1]], *([surface.y[place[0]]] if len(surface.y) else [])]
        writer.writerow([*(f"{a:.9g}" for a in spot), *(f"{surface.values[n][place]:.9g}" for n in names)])
    return text.getvalue()


def tracks_csv(surface: Surface) -> str:
    """A line a snapshot: where it is in the plane, how far from it, what it loses and what the plane does there."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(surface.values)
    both = [f"{kind}_{name}" for name in names for kind in ("true", "plane")]
    writer.writerow(["run", "step", "x", "y", "cosine", "left_out", "distance", *both])
    for track in surface.tracks:
        for i, step in enumerate(track.steps):
            facts = [*track.coordinates[i], track.cosine[i], track.left_out[i], track.distance[i]]
            values = [value[i] for name in names for value in (track.true[name], track.projected[name])]
            writer.writerow([track.label, step, *(f"{v:.9g}" for v in (*facts, *values))])
    return text.getvalue()
