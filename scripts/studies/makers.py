"""What marked places of pages are filled with: a table or a picture, from a record's path and the words of a mark."""

from __future__ import annotations

import csv
import json
import re
import tarfile
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure

from analysis import compare, factors, fisher, records, sensitivity, toy
from scripts import benchmark
from scripts.studies import families, verify_zoo, zoo
from training.errors import UserError

T = TypeVar("T")


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


def _said(first: Mapping[str, Any]) -> str:
    """The command of a record, and where it ran."""
    command = " \\\n        ".join(textwrap.wrap(first["command"], 100, break_long_words=False, break_on_hyphens=False))
    threads = f"{first['threads']} thread{'s' if first['threads'] > 1 else ''}"
    return f"\n    {command}\n\n{first['cpu']}, {threads}, torch {first['torch']}.\n\n"


def _benchmark(path: Path, _: str) -> str:
    first, rows = records.read(path)
    return _said(first) + benchmark.markdown(rows)


def _ratios(path: Path) -> dict[str, float]:
    return {row["optimizer"]: row["ratio"] for row in records.read(path)[1]}


def _ratio(path: Path, words: str) -> str:
    """A step of an optimizer as a ratio to SGD's, or to another's: ``kfac``, ``kpsvd / kfac``."""
    found = _ratios(path)
    one, _, other = words.partition(" / ")
    return f"{found[one] / found[other or 'sgd']:.2f}"


def _value(path: Path, words: str) -> str:
    """One value of a row that its first column names: ``ms of kfac``."""
    key, _, name = words.partition(" of ")
    return _cell(next(row[key] for row in records.read(path)[1] if next(iter(row.values())) == name))


def _cost(path: Path, words: str) -> str:
    """Ratios to SGD's step of several records, a column each: ``NAME NAME: ENTRY ENTRY``, or of all entries."""
    names, _, asked = words.partition(": ")
    paths = [path, *(path.with_name(f"{name}.jsonl") for name in names.split())]
    columns = [_ratios(found) for found in paths]
    titles = []
    for it in (records.read(found)[0]["options"] for found in paths):
        size = "" if it["model"].startswith("autoencoder") else f" of {it['image_size']} × {it['image_size']}"
        titles.append(f"{it['model']}, batch {it['batch_size']}{size}")
    lines = [f"| `optimizer=` | {' | '.join(titles)} |", f"| --- |{' ---: |' * len(titles)}"]
    for entry in asked.split() or dict.fromkeys(entry for column in columns for entry in column):
        cells = [f"{column[entry]:.2f}" if entry in column else "" for column in columns]
        lines.append(f"| {benchmark.called(entry)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rows(path: Path, _: str) -> str:
    """All rows, their keys being the titles."""
    first, rows = records.read(path)
    lines = [f"| {' | '.join(rows[0])} |", f"| --- |{' ---: |' * (len(rows[0]) - 1)}"]
    lines += [f"| {' | '.join(map(_cell, row.values()))} |" for row in rows]
    return _said(first) + "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _toy(path: Path) -> list[toy.Path]:
    return [toy.from_dict(row) for row in records.read(path)[1]]


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
    """A comparison by ``METRIC: COLUMN, COLUMN``, and the columns, of which ``epoch 5`` is one."""
    metric, _, columns = words.partition(": ")
    with unpacked(path) as runs:
        groups, remarks = compare.group_runs(runs)
        epochs = [int(epoch) for epoch in re.findall(r"\bepoch (\d+)", columns)]
        yield compare.Comparison(groups, metric, epochs=epochs, remarks=remarks), columns.split(", ")


def _runs(path: Path, words: str) -> str:
    with _compared(path, words) as (comparison, columns):
        return compare.to_table(comparison, columns)


def _curves(path: Path, words: str) -> Figure:
    with _compared(path, words) as (comparison, _):
        return compare.plot(comparison)


def _fisher(path: Path, net: str) -> str:
    rows = fisher.kept(path)
    return fisher.to_markdown([row for row in rows if row.net == net], {}).partition("\n\n")[2].rstrip("\n") + "\n"


def _fisher_drawn(path: Path, words: str) -> Figure:
    """Of a net at its last step ``errors`` or ``directions``, or its ``training``."""
    net, kind = words.split()
    own = sorted((row for row in fisher.kept(path) if row.net == net), key=lambda row: row.step)
    damping, last = f"damping {own[0].damping:g}", own[-1].step
    if kind == "training":
        return fisher.training(own, f"{fisher.NETS[net].title}: {damping}")
    draw = {"errors": fisher.errors, "directions": fisher.directions}[kind]
    return draw([row for row in own if row.step == last], f"{fisher.NETS[net].title}: step {last}, {damping}")


def _factors(path: Path, words: str) -> str:
    """Of a factors.json some numbers of all layers at some steps: ``0,80: columns, participation_A``."""
    steps, _, keys = words.partition(": ")
    points = {point["step"]: point["layers"] for point in json.loads(path.read_text(encoding="utf-8"))["points"]}
    titles = {key: dict(factors.COLUMNS).get(key, key) for key in keys.split(", ")}
    lines = [f"| layer | step | {' | '.join(titles.values())} |", f"| --- |{' ---: |' * (1 + len(titles))}"]
    for number, row in enumerate(points[int(steps.split(",")[0])]):
        for step in map(int, steps.split(",")):
            cells = [factors.cell(points[step][number].get(key)) for key in titles]
            lines.append(f"| {row['layer']} | {step} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ways(path: Path, metric: str) -> str:
    """Of a landscape's ways.csv where each run is at its end."""
    with path.open(encoding="utf-8", newline="") as file:
        last = {row["run"]: row for row in csv.DictReader(file)}
    keys = {"distance": "distance from the start", "cosine": "cosine with the plane", "left_out": "left out",
            f"true_{metric}": f"{metric} at the end", f"plane_{metric}": "of the plane there"}  # fmt: skip
    lines = [f"| | {' | '.join(keys.values())} |", f"| --- |{' ---: |' * len(keys)}"]
    lines += [f"| `{run}` | {' | '.join(f'{float(row[key]):.2g}' for key in keys)} |" for run, row in last.items()]
    return "\n".join(lines) + "\n"


def _json(path: Path, kind: Callable[..., T]) -> dict[str, T]:
    try:
        return {key: kind(**values) for key, values in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error})") from error


#: What writes a table of a record and the words of its mark, one maker a line.
TABLES: dict[str, Callable[[Path, str], str]] = {
    "benchmark": _benchmark,
    "cost": _cost,
    "ratio": _ratio,
    "value": _value,
    "rows": _rows,
    "toy": lambda path, _: toy.to_markdown(_toy(path)),
    "sensitivity": lambda path, words: sensitivity.to_markdown(*_grids(path, words)),
    "runs": _runs,
    "fisher": _fisher,
    "factors": _factors,
    "ways": _ways,
    "zoo": lambda path, _: zoo.markdown(_json(path, dict)) + "\n",
    "verified": lambda path, _: verify_zoo.markdown(_json(path, verify_zoo.Checked)) + "\n",
    "families": lambda path, _: families.markdown(_json(path, families.Family)) + "\n",
}
#: What draws a picture, likewise.
PICTURES: dict[str, Callable[[Path, str], Figure]] = {
    "toy": lambda path, _: toy.plot(_toy(path)),
    "sensitivity": _heat_maps,
    "runs": _curves,
    "fisher": _fisher_drawn,
}
