"""Aligned plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of a table, its columns as wide as their widest cell, a line of dashes below the header.

    Args:
        header: names of the columns.
        rows: cells.
        right: columns of numbers, aligned to the right.
    """
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        parts = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(parts).rstrip()

    lines = [line(row) for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths if width))
    return lines
