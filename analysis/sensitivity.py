"""How sensitive an optimizer is to two of its values: grids of runs, ranges of good values, heat maps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis import pages
from analysis.compare import LoadedRun, higher_is_better
from training.show.curves import GREY

#: Keys that a grid is over unless others are asked for.
KEYS = ("optimizer.lr", "optimizer.damping")
#: What is near the best: points of accuracy, or share of the loss.
NEAR = 0.02
#: Points of accuracy below the best that colours tell apart.
SHOWN = 0.2
#: How the ends of a range of values are written: a base and a power.
_POWER = re.compile(r"(\d+(?:\.\d+)?)\^(-?\d+)")


@dataclass(frozen=True)
class Axis:
    """A key and the values that it is to have.

    Attributes:
        key: a dotted name, "optimizer.lr".
        factors: multiples of what an optimizer is configured with; () where values are given.
        values: the same for all optimizers; () where factors are given.
    """

    key: str
    factors: tuple[float, ...] = ()
    values: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str, name: str) -> Axis:
        """An axis from ``KEY:2^-4..2^4`` (multiples), ``KEY:2^-4..2^4/2`` (each second power), or ``KEY:0.1,0.2``.

        Args:
            text: as it was given.
            name: of the argument, for the sentence.

        Raises:
            ValueError: the text has another form.
        """
        key, _, spec = text.partition(":")
        form = f"{name} must be KEY:2^-4..2^4 (multiples of the configured value) or KEY:0.1,0.2,..., got {text!r}"
        if not key or not spec:
            raise ValueError(form)
        if ".." not in spec:
            try:
                values = tuple(sorted({float(word) for word in spec.split(",")}))
            except ValueError:
                raise ValueError(form) from None
            return cls(key, values=values)
        spec, _, stride = spec.partition("/")
        ends = [_POWER.fullmatch(end) for end in spec.split("..")]
        if len(ends) != 2 or not all(ends) or not re.fullmatch(r"([1-9]\d*)?", stride):
            raise ValueError(form)
        (base, low), (other, high) = (match.groups() for match in ends if match)
        if base != other or int(low) > int(high) or float(base) <= 1:
            raise ValueError(form)
        powers = range(int(low), int(high) + 1, int(stride or 1))
        return cls(key, factors=tuple(float(base) ** power for power in powers))

    def of(self, configured: Any, optimizer: str) -> list[float]:
        """The values for an optimizer.

        Args:
            configured: what it has for the key.
            optimizer: its name, for the sentence.

        Raises:
            ValueError: multiples are asked for, and what is configured is no number above 0.
        """
        if self.values:
            return list(self.values)
        if isinstance(configured, bool) or not isinstance(configured, int | float) or not configured > 0:
            raise ValueError(
                f"{self.key} of {optimizer} is {configured!r}, which has no multiples: give values, such as "
                f"{self.key}:0.01,0.1"
            )
        return [float(f"{configured * factor:.4g}") for factor in self.factors]


def near_best(values: Sequence[float | None], higher: bool, near: float = NEAR) -> tuple[int, int, int]:
    """Places of the lowest value of a row, the best one and the highest, as far as all between are near the best.

    Args:
        values: in a row; None where a run did not come to an end.
        higher: more is better, and near is meant in points; otherwise less is, and in shares of the best.
        near: how much worse than the best still counts.

    Raises:
        ValueError: there is no value.
    """
    scores = [None if value is None else -value if higher else value for value in values]
    known = [score for score in scores if score is not None]
    if not known:
        raise ValueError("no run of the row has come to an end")
    best = min(known)
    place = low = high = scores.index(best)
    while low > 0 and is_near(scores[low - 1], best, higher, near):
        low -= 1
    while high + 1 < len(scores) and is_near(scores[high + 1], best, higher, near):
        high += 1
    return low, place, high


def is_near(score: float | None, best: float, higher: bool, near: float) -> bool:
    """Whether a score, of which less is better, is near the best one; see ``near_best``."""
    limit = best + near if higher else best + near * abs(best)
    return score is not None and score <= limit + 1e-12


@dataclass(frozen=True)
class Extent:
    """A range of good values around the best one.

    Attributes:
        low: its lowest value.
        best: the best.
        high: its highest.
        open: whether it reaches the ends of what was tried, below and above.
    """

    low: float
    best: float
    high: float
    open: tuple[bool, bool]

    @property
    def octaves(self) -> float:
        """Its width, in factors of two."""
        return math.log2(self.high / self.low) if self.low > 0 else math.nan

    def __str__(self) -> str:
        pairs = zip((self.low, self.high), self.open, strict=True)
        return f"{self.octaves:.3g} ({' to '.join(('beyond ' if open else '') + f'{end:.3g}' for end, open in pairs)})"


@dataclass(frozen=True)
class Grid:
    """What became of one optimizer's runs over two keys, or one.

    Attributes:
        label: the optimizer.
        x_key: key along the columns.
        xs: its values, ascending.
        y_key: key along the rows; None for a strip.
        ys: its values, ascending; [nan] for a strip.
        values: ``[rows, columns]``, means over seeds; NaN where a run is missing or did not come to an end.
        states: "finished", "diverged", "failed", "missing", ... for each.
        seeds: how many runs a value is the mean of, at most.
        higher: whether more is better.
    """

    label: str
    x_key: str
    xs: list[float]
    y_key: str | None
    ys: list[float]
    values: np.ndarray
    states: list[list[str]]
    seeds: int
    higher: bool

    @property
    def best(self) -> tuple[int, int] | None:
        """Row and column of the best value; None if there is none."""
        if np.isnan(self.values).all():
            return None
        flat = int(np.nanargmax(self.values) if self.higher else np.nanargmin(self.values))
        row, column = divmod(flat, len(self.xs))
        return row, column

    def near(self, near: float = NEAR) -> np.ndarray:
        """Which values are near the best, bool ``[rows, columns]``."""
        if self.best is None:
            return np.zeros(self.values.shape, dtype=bool)
        scores = -self.values if self.higher else self.values
        best = float(np.nanmin(scores))
        return np.array([[is_near(float(score), best, self.higher, near) for score in row] for row in scores])

    def extent(self, axis: str, near: float = NEAR) -> Extent | None:
        """The range of good values along an axis, the other key at the best run's.

        Args:
            axis: "x" or "y".
            near: see ``near_best``.

        Returns:
            None if no run came to an end, or a strip has no such axis.
        """
        if self.best is None or (axis == "y" and self.y_key is None):
            return None
        row, column = self.best
        line, ends = (self.values[row], self.xs) if axis == "x" else (self.values[:, column], self.ys)
        values = [None if math.isnan(value) else float(value) for value in line]
        low, place, high = near_best(values, self.higher, near)
        return Extent(ends[low], ends[place], ends[high], (low == 0, high == len(ends) - 1))


def number(run: LoadedRun, key: str) -> float | None:
    """A run's value of a dotted key, if it is a number."""
    found: Any = run.values
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def varying(runs: Sequence[LoadedRun]) -> list[str]:
    """Keys whose numbers differ among the runs of one optimizer, the usual ones first.

    Args:
        runs: of a sweep.
    """
    found: dict[str, None] = {}
    for optimizer in dict.fromkeys(run.choices.get("optimizer") for run in runs):
        own = [run for run in runs if run.choices.get("optimizer") == optimizer]
        for key in dict.fromkeys(key for run in own for key in run.settings):
            numbers = {number(run, key) for run in own}
            if len(numbers) > 1 and None not in numbers:
                found[key] = None
    return [*(key for key in KEYS if key in found), *(key for key in found if key not in KEYS)]


def grids(runs: Sequence[LoadedRun], x_key: str, y_key: str | None, metric: str | None = None) -> list[Grid]:
    """A grid an optimizer; one whose runs have no number for a key gets a strip.

    Args:
        runs: of a sweep, with one seed or several.
        x_key: dotted name of the key along the columns.
        y_key: along the rows; None: all are strips.
        metric: of the end of a run, "val/accuracy"; None: that which chose the best weights.

    Raises:
        ValueError: no run has that metric or that key, or runs of a cell differ in more than their seed.
    """
    monitors = dict.fromkeys(run.summary.get("monitor") for run in runs if run.summary.get("monitor"))
    metric = metric or next(iter(monitors), None) or "val/loss"
    known = sorted({name for run in runs for name in run.summary.get("final") or {}})
    if metric not in known:
        raise ValueError(f"metric: no run has ended with {metric!r}; they have {', '.join(known) or 'none yet'}")
    made = []
    for optimizer in dict.fromkeys(str(run.choices.get("optimizer")) for run in runs):
        own = [run for run in runs if run.choices.get("optimizer") == optimizer]
        if all(number(run, x_key) is None for run in own):
            raise ValueError(f"x: the runs of {optimizer} have no number for {x_key}; {_advice(own)}")
        strip = y_key is None or all(number(run, y_key) is None for run in own)
        made.append(_grid(optimizer, own, x_key, None if strip else y_key, metric))
    return made


def _advice(runs: Sequence[LoadedRun]) -> str:
    return f"what varies is {', '.join(varying(runs)) or 'nothing'}"


def _grid(label: str, runs: Sequence[LoadedRun], x_key: str, y_key: str | None, metric: str) -> Grid:
    cells: dict[tuple[float, float], dict[int, LoadedRun]] = {}
    for run in runs:
        x, y = number(run, x_key), math.inf if y_key is None else number(run, y_key)
        if x is None or y is None:
            continue
        cell = cells.setdefault((x, y), {})
        if run.seed in cell:
            rest = [key for key in varying(runs) if key not in (x_key, y_key)]
            why = f"and differ in {', '.join(rest)}" if rest else "of one seed"
            raise ValueError(f"several runs of {label} have {x_key}={x:g} {why}: give a folder with one run a cell")
        cell[run.seed] = run
    xs, ys = sorted({x for x, _ in cells}), sorted({y for _, y in cells})
    values, states = np.full((len(ys), len(xs)), math.nan), [["missing"] * len(xs) for _ in ys]
    seeds = {seed for cell in cells.values() for seed in cell}
    for (x, y), cell in cells.items():
        row, column = ys.index(y), xs.index(x)
        found = [(run.summary.get("final") or {}).get(metric) for run in cell.values()]
        ended = [run.status in ("finished", "stopped early") for run in cell.values()]
        numbers = [float(value) for value in found if value is not None]
        good = all(ended) and len(numbers) == len(seeds)
        trouble = next((run.status for run, fine in zip(cell.values(), ended, strict=True) if not fine), "missing")
        values[row, column] = fmean(numbers) if good else math.nan
        states[row][column] = "finished" if good else trouble
    ys = [math.nan] if y_key is None else ys
    return Grid(label, x_key, xs, y_key, ys, values, states, len(seeds), higher_is_better(metric))


def to_markdown(found: Iterable[Grid], metric: str, near: float = NEAR) -> str:
    """A table: the best value, where it is, and in how many octaves around it values are near the best.

    Args:
        found: grids.
        metric: what they are of.
        near: see ``near_best``.
    """
    found = list(found)
    first, second = found[0].x_key, next((grid.y_key for grid in found if grid.y_key), None)
    titles = [f"best {metric}", *(f"octaves of {key}" for key in (first, second) if key), "near the best"]
    lines = []
    for grid in found:
        if grid.best is None:
            cells = ["none ended", *[""] * (len(titles) - 1)]
        else:
            row, column = grid.best
            value = float(grid.values[row, column])
            where = f"{grid.x_key}={grid.xs[column]:.3g}" + (f", {grid.y_key}={grid.ys[row]:.3g}" if grid.y_key else "")
            cells = [f"{figure(value, grid.higher)} at {where}", str(grid.extent("x", near))]
            if second is not None:
                cells.append("" if grid.y_key is None else str(grid.extent("y", near)))
            cells.append(f"{int(grid.near(near).sum())} of {grid.values.size} runs")
        lines.append([grid.label, *cells])
    return pages.table(["optimizer", *titles], lines)


def figure(value: float, higher: bool) -> str:
    """A value as it is written: an accuracy in percent."""
    return f"{100 * value:.1f}" if higher else f"{value:.3g}"


def plot(found: Sequence[Grid], metric: str, near: float = NEAR, title: str = "") -> Figure:
    """A heat map an optimizer, on one scale of colours; what is near the optimizer's own best is framed.

    Args:
        found: grids.
        metric: what they are of, for the colour bar.
        near: see ``near_best``.
        title: above all.
    """
    found = sorted(found, key=lambda grid: grid.y_key is None)  # strips come last, beside each other
    columns = 2 if len(found) in (2, 4) else min(len(found), 3)
    rows = -(-len(found) // columns)
    tallest = [max(len(grid.ys) for grid in found[i * columns : (i + 1) * columns]) for i in range(rows)]
    widest = max(len(grid.xs) for grid in found)
    size = 0.47
    shape = (columns * (widest * size + 1.1) + 1.0, sum(n * size + 1.2 for n in tallest) + 0.5)
    canvas = Figure(figsize=(max(shape[0], 4.5), shape[1]), layout="constrained")
    panels = canvas.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": [n + 1.5 for n in tallest]})
    scale, colours = _scale(found), matplotlib.colormaps["viridis" if found[0].higher else "viridis_r"].copy()
    for axes, grid in zip(panels.flat, found, strict=False):
        _draw(axes, grid, scale, colours, near)
    for axes in list(panels.flat)[len(found) :]:
        axes.remove()
    drawn = list(panels.flat)[: len(found)]
    beyond: Any = "min" if found[0].higher else "max"
    bar = canvas.colorbar(matplotlib.cm.ScalarMappable(scale, colours), ax=drawn, fraction=0.05, extend=beyond)
    bar.set_label(metric + (" (%)" if found[0].higher else ""), fontsize=9)
    if found[0].higher:
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    canvas.suptitle(title, fontsize="medium")
    return canvas


def _scale(found: Sequence[Grid]) -> Normalize:
    """One scale for all grids, on which what is far worse than most does not hide what differs among the good."""
    values = np.concatenate([grid.values[~np.isnan(grid.values)] for grid in found])
    if not len(values):
        return Normalize(0, 1)
    if found[0].higher:
        best = float(values.max())
        return Normalize(max(best - SHOWN, float(values.min())), best, clip=True)
    low, high = float(values.min()), float(np.quantile(values, 0.9))
    if low > 0:
        return LogNorm(low, max(high, 1.01 * low), clip=True)
    return Normalize(low, max(high, low + 1e-9), clip=True)


def _draw(axes: Axes, grid: Grid, scale: Normalize, colours: Any, near: float) -> None:
    rows, columns = grid.values.shape
    axes.set_facecolor("#eeeeee")
    axes.imshow(np.ma.masked_invalid(grid.values), cmap=colours, norm=scale, origin="lower", aspect="equal")
    good = grid.near(near)
    for row in range(rows):
        for column in range(columns):
            value, state = float(grid.values[row, column]), grid.states[row][column]
            if math.isnan(value):
                sign = {"diverged": "×", "missing": ""}.get(state, "!")
                axes.text(column, row, sign, ha="center", va="center", color=GREY)
                continue
            red, green, blue, _ = colours(scale(value))
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            weight = "bold" if (row, column) == grid.best else "normal"
            text = figure(value, grid.higher)
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=7, fontweight=weight)
            if good[row, column]:
                corner = (column - 0.46, row - 0.46)
                axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor="#ee3377", linewidth=1.6))
    axes.set_xticks(range(columns), [f"{x:.2g}" for x in grid.xs], rotation=45, ha="right", fontsize=7)
    axes.set_xlabel(grid.x_key, fontsize=8)
    if grid.y_key is None:
        axes.set_yticks([])
    else:
        axes.set_yticks(range(rows), [f"{y:.2g}" for y in grid.ys], fontsize=7)
        axes.set_ylabel(grid.y_key, fontsize=8)
    axes.tick_params(length=2)
    axes.spines[:].set_visible(False)
    keys = {"x": grid.x_key, "y": grid.y_key or ""}
    known = [(keys[axis].rpartition(".")[2], extent) for axis in "xy" if (extent := grid.extent(axis, near))]
    extents = [f"{name} {extent.octaves:.3g}" for name, extent in known]
    axes.set_title(f"{grid.label}\noctaves of {', '.join(extents)}" if extents else grid.label, fontsize=9)
