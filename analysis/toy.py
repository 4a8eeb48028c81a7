"""Rosenbrock's and Rastrigin's functions: where the optimizers go in the plane, from the same start at the same price.

An optimizer that takes parameters gets ``(x, y)`` as one vector of doubles. Those that take a module need what flows
through its layers, of which a function of two numbers has none: their fallback would run, not the method. The price is
the number of times the function is evaluated: once a step for all of them, and a step of AdaHessian differentiates its
one evaluation twice. Each learning rate of a logarithmic grid gets the whole budget, and the one that ends lowest
counts: nobody who tunes knows how far away the minimum is.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from analysis import pages
from training import backward
from training.show.curves import GREY

Build = Callable[[list[Tensor], float], torch.optim.Optimizer]

# Half decades: fine enough to see each method work, coarse enough to be no search.
RATES = tuple(10 ** (k / 2) for k in range(-8, 3))
# Pairs of cells in a row of the picture.
PAIRS = 3


def rosenbrock(x: Any, y: Any) -> Any:
    """A curved valley with steep sides and a nearly flat floor (Rosenbrock 1960); tensors or arrays."""
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def rastrigin(x: Any, y: Any) -> Any:
    """A bowl with a local minimum near every pair of whole numbers (Rastrigin 1974); tensors or arrays."""
    cos = torch.cos if isinstance(x, Tensor) else np.cos
    return 20 + x**2 + y**2 - 10 * (cos(2 * math.pi * x) + cos(2 * math.pi * y))


@dataclass(frozen=True)
class Surface:
    """A function with the place where the paths begin.

    Attributes:
        name: for titles.
        function: of x and y.
        start: of every path, as in the gallery of the package torch_optimizer.
        minimum: the global one, where the function is 0.
        window: (left, right, bottom, top) of the picture.
        levels: of its contour lines.
    """

    name: str
    function: Callable[[Any, Any], Any]
    start: tuple[float, float]
    minimum: tuple[float, float]
    window: tuple[float, float, float, float]
    levels: np.ndarray


SURFACES = (
    Surface("Rosenbrock", rosenbrock, (-2.0, 2.0), (1.0, 1.0), (-2.3, 2.3, -1.3, 3.3), np.logspace(-0.5, 3.5, 9)),
    Surface("Rastrigin", rastrigin, (-2.0, 3.5), (0.0, 0.0), (-4.5, 4.5, -4.5, 4.5), np.arange(8.0, 64.0, 8.0)),
)


@dataclass(frozen=True)
class Path:
    """Where one optimizer went on one surface.

    Attributes:
        optimizer: its name; a package before a colon is left out of the picture.
        surface: the surface.
        lr: the learning rate.
        evaluations: how often the function was evaluated.
        points: the start and the point after each step, ``[steps + 1, 2]``.
    """

    optimizer: str
    surface: Surface
    lr: float
    evaluations: int
    points: np.ndarray

    @property
    def distance(self) -> float:
        """From the last point to the minimum."""
        return math.dist(self.points[-1], self.surface.minimum)

    @property
    def value(self) -> float:
        """The function at the last point; infinite where that is not finite."""
        with np.errstate(all="ignore"):
            value = float(self.surface.function(*self.points[-1]))
        return value if math.isfinite(value) else math.inf


def as_dict(path: Path) -> dict[str, Any]:
    """A path for a record: its points to five digits, rates and ends as they are.

    Args:
        path: one.
    """
    points = [[float(f"{x:.5g}") for x in point] for point in path.points[:-1]] + [path.points[-1].tolist()]
    return {
        "optimizer": path.optimizer, "surface": path.surface.name, "lr": path.lr, "evaluations": path.evaluations,
        "points": [[x if math.isfinite(x) else None for x in point] for point in points],
    }  # fmt: skip


def from_dict(values: dict[str, Any]) -> Path:
    """What ``as_dict`` has made of a path.

    Args:
        values: of it.
    """
    surface = next(surface for surface in SURFACES if surface.name == values["surface"])
    points = np.array(values["points"], dtype=float)  # None: NaN
    return Path(values["optimizer"], surface, values["lr"], values["evaluations"], points)


def to_markdown(paths: Sequence[Path]) -> str:
    """A line an optimizer: its distance to each minimum at the end, and the rate.

    Args:
        paths: one an optimizer and surface.
    """
    lines = []
    for name in dict.fromkeys(path.optimizer for path in paths):
        package, _, kind = name.rpartition(":")
        own = [text for path in paths if path.optimizer == name for text in (f"{path.distance:.3g}", f"{path.lr:.2g}")]
        lines.append([f"`{package}` {kind}" if package else f"`{kind}`", *own])
    return pages.table(["optimizer", *(title for surface in SURFACES for title in (surface.name, "lr"))], lines)


def run(optimizer: str, build: Build, surface: Surface, lr: float, evaluations: int) -> Path:
    """One path.

    Args:
        optimizer: its name.
        build: makes it for a list of tensors and a learning rate.
        surface: what to minimise.
        lr: the learning rate.
        evaluations: of the function, at most. A path that has left the finite numbers ends early.
    """
    point = torch.tensor(surface.start, dtype=torch.float64, requires_grad=True)
    stepper = build([point], lr)
    points, count = [point.tolist()], 0
    while count < evaluations and all(map(math.isfinite, points[-1])):
        stepper.zero_grad()
        value = surface.function(point[0], point[1])
        count += 1
        backward(stepper, value)
        try:
            stepper.step()
        except torch.linalg.LinAlgError:  # a method that factorizes what is no longer finite
            points.append([math.nan, math.nan])
            break
        points.append(point.tolist())
    return Path(optimizer, surface, lr, count, np.array(points))


def tune(optimizer: str, build: Build, surface: Surface, evaluations: int, rates: Iterable[float] = RATES) -> Path:
    """The path of the learning rate that ends lowest; of the smaller one of two equals.

    Args:
        optimizer: its name.
        build: see ``run``.
        surface: what to minimise.
        evaluations: of the function, for each rate.
        rates: the candidates.

    Raises:
        ValueError: for fewer than one evaluation.
    """
    if evaluations < 1:
        raise ValueError(f"evaluations must be at least 1, got {evaluations}")
    return min((run(optimizer, build, surface, lr, evaluations) for lr in rates), key=lambda path: path.value)


def to_csv(paths: Sequence[Path]) -> str:
    """A line a path.

    Args:
        paths: one an optimizer and surface.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("function", "optimizer", "lr", "evaluations", "distance", "value", "x", "y"))
    for path in paths:
        figures = (path.lr, path.evaluations, path.distance, path.value, *path.points[-1])
        writer.writerow((path.surface.name, path.optimizer, *(f"{figure:.6g}" for figure in figures)))
    return text.getvalue()


def plot(paths: Sequence[Path]) -> Figure:
    """Paths over contours: for each optimizer one cell a surface, side by side.

    Args:
        paths: one an optimizer and surface.
    """
    names = list(dict.fromkeys(path.optimizer for path in paths))
    pairs = min(PAIRS, len(names))
    rows = math.ceil(len(names) / pairs)
    figure = Figure(figsize=(5.4 * pairs, 2.95 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, len(SURFACES) * pairs, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for path in paths:
        row, pair = divmod(names.index(path.optimizer), pairs)
        _draw(grid[row, len(SURFACES) * pair + SURFACES.index(path.surface)], path)
    marks = [
        Line2D([], [], color="none", marker="o", mfc="white", mec="black", markersize=6, label="start"),
        Line2D([], [], color="#cc3311", marker="D", markersize=5, label="path and its end"),
        Line2D([], [], color="none", marker="*", mfc="#228833", mec="white", markersize=12, label="minimum"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)
    return figure


def _draw(axes: Axes, path: Path) -> None:
    surface = path.surface
    left, right, bottom, top = surface.window
    x, y = np.meshgrid(np.linspace(left, right, 200), np.linspace(bottom, top, 200))
    norm = LogNorm(vmin=surface.levels[0], vmax=surface.levels[-1])
    axes.contour(x, y, surface.function(x, y), levels=surface.levels, cmap="Blues_r", norm=norm, linewidths=0.6)
    points = path.points[np.isfinite(path.points).all(axis=1)]
    axes.plot(*points.T, color="#cc3311", linewidth=0.9, marker=".", markersize=2.5, zorder=3)
    axes.plot(*surface.minimum, "*", mfc="#228833", mec="white", markersize=13, zorder=4)
    axes.plot(*surface.start, "o", mfc="white", mec="black", markersize=6, zorder=4)
    axes.plot(*points[-1], "D", mfc="#cc3311", mec="white", markersize=6, zorder=5)
    axes.set_axis_on()
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
    name = path.optimizer.rpartition(":")[2]
    axes.set_title(f"{name}, lr {path.lr:.2g}\n{surface.name}: {path.distance:.2g} away", fontsize=9)
    for spine in axes.spines.values():
        spine.set_color(GREY)
