"""What is in a page of Markdown: links, pictures, headings, commands."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.conftest import ROOT

ROOTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in ROOTS), *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)]

#: What a line of a code block begins with, if it is a command.
PROGRAMS = (
    "bash", "conda", "curvlab", "jupyter", "make", "pip", "python", "srun", "tensorboard", "torchrun",
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command that a page gives.

    Attributes:
        page: that it stands in, from the root.
        text: the line, continued ones joined, without its comment.
    """

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """As a shell splits it."""
        return shlex.split(self.text)


def name(path: Path) -> str:
    """A page's path from the root."""
    return path.relative_to(ROOT).as_posix()


@cache
def tokens(path: Path) -> list[Token]:
    """The tokens of a page."""
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def targets(path: Path) -> list[str]:
    """What a page links to and shows, without addresses of other hosts."""
    found = []
    for token in tokens(path):
        for child in token.children or []:
            target = child.attrs.get("href") if child.type == "link_open" else child.attrs.get("src")
            if target and not re.match(r"[a-z]+:", str(target)):
                found.append(str(target))
    return found


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to a page's headings, and those that it has by itself."""
    found: dict[str, int] = {}
    result = set(re.findall(r'<a (?:id|name)="([^"]+)"', path.read_text(encoding="utf-8")))
    for token, content in itertools.pairwise(tokens(path)):
        if token.type != "heading_open":
            continue
        words = "".join(child.content for child in content.children or [] if child.type in ("text", "code_inline"))
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        result.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return result


def fences(path: Path) -> list[tuple[str, str]]:
    """Language and content of the blocks between fences."""
    return [(token.info.strip(), token.content) for token in tokens(path) if token.type == "fence"]


def blocks(path: Path) -> list[str]:
    """The code of a page, but for blocks in another language than a shell's."""
    return [
        token.content
        for token in tokens(path)
        if token.type == "code_block" or (token.type == "fence" and token.info.strip() in ("", "bash", "sh", "console"))
    ]


def commands(path: Path) -> list[Command]:
    """The commands of a page.

    Raises:
        AssertionError: a line of a code block is none.
    """
    found = []
    for block in blocks(path):
        joined = re.sub(r" *\\\n *", " ", block)
        for line in joined.splitlines():
            text = re.split(r"\s{2,}#|^#", line.strip())[0].strip()
            if not text:
                continue
            assert text.split()[0] in PROGRAMS, f"{name(path)}: is this a command? {text}"
            found.append(Command(name(path), text))
    return found
