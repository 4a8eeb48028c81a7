"""What marked places of pages are filled with: a table or a picture, from a record's path and the words of a mark.

A module for what records are of; each says in TABLES and PICTURES which names it answers to.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from scripts.studies.makers import curvature, measured, runs

#: What writes a table.
TABLES: dict[str, Callable[[Path, str], str]] = {**measured.TABLES, **runs.TABLES, **curvature.TABLES}
#: What draws a picture.
PICTURES: dict[str, Callable[[Path, str], Figure]] = {**measured.PICTURES, **runs.PICTURES, **curvature.PICTURES}
