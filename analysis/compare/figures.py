"""The picture of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from analysis.compare.groups import Group
from analysis.compare.measures import Comparison, Target, higher_is_better
from analysis.compare.runs import AXES
from training.show.curves import GREY, dress, log_axis

# One colour a group; grey is kept for what belongs to no group.
PALETTE = (
    "#4477aa", "#cc6677", "#228833", "#ddaa33", "#aa3377", "#33bbee", "#ee7733", "#885533", "#882255", "#999933",
)  # fmt: skip
# A logarithmic axis from this ratio of the largest to the smallest value on.
LOG_RANGE = 5

# Lines of single runs where their group has no mean.
THIN: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.6}


def plot(comparison: Comparison, by: Sequence[str] = tuple(AXES)) -> Figure:
    """The metric by epoch, step and training seconds: a line a group, with a band of one standard deviation.

    A mean reaches as far as all runs of its group do, those that diverged excepted; what single runs have beyond is
    thin. Published curves are dashed in their group's colour, by epoch and, an epoch taken to have as many steps as
    here, by step; their seconds are another machine's.

    Args:
        comparison: what is compared.
        by: of ``AXES``, a panel each.
    """
    metric = comparison.metric
    figure = Figure(figsize=(max(14 / 3 * len(by), 8), 4.8), layout="constrained")
    panels = figure.subplots(1, len(by), sharey=True, squeeze=False)[0]
    drawn: list[np.ndarray] = []
    for group, colour in zip(comparison.groups, colours(len(comparison.groups)), strict=True):
        diverged = Group(group.label, [run for run in group.runs if run.status == "diverged"]).curves(metric)
        lasting = Group(group.label, [run for run in group.runs if run.status != "diverged"]).curves(metric)
        drawn += [curve.value for curve in (*lasting, *diverged)]
        for axes, x in zip(panels, by, strict=True):
            _draw_group(axes, [(getattr(curve, x), curve.value) for curve in lasting], colour)
            for curve in diverged:
                axes.plot(getattr(curve, x), curve.value, **THIN, color=colour)
    longest = max(curve.epoch[-1] for group in comparison.groups for curve in group.curves(metric))
    for group, colour in zip(comparison.groups, colours(len(comparison.groups)), strict=True):
        if reference := comparison.references.get(group.label):
            published = reference.curve(metric)[: math.ceil(longest - 1e-6)]
            drawn.append(published)
            epochs = np.arange(1, len(published) + 1)
            for axes, x in zip(panels, by, strict=True):
                if x != "seconds":
                    per_epoch = 1.0 if x == "epoch" else group.runs[0].steps_per_epoch
                    axes.plot(epochs * per_epoch, published, "--", color=colour, linewidth=1.3)
    plateaus = sorted({f"{p:.4g}" for group in comparison.groups for run in group.runs if (p := run.plateau(metric))})
    shown = comparison.target if comparison.target and comparison.target.metric == metric else None
    for axes, x in zip(panels, by, strict=True):
        for plateau in plateaus:
            axes.axhline(float(plateau), color=GREY, linestyle="--", linewidth=1.2)
        if shown:
            axes.axhline(shown.value, color=GREY, linestyle=":", linewidth=1.2)
        dress(axes, AXES[x], metric if axes is panels[0] else "")
    scale(panels[0], drawn, metric, list(map(float, plateaus)), shown)
    _legend(figure, comparison, [f"constant output {plateau}" for plateau in plateaus], shown)
    figure.suptitle(comparison.title, fontsize="medium")
    return figure


def colours(count: int) -> list[Any]:
    """As many colours as there are groups, far apart while ten are enough."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    return list(matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, count)))


def _draw_group(axes: Axes, lines: list[tuple[np.ndarray, np.ndarray]], colour: Any) -> None:
    """The mean of several lines over the positions of all, its band, and single lines beyond its end."""
    if not lines:
        return
    end = min(x[-1] for x, _ in lines)
    grid = np.unique(np.concatenate([x[x <= end] for x, _ in lines]))
    grid = grid[grid >= max(x[0] for x, _ in lines)]
    if len(grid):
        values = np.stack([np.interp(grid, x, y) for x, y in lines])
        mean = values.mean(0)
        axes.plot(grid, mean, "o-" if len(grid) == 1 else "-", color=colour, linewidth=1.8, markersize=4)
        if len(lines) > 1:
            std = values.std(0, ddof=1)
            low, high = np.maximum(mean - std, values.min(0)), np.minimum(mean + std, values.max(0))
            axes.fill_between(grid, low, high, color=colour, alpha=0.2, linewidth=0)
    for x, y in lines:
        if x[-1] > end or not len(grid):
            start = max(int(np.searchsorted(x, end, side="right")) - 1, 0)
            axes.plot(x[start:], y[start:], **THIN, color=colour)


def scale(axes: Axes, drawn: list[np.ndarray], metric: str, plateaus: list[float], target: Target | None) -> None:
    """The shared vertical axis: per cent for accuracies; logarithmic for a large range; no room for what blew up."""
    if higher_is_better(metric):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        return
    extra = [*plateaus, *([target.value] if target else [])]
    values = np.concatenate([*drawn, extra])
    # Training starts about where every curve does; what is far above has diverged and would flatten all others.
    ceiling = max(3 * float(np.median([line[0] for line in drawn if len(line)])), max(extra, default=0.0))
    last = [float(line[-1]) for line in drawn if len(line)]
    if plateaus and last and float(np.median(last)) < 0.9 * max(plateaus):  # what matters lies below the plateau
        ceiling = max(1.1 * max(plateaus), max(last))
    low, top = float(values.min()), min(float(values.max()), ceiling)
    logarithmic = low > 0 and top / low > LOG_RANGE
    if logarithmic:
        log_axis(axes, low, top)  # shared with the others
    if top < values.max():
        margin = 0.05 * (math.log(top / low) if logarithmic else top - low)
        axes.set_ylim(
            *((low / math.exp(margin), top * math.exp(margin)) if logarithmic else (low - margin, top + margin))
        )


def _legend(figure: Figure, comparison: Comparison, plateaus: list[str], target: Target | None) -> None:
    """Below the panels, in as many columns as the labels leave room for."""
    own = colours(len(comparison.groups))
    entries = []
    for group, colour in zip(comparison.groups, own, strict=True):
        count = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
        trouble = "" if group.status == "finished" else f" [{group.status}]"
        entries.append(Line2D([], [], color=colour, linewidth=1.8, label=f"{group.label}{count}{trouble}"))
    if comparison.references:
        names = {reference.name for reference in comparison.references.values()}
        label = f"published {names.pop()}" if len(names) == 1 else "published, in the group's colour"
        entries.append(Line2D([], [], color="black", linestyle="--", linewidth=1.3, label=label))
    entries += [Line2D([], [], color=GREY, linestyle="--", linewidth=1.2, label=label) for label in plateaus]
    if target:
        label = f"target {target.value:g}"
        entries.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1.2, label=label))
    widest = max(len(str(entry.get_label())) for entry in entries)
    letters = 190 / 14 * figure.get_figwidth()  # 190 in a line of 14 inches
    columns = min(len(entries), max(1, int(letters / (widest + 9))))
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    figure.set_figheight(4.5 + 0.2 * math.ceil(len(entries) / columns))
