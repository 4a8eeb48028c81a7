"""Pictures of how good the approximations are: errors by layer, directions, and both over training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.compare.figures import PALETTE
from analysis.fisher.measure import Row
from analysis.fisher.methods import OWN
from analysis.fisher.methods import label as label_of
from analysis.fisher.profiles import Binned
from analysis.fisher.tables import DIRECTIONS, ERRORS, middle
from training.show.curves import GREY, log_axis

#: Colour, line and mark of each method: families share a colour's neighbourhood, and no two look alike in grey.
LOOKS: dict[str, tuple[str, Literal["-", "--", ":"], str]] = {
    "gradient": (GREY, ":", "x"),
    "diagonal": ("#bbbbbb", "-", "s"),
    "adafisher": (PALETTE[3], "--", "P"),
    "adafisher_raw": (PALETTE[3], "-", "P"),
    "kfac": (PALETTE[0], "-", "o"),
    "kfac_reduce": (PALETTE[0], "--", "o"),
    "kfac_tikhonov": (PALETTE[0], ":", "o"),
    "ekfac": (PALETTE[5], "-", "D"),
    "kpsvd": (PALETTE[2], "-", "^"),
    "kpsvd_tikhonov": (PALETTE[2], ":", "^"),
    "deflation": (PALETTE[1], "-", "v"),
    "kfac_corrected": (PALETTE[4], "-", "<"),
    "lanczos": (PALETTE[1], ":", ">"),
    "fishleg": (PALETTE[6], "-", "*"),
    "two_level": (PALETTE[7], "--", "h"),
    "block": ("#000000", ":", "."),
    OWN: ("#000000", "-", "X"),
}
#: More layers than this are numbered rather than named.
NAMED = 8
#: Larger errors are told rather than drawn: approximations are no better than none long before.
TOP = 3.0


def errors(rows: Sequence[Row], title: str) -> Figure:
    """The four errors by layer, a line a method.

    Args:
        rows: of one net, step and damping.
        title: of the picture.
    """
    layers = list(dict.fromkeys(row.layer for row in rows if row.layer))
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    drawn: set[str] = set()
    for axes, (measure, name) in zip(grid.flat, ERRORS.items(), strict=True):
        drawn |= _lines(axes, rows, layers, measure)
        _dress(axes, "", f"relative error: {name}")
        _logarithmic(axes, [row.method for row in rows if row.layer and getattr(row, measure) > TOP])
    named = len(layers) <= NAMED
    for axes in grid[1]:
        axes.set_xticks(range(len(layers)), layers if named else [str(k + 1) for k in range(len(layers))])
        axes.set_xlabel("layer" if named else "layer, from the input on")
        if named and max(map(len, layers)) > 6:
            axes.set_xticks(range(len(layers)), layers, rotation=30, ha="right")
    _legend(figure, [m for m in LOOKS if m in drawn])
    figure.suptitle(title, fontsize="medium")
    return figure


def _lines(axes: Axes, rows: Sequence[Row], layers: Sequence[str], measure: str) -> set[str]:
    drawn = set()
    for method in LOOKS:
        values = {row.layer: getattr(row, measure) for row in rows if row.method == method and row.layer}
        line = [values.get(layer, math.nan) for layer in layers]
        if not all(map(math.isnan, line)):
            colour, style, mark = LOOKS[method]
            axes.plot(range(len(layers)), line, style, color=colour, marker=mark, markersize=5, linewidth=1.4)
            drawn.add(method)
    return drawn


def directions(rows: Sequence[Row], title: str) -> Figure:
    """What each method's direction is worth on the whole net: angles, and shares of the model's decrease.

    Args:
        rows: of one net, step and damping.
        title: of the picture.
    """
    whole = {row.method: row for row in rows if not row.layer}
    methods = [method for method in LOOKS if method in whole]
    figure = Figure(figsize=(10, 0.34 * len(methods) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, measures, label in (
        (left, ("angle_block", "angle_full"), "degrees to the exact natural gradient"),
        (right, ("decrease_block", "decrease_full"), "share of the quadratic model's decrease"),
    ):
        for offset, measure, colour in zip((-0.19, 0.19), measures, (PALETTE[0], PALETTE[1]), strict=True):
            values = [getattr(whole[method], measure) for method in methods]
            places = [place + offset for place in range(len(methods))]
            name = "of the exact blocks" if measure.endswith("block") else "of the whole Fisher matrix"
            axes.barh(places, values, height=0.36, color=colour, label=name)
            for place, value in zip(places, values, strict=True):
                text = f" {value:.0f}°" if measure.startswith("angle") else f" {value:.2g}"
                axes.text(value, place, text, va="center", fontsize=7, color=GREY)
        axes.set_xlabel(label)
        axes.margins(x=0.1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25, linewidth=0.8)
    left.set_yticks(range(len(methods)), [label_of(method) for method in methods])
    left.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize="medium")
    return figure


def training(rows: Sequence[Row], title: str) -> Figure:
    """Over training: the median error of the blocks and of their inverses, and the angle and decrease on the whole.

    Args:
        rows: of one net and damping, at several steps.
        title: of the picture.
    """

    def of_layers(measure: str) -> Callable[[Sequence[Row]], float]:
        return lambda own: middle([getattr(row, measure) for row in own if row.layer])

    def of_whole(measure: str) -> Callable[[Sequence[Row]], float]:
        return lambda own: next((getattr(row, measure) for row in own if not row.layer), math.nan)

    kept = ("fisher_frobenius", "inverse_frobenius")
    panels = [(f"{ERRORS[key]}, median layer", of_layers(key), True) for key in kept]
    panels += [(DIRECTIONS[key], of_whole(key), False) for key in ("angle_full", "decrease_full")]
    steps = sorted({row.step for row in rows})
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    drawn: set[str] = set()
    for axes, (label, value, logarithmic) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        beyond = []
        for method in LOOKS:
            own = [[row for row in rows if row.method == method and row.step == step] for step in steps]
            line = [value(some) if some else math.nan for some in own]
            if not all(map(math.isnan, line)):
                colour, style, mark = LOOKS[method]
                axes.plot(steps, line, style, color=colour, marker=mark, markersize=5, linewidth=1.4)
                drawn.add(method)
                beyond += [method] if max(line) > TOP else []
        _dress(axes, "step of training", label + (", degrees" if "angle" in label else ""))
        if logarithmic:
            _logarithmic(axes, beyond)
        if min(steps) > 0 and max(steps) / min(steps) > 5:
            axes.set_xscale("log")
            axes.set_xticks(steps, [str(step) for step in steps])
            axes.minorticks_off()
    _legend(figure, [m for m in LOOKS if m in drawn])
    figure.suptitle(title, fontsize="medium")
    return figure


def profile(found: Sequence[Binned], title: str) -> Figure:
    """Curvature and steps along the eigenvectors of the exact block, in units of the true ones: a row a layer.

    A point is of a quarter of a decade of eigenvalues: the median of the curvatures, the length of the step there.

    Args:
        found: of one net, step and damping.
        title: of the picture.
    """
    layers = list(dict.fromkeys(one.layer for one in found))
    figure = Figure(figsize=(10, 3.2 * len(layers) + 0.9), layout="constrained")
    for pair, layer in zip(figure.subplots(len(layers), 2, squeeze=False), layers, strict=True):
        for one in (one for one in found if one.layer == layer):
            colour, style, mark = LOOKS[one.method]
            for axes, line in zip(pair, (one.curvatures, one.lengths), strict=True):
                axes.plot(one.eigenvalues, line, style, color=colour, marker=mark, markersize=4, linewidth=1.3)
        for axes, label in zip(pair, ("curvature / true curvature", "step / natural gradient"), strict=True):
            axes.axhline(1, color=GREY, linewidth=1)
            axes.set_xscale("log")
            axes.invert_xaxis()
            _dress(axes, f"eigenvalue of F, layer {layer}", label)
            _logarithmic(axes)
    _legend(figure, [m for m in LOOKS if m in {one.method for one in found}])
    figure.suptitle(title, fontsize="medium")
    return figure


def _logarithmic(axes: Axes, beyond: Sequence[str] = ()) -> None:
    """A logarithmic vertical axis with plain numbers on it; which methods go beyond its top, it says."""
    axes.set_yscale("log")
    if beyond and axes.get_ylim()[0] < TOP:
        axes.set_ylim(top=TOP)
        text = f"also above {TOP:g}: {', '.join(label_of(method) for method in dict.fromkeys(beyond))}"
        axes.text(0.99, 0.98, text, ha="right", va="top", fontsize=8, transform=axes.transAxes)
    log_axis(axes)


def _dress(axes: Axes, x_label: str, y_label: str) -> None:
    """Labels, a light grid and no frame, as in all pictures."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, methods: Sequence[str]) -> None:
    entries = []
    for method in methods:
        colour, style, mark = LOOKS[method]
        label = label_of(method)
        entries.append(Line2D([], [], color=colour, linestyle=style, marker=mark, markersize=5, label=label))
    figure.legend(handles=entries, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
