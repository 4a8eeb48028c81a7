"""Of curvature: how good approximations are, Kronecker factors of layers, ways over loss surfaces."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from analysis import factors, fisher


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


TABLES: dict[str, Callable[[Path, str], str]] = {"fisher": _fisher, "factors": _factors, "ways": _ways}
PICTURES: dict[str, Callable[[Path, str], Figure]] = {"fisher": _fisher_drawn}
