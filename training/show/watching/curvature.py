"""The picture of what steps did, from a run's `metrics.jsonl` alone: a panel a scalar, a line a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from training.show.curves import GREY, dress, log_axis, name_of_run, read_metrics, series

#: Panels in their order: what it is called, and whether it is drawn on a logarithmic axis.
PANELS = {
    "above_damping": ("directions with curvature above damping", False),
    "condition": ("condition of the damped matrix", True),
    "floored": ("floored directions", False),
    "kl_scale": ("scale of the KL clip", True),
    "angle": ("degrees from steepest descent", False),
    "update_ratio": ("length of update / weights", True),
}
SHARES = ("above_damping", "floored")
#: What the loss of a step's batch fell by, and what was foretold.
DECREASES = {
    "decrease": ("measured", "#333333", "-"),
    "decrease_linear": ("by the gradient", "#cc6677", "--"),
    "decrease_quadratic": ("by the damped curvature", "#4477aa", "-"),
}
#: So many layers are named in the legend; of more, the first and the last.
NAMED = 12
PLAYERS = ("", "critic/", "generator/")


def plot_curvature(metrics_jsonl: str | Path, name: str | None = None) -> Figure | None:
    """Draw what `callbacks=curvature` has logged.

    Args:
        metrics_jsonl: the run's `metrics.jsonl`, or its folder.
        name: title; None: the names of the run's folder and of the one above it.

    Returns:
        A figure that is not registered with pyplot; None if nothing of the kind was logged.
    """
    path = Path(metrics_jsonl)
    events = [event for event in read_metrics(path, whole=False) if event.get("event") == "curvature"]
    if not events:
        return None
    layers = layers_in(events)
    panels = [key for key in PANELS if any(f"curvature.{key}/{layer}" in event for event in events for layer in layers)]
    decreases = any(f"{player}curvature/{key}" in event for event in events for player in PLAYERS for key in DECREASES)
    count = len(panels) + decreases
    columns = min(count, 4 if count in (4, 7, 8) else 3)
    rows = -(-count // columns)
    named = len(layers) <= NAMED
    legend = 0.25 * -(-len(layers) // 6) if named else 0.0
    width, height = 4.2 * columns + (0 if named else 0.9), 3.2 * rows + 0.5 + legend
    figure = Figure(figsize=(width, height))  # margins in inches, as of all pictures of a run
    room = {"left": 0.7 / width, "right": 1 - (0.2 if named else 1.3) / width, "wspace": 0.28, "hspace": 0.42}
    figure.subplots_adjust(bottom=(0.6 + legend) / height, top=1 - 0.75 / height, **room)
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    colours = [matplotlib.colormaps["viridis"](0.95 * i / max(len(layers) - 1, 1)) for i in range(len(layers))]
    for key, axes in zip(panels, all_axes, strict=False):
        _draw_layers(axes, events, key, layers, colours)
    if decreases:
        _draw_decreases(all_axes[len(panels)], events)
    for axes in all_axes[count:]:
        axes.remove()
    if named:
        lines = [Line2D([], [], color=c, linewidth=1.8, label=layer) for layer, c in zip(layers, colours, strict=True)]
        figure.legend(handles=lines, loc="lower center", ncols=min(len(lines), 6), frameon=False, fontsize=8)
    else:
        scale = matplotlib.cm.ScalarMappable(cmap=ListedColormap(colours))
        place = (1 - 1.15 / width, 0.6 / height, 0.12 / width, 1 - 1.35 / height)
        bar = figure.colorbar(scale, cax=figure.add_axes(place))
        bar.set_ticks([0, 1], labels=[f"{layers[0]}\n(first)", f"{layers[-1]}\n(last)"], fontsize=8)
        bar.set_label(f"{len(layers)} layers, in the model's order", fontsize=8, labelpad=-25)
    figure.suptitle(name or name_of_run(path), fontsize="medium", y=1 - 0.1 / height, va="top")
    return figure


def layers_in(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the layers that events tell of, in the order in which they do."""
    keys = dict.fromkeys(key for event in events for key in event if key.startswith("curvature."))
    return list(dict.fromkeys(key.partition("/")[2] for key in keys))


def _draw_layers(
    axes: Axes, events: Sequence[Mapping[str, Any]], key: str, layers: Sequence[str], colours: Sequence[Any]
) -> None:
    label, logarithmic = PANELS[key]
    positive = True
    for layer, colour in zip(layers, colours, strict=True):
        steps, values = series(events, f"curvature.{key}/{layer}", "step")
        positive = positive and min(values, default=1) > 0
        axes.plot(steps, values, "o-" if len(values) < 8 else "-", color=colour, linewidth=1.4, markersize=3)
    dress(axes, "step", "")
    axes.set_title(label, fontsize="medium")
    if key in SHARES:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    if logarithmic and positive:
        log_axis(axes)
    if key == "angle":
        axes.axhline(90, color=GREY, linestyle=":", linewidth=1)


def _draw_decreases(axes: Axes, events: Sequence[Mapping[str, Any]]) -> None:
    values: list[float] = []
    for player in PLAYERS:
        for key, (label, colour, style) in DECREASES.items():
            steps, own = series(events, f"{player}curvature/{key}", "step")
            if own:
                label = f"{player.rstrip('/')} {label}".strip()
                mark = "o" if len(own) < 8 else ""
                line: dict[str, Any] = {"color": colour, "linestyle": style, "linewidth": 1.4, "markersize": 3}
                axes.plot(steps, own, marker=mark, label=label, **line)
                values += own
    dress(axes, "step", "")
    axes.set_title("decrease of the batch's loss", fontsize="medium")
    # Decades, and both signs where there are two: the first steps change more than all others.
    widest = max(map(abs, values))
    if min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif widest > 0:
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_yscale("symlog", linthresh=max(widest / 1000, 1e-12), linscale=1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize="small")
