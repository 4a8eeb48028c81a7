"""Write the tables of options in docs/optimizers: names, default values and words of configs/optimizer.

    python scripts/pages/options.py

Between ``<!-- options: NAME -->`` and ``<!-- /options -->`` a page holds the table of that file. A test compares them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from analysis import pages

FOLDER = ROOT / "docs" / "optimizers"

_BLOCK = re.compile(r"(<!-- options: (\w+) -->\n).*?(<!-- /options -->)", re.DOTALL)
_OPTION = re.compile(r"(?P<name>\w+): (?P<value>.*?) +# (?P<words>.*)")


def options(name: str) -> list[tuple[str, str, str]]:
    """Options of an optimizer: name, default value and what it is.

    Args:
        name: of a file in configs/optimizer.

    Raises:
        FileNotFoundError: there is no such file.
    """
    lines = (ROOT / "configs" / "optimizer" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    found = [_OPTION.fullmatch(line) for line in lines]
    return [(m["name"], m["value"], m["words"]) for m in found if m]


def table(name: str) -> str:
    """The options of an optimizer as a table in Markdown."""
    rows = [(f"`{key}`", f"`{value}`", words) for key, value, words in options(name)]
    return pages.table([f"`optimizer={name}`", "default", "what it is"], rows, left=3)


def renewed(text: str) -> str:
    """A page with its tables of options as they are now."""
    return _BLOCK.sub(lambda m: f"{m[1]}{table(m[2])}{m[3]}", text)


def names(text: str) -> list[str]:
    """The optimizers whose options a page lists."""
    return [m[2] for m in _BLOCK.finditer(text)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    for path in sorted(FOLDER.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (new := renewed(text)) != text:
            path.write_text(new, encoding="utf-8")
            print(f"{path.relative_to(ROOT)} is written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
