"""Pages in Markdown: tables, and what stands in a page by hand."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path

from training.runs.folder import atomic_file

#: Where the part of a page begins that is written by hand.
NOTES = "## Notes"


def table(head: Sequence[str], lines: Iterable[Sequence[object]], left: int | Container[int] = 1) -> str:
    """A table in Markdown.

    Args:
        head: titles of the columns.
        lines: their cells; a stroke in one does not end it.
        left: how many columns, the first ones, are written to the left, or which; the others are numbers.
    """
    words = range(left) if isinstance(left, int) else left
    rule = ["---" if column in words else "---:" for column in range(len(head))]
    rows = [[str(cell).replace("|", "\\|") for cell in line] for line in (head, *lines)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (rows[0], rule, *rows[1:]))


def write_page(target: Path, make: Callable[[str], str]) -> Path:
    """Write a page anew but for what stands in it from ``NOTES`` on.

    Args:
        target: the page; its folder is made if need be.
        make: its text, given its notes; "" where it has none.
    """
    before = target.read_text(encoding="utf-8") if target.exists() else ""
    text = make(before[before.index(NOTES) :] if NOTES in before else "")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as file:
        file.write(text.encode())
    return target
