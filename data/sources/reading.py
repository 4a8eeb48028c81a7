"""Text files as users have them: in UTF-8, with any line ends, from any system; what is none says where."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

MARK = "\ufeff"  # what some systems write at the beginning of a text; no character of it
# By the mark at the beginning of a file; UTF-32's begins as UTF-16's does.
OTHERS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_lines(path: Path) -> Iterator[str]:
    r"""The lines of a text in UTF-8, each with its end, which is ``\n`` whatever the file has (``\r\n``, ``\r``).

    A byte order mark at the beginning of a line is left out: at that of the file, and where files were put together.

    Args:
        path: the file.

    Yields:
        A line.

    Raises:
        OSError: the file cannot be opened or read.
        ValueError: it is in another encoding or no text; says which and at which byte.
    """
    with path.open("rb") as file:
        begin = file.read(4)
        if other := next((name for mark, name in OTHERS.items() if begin.startswith(mark)), None):
            raise ValueError(f"it is in {other}, byte 0 is 0x{begin[0]:02x}")
        file.seek(0)
        start = 0
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                at = error.start
                raise ValueError(f"byte {start + at}, in line {number}, is 0x{line[at]:02x} and no UTF-8") from error
            if (at := line.find(b"\0")) >= 0:  # valid UTF-8, but what UTF-16 without a mark and binary files have
                raise ValueError(f"byte {start + at}, in line {number}, is 0x00: it is in UTF-16, or no text")
            text = text.removeprefix(MARK)
            if "\r" in text:
                *whole, rest = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
                yield from (f"{part}\n" for part in whole)
                text = rest
            if text:
                yield text
            start += len(line)
