"""One page of what runs say: the verdict in two sentences, the table, the curves, and where each number comes from.

`write` makes `report/` of a folder of `scripts/verdict.py`, or of any sweep: `index.html`, which loads nothing, the
table as CSV, Markdown and LaTeX, and each figure as PNG, SVG and PDF. What is missing is left out; what has not
finished is said.

Definitions:

- A score is the last value of the metric, of runs that finished or stopped early; runs that diverged or failed have
  none, and a warning says how many.
- The leader has the best mean. Each other arm is compared with it by a paired t test over common seeds; the p values
  are adjusted by Holm over all of them. A difference is shown where p is below 0.05.
- All else is as `analysis.statistics` defines it.
"""

from __future__ import annotations

from pathlib import Path

from analysis.compare import find_runs
from analysis.report import figures, tables
from analysis.report.page import Page
from analysis.report.reading import Material, is_verdict, read_sweep, read_verdict
from analysis.report.results import Results, Row, results
from analysis.report.words import sentences
from training.errors import UserError
from training.runs.folder import atomic_file

__all__ = [
    "Material",
    "Results",
    "Row",
    "is_verdict",
    "read",
    "read_sweep",
    "read_verdict",
    "results",
    "sentences",
    "verdict_sentences",
    "write",
]


def read(folder: Path) -> Results:
    """Read a verdict's folder, or a sweep's, and compute what is to be said.

    Args:
        folder: of `scripts/verdict.py`, or one that holds runs.

    Raises:
        ValueError: there is nothing in it, or a file is damaged.
    """
    return results(read_verdict(folder) if is_verdict(folder) else read_sweep(find_runs([folder]), folder))


def verdict_sentences(folder: Path) -> list[str]:
    """The verdict in two sentences, after one that says what is missing if something is.

    Args:
        folder: as for `read`.

    Raises:
        ValueError: as for `read`.
    """
    return sentences(read(folder))


def write(folder: Path | Results, out: Path | None = None, command: str | None = None, linked: bool = True) -> Path:
    """Write the page, the tables and the figures.

    Args:
        folder: of `scripts/verdict.py`, one that holds runs, or what was computed of them already.
        out: folder of the page; None: `report` in that of the runs.
        command: that writes the page again, to be said on it; None: `scripts/compare.py FOLDER --html`.
        linked: whether numbers lead to the folders of runs; a page that is to stand without them has no links.

    Returns:
        `index.html`.

    Raises:
        ValueError: there is nothing in the folder, or a file is damaged.
        UserError: the page cannot be written.
    """
    found = folder if isinstance(folder, Results) else read(folder)
    home = found.material.folder
    out = out or home / "report"
    said = sentences(found)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with figures.style():
            drawn = {
                name: (figures.files(figure, out / name), text) for name, (figure, text) in figures.draw(found).items()
            }
        (out / "table.csv").write_text(tables.to_csv(found), encoding="utf-8")
        (out / "table.md").write_text(tables.to_markdown(found, said), encoding="utf-8")
        (out / "table.tex").write_text(tables.to_tex(found), encoding="utf-8")
        page = Page(found, out, command or f"python scripts/compare.py {home} --html", linked)
        with atomic_file(out / "index.html") as file:
            file.write(page.text(said, drawn).encode())
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror}); give another folder") from error
    return out / "index.html"
