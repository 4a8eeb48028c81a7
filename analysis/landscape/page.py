"""One HTML file with surfaces that can be turned: data, drawing library and all, so that it opens without a network."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.compare.figures import PALETTE
from analysis.landscape.surface import Surface

HERE = Path(__file__).parent
#: plotly.js's bundle for three dimensions; its licence (MIT) lies beside it.
LIBRARY = HERE / "plotly" / "plotly-gl3d.min.js"


def to_page(surfaces: Sequence[Surface], picture: bytes, metric: str = "loss") -> str:
    """The text of a page.

    Args:
        surfaces: planes, between which the page can choose.
        picture: PNG that is shown by browsers that draw nothing in three dimensions.
        metric: what is drawn at first; the others can be chosen.

    Raises:
        ValueError: one is a line, or there is no such metric.
    """
    for surface in surfaces:
        surface.metric(metric)
        if not len(surface.y):
            raise ValueError("dims must be 2 for a page: a line has no surface to turn")
    data = {"metric": metric, "colours": PALETTE, "surfaces": [_plain(surface) for surface in surfaces]}
    # "</" would end the script that the data lies in.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")
    parts = {
        "title": html.escape(f"{metric} {surfaces[0].title}"),
        "picture": f"data:image/png;base64,{base64.b64encode(picture).decode()}",
        "plotly": LIBRARY.read_text(encoding="utf-8"),
        "data": text,
    }
    page = (HERE / "page.html").read_text(encoding="utf-8")
    pieces = []
    for name in ("title", "picture", "plotly", "data"):  # in the order of the page
        before, _, page = page.partition(f"[[{name}]]")
        pieces += [before, parts[name]]
    return "".join([*pieces, page])


def _plain(surface: Surface) -> dict[str, Any]:
    return {
        "title": surface.title,
        "notes": surface.notes,
        "axes": surface.axes,
        "x": _numbers(surface.x, 9),
        "y": _numbers(surface.y, 9),
        "values": {name: _numbers(values, 7) for name, values in surface.values.items()},
        "explained": [round(share, 5) for share in surface.explained],
        "tracks": [
            {
                "label": track.label,
                "steps": track.steps.tolist(),
                "coordinates": _numbers(track.coordinates, 9),
                "cosine": _numbers(track.cosine, 5),
                "left_out": _numbers(track.left_out, 5),
                "projected": {name: _numbers(values, 7) for name, values in track.projected.items()},
                "true": {name: _numbers(values, 7) for name, values in track.true.items()},
            }
            for track in surface.tracks
        ],
    }


def _numbers(values: np.ndarray, digits: int) -> Any:
    """Nested lists of numbers with so many digits; null for what is not finite, which JSON lacks."""
    if values.ndim > 1:
        return [_numbers(row, digits) for row in values]
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values.tolist()]
