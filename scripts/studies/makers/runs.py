"""Of runs that were kept: their table, their curves, and grids over learning rate and damping."""

from __future__ import annotations

import json
import math
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from analysis import compare, pages, sensitivity
from training.errors import UserError


@contextmanager
def unpacked(path: Path) -> Iterator[list[compare.LoadedRun]]:
    """The runs of an archive, while they are needed.

    Args:
        path: of the archive.

    Yields:
        All of them.
    """
    with tempfile.TemporaryDirectory() as place, tarfile.open(path) as archive:
        archive.extractall(place, filter="data")
        yield [compare.read_run(folder) for folder in compare.find_runs([place])]


def _grids(path: Path, metric: str) -> tuple[list[sensitivity.Grid], str]:
    """Grids over the usual two keys."""
    with unpacked(path) as runs:
        return sensitivity.grids(runs, *sensitivity.KEYS, metric), metric


def _heat_maps(path: Path, metric: str) -> Figure:
    found, _ = _grids(path, metric)
    share = f"{100 * sensitivity.NEAR:g} {'points' if found[0].higher else '%'} of the best"
    return sensitivity.plot(found, metric, title=f"framed is what is within {share}")


@contextmanager
def _compared(path: Path, words: str) -> Iterator[tuple[compare.Comparison, list[str]]]:
    """A comparison by ``METRIC: COLUMN, COLUMN``, and the columns, of which ``epoch 5`` is one.

    ``METRIC of GROUP to LABEL until VALUE: ...``, all of it as needed, calls groups by what this one chose
    (``optimizer=adam``), is to this one, and takes the time until this value. Published curves by group, where there
    are some, lie beside the archive, NAME_published.json.

    Yields:
        Both.

    Raises:
        UserError: the metric is said otherwise, or groups would be called alike.
    """
    said, _, columns = words.partition(": ")
    asked = re.fullmatch(r"(\S+)(?: of (\w+))?(?: to (.+?))?(?: until (\S+))?", said)
    if not asked:
        raise UserError(f"runs: a metric, then perhaps 'of GROUP', 'to LABEL' and 'until VALUE', not {said!r}")
    metric, named, unit, until = asked.groups()
    published = path.with_name(path.name.replace(".tar.xz", "_published.json"))
    curves = json.loads(published.read_text(encoding="utf-8")) if published.exists() else {}
    with unpacked(path) as runs:
        groups, remarks = compare.group_runs(runs)
        if named:
            groups = [replace(group, label=f"{named}={group.runs[0].choices[named]}") for group in groups]
            if len({group.label for group in groups}) < len(groups):
                raise UserError(f"runs: several groups chose the same {named}; leave 'of {named}' out")
        yield compare.Comparison(
            groups,
            metric,
            target=compare.Target(metric, float(until)) if until else None,
            epochs=[int(epoch) for epoch in re.findall(r"\bepoch (\d+)", columns)],
            baseline=compare.match(groups, unit, "runs") if unit else None,
            references={key: compare.Reference("curves", it) for key, it in curves.items()},
            remarks=remarks,
        ), columns.split(", ")


def _runs(path: Path, words: str) -> str:
    with _compared(path, words) as (comparison, columns):
        return compare.to_table(comparison, columns)


def _curves(path: Path, words: str) -> Figure:
    """The metric by epoch, step and seconds, or as ``METRIC by step`` asks, where another of these says nothing."""
    words, _, by = words.partition(" by ")
    with _compared(path, words) as (comparison, _):
        return compare.plot(comparison, by.split(", ")) if by else compare.plot(comparison)


def _rates(path: Path, words: str) -> str:
    """What runs ended with, by what was tried: ``METRIC by KEY, KEY: KEY, KEY``.

    A row for the first keys, of which ``optimizer`` or a player is what was chosen; in it, values of those among the
    last that differ there, in their order, each with its result, the best one bold.
    """
    said, _, tried = words.partition(": ")
    metric, _, keys = said.partition(" by ")
    found: dict[tuple[str, ...], list[compare.LoadedRun]] = {}
    with unpacked(path) as runs:
        for run in runs:
            found.setdefault(tuple(_told(run, key) for key in keys.split(", ")), []).append(run)
        lines = []
        for row, own in found.items():
            asked = [key for key in tried.split(", ") if key in own[0].settings]
            differing = [key for key in asked if len({run.settings[key] for run in own}) > 1] or asked[:1]
            ends = {}
            for run in sorted(own, key=lambda run: [_number(run.settings[key]) for key in differing]):
                curve = run.curve(metric)
                lasting = run.status != "diverged" and len(curve.value)
                rate = " and ".join(run.settings[key] for key in differing)
                ends[rate] = float(curve.value[-1]) if lasting else math.inf
            known = [end for end in ends.values() if math.isfinite(end)]
            best = (max if compare.higher_is_better(metric) else min)(known, default=math.nan)
            cells = [f"{rate}: {end:.3g}" if math.isfinite(end) else f"{rate}: diverged" for rate, end in ends.items()]
            places = [place for place, end in enumerate(ends.values()) if end == best and len(ends) > 1]
            bold = [f"**{cell}**" if place in places else cell for place, cell in enumerate(cells)]
            lines.append([*row, ", ".join(bold)])
    names = [key.removeprefix("optimizer.") for key in keys.split(", ")]
    last = " and ".join(dict.fromkeys(key.rpartition(".")[2] for key in tried.split(", ")))
    return pages.table([*names, f"{last}: {metric}"], lines, left=len(names) + 1)


def _number(text: str) -> float:
    """What a value comes by; all that are no numbers are behind them, as they were found."""
    try:
        return float(text)
    except ValueError:
        return math.inf


def _told(run: compare.LoadedRun, key: str) -> str:
    if "." in key:
        return run.settings.get(key, "")
    return compare.choice(run, key) or ""


def _samples(path: Path, metric: str) -> Figure:
    """What generators draw, a panel a run, the best first; above, their metric at the end."""
    with _compared(path, metric) as (comparison, _):
        rows, folders = compare.rows(comparison), {group.label: group.runs[0].folder for group in comparison.groups}
        figure = Figure(figsize=(10, 2.4 * math.ceil(len(rows) / 3)), layout="constrained")
        grid = figure.subplots(math.ceil(len(rows) / 3), 3, squeeze=False).ravel()
        for axes in grid:
            axes.set_axis_off()
        for axes, row in zip(grid, rows, strict=False):
            with Image.open(folders[row["group"]] / "samples.png") as picture:
                axes.imshow(picture.convert("L"), cmap="gray")
            axes.set_title(f"{row['group']}\n{metric} {row[f'final {metric}'].mean:.2f}", fontsize="small")
    return figure


TABLES: dict[str, Callable[[Path, str], str]] = {
    "runs": _runs,
    "rates": _rates,
    "sensitivity": lambda path, words: sensitivity.to_markdown(*_grids(path, words)),
}
PICTURES: dict[str, Callable[[Path, str], Figure]] = {"runs": _curves, "sensitivity": _heat_maps, "samples": _samples}
