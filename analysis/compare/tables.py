"""The rows of a comparison as tables: for programs, for pages, and in Markdown."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis import pages
from analysis.compare.measures import Comparison, Row, Spread, higher_is_better, rows
from analysis.compare.runs import LoadedRun

#: In front of the best group's label.
BEST = "* "
#: How columns end that are no values of the metric.
RATIOS = ("/ baseline", "/ published", "to target")


def to_csv(found: Sequence[Row]) -> str:
    """The rows with all their digits; a column of its own for each standard deviation."""
    text = io.StringIO()
    table = [
        {
            name: part
            for column, cell in row.items()
            for name, part in (
                {column: cell.mean, f"{column} std": cell.std} if isinstance(cell, Spread) else {column: cell}
            ).items()
        }
        for row in found
    ]
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in line.items()} for line in table
    )
    return text.getvalue()


@dataclass(frozen=True)
class Sheet:
    """A part of the table that fits a page.

    Attributes:
        title: what it shows.
        header: names of its columns.
        lines: text of its cells.
    """

    title: str
    header: list[str]
    lines: list[list[str]]


def sheets(comparison: Comparison, found: Sequence[Row]) -> list[Sheet]:
    """The rows as tables to be read: results, values at epochs, time to target and ratios, published values.

    Args:
        comparison: what is compared.
        found: its `rows`.
    """
    metric, target, published = comparison.metric, comparison.target, bool(comparison.references)
    name = metric.partition("/")[2]
    group, unit = {"group": "group", "runs": "runs"}, f"; ratios to {comparison.unit.label}"
    if any(row["status"] != "finished" for row in found):
        group["status"] = "status"
    results = {c: c for split in ("train", "val") for c in (f"final {split}/{name}", f"best {split}/{name}")}
    if any(not math.isnan(row[f"final test/{name}"].mean) for row in found):
        results[f"final test/{name}"] = f"final test/{name}"
    marked = found
    if len(found) > 1 and not math.isnan(found[0][f"final {metric}"].mean):
        marked = [found[0] | {"group": f"{BEST}{found[0]['group']}"}, *found[1:]]
    results[f"final {metric} / baseline"] = f"final {metric.partition('/')[0]} ratio"
    parts = [_sheet(f"Results{unit}", group | results, marked, name)]
    group = {"group": "group"}
    if comparison.epochs:
        columns = {}
        for epoch in comparison.epochs:
            columns[f"epoch {epoch}"] = f"epoch {epoch}"
            if published:
                columns |= {f"published epoch {epoch}": "paper", f"epoch {epoch} / published": "ratio"}
        parts.append(_sheet(f"{metric} at chosen epochs", group | columns, found, name))
    columns = {"s/epoch": "s/epoch", "s/step": "s/step", "s/step / baseline": "s/step ratio"}
    if target is not None:
        columns |= {column: column for column in ("reached", "epochs to target", "s to target")}
        columns["s to target / baseline"] = "s to target ratio"
    title = f"Training seconds{f', target {target.metric} = {target.value:g}' if target else ''}{unit}"
    parts.append(_sheet(title, group | columns, found, name))
    if published:
        columns = {"last epoch": "epoch", f"final {metric}": f"final {metric}", "published final": "paper"}
        columns["final / published"] = "ratio"
        parts.append(_sheet(f"{metric} beside what was published, at the last epoch", group | columns, found, name))
    return parts


def _sheet(title: str, columns: dict[str, str], found: Sequence[Row], name: str) -> Sheet:
    """Columns of the rows under short headers; `name` is the metric's without its split."""
    values = [c for c in columns if c.startswith(("final", "best", "epoch", "published")) and not c.endswith(RATIOS)]
    lines = [[_cell(row[column], name if column in values else "") for column in columns] for row in found]
    return Sheet(title, list(columns.values()), lines)


def _cell(value: Any, metric: str) -> str:
    """A figure as text; a metric's in per cent where it is an accuracy."""
    scale, unit = (100, " %") if higher_is_better(metric) else (1, "")
    if isinstance(value, Spread):
        spread = "" if math.isnan(value.std) else f" ± {_digits(scale * value.std, 2)}"
        return "–" if math.isnan(value.mean) else f"{_digits(scale * value.mean, 4)}{spread}{unit}"
    if isinstance(value, float):
        return (
            "–" if math.isnan(value) else "not reached" if math.isinf(value) else f"{_digits(scale * value, 4)}{unit}"
        )
    return str(value)


def _digits(value: float, digits: int) -> str:
    """A number to so many significant digits, without an exponent where that is readable."""
    if value and not 1e-6 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    return str(np.format_float_positional(value, digits, unique=False, fractional=False, trim="-"))


def to_markdown(comparison: Comparison, found: Sequence[Row]) -> str:
    """The tables with a heading each, and below them what was measured how and where.

    Args:
        comparison: what is compared.
        found: its `rows`.
    """
    lines = [f"# {comparison.title or 'Comparison'}: {len(comparison.groups)} groups of runs", ""]
    for sheet in sheets(comparison, found):
        lines += [f"## {sheet.title}", "", pages.table(sheet.header, sheet.lines)]
    lines += [f"- {remark}" for remark in notes(comparison)]
    return "\n".join(lines) + "\n"


def to_table(comparison: Comparison, columns: Sequence[str]) -> str:
    """Some columns as one table in Markdown, the best first.

    Args:
        comparison: what is compared.
        columns: of its `rows`, "epoch 5", besides the group's label, of those by another metric, "final test/loss", or
            "step 500", the metric's values at that step.

    Raises:
        ValueError: there is no such column.
    """
    found = rows(comparison)
    for name in {m[1] for column in columns if (m := re.fullmatch(r"(?:final|best) \w+/(\w+)", column))}:
        others = {row["group"]: row for row in rows(replace(comparison, metric=f"val/{name}", references={}))}
        for row in found:
            row |= {key: cell for key, cell in others[row["group"]].items() if key not in row}
    groups = {group.label: group.curves(comparison.metric) for group in comparison.groups}
    for column, step in ((c, int(m[1])) for c in columns if (m := re.fullmatch(r"step (\d+)", c))):
        for row in found:
            values = [curve.value[curve.step == step] for curve in groups[row["group"]]]
            row[column] = Spread.of(float(value[-1]) for value in values if len(value))
    if unknown := [column for column in columns if column not in found[0]]:
        raise ValueError(f"columns: there is no {unknown[0]!r}; there are {', '.join(found[0])}")
    kinds = {c: comparison.metric if c.startswith(("epoch", "published", "step ")) else c for c in columns}
    kinds |= {c: "" for c in columns if c.endswith(RATIOS)}
    lines = [[row["group"], *(_cell(row[c], kinds[c]) for c in columns)] for row in found]
    return pages.table(["group", *columns], lines)


def notes(comparison: Comparison) -> list[str]:
    """How the figures are defined and where they were measured."""
    runs = [run for group in comparison.groups for run in group.runs]
    said = ["Mean ± standard deviation over seeds; a training metric is the mean over an epoch's steps."]
    if len(comparison.groups) > 1:
        said.append(f"Best first, by the final {comparison.metric}; * the best.")
    if comparison.target:
        said.append(
            "Time to target: training seconds until the first epoch (training metrics) or evaluation (validation "
            "metrics) that is at least as good; median over seeds, a run that never is counts as infinite."
        )
    machines = dict.fromkeys(filter(None, map(_machine, runs)))  # a run tells at its end
    said += [f"Measured on {'; '.join(machines)}."] if machines else []
    if len(machines) > 1:
        said.append("The runs were not all made on the same machine: seconds do not compare.")
    return said + comparison.remarks


def _machine(run: LoadedRun) -> str:
    """Where a run was trained, in a few words."""
    hardware = run.summary.get("hardware") or {}
    name = hardware.get("gpu") or hardware.get("cpu")
    words = [str(hardware.get("device", "")), *([str(name)] if name else [])]
    words += [f"{hardware['threads']} thread(s)"] if hardware.get("threads") else []
    return ", ".join(word for word in words if word)
