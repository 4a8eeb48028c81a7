"""Of measurements: what a step costs, paths in the plane, what is known of each model."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure

from analysis import pages, records, toy
from scripts import benchmark
from scripts.benchmarks import ranks
from scripts.studies import families, verify_zoo, zoo
from training.errors import UserError

T = TypeVar("T")


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
    lines = []
    for entry in asked.split() or dict.fromkeys(entry for column in columns for entry in column):
        cells = [f"{column[entry]:.2f}" if entry in column else "" for column in columns]
        lines.append([benchmark.called(entry), *cells])
    return pages.table(["`optimizer=`", *titles], lines)


def _rows(path: Path, _: str) -> str:
    """All rows, their keys being the titles."""
    first, rows = records.read(path)
    return _said(first) + pages.table([*rows[0]], [[*map(_cell, row.values())] for row in rows])


def _ranks(path: Path, _: str) -> str:
    first, rows = records.read(path)
    lines = [[cell.replace("|", "/") for cell in line] for line in ranks.lines(rows)]
    return _said(first) + pages.table(ranks.COLUMNS, lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _toy(path: Path) -> list[toy.Path]:
    return [toy.from_dict(row) for row in records.read(path)[1]]


def _json(path: Path, kind: Callable[..., T]) -> dict[str, T]:
    try:
        return {key: kind(**values) for key, values in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error})") from error


def _count(path: Path, words: str) -> str:
    """How many entries there are, are ``ok``, or have a share of at least so much: ``layers 0.99``."""
    found: dict[str, dict[str, Any]] = _json(path, dict)
    key, _, least = words.partition(" ")
    if key == "ok":
        return str(sum(map(_all_ok, found.values())))
    return str(sum((it[key] or 0.0) >= float(least) for it in found.values()) if key else len(found))


def _all_ok(entry: Mapping[str, Any]) -> bool:
    if "verdicts" in entry:
        return set(entry["verdicts"].values()) == {"ok"}
    return entry["verdict"] == "ok" if "verdict" in entry else not (entry["failed"] or entry["wrong"])


TABLES: dict[str, Callable[[Path, str], str]] = {
    "benchmark": _benchmark,
    "cost": _cost,
    "ratio": _ratio,
    "value": _value,
    "rows": _rows,
    "ranks": _ranks,
    "toy": lambda path, _: toy.to_markdown(_toy(path)),
    "count": _count,
    "zoo": lambda path, _: zoo.markdown(_json(path, dict)),
    "verified": lambda path, _: verify_zoo.markdown(_json(path, verify_zoo.Checked)),
    "families": lambda path, _: families.markdown(_json(path, families.Family)),
}
PICTURES: dict[str, Callable[[Path, str], Figure]] = {"toy": lambda path, _: toy.plot(_toy(path))}
