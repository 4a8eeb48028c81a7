"""Rows as a file of values, as a page's tables, and the order that is expected of them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from statistics import median

from analysis import pages
from analysis.fisher.measure import Row, as_dict
from analysis.fisher.methods import label

#: What is measured on layers, and how tables call it.
ERRORS = {
    "fisher_frobenius": "F, Frobenius",
    "fisher_operator": "F, operator",
    "inverse_frobenius": "inverse, Frobenius",
    "inverse_operator": "inverse, operator",
}
DIRECTIONS = {
    "angle_block": "angle, blocks",
    "angle_full": "angle, whole",
    "decrease_block": "decrease, blocks",
    "decrease_full": "decrease, whole",
}
#: The order that the KPSVD study reports (Koroko et al. 2022), from the smallest error on: rank two, KPSVD, K-FAC.
PAIRS = (("deflation", "kpsvd"), ("lanczos", "kpsvd"), ("kfac_corrected", "kfac"), ("kpsvd", "kfac"))
#: Numbers that are nearer than this to each other are equal: the fits end at such tolerances. Of operator norms, so are
#: those that are nearer than the bound to which they are known.
EQUAL = 1e-6


def to_csv(rows: Iterable[Row]) -> str:
    """All rows with all digits.

    Args:
        rows: what was measured.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in as_dict(row).items()} for row in rows)
    return text.getvalue()


@dataclass(frozen=True)
class Order:
    """On how many layers one method is no worse than another, of what was measured of both.

    Attributes:
        better: which is expected to be.
        worse: than which.
        measure: a name of ``ERRORS`` or ``DIRECTIONS``.
        holds: on how many layers and steps.
        of: so many.
        fails: layer, step and the two values where it is not so.
    """

    better: str
    worse: str
    measure: str
    holds: int
    of: int
    fails: tuple[tuple[str, int, float, float], ...]


def order(rows: Sequence[Row], measures: Iterable[str] = ERRORS) -> list[Order]:
    """Whether the published order holds, layer by layer.

    Args:
        rows: of one net and damping.
        measures: of which.
    """
    found = []
    at = {(row.method, row.layer, row.step): row for row in rows if row.layer}
    for measure in measures:
        for better, worse in PAIRS:
            pairs = [
                (row, at[worse, layer, step])
                for (method, layer, step), row in at.items()
                if method == better and (worse, layer, step) in at
            ]
            pairs = [pair for pair in pairs if not any(math.isnan(getattr(row, measure)) for row in pair)]
            fails = tuple(
                (one.layer, one.step, getattr(one, measure), getattr(two, measure))
                for one, two in pairs
                if _is_worse(one, two, measure)
            )
            if pairs:
                found.append(Order(better, worse, measure, len(pairs) - len(fails), len(pairs), fails))
    return found


def _is_worse(one: Row, two: Row, measure: str) -> bool:
    """Whether the first one is, by more than what is not known."""
    values = [getattr(row, measure) for row in (one, two)]
    margin = EQUAL
    if measure.endswith("operator"):
        margin = max(margin, *(row.bound * value for row, value in zip((one, two), values, strict=True)))
    return values[1] > values[0] + margin if measure.startswith("decrease") else values[0] > values[1] + margin


def to_markdown(rows: Sequence[Row], titles: dict[str, str]) -> str:
    """The tables of a page: by net the errors and directions at its last step, and where the order holds.

    Args:
        rows: what was measured.
        titles: of nets; one without has its name.
    """
    parts = []
    for net, damping in dict.fromkeys((row.net, row.damping) for row in rows):
        own = [row for row in rows if (row.net, row.damping) == (net, damping)]
        last = max(row.step for row in own)
        at_last = [row for row in own if row.step == last]
        layers = len({row.layer for row in at_last if row.layer})
        title = f"### {titles.get(net, net)}\n\nStep {last}, damping {damping:g}; errors: median of {layers} layers.\n"
        parts += [title, _summary(at_last), _orders(own), ""]
    return "\n".join(parts)


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """A line a method: medians of its layers' errors, and what its direction is worth on the whole net.

    Args:
        rows: of one net, step and damping.
    """
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        cells = [_text(middle([getattr(row, key) for row in own if row.layer])) for key in ERRORS]
        whole = next((row for row in own if not row.layer), None)
        cells += [_text(getattr(whole, key, math.nan), degrees=key.startswith("angle")) for key in DIRECTIONS]
        lines.append([label(method), *cells])
    return lines


def _summary(rows: Sequence[Row]) -> str:
    return pages.table(["method", *ERRORS.values(), *DIRECTIONS.values()], summary(rows))


def _orders(rows: Sequence[Row]) -> str:
    found = order(rows, [*ERRORS, "decrease_block"])
    measures = {**ERRORS, "decrease_block": "decrease, blocks"}
    header = ["order holds on layers × steps", *measures.values()]
    lines = []
    for better, worse in PAIRS:
        mine = {entry.measure: entry for entry in found if (entry.better, entry.worse) == (better, worse)}
        if mine:
            cells = [f"{mine[key].holds} of {mine[key].of}" if key in mine else "–" for key in measures]
            lines.append([f"{label(better)} before {label(worse)}", *cells])
    return pages.table(header, lines) if lines else ""


def middle(values: Iterable[float]) -> float:
    """The median of what is known; NaN of nothing."""
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.nan


def _text(value: float, degrees: bool = False) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.1f}°" if degrees else f"{value:.3g}"
