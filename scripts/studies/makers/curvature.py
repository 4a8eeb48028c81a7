"""Of curvature: how good approximations are, and ways over loss surfaces."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from analysis import fisher, landscape, pages, records
from analysis.fisher.methods import label
from analysis.fisher.tables import DIRECTIONS, ERRORS


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


def _fisher_orders(path: Path, _: str) -> str:
    """On how many layers and steps of all nets the published order holds."""
    rows, measures = fisher.kept(path), [*ERRORS, "decrease_block"]
    counts: dict[str, dict[str, tuple[int, int]]] = {}
    for where in dict.fromkeys((row.net, row.damping) for row in rows):
        for it in fisher.order([row for row in rows if (row.net, row.damping) == where], measures):
            cells = counts.setdefault(f"{label(it.better)} before {label(it.worse)}", {})
            holds, of = cells.get(it.measure, (0, 0))
            cells[it.measure] = (holds + it.holds, of + it.of)
    titles = [{**ERRORS, **DIRECTIONS}[measure] for measure in measures]
    lines = [[name, *("{} of {}".format(*cells[measure]) for measure in measures)] for name, cells in counts.items()]
    return pages.table(["order holds on layers × steps", *titles], lines)


def _fisher_by(path: Path, words: str) -> str:
    """One measure, a column a method: ``MEASURE by KEY, KEY: METHOD, METHOD``, or ``... by KEY of NET: ...``.

    A measure of the whole model is the whole model's; of layers it is their median, or each one's where ``layer`` is a
    key. Of several steps, where ``step`` is none, it is the last.
    """
    asked, _, named = words.partition(": ")
    measure, _, keys = asked.partition(" by ")
    keys, _, net = keys.partition(" of ")
    by, methods = keys.split(", "), named.split(", ")
    layers = measure in ERRORS
    rows = [row for row in fisher.kept(path) if net in ("", row.net) and bool(row.layer) == layers]
    last = {row.net: row.step for row in sorted(rows, key=lambda row: row.step)}
    found: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for row in rows:
        if row.method in methods and ("step" in by or row.step == last[row.net]):
            cells = found.setdefault(tuple(getattr(row, key) for key in by), {})
            cells.setdefault(row.method, []).append(getattr(row, measure))
    titles = {"damping": "λ", "net": "net"}
    head = [*(titles.get(key, key) for key in by), *(label(method) for method in methods)]
    lines = []
    places = [list(dict.fromkeys(values)) for values in zip(*found, strict=True)]
    for key in sorted(found, key=lambda key: [place.index(it) for place, it in zip(places, key, strict=True)]):
        cells = found[key]
        names = [fisher.NETS[it].title if it in fisher.NETS else it if isinstance(it, str) else f"{it:g}" for it in key]
        values = [f"{median(cells[method]):.2f}" if method in cells else "–" for method in methods]
        lines.append([*names, *values])
    return pages.table(head, lines, left=len(by))


def _fisher_profile(path: Path, net: str) -> Figure:
    """Curvature and steps of a net by eigenvalue, as --profile writes them."""
    found = next(it for it in map(json.loads, records.text(path).splitlines()) if it["net"] == net)
    return fisher.profile([fisher.Binned(**one) for one in found["profiles"]], found["title"])


def _surfaces(path: Path) -> list[landscape.Surface]:
    return landscape.from_record(records.text(path))


def _landscape(path: Path, metric: str) -> Figure:
    return landscape.plot(_surfaces(path), metric)


def _ways(path: Path, metric: str) -> str:
    """Of a plane of ways through the start, where each run is at its end."""
    head = ["run", "distance from the start", "cosine with the plane", "left out", f"{metric} at the end"]
    head.append("plane's there")
    surface, lines = _surfaces(path)[0], []
    for track in surface.tracks:
        distance = math.hypot(*track.coordinates[-1], track.distance[-1])
        cells = [f"{distance:.3g}", f"{track.cosine[-1]:.2f}", f"{100 * track.left_out[-1]:.0f} %"]
        cells += [f"{kind[metric][-1]:.2g}" for kind in (track.true, track.projected)]
        lines.append([f"`{track.label}`", *cells])
    return f"{surface.notes[0].capitalize()}.\n\n{pages.table(head, lines)}"


TABLES: dict[str, Callable[[Path, str], str]] = {
    "fisher": _fisher,
    "fisher_orders": _fisher_orders,
    "fisher_by": _fisher_by,
    "ways": _ways,
}
PICTURES: dict[str, Callable[[Path, str], Figure]] = {
    "fisher": _fisher_drawn,
    "fisher_profile": _fisher_profile,
    "landscape": _landscape,
}
