"""Pictures of one run, drawn from its `metrics.jsonl` alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

# One colour a split, distinct in grey and for colour-blind readers.
COLOURS = {"train": "#4477aa", "val": "#cc6677", "test": "#228833"}
LABELS = {"train": "training", "val": "validation", "test": "test"}
GREY = "#555555"
PLAYERS = {"loss": ("critic", "#4477aa"), "generator_loss": ("generator", "#aa3377")}
FRECHET = ("frechet_mnist", "frechet_cifar10", "fid")

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

    Args:
        metrics_jsonl: the run's `metrics.jsonl`, or its folder.
        name: title; None: the names of the run's folder and of the one above it.

    Returns:
        {"loss", "accuracy", "perplexity", "frechet_mnist", ..., "lr"}: the figures of what the run logged; {} if it
        logged nothing. No figure is registered with pyplot, so nothing has to be closed.
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
    if _has_metric(events, "lr"):
        figures["lr"] = _learning_rate(events, title)
    return figures


def canvas(width: float, height: float, title: str) -> Figure:
    """An empty figure with a title, and margins in inches that its labels fit into.

    Measuring the labels instead (a layout of matplotlib's) takes three times as long as all the rest of a picture.
    """
    figure = Figure(figsize=(width, height))
    left, right, bottom, top = 1.0, 0.15, 0.5, 0.5
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    figure.suptitle(title, fontsize="medium", y=1 - 0.08 / height, va="top")
    return figure


def _loss(events: Sequence[Mapping[str, Any]], title: str) -> Figure:
    figure = canvas(10, 4.2, title)
    by_epoch, by_time = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.06})
    _, plateau = series(events, "plateau/loss")
    for axes, x, label in ((by_epoch, "epoch", "epoch"), (by_time, "seconds", "training seconds")):
        values = _draw_splits(axes, events, "loss", x, best=min)
        dress(axes, label, "loss" if axes is by_epoch else "")
        if plateau:
            axes.axhline(
                plateau[-1], color=GREY, linestyle="--", linewidth=1.2, label=f"constant output {plateau[-1]:.3g}"
            )
    if values and min(values) > 0 and max(values) / min(values) > 30:
        by_epoch.set_yscale("log")  # shared with the other
        by_epoch.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _legend(by_epoch, "upper right")
    return figure


def _accuracy(events: Sequence[Mapping[str, Any]], title: str) -> Figure:
    figure = canvas(6.4, 4.2, title)
    axes = figure.subplots()
    values = _draw_splits(axes, events, "accuracy", "epoch", best=max)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if max(values) - min(values) > 0.05 else 1))
    dress(axes, "epoch", "accuracy")
    _legend(axes, "lower right")
    return figure


def _game(events: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """What two players lose, and the distance that the critic sees."""
    figure = canvas(10, 4.2, title)
    losses, distance = figure.subplots(1, 2, gridspec_kw={"wspace": 0.28})
    for metric, (player, colour) in PLAYERS.items():
        _draw_training(losses, *series(events, f"train/{metric}"), colour, label=player)
    dress(losses, "epoch", "training loss")
    for split in ("train", "val"):
        values = series(events, f"{split}/wasserstein")
        _draw_training(distance, *values, COLOURS[split], label=LABELS[split])
    dress(distance, "epoch", "Wasserstein distance by the critic")
    _legend(losses, "lower right")  # where losses that begin far below 0 have left
    _legend(distance, "upper right")
    return figure


def _logarithmic(events: Sequence[Mapping[str, Any]], title: str, metric: str, label: str) -> Figure:
    figure = canvas(6.4, 4.2, title)
    axes = figure.subplots()
    _draw_splits(axes, events, metric, "epoch", best=min)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    dress(axes, "epoch", label)
    _legend(axes, "upper right")
    return figure


def _learning_rate(events: Sequence[Mapping[str, Any]], title: str) -> Figure:
    figure = canvas(6.4, 3.2, title)
    axes = figure.subplots()
    axes.plot(*series(events, "lr"), color=GREY, linewidth=1.8)
    axes.set_ylim(bottom=0)
    dress(axes, "epoch", "learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    return figure


def _draw_splits(axes: Axes, events: Sequence[Mapping[str, Any]], metric: str, x: str, best: Any) -> list[float]:
    """Draw a metric of every split, mark the best validation value, and return all values drawn."""
    drawn: list[float] = []
    for split, colour in COLOURS.items():
        positions, values = series(events, f"{split}/{metric}", x)
        if not values:
            continue
        drawn += values
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
            _draw_training(axes, positions, values, colour)
    return drawn


def _figure(metric: str, value: float) -> str:
    if metric == "accuracy":
        return f"{100 * value:.2f} %"
    return f"{value:.4g}" if metric == "perplexity" else f"{value:.3g}"


def _draw_training(
    axes: Axes, positions: list[float], values: list[float], colour: str, label: str = LABELS["train"]
) -> None:
    """Training values are means of a few batches: a smooth line over the faint raw one where they are many."""
    smooth = _running_mean(values, max(1, len(values) // 40))
    many = len(values) >= 60
    if many:
        axes.plot(positions, values, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(positions, smooth if many else values, color=colour, linewidth=1.8, label=label)


def _running_mean(values: list[float], width: int) -> list[float]:
    """Centred mean over at most `2 width + 1` values, fewer at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        reach = min(width, i, len(values) - 1 - i)
        means.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return means


def dress(axes: Axes, x_label: str, y_label: str) -> None:
    """Labels, a light grid and no frame, the same in all pictures."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes, place: Literal["upper right", "lower right"]) -> None:
    axes.legend(loc=place, frameon=True, framealpha=0.9, edgecolor="none", fontsize="small")


def _has(events: Sequence[Mapping[str, Any]], metric: str) -> bool:
    return any(_has_metric(events, f"{split}/{metric}") for split in COLOURS)


def _has_metric(events: Sequence[Mapping[str, Any]], metric: str) -> bool:
    return any(event.get(metric) is not None for event in events)


def name_of_run(path: Path) -> str:
    """The title of a run's pictures: the names of its folder and of the one above it.

    Args:
        path: the folder, or its `metrics.jsonl`.
    """
    folder = (path if path.is_dir() else path.parent).resolve()
    return f"{folder.parent.name} / {folder.name}"
