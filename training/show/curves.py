"""Pictures of one run, drawn from its `metrics.jsonl` alone."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

# One colour a split, distinct in grey and for colour-blind readers.
COLOURS = {"train": "#4477aa", "val": "#cc6677", "test": "#228833"}
LABELS = {"train": "training", "val": "validation", "test": "test"}
GREY = "#555555"
PLAYERS = {"loss": ("critic", "#4477aa"), "generator_loss": ("generator", "#aa3377")}
FRECHET = ("frechet_mnist", "frechet_cifar10", "fid")
LABELS_OF_X = {"epoch": "epoch", "seconds": "training seconds"}
#: A loss that ranges over more than this factor has a logarithmic axis.
SWING = 20
#: From so many training values on, their mean is drawn over them; up to so few, each has a mark.
MANY, FEW = 60, 4

log = logging.getLogger(__name__)

Series = tuple[list[float], list[float]]


def read_metrics(path: str | Path, whole: bool = True) -> list[dict[str, Any]]:
    """The events of a run, in order.

    Args:
        path: a `metrics.jsonl`, or the run folder that holds it.
        whole: whether a damaged line is refused; else it is left out, and a warning says so. The last line is neither:
            a killed run may have left half of it.

    Raises:
        ValueError: a line that is no JSON object.
    """
    file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    lines = file.read_bytes().splitlines()
    events: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
        except ValueError:  # no JSON, or no text
            event = None
        if isinstance(event, dict):
            events.append(event)
        elif number < len(lines):
            fault = f"line {number} of {file} is not a JSON object: the file is damaged"
            if whole:
                raise ValueError(fault)
            log.warning("%s, and that line is left out.", fault)
    return events


def series(events: Sequence[Mapping[str, Any]], metric: str, x: str = "epoch") -> Series:
    """Values of one metric against `x`.

    Args:
        events: what `read_metrics` returned.
        metric: e.g. "val/loss".
        x: "step", "epoch", "seconds" (training seconds) or "wall".

    Returns:
        Positions and values; events without the metric, or with null for a value that was not finite, are left out.
    """
    given = ((e.get(x), e.get(metric)) for e in events)
    points = [(float(at), float(y)) for at, y in given if isinstance(at, int | float) and isinstance(y, int | float)]
    return [point[0] for point in points], [point[1] for point in points]


def plot_run(metrics_jsonl: str | Path, name: str | None = None) -> dict[str, Figure]:
    """Draw the curves of one run.

    Training values that are many are drawn faintly, and over them their trailing mean, which lags behind them and tells
    of nothing before it happens. A loss whose values are all positive and range over more than a factor of ``SWING``
    has a logarithmic axis, on which that mean is the geometric one; one with values of both signs, some more than so
    many times its median size, one that is linear around zero and logarithmic beyond. The learning rate is a strip
    below the loss, unless it stays as it is: then the title says it.

    Args:
        metrics_jsonl: the run's `metrics.jsonl`, or its folder.
        name: title; None: the names of the run's folder and of the one above it.

    Returns:
        {"loss", "accuracy", "perplexity", "frechet_mnist", ...}: the figures of what the run logged; {} if it logged
        nothing. No figure is registered with pyplot, so nothing has to be closed.
    """
    path = Path(metrics_jsonl)
    events = read_metrics(path, whole=False)
    title = name or name_of_run(path)
    figures: dict[str, Figure] = {}
    if _has(events, "wasserstein"):
        figures["loss"] = _game(events, title)
    elif _has(events, "loss"):
        figures["loss"] = _loss(events, title)
    if _has(events, "accuracy"):
        figures["accuracy"] = _accuracy(events, title)
    if _has(events, "perplexity"):
        figures["perplexity"] = _logarithmic(events, title, "perplexity", "perplexity")
    for metric in FRECHET:
        if _has(events, metric):
            figures[metric] = _logarithmic(events, title, metric, f"Fréchet distance ({metric.split('_')[-1]})")
    return figures


def canvas(width: float, height: float, title: str, rows: int = 0) -> Figure:
    """An empty figure with a title, and margins in inches that its labels fit into.

    Measuring the labels instead (a layout of matplotlib's) takes three times as long as all the rest of a picture.

    Args:
        width: in inches.
        height: in inches; rows of a legend come on top of it.
        title: of the picture.
        rows: how many lines of a legend fit between the title and the axes.
    """
    height += 0.2 * rows
    figure = Figure(figsize=(width, height))
    left, right, bottom, top = 1.0, 0.15, 0.5, 0.4 + 0.2 * rows
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    figure.suptitle(title, fontsize="medium", y=1 - 0.08 / height, va="top")
    return figure


def _panels(
    events: Sequence[Mapping[str, Any]], title: str, xs: Sequence[str], **grid: Any
) -> tuple[Figure, list[Axes]]:
    """Two axes side by side, below each the learning rate if it changes."""
    _, rates = series(events, "lr")
    if len(rates) > 1 and max(rates) > min(rates):
        figure = canvas(10, 5.0, title, rows=1)
        both = figure.subplots(2, 2, sharex="col", gridspec_kw={"height_ratios": [5, 1], "hspace": 0.08, **grid})
        for axes, x in zip(both[1], xs, strict=True):
            _draw_rate(axes, *series(events, "lr", x))
            axes.set_xlabel(LABELS_OF_X[x])
        both[1][0].set_ylabel("rate")
        both[1][1].tick_params(labelleft=False)
        return figure, list(both[0])
    if len(rates) > 1:
        title = f"{title}, learning rate {rates[0]:.3g}"
    figure = canvas(10, 4.2, title, rows=1)
    return figure, list(figure.subplots(1, 2, gridspec_kw=grid))


def _draw_rate(axes: Axes, positions: list[float], rates: list[float]) -> None:
    axes.plot(positions, rates, color=GREY, linewidth=1.4)
    dress(axes, "", "")
    axes.set_ylim(bottom=0)
    axes.set_yticks([0, max(rates)], labels=["0", f"{max(rates):.2g}"])


def _loss(events: Sequence[Mapping[str, Any]], title: str) -> Figure:
    figure, (by_epoch, by_time) = _panels(events, title, ("epoch", "seconds"), wspace=0.06)
    by_time.sharey(by_epoch)
    by_time.tick_params(labelleft=False)
    _, plateau = series(events, "plateau/loss")
    for axes, x in ((by_epoch, "epoch"), (by_time, "seconds")):
        values = _draw_splits(axes, events, "loss", x, best=min)
        dress(axes, LABELS_OF_X[x], "loss" if axes is by_epoch else "")
        if plateau:
            axes.axhline(
                plateau[-1], color=GREY, linestyle="--", linewidth=1.2, label=f"constant output {plateau[-1]:.3g}"
            )
    scale(by_epoch, [*values, *plateau[-1:]])  # shared with the other
    _legend(by_epoch, 5)
    return _labelled_once(figure)


def _accuracy(events: Sequence[Mapping[str, Any]], title: str) -> Figure:
    positions, top = series(events, "val/top5_accuracy")
    figure = canvas(6.4, 4.2, title, rows=3 if top else 2)
    axes = figure.subplots()
    values = _draw_splits(axes, events, "accuracy", "epoch", best=max)
    if top:
        label = f"{LABELS['val']}, among the first 5"
        axes.plot(positions, top, "--", color=COLOURS["val"], linewidth=1.4, label=label)
        values += top
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if max(values) - min(values) > 0.05 else 1))
    dress(axes, "epoch", "accuracy")
    _legend(axes, 2)
    return figure


def _game(events: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """What two players lose, and the distance that the critic sees."""
    figure, (losses, distance) = _panels(events, title, ("epoch", "epoch"), wspace=0.28)
    drawn: list[float] = []
    for metric, (player, colour) in PLAYERS.items():
        drawn += _draw_training(losses, *series(events, f"train/{metric}"), colour, label=player)
    dress(losses, "epoch", "training loss")
    scale(losses, drawn)
    drawn = []
    for split in ("train", "val"):
        values = series(events, f"{split}/wasserstein")
        drawn += _draw_training(distance, *values, COLOURS[split], label=LABELS[split])
    dress(distance, "epoch", "Wasserstein distance by the critic")
    scale(distance, drawn)
    _legend(losses, 2)
    _legend(distance, 2)
    return _labelled_once(figure)


def _logarithmic(events: Sequence[Mapping[str, Any]], title: str, metric: str, label: str) -> Figure:
    figure = canvas(6.4, 4.2, title, rows=2)
    axes = figure.subplots()
    values = _draw_splits(axes, events, metric, "epoch", best=min)
    log_axis(axes, min(values), max(values))
    dress(axes, "epoch", label)
    _legend(axes, 2)
    return figure


def _labelled_once(figure: Figure) -> Figure:
    """Positions are named below the lowest of axes that stand above each other."""
    if len(figure.axes) > 2:
        for axes in figure.axes[:2]:
            axes.set_xlabel("")
            axes.tick_params(labelbottom=False)
    return figure


def _swings(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > SWING


def scale(axes: Axes, values: Sequence[float]) -> None:
    """Give a vertical axis the scale that its values ask for; see `plot_run`.

    Args:
        axes: whose.
        values: all that are drawn there.
    """
    sizes = sorted(map(abs, values))
    if not sizes:
        return
    if _swings(values):
        log_axis(axes, min(values), max(values))
    elif min(values) <= 0 and (typical := sizes[len(sizes) // 2]) > 0 and sizes[-1] / typical > SWING:
        axes.set_yscale("symlog", linthresh=typical)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def log_axis(axes: Axes, low: float | None = None, high: float | None = None) -> None:
    """A logarithmic vertical axis with plain numbers, as many as there is room for.

    Args:
        axes: whose.
        low: the smallest value on it, above zero; None: where it begins.
        high: the largest; None: where it ends.
    """
    axes.set_yscale("log")
    limits = axes.get_ylim()
    low, high = limits[0] if low is None else low, limits[1] if high is None else high
    if high / low > 10:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    else:  # such as 3.2 to 3.9, where 1, 2 and 5 times a power of ten may be none
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_splits(axes: Axes, events: Sequence[Mapping[str, Any]], metric: str, x: str, best: Any) -> list[float]:
    """Draw a metric of every split, mark the best validation value, and return all values drawn."""
    found = {split: series(events, f"{split}/{metric}", x) for split in COLOURS}
    drawn = [value for _, values in found.values() for value in values]
    for split, (positions, values) in found.items():
        colour = COLOURS[split]
        if not values:
            continue
        if split == "test":  # evaluated once, at the end
            label = f"{LABELS[split]} {_figure(metric, values[-1])}"
            axes.plot(positions[-1:], values[-1:], "D", color=colour, markersize=6, label=label)
        elif split == "val":
            marker = 4 if len(values) <= 40 else 0
            axes.plot(positions, values, "o-", color=colour, linewidth=1.8, markersize=marker, label=LABELS[split])
            at = values.index(best(values))
            label = f"{'lowest' if best is min else 'highest'} {LABELS[split]} {_figure(metric, values[at])}"
            axes.plot(positions[at], values[at], "o", mfc="none", mec=colour, mew=1.5, markersize=11, label=label)
        else:
            _draw_training(axes, positions, values, colour, relative=_swings(drawn))
    return drawn


def _figure(metric: str, value: float) -> str:
    if metric == "accuracy":
        return f"{100 * value:.2f} %"
    return f"{value:.4g}" if metric == "perplexity" else f"{value:.3g}"


def _draw_training(
    axes: Axes, positions: list[float], values: list[float], colour: str, label: str = LABELS["train"],
    relative: bool = False,
) -> list[float]:  # fmt: skip
    """Training values are means of a few batches: their trailing mean over the faint raw ones where they are many.

    A line of one value would be invisible, and those of a few are marked. ``relative``: the mean is the geometric one,
    of which a single spike is no plateau. Returns the values.
    """
    shown = values
    if len(values) >= MANY:
        width = 2 * (len(values) // 40) + 1
        axes.plot(positions, values, color=colour, linewidth=0.8, alpha=0.3)
        shown = _trailing_mean([*map(math.log, values)] if relative else values, width)
        shown = [*map(math.exp, shown)] if relative else shown
        label = f"{label} ({'geometric ' if relative else ''}mean of {width})"
    marker = "o" if len(values) <= FEW else ""
    axes.plot(positions, shown, color=colour, linewidth=1.8, marker=marker, markersize=4, label=label)
    return values


def _trailing_mean(values: list[float], width: int) -> list[float]:
    """Means of each value and those before it, `width` in all, fewer at the beginning."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    begins = [max(0, end - width) for end in range(1, len(sums))]
    return [(sums[end] - sums[begin]) / (end - begin) for end, begin in enumerate(begins, 1)]


def dress(axes: Axes, x_label: str, y_label: str) -> None:
    """Labels, a light grid and no frame, the same in all pictures."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes, columns: int) -> None:
    """Above the axes, where nothing is drawn: `canvas` leaves room for its rows."""
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.1}
    axes.legend(**place, ncols=columns, frameon=False, fontsize="small", columnspacing=1.4, handlelength=1.6)


def _has(events: Sequence[Mapping[str, Any]], metric: str) -> bool:
    return any(event.get(f"{split}/{metric}") is not None for event in events for split in COLOURS)


def name_of_run(path: Path) -> str:
    """The title of a run's pictures: the names of its folder and of the one above it.

    Args:
        path: the folder, or its `metrics.jsonl`.
    """
    folder = (path if path.is_dir() else path.parent).resolve()
    return f"{folder.parent.name} / {folder.name}"
