"""Places of pages that are filled from records, so that no figure in them is typed by hand.

    <!-- table: MAKER NAME WORDS -->                 from here to the end, what a maker writes
    <!-- end -->
    <!-- picture: MAKER NAME WORDS -->
    ![what it shows](NAME.png)                       the file that a maker draws

``make results`` renews them. A maker (scripts/studies/makers/) reads docs/results/logs/NAME.jsonl, .json or .csv,
what a script has written, or what `results.py keep` has packed: such a file in NAME.jsonl.xz, runs in NAME.tar.xz.
Where a record is not there, what stands in its place stays as it is: docs/results/README.md says of which pages, and a
test compares.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from scripts.studies.makers import PICTURES, TABLES
from training.runs.folder import atomic_file

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "docs" / "results" / "logs"
SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.xz", ".json.xz", ".tar.xz")
#: The pages that may have such places.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("*/*.md"))]
#: What a picture keeps, as text, of the record that it was drawn from.
DRAWN = "Record"

_TABLE = re.compile(r"(<!-- table: ([^>]+) -->\n?)(.*?)(<!-- end -->)", re.DOTALL)
_PICTURE = re.compile(r"<!-- picture: ([^>]+) -->\n!\[[^\]]*\]\(([^)]+)\)")


@dataclass(frozen=True)
class Mark:
    """What a place of a page asks for.

    Attributes:
        maker: a name of ``TABLES`` or ``PICTURES``.
        name: of the record.
        words: what else the maker is told.
        picture: the file that it draws; None for a table.
    """

    maker: str
    name: str
    words: str
    picture: Path | None = None

    @classmethod
    def parse(cls, text: str, picture: Path | None = None) -> Mark:
        """A mark from ``MAKER NAME WORDS``.

        Args:
            text: of the mark.
            picture: the file that it draws.
        """
        maker, name, *words = text.split(maxsplit=2)
        return cls(maker, name, " ".join(words), picture)

    @property
    def record(self) -> Path | None:
        """The record; None if it was not kept."""
        return next((path for end in SUFFIXES if (path := LOGS / f"{self.name}{end}").exists()), None)

    @property
    def digest(self) -> str:
        """Of all that a picture is drawn from."""
        content = self.record.read_bytes() if self.record else b""
        return hashlib.sha256(f"{self.maker} {self.words}\n".encode() + content).hexdigest()


def marks(page: Path) -> list[Mark]:
    """All marks of a page.

    Args:
        page: its file.
    """
    text = page.read_text(encoding="utf-8")
    found = [Mark.parse(m[1], page.parent / m[2]) for m in _PICTURE.finditer(text)]
    return found + [Mark.parse(m[2]) for m in _TABLE.finditer(text)]


def renewed(text: str) -> str:
    """A page with its tables as their records have them.

    Args:
        text: of the page.
    """

    def table(found: re.Match[str]) -> str:
        mark = Mark.parse(found[2])
        return found[0] if mark.record is None else found[1] + TABLES[mark.maker](mark.record, mark.words) + found[4]

    return _TABLE.sub(table, text)


def renew() -> Iterator[str]:
    """Write all pages and pictures anew that are not as their records have them.

    Yields:
        A sentence on each page that has marks.
    """
    for page in PAGES:
        asked = marks(page)
        text = page.read_text(encoding="utf-8")
        if (new := renewed(text)) != text:
            with atomic_file(page) as file:
                file.write(new.encode())
        for mark in asked:
            if mark.picture and mark.record and drawn_from(mark.picture) != mark.digest:
                save(PICTURES[mark.maker](mark.record, mark.words), mark.picture, mark.digest)
        gone = dict.fromkeys(mark.name for mark in asked if mark.record is None)
        if asked:
            yield str(page.relative_to(ROOT)) + (f" (no record was kept of {', '.join(gone)})" if gone else "")


def drawn_from(picture: Path) -> str | None:
    """The digest of what a picture was drawn from; None if it says none.

    Args:
        picture: a PNG.
    """
    if not picture.exists():
        return None
    with Image.open(picture) as image:
        return image.info.get(DRAWN)


def save(figure: Figure, path: Path, digest: str) -> None:
    """Write a picture in 256 colours, which makes the file a quarter, and what it was drawn from.

    Args:
        figure: any.
        path: of the PNG.
        digest: of its mark.
    """
    drawn, said = io.BytesIO(), PngInfo()
    figure.savefig(drawn, format="png", dpi=100)
    said.add_text(DRAWN, digest)
    picture = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    with atomic_file(path) as file:
        picture.save(file, format="png", optimize=True, pnginfo=said)
