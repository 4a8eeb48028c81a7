"""Of Kronecker factors: numbers of layers, in one run and in several, and the pictures of a study."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis import factors, pages, records

#: What tables call the numbers, and which of these are shares.
NAMES = {
    "columns": "d(A)", "d_out": "d(G)", "mean_A": "mean of A", "mean_G": "mean of G",
    "participation_A": "directions that count in A", "participation_G": "directions that count in G",
    "diagonal_A": "diagonal's share of |A|²", "diagonal_G": "of |G|²", "kept_frobenius": "of |G ⊗ A|²",
    "above": "directions of G ⊗ A above the damping", "fit_cosine": "cosine of F and G ⊗ A",
    "fit_error": "|F - G ⊗ A| / |F|", "fit_shared": "a shift: true over K-FAC's",
}  # fmt: skip
SHARES = ("diagonal_A", "diagonal_G", "kept_frobenius", "above")


def _studies(path: Path) -> list[factors.Study]:
    return [factors.from_record(line) for line in records.text(path).splitlines()]


def _rows(study: factors.Study, step: int) -> dict[str, dict[str, Any]]:
    point = next(point for point in study.points if point.step == step)
    return {row["layer"]: row for row in point.rows}


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if isinstance(value, int):
        return str(value)
    if value is None or (key == "fit_error" and row["fit_cosine"] > 1):  # of few examples: there is none
        return "–"
    if key == "fit_shared" and abs(value) < 1e-12:  # gradients that cancel, but for rounding
        return "0"
    if key in SHARES:
        return f"{100 * value:.2g} %"
    return f"{value:.0f}" if 100 <= value < 10000 else f"{value:.2g}"


def _numbers(path: Path, words: str) -> str:
    """Of a study some numbers of all layers at some steps: ``0,80: columns, participation_A``."""
    steps, _, keys = words.partition(": ")
    [study], asked = _studies(path), keys.split(", ")
    at = {step: _rows(study, int(step)) for step in steps.split(",")}
    several = len(at) > 1
    lines = [
        [layer, *([step] if several else []), *(_cell(rows[layer], key) for key in asked)]
        for layer in next(iter(at.values()))
        for step, rows in at.items()
    ]
    return pages.table(["layer", *(["step"] if several else []), *(NAMES.get(key, key) for key in asked)], lines)


def _of_runs(path: Path, words: str) -> str:
    """Of several runs some numbers at a step, a row a run: ``60: KEY of LAYER, KEY of LAYER``."""
    step, _, keys = words.partition(": ")
    asked = [key.split(" of ") for key in keys.split(", ")]
    studies = _studies(path)
    lines = []
    for name, study, at in (("untrained", studies[0], 0), *((f"`{it.name}`", it, int(step)) for it in studies)):
        loss = next(point.loss for point in study.points if point.step == at)
        rows = _rows(study, at)
        lines.append([name, f"{math.exp(loss):,.0f}", *(_cell(rows[layer], key) for key, layer in asked)])
    return pages.table(["run", "perplexity", *(f"{NAMES.get(key, key)}, `{layer}`" for key, layer in asked)], lines)


def _of_blocks(path: Path, words: str) -> str:
    """Of blocks one number of some of their layers: ``KEY at 0,60: query, key``."""
    asked, _, names = words.partition(": ")
    key, _, steps = asked.partition(" at ")
    [study], kinds = _studies(path), names.split(", ")
    lines = []
    at = {step: _rows(study, int(step)) for step in steps.split(",")}
    for block in dict.fromkeys(layer.rpartition(".")[0].replace(".attention", "") for layer in study.layers):
        for step, rows in at.items():
            own = {layer.rpartition(".")[2]: row for layer, row in rows.items() if layer.startswith(f"{block}.")}
            lines.append([f"`{block}`", step, *(_cell(own[kind], key) for kind in kinds)])
    return pages.table([NAMES.get(key, key), "step", *kinds], lines)


def _drawn(path: Path, kind: str) -> Figure:
    return dict(factors.pictures(_studies(path)[0]))[kind]


TABLES: dict[str, Callable[[Path, str], str]] = {
    "factors": _numbers,
    "factors_runs": _of_runs,
    "factors_blocks": _of_blocks,
}
PICTURES: dict[str, Callable[[Path, str], Figure]] = {
    "factors": _drawn,
    "factors_runs": lambda path, layer: factors.runs(_studies(path), layer),
}
