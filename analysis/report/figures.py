"""The pictures of a page, each of which is also a file for a paper."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from analysis import statistics
from analysis.compare import Curve, LoadedRun, Target
from analysis.compare.figures import colours, scale
from analysis.report.reading import ArmRuns
from analysis.report.results import Results, octaves, rates
from analysis.report.words import digits, is_share, score, seconds, spoken
from training.show.curves import log_axis
from training.show.watching.curvature import PANELS

#: Points of a line, fewer where lines are many.
POINTS, ALL_POINTS = 200, 12_000
AXES = {"step": "optimizer steps", "epoch": "epochs", "seconds": "training time (s)"}
#: Drawn in these, so that a page can give them its own, light or dark.
INK, SOFT, LINE = "#1c1c1d", "#5b5b5c", "#d9d9da"
STYLE: Any = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT,
    "grid.color": LINE, "font.size": 9.5, "font.family": "DejaVu Sans", "svg.fonttype": "none", "pdf.fonttype": 42,
    "svg.hashsalt": "report", "axes.spines.top": False, "axes.spines.right": False, "path.simplify_threshold": 0.3,
}  # fmt: skip
#: Markers, so that colours are not alone in telling arms apart.
MARKERS = "osD^vP*XhpdH"
WIDTH = 6.2


@contextmanager
def style() -> Iterator[None]:
    """Within it, figures look as those of a page do."""
    with matplotlib.rc_context(STYLE):
        yield


def draw(found: Results) -> dict[str, tuple[Figure, str]]:
    """All figures that there is something for, by name, with what each shows.

    Args:
        found: the results.
    """
    made: dict[str, tuple[Figure | None, str]] = {"final": _final(found)}
    for x in AXES:
        made[f"curves_{x}"] = _curves(found, x)
    made |= {"tuning": _tuning(found), "sensitivity": _sensitivity(found), "cost": _cost(found)}
    made["diagnostics"] = _diagnostics(found)
    return {name: (figure, text) for name, (figure, text) in made.items() if figure is not None}


def files(figure: Figure, stem: Path) -> str:
    """Write a figure as PNG, SVG and PDF.

    Args:
        figure: that was drawn.
        stem: path without the ending.

    Returns:
        The SVG's text.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # once for all three
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    stem.with_suffix(".svg").write_text(text.getvalue(), encoding="utf-8")
    figure.savefig(stem.with_suffix(".png"), dpi=170)
    figure.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})
    return text.getvalue()


def inline(svg: str, name: str, title: str) -> str:
    """An SVG for the inside of a page: names of its own, the page's colours, and an explanation that can be read.

    Args:
        svg: the text of the file.
        name: no other figure's.
        title: what it shows, escaped.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'id="arm(\d+)"', r'class="arm" data-arm="\1"', body)
    body = re.sub(r'(id="|url\(#|href="#)', rf"\1{name}-", body)
    for colour, own in ((INK, "currentColor"), (SOFT, "var(--soft)"), (LINE, "var(--line)")):
        body = body.replace(colour, own)
    body = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{title}"', body, count=1)
    body = re.sub(r'xmlns:xlink="[^"]*" ?| ?xmlns="[^"]*"', "", body)
    return body.replace("xlink:href", "href")


def palette(found: Results) -> dict[str, Any]:
    """A colour an arm."""
    names = [arm.name for arm in found.material.arms]
    shown = [matplotlib.colors.to_hex(colour) for colour in colours(len(names))]
    return dict(zip(names, shown, strict=True))


def _marker(found: Results, name: str) -> str:
    return MARKERS[[arm.name for arm in found.material.arms].index(name) % len(MARKERS)]


def _short(name: str, longest: int = 46) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _dress(axes: Axes, x: str, y: str, metric: str = "") -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(linewidth=0.7)
    axes.set_axisbelow(True)
    if metric and is_share(metric):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def _legend(
    figure: Figure, found: Results, names: Sequence[str], marked: bool = False, more: Sequence[Any] = ()
) -> None:
    """Below the axes, so that it covers nothing; of very many arms only some are named."""
    own = palette(found)
    shown = list(names)[:24]
    entries: list[Any] = [
        Line2D([], [], color=own[name], label=_short(name), linewidth=1.9, markersize=4.5, marker=marker)
        for name in shown
        for marker in [_marker(found, name) if marked else None]
    ]
    if len(names) > len(shown):
        entries.append(Line2D([], [], linestyle="", label=f"and {len(names) - len(shown)} more"))
    entries += more
    widest = max(len(str(entry.get_label())) for entry in entries)
    columns = max(1, min(len(entries), 5, 104 // (widest + 7)))
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)
    figure.set_figheight(figure.get_figheight() + 0.19 * math.ceil(len(entries) / columns))


def _final(found: Results) -> tuple[Figure | None, str]:
    """Each arm's runs and the interval of their mean, the best above."""
    metric, own = found.material.metric, palette(found)
    rows = [row for row in found.ranked if row.value][:40]
    figure = Figure(figsize=(WIDTH, 0.85 + 0.3 * len(rows)), layout="constrained")
    if not rows:
        return None, ""
    axes = figure.subplots()
    for place, row in enumerate(rows):
        assert row.value is not None
        arm = [one.name for one in found.material.arms].index(row.name)
        values = list(row.scores.values())
        spread = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else [0.0]
        (dots,) = axes.plot(
            values, place + np.asarray(spread), "o", color=own[row.name], alpha=0.45, markersize=4, mew=0
        )
        dots.set_gid(f"arm{arm}")
        if math.isfinite(row.value.low):
            (bar,) = axes.plot([row.value.low, row.value.high], [place, place], color=own[row.name], linewidth=2.2)
            bar.set_gid(f"arm{arm}")
        (mean,) = axes.plot(row.value.middle, place, "D", color=own[row.name], markersize=6, mec="white", mew=0.8)
        mean.set_gid(f"arm{arm}")
    axes.set_yticks(range(len(rows)), [_short(row.name, 40) for row in rows])
    for label in axes.get_yticklabels():
        label.set_color(INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    # Runs far behind would press all others into a corner.
    axes.set_xlim(*_limits(rows, found.material.higher))
    if is_share(metric):
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.set_xlabel(f"{spoken(metric)} at the end of training")
    count = sum(row.value is not None for row in found.rows)
    best = f" The best {len(rows)} of {count} arms." if count > len(rows) else ""
    return figure, f"Mean (diamond) and its 95 % interval (bar) of the last value, and every run (dot).{best}"


def _limits(rows: Sequence[Any], higher: bool) -> tuple[float, float]:
    """Of the axis of last values: all runs, or the better half of the arms and as much again."""
    values = [value for row in rows for value in row.scores.values()]
    ends = [end for row in rows for end in (row.value.low, row.value.high) if math.isfinite(end)]
    low, high = min(values + ends), max(values + ends)
    middles = sorted((row.value.middle for row in rows), reverse=higher)
    half = abs(middles[len(middles) // 2] - middles[0])
    inner = [end for end in values + ends if abs(end - middles[0]) <= max(6 * half, 1e-12)]
    if half and len(rows) > 3:
        low, high = (max(low, min(inner)), high) if higher else (low, min(high, max(inner)))
    margin = 0.04 * (high - low) or 0.01 * abs(high) or 0.01
    return low - margin, high + margin


def _curves(found: Results, x: str) -> tuple[Figure | None, str]:
    """Mean and band over seeds, by one axis."""
    metric, own = found.material.metric, palette(found)
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    axes = figure.subplots()
    lines = sum(len(arm.runs) for arm in found.material.arms)
    points = max(20, min(POINTS, ALL_POINTS // max(len(found.material.arms), 1), 3 * ALL_POINTS // max(lines, 1)))
    drawn, names = [], []
    for number, arm in enumerate(found.material.arms):
        curves = [(run, curve) for run in arm.runs if run.events and len((curve := run.curve(metric)).value)]
        if not curves:
            continue
        names.append(arm.name)
        drawn += [curve.value for _, curve in curves]
        _band(axes, curves, x, own[arm.name], number, points)
    if not drawn:
        return None, ""
    _dress(axes, AXES[x], spoken(metric), metric)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    target = None if found.target is None else Target(metric, found.target)
    more = []
    if target:
        axes.axhline(target.value, color=SOFT, linestyle=":", linewidth=1.2)
        more = [Line2D([], [], color=SOFT, linestyle=":", linewidth=1.2, label=f"target {score(target.value, metric)}")]
    if is_share(metric):
        ends = [line[-1] for line in drawn]
        later = [float(line[len(line) // 4 :].min()) for line in drawn if len(line) > 7]
        low = min([float(np.median(ends)), *later])
        axes.set_ylim(max(0.0, low - 0.03), min(1.0, max(float(line.max()) for line in drawn) + 0.01))
    else:
        scale(axes, drawn, metric, [], target)
    _legend(figure, found, names, more=more)
    return figure, (
        f"Mean over seeds and, where there are several, one standard deviation; a thin line is a single run, beyond "
        f"where all of its arm reach or one that diverged. {points} points a line are drawn at most."
    )


def _band(axes: Axes, curves: Sequence[tuple[LoadedRun, Curve]], x: str, colour: str, number: int, points: int) -> None:
    def line(xs: np.ndarray, ys: np.ndarray, **options: Any) -> None:
        (artist,) = axes.plot(xs, ys, color=colour, **options)
        artist.set_gid(f"arm{number}")

    lasting = [(getattr(curve, x), curve.value) for run, curve in curves if run.status != "diverged"]
    thin = [(getattr(curve, x), curve.value) for run, curve in curves if run.status == "diverged"]
    if lasting:
        end, start = min(xs[-1] for xs, _ in lasting), max(xs[0] for xs, _ in lasting)
        grid = _thinned(np.unique(np.concatenate([xs[(xs >= start) & (xs <= end)] for xs, _ in lasting])), points)
        if len(grid):
            values = np.stack([np.interp(grid, xs, ys) for xs, ys in lasting])
            mean = values.mean(0)
            if len(lasting) > 1:
                std = values.std(0, ddof=1)
                low, high = np.maximum(mean - std, values.min(0)), np.minimum(mean + std, values.max(0))
                band = axes.fill_between(grid, low, high, color=colour, alpha=0.17, linewidth=0)
                band.set_gid(f"arm{number}")
            line(grid, mean, linewidth=1.9, marker="o" if len(grid) == 1 else None, markersize=4)
        for xs, ys in lasting:
            if xs[-1] > 1.005 * end or not len(grid):  # seconds never end at the very same
                rest = slice(max(int(np.searchsorted(xs, end, side="right")) - 1, 0), None)
                thin.append((xs[rest], ys[rest]))
    for xs, ys in thin:
        kept = _thinned(np.arange(len(xs)), points)
        line(xs[kept], ys[kept], linewidth=0.8, alpha=0.6)


def _thinned(values: np.ndarray, points: int) -> np.ndarray:
    """So many of the values, evenly spaced, the first and the last among them."""
    if len(values) <= points:
        return values
    return values[np.unique(np.linspace(0, len(values) - 1, points).round().astype(int))]


def first_rung(arm: ArmRuns) -> list[float]:
    """What the trials of an arm gave that all had the same budget; NaN for those that did not come to an end."""
    return [trial.value for trial in arm.trials if trial.rung == 0 and trial.status != "unfinished"]


def _tuning(found: Results) -> tuple[Figure | None, str]:
    """Expected best value after k trials."""
    metric, own = found.material.metric, palette(found)
    given = {arm.name: first_rung(arm) for arm in found.material.arms}
    given = {name: values for name, values in given.items() if np.isfinite(values).any() and len(values) > 1}
    if not given:
        return None, ""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    axes = figure.subplots()
    number = {arm.name: i for i, arm in enumerate(found.material.arms)}
    for name, values in given.items():
        mean, _ = statistics.expected_best(values, higher=found.material.higher)
        (line,) = axes.plot(
            np.arange(1, len(mean) + 1), mean, color=own[name], marker=_marker(found, name), markersize=4
        )
        line.set_gid(f"arm{number[name]}")
    _dress(axes, "trials", f"expected best\n{spoken(metric)}", metric)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if not is_share(metric):
        _logarithmic(axes)
    _legend(figure, found, list(given), marked=True)
    return figure, (
        "What the best of k trials would be (Dodge et al. 2019), from the trials of the first rung, which all had the "
        "same budget; one that failed counts as the worst that ended. It is biased downwards near its right end."
    )


def _sensitivity(found: Results) -> tuple[Figure | None, str]:
    """The metric against the learning rate."""
    metric, higher = found.material.metric, found.material.higher
    given, how = rates(found.material)
    given = {name: own for name, own in given.items() if any(math.isfinite(value) for value in own.values())}
    if not given:
        return None, ""
    names = [arm.name for arm in found.material.arms]
    fresh = colours(len(given))
    own = palette(found) | {name: c for name, c in zip(given, fresh, strict=True) if name not in names}
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    entries = []
    for place, (name, rated) in enumerate(given.items()):
        xs = np.array([x for x, y in rated.items() if math.isfinite(y)])
        ys = np.array([y for y in rated.values() if math.isfinite(y)])
        marker = MARKERS[(names.index(name) if name in names else place) % len(MARKERS)]
        (line,) = axes.plot(xs, ys, color=own[name], marker=marker, markersize=4.5, linewidth=1.3)
        if name in names:
            line.set_gid(f"arm{names.index(name)}")
        wide = octaves(rated, higher)
        label = f"{name}: {digits(wide, 2)} octaves"
        entries.append(Line2D([], [], color=own[name], marker=marker, markersize=4.5, linewidth=1.3, label=label))
        for x in (x for x, y in rated.items() if not math.isfinite(y)):
            axes.plot(x, 0.02, "x", color=own[name], markersize=6, transform=axes.get_xaxis_transform())
    axes.set_xscale("log")
    _dress(axes, "learning rate", spoken(metric), metric)
    if not is_share(metric):
        _logarithmic(axes)
    else:
        values = [y for rated in given.values() for y in rated.values() if math.isfinite(y)]
        axes.set_ylim(max(min(values) - 0.02, max(values) - 0.35, -0.02), min(1.0, max(values) + 0.02))
    columns = 2 if max(len(str(entry.get_label())) for entry in entries) < 40 else 1
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)
    figure.set_figheight(3.4 + 0.19 * math.ceil(len(entries) / columns))
    return figure, (
        f"From {how}. Octaves: factors of two around the best rate within which values are near the best, "
        f"by {'2 points' if higher else '2 % of it'}. A cross at the foot is a run that did not come to an end."
    )


def _cost(found: Results) -> tuple[Figure | None, str]:
    """Step time and memory as multiples of the baseline's."""
    rows = [row for row in found.rows if math.isfinite(row.ratio)][:40]
    if len(rows) < 2:
        return None, ""
    own, unit = palette(found), found.row(found.material.baseline)
    measured = all(row.memory for row in rows) and bool(unit.memory)
    if not measured and max(row.ratio for row in rows) < 1.05 * min(row.ratio for row in rows):
        return None, ""  # settings of one optimizer cost alike
    figure = Figure(figsize=(WIDTH, 0.95 + 0.3 * len(rows)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, 1 + measured, sharey=True))
    columns = [("step time", [row.ratio for row in rows], [seconds(row.step_seconds) for row in rows])]
    if measured:
        assert unit.memory
        columns.append(("memory", [(row.memory or 0) / unit.memory for row in rows], []))
    for axes, (name, ratios, texts) in zip(panels, columns, strict=True):
        for place, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
            (bar,) = axes.barh(place, ratio, color=own[row.name], height=0.62)
            bar.set_gid(f"arm{[arm.name for arm in found.material.arms].index(row.name)}")
            text = f" {digits(ratio, 3)}×" + (f" ({texts[place]})" if texts else "")
            axes.text(ratio, place, text, va="center", fontsize=8.5)
        axes.set_xlim(0, max(ratios) * (1.6 if texts and measured else 1.3))
        axes.set_yticks(range(len(rows)), [_short(row.name, 34) for row in rows])
        for label in axes.get_yticklabels():
            label.set_color(INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines[["left"]].set_visible(False)
        axes.grid(axis="x", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(f"{name}, multiples of {_short(found.material.baseline, 24)}")
    paced = bool(found.material.arms[0].pace)
    how = "measured for the verdict, in turns" if paced else "training seconds by steps, of the runs"
    return figure, f"Seconds of a step: {how}."


def _diagnostics(found: Results) -> tuple[Figure | None, str]:
    """Medians over layers of what `callbacks=curvature` has logged, of each arm's first run that has it."""
    own = palette(found)
    runs = []
    for number, arm in enumerate(found.material.arms):
        for run in arm.runs:
            events = [event for event in run.events if event.get("event") == "curvature"]
            if events:
                runs.append((number, arm.name, events))
                break
    given: dict[str, list[tuple[int, str, np.ndarray, np.ndarray]]] = {}
    for key in PANELS:
        for number, name, events in runs:
            points = [
                (event["step"], float(np.median(values)))
                for event in events
                if (values := [v for k, v in event.items() if k.startswith(f"curvature.{key}/") and v is not None])
            ]
            if len(points) > 1:
                xs, ys = np.array(points, dtype=float).T
                given.setdefault(key, []).append((number, name, xs, ys))
    if not given:
        return None, ""
    columns = min(2, len(given))
    rows = math.ceil(len(given) / columns)
    figure = Figure(figsize=(WIDTH, 0.2 + 2.0 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, (key, lines) in zip(panels.flat, given.items(), strict=False):
        title, logarithmic = PANELS[key]
        for number, name, xs, ys in lines:
            kept = _thinned(np.arange(len(xs)), 150)
            (line,) = axes.plot(xs[kept], ys[kept], color=own[name], linewidth=1.3)
            line.set_gid(f"arm{number}")
        axes.set_title(title, fontsize=9)
        axes.grid(linewidth=0.7)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("optimizer steps")
        if logarithmic and all((ys > 0).all() for _, _, _, ys in lines):
            log_axis(axes)
    for axes in list(panels.flat)[len(given) :]:
        axes.remove()
    _legend(figure, found, [name for _, name, _ in runs])
    return figure, "Median over layers of what callbacks=curvature logged, of each arm's first run that has it."


def _logarithmic(axes: Axes) -> None:
    """A logarithmic vertical axis where values differ by much."""
    low, high = axes.dataLim.intervaly
    if low > 0 and high / low > 5:
        log_axis(axes, low, high)
