"""What marked places of pages are filled with: a table or a picture, from a record's path and the words of a mark.

A module for what records are of; each says in TABLES and PICTURES which names it answers to.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from scripts.studies.makers import curvature, factors, measured, runs

_ALL = (measured, runs, curvature, factors)
#: What writes a table.
TABLES: dict[str, Callable[[Path, str], str]] = {name: make for it in _ALL for name, make in it.TABLES.items()}
#: What draws a picture.
PICTURES: dict[str, Callable[[Path, str], Figure]] = {name: make for it in _ALL for name, make in it.PICTURES.items()}
