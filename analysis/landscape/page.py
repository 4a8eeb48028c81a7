"""One HTML file with surfaces that can be turned: data, drawing library and all, so that it opens without a network."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path

from analysis.compare.figures import PALETTE
from analysis.landscape.recording import to_dict
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
    data = {"metric": metric, "colours": PALETTE, "surfaces": [to_dict(surface) for surface in surfaces]}
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
