"""Pictures of factors over training: numbers, spectra, how curvature lies beside damping, runs beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from analysis.compare.figures import PALETTE
from analysis.factors import matrices
from analysis.factors.study import Point, Study
from training.show.curves import GREY, dress, log_axis

#: What ``over_training`` and ``runs`` draw: key, label, whether the axis is logarithmic.
PANELS: tuple[tuple[str, str, bool], ...] = (
    ("mean_A", "mean eigenvalue of A", True),
    ("mean_G", "mean eigenvalue of G", True),
    ("participation_A", "directions that count in A", True),
    ("participation_G", "directions that count in G", True),
    ("diagonal_A", "diagonal's share of |A|²", False),
    ("diagonal_G", "diagonal's share of |G|²", False),
    ("above", "directions above the damping", False),
    ("relative_step", "step of rate 1, in weights' length", True),
)
#: And where nearness to a Kronecker product was asked for.
FIT = (
    ("fit_cosine", "cosine of the Fisher block and G ⊗ A", False),
    ("fit_shared", "a shift of all positions: true curvature over K-FAC's", True),
)
QUANTILES = (0.1, 0.5, 0.9)


def wrapped(title: str, width: float) -> str:
    """A title broken at spaces into lines that fit a figure.

    Args:
        title: one line.
        width: of the figure in inches.
    """
    lines, most = [""], int(width * 12)
    for word in title.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > most:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def canvas(width: float, height: float, title: str) -> Figure:
    """An empty figure with its title.

    Args:
        width: in inches.
        height: in inches, without the title.
        title: broken into lines as it needs.
    """
    text = wrapped(title, width)
    figure = Figure(figsize=(width, height + 0.25 * text.count("\n")), layout="constrained")
    figure.suptitle(text, fontsize="medium")
    return figure


def below(figure: Figure, handles: Sequence[Line2D], columns: int) -> None:
    """A legend below all panels.

    Args:
        figure: that gets it.
        handles: lines with their labels.
        columns: side by side.
    """
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize="small", frameon=False)


def colours(count: int) -> list[str]:
    """As many colours as lines, those of the house first."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    ramp = matplotlib.colormaps["turbo"]
    return [matplotlib.colors.to_hex(ramp(0.03 + 0.94 * i / (count - 1))) for i in range(count)]


def over_training(study: Study, layers: Sequence[str] | None = None) -> Figure:
    """Numbers of some layers against the step, a panel a number.

    Args:
        study: of one run.
        layers: names; None: all.
    """
    shown = list(layers if layers is not None else study.layers)
    lines = {name: (study, name) for name in shown}
    return _panels(study.title, lines, dict(zip(shown, colours(len(shown)), strict=True)))


def runs(studies: Sequence[Study], layer: str, keys: Sequence[str] | None = None) -> Figure:
    """One layer's numbers in several runs against the step.

    Args:
        studies: of one run each, of the same labels.
        layer: its name.
        keys: of the numbers; None: those of ``over_training``.

    Raises:
        ValueError: the layer is in none of them.
    """
    having = [study for study in studies if layer in study.layers]
    if not having:
        raise ValueError(f"layer {layer!r} is in none of the runs")
    names = [study.name for study in having]
    lines = {name: (study, layer) for name, study in zip(names, having, strict=True)}
    title = f"{layer}: {having[0].title.partition(': ')[2]}"
    return _panels(title, lines, dict(zip(names, colours(len(names)), strict=True)), keys)


def _panels(
    title: str,
    lines: Mapping[str, tuple[Study, str]],
    palette: Mapping[str, str],
    keys: Sequence[str] | None = None,
) -> Figure:
    """A panel a number, a line a label."""
    known = (*PANELS, *FIT)
    chosen = [panel for panel in known if keys is None or panel[0] in keys]
    chosen = [p for p in chosen if any(study.series(layer, p[0])[1] for study, layer in lines.values())]
    columns = min(2, len(chosen))
    rows = math.ceil(len(chosen) / max(columns, 1))
    figure = canvas(9, 2.5 * rows + 0.4 + 0.22 * math.ceil(len(lines) / 3), title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(chosen) :]:
        axes.set_axis_off()
    for axes, (key, label, logarithmic) in zip(grid.flat, chosen, strict=False):
        for name, (study, layer) in lines.items():
            steps, values = study.series(layer, key)
            if logarithmic:
                kept = [(s, v) for s, v in zip(steps, values, strict=True) if v > 0]
                steps, values = [s for s, _ in kept], [v for _, v in kept]
            axes.plot(steps, values, "o-", color=palette[name], linewidth=1.5, markersize=3)
        if logarithmic:
            log_axis(axes)
        else:
            axes.set_ylim(0, 1.03)
        dress(axes, "step" if axes in grid[-1] else "", "")
        axes.set_title(label, fontsize="small", loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    handles = [Line2D([], [], color=palette[name], linewidth=1.8, label=name) for name in lines]
    below(figure, handles, min(3, len(handles)))
    return figure


def spectra(study: Study) -> Figure:
    """Eigenvalues of both factors of the pictured layers, a line a point of training."""
    names = [name for name in study.pictured if any(name in point.spectra for point in study.points)]
    figure, grid = layer_grid(names, 2, study.title, width=9, height=2.6)
    shades = matplotlib.colormaps["viridis"]
    most = max(len(study.points) - 1, 1)
    for row, name in zip(grid, names, strict=True):
        for axes, key in zip(row, "AG", strict=True):
            for index, point in enumerate(study.points):
                if name in point.spectra:
                    values = getattr(point.spectra[name], key).flatten().sort(descending=True).values
                    _curve(axes, values, shades(0.9 * index / most), f"step {point.step}")
            log_axis(axes)
            plain(axes, "eigenvalue, from the largest" if row is grid[-1] else "", f"{key} of {name}")
            axes.set_xlim(left=1)
    if names:
        below(figure, grid[0][0].get_lines(), min(6, len(study.points)))
    return figure


def _curve(axes: Axes, values: Tensor, colour: object, label: str) -> None:
    """Positive values by their place; what rounding left at or below zero ends the line."""
    kept = values[values > matrices.resolution(values)]
    places = torch.arange(1, len(kept) + 1)
    axes.plot(places.tolist(), kept.tolist(), color=colour, linewidth=1.3, label=label)


def kind_of(name: str) -> str:
    """What a layer is called within its block: the last part of its name that is no number, or the whole name."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return parts[-1] if parts else name


def curvature(study: Study, steps: Sequence[int] | None = None) -> Figure:
    """How the curvature of ``G (x) A`` lies beside the damping, layer by layer in the model's order.

    Bars reach from the tenth to the ninetieth percentile of the directions, a dot is the mean, a line the median, a
    tick the largest.

    Args:
        study: of one run.
        steps: of the points to draw, a panel each; None: the first and the last.
    """
    points = [point for point in study.points if steps is None or point.step in steps]
    points = points if steps is not None or len(points) < 2 else [points[0], points[-1]]
    names = [name for name in study.layers if any(name in point.spectra for point in points)]
    kinds = list(dict.fromkeys(map(kind_of, names)))
    palette = dict(zip(kinds, colours(len(kinds)), strict=True))
    figure = canvas(9, 2.9 * len(points) + 1.2, study.title)
    grid = figure.subplots(len(points), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    low = high = study.plan.damping
    for axes, point in zip(grid, points, strict=True):
        for place, name in enumerate(names):
            if name in point.spectra:
                least, most = _bar(axes, place, point.spectra[name].product, palette[kind_of(name)])
                low, high = min(low, least), max(high, most)
        axes.axhline(study.plan.damping, color=GREY, linestyle="--", linewidth=1.2)
        axes.set_yscale("log")
        plain(axes, "", f"eigenvalues of G ⊗ A after {point.step} steps; dashed: damping {study.plan.damping:g}")
    grid[0].set_ylim(low / 100, high * 5)
    grid[-1].set_xticks(range(len(names)), [_short(name) for name in names], rotation=90, fontsize="x-small")
    return figure


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else "…" + name[-most + 1 :]


def _bar(axes: Axes, place: int, product: Tensor, colour: str) -> tuple[float, float]:
    """One layer's eigenvalues; returns their mean and the largest."""
    values = product.flatten()
    some = values[:: max(1, values.numel() // 500_000)]  # torch.quantile takes no more
    low, middle, high = torch.quantile(some, torch.tensor(QUANTILES, dtype=some.dtype)).tolist()
    largest, mean = float(values.max()), float(values.mean())
    if largest <= 0:
        return math.inf, 0.0  # nothing flows: no bar
    floor = largest * 1e-18
    low, middle, high = (max(v, floor) for v in (low, middle, high))
    axes.bar(place, high - low, bottom=low, color=colour, alpha=0.45, width=0.7)
    axes.plot([place - 0.35, place + 0.35], [middle, middle], color=colour, linewidth=2)
    axes.plot(place, mean, "o", color=colour, markersize=4, mec="white", mew=0.5)
    axes.plot(place, largest, "_", color=colour, markersize=8, mew=1.5)
    return mean, largest


def layer_grid(
    names: Sequence[str], columns: int, title: str, *, width: float, height: float
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a row of panels for each layer.

    Args:
        names: of the layers.
        columns: panels a row.
        title: of the figure.
        width: of it, in inches.
        height: of a row, in inches.
    """
    rows = max(len(names), 1)
    figure = canvas(width, height * rows + 0.6, title)
    grid = figure.subplots(rows, columns, squeeze=False)
    if not names:
        for axes in grid.flat:
            axes.set_axis_off()
        grid[0, 0].text(0, 0.5, "no pictured layer has whole factors", color=GREY)
    return figure, [list(row) for row in grid[: len(names)]]


def plain(axes: Axes, x_label: str, title: str) -> None:
    """The house style for axes that need not begin at zero.

    Args:
        axes: to be dressed.
        x_label: below.
        title: above, on the left.
    """
    axes.set_xlabel(x_label, fontsize="small")
    axes.set_title(title, fontsize="small", loc="left")
    axes.grid(alpha=0.25, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize="small")


def point_of(study: Study, name: str) -> Point | None:
    """The last point at which a layer's factors can be seen."""
    having = [point for point in study.points if (name, "A") in study.seeable(point)]
    return having[-1] if having else None
