"""The table as text and as it stands in the README, with what it says below."""

from __future__ import annotations

from dataclasses import fields

from ..packaged import DRAWING, EXCEPTIONS, LIMITS, Package
from .catalogue import present
from .measured import Row

#: Titles of the columns.
TITLES = Row("optimizer=", "class", "step", "paper", "needs", "state B/param", "layers", "numbers", "ranks")

#: What the columns mean, below the table.
NOTES = (
    "needs: the whole module, the model's outputs, a graph through gradients (no compile), an auxiliary pass.",
    "state: measured after two float32 steps on a 784-400-200-100 net.",
    "layers: all = Linear, Conv1d, Conv2d, ConvTranspose2d, MultiheadAttention, norms, Embedding; for what else there "
    "is, Adam's step.",
    "numbers: all = weights in fp32, fp64 and bf16, and fp32 weights under bf16 autocast; tried out.",
    "ranks: whether curvature is averaged over processes or its statistics gathered, or made of averaged gradients.",
)


def limits() -> list[str]:
    """A line for each reason why a class of a package cannot be asked for by its name."""
    found: dict[str, list[str]] = {}
    packages = [target for _, _, target in present() if isinstance(target, Package)]
    known = {name for package in packages for name in package.classes()}
    for reason, names in LIMITS.items():
        if there := [name for name in names if name in known]:
            found[reason] = there
    lines = [f"{', '.join(names)}: {reason}" for reason, names in found.items()]
    drawing = [name for name in DRAWING if name in known]
    return lines + ([f"{', '.join(drawing)}: alone in one process, for each would draw other numbers"] * bool(drawing))


def text(table: list[Row]) -> str:
    """The table in columns.

    Args:
        table: what ``rows`` returned.
    """
    cells = [_cells(row) for row in (TITLES, *table)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    exceptions = [f"{name}, {point}: {reason}" for (name, point), reason in EXCEPTIONS.items()]
    listed = {"Not met:": exceptions, "Not by name:": limits()}
    return "\n".join([*lines, "", *NOTES, *(f"\n{title}\n  " + "\n  ".join(some) for title, some in listed.items())])


def markdown(table: list[Row]) -> str:
    """The table for a README.

    Args:
        table: what ``rows`` returned.
    """
    cells = [_cells(row) for row in table]
    marked = [[f"`{line[0]}`", f"`{line[1]}`" if line[1] else "", *line[2:]] for line in cells]
    titles = [f"`{TITLES.name}`", *_cells(TITLES)[1:]]
    rule = ["---:" if title == TITLES.state else "---" for title in titles]
    lines = [f"| {' | '.join(line)} |" for line in (titles, rule, *marked)]
    exceptions = "; ".join(f"`{name}` ({point}) {reason}" for (name, point), reason in EXCEPTIONS.items())
    return "\n".join([*lines, "", " ".join(NOTES), f"Not met: {exceptions}."])


def _cells(row: Row) -> list[str]:
    return [getattr(row, f.name) for f in fields(Row)]
