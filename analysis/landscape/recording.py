"""Surfaces as values that JSON holds, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.landscape.surface import Surface, Track
from training.errors import UserError

#: Of a track, what is an array, and how many digits of it are kept; of metrics, the last.
ARRAYS = {"steps": 9, "coordinates": 9, "cosine": 5, "left_out": 5, "distance": 9}
VALUES = 7


def to_dict(surface: Surface) -> dict[str, Any]:
    """A surface as lists and numbers; what is not finite is None, as JSON has nothing else for it.

    Args:
        surface: a line or a plane.
    """
    return {
        "title": surface.title,
        "notes": list(surface.notes),
        "axes": list(surface.axes),
        "x": _numbers(surface.x, 9),
        "y": _numbers(surface.y, 9),
        "values": {name: _numbers(values, VALUES) for name, values in surface.values.items()},
        "explained": [round(float(share), 5) for share in surface.explained],
        "tracks": [_track(track) for track in surface.tracks],
    }


def _track(track: Track) -> dict[str, Any]:
    arrays = {name: _numbers(getattr(track, name), digits) for name, digits in ARRAYS.items()}
    metrics = {
        kind: {name: _numbers(values, VALUES) for name, values in getattr(track, kind).items()}
        for kind in ("projected", "true")
    }
    return {"label": track.label, **arrays, **metrics}


def to_record(surfaces: Sequence[Surface]) -> str:
    """Surfaces as JSON, a line each.

    Args:
        surfaces: lines or planes.
    """
    return "".join(f"{json.dumps(to_dict(surface), allow_nan=False, ensure_ascii=False)}\n" for surface in surfaces)


def from_record(text: str) -> list[Surface]:
    """The surfaces of a record; what was not finite is not a number.

    Args:
        text: of it.

    Raises:
        UserError: it is none.
    """
    try:
        return [_surface(json.loads(line)) for line in text.splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"this is no record of surfaces ({error})") from error


def _surface(found: dict[str, Any]) -> Surface:
    tracks = tuple(
        Track(
            own["label"], projected=_arrays(own["projected"]), true=_arrays(own["true"]),
            **{name: _array(own[name]) for name in ARRAYS},
        )
        for own in found["tracks"]
    )  # fmt: skip
    return Surface(
        found["title"], tuple(found["notes"]), tuple(found["axes"]), _array(found["x"]), _array(found["y"]),
        _arrays(found["values"]), tracks, tuple(found["explained"]),
    )  # fmt: skip


def _arrays(values: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: _array(own) for name, own in values.items()}


def _array(values: Any) -> np.ndarray:
    return np.array(values, dtype=float)


def _numbers(values: np.ndarray, digits: int) -> Any:
    if values.ndim > 1:
        return [_numbers(row, digits) for row in values]
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values.tolist()]
