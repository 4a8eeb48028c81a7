"""Records of what was measured, which pages of docs/results are made of: a line on where and how, then a line a row."""

from __future__ import annotations

import json
import lzma
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from training.errors import UserError
from training.runs import provenance
from training.runs.folder import atomic_file


def write(path: Path, rows: Iterable[Mapping[str, Any]], **facts: Any) -> None:
    """Write a record: of this process its command, machine, threads and torch, and the rows.

    Args:
        path: of the file; its folder is made if need be.
        rows: what JSON can hold.
        facts: more of the first line.

    Raises:
        UserError: the file cannot be written.
    """
    machine = provenance.hardware(torch.device("cpu"), 1)
    words = [re.sub(r"(^|=)/(?:.*/)?", r"\1", word) for word in sys.argv]  # where it lay is nobody's concern
    first = {
        "command": shlex.join(["python", *words]),
        "cpu": machine["cpu"],
        "threads": machine["threads"],
        "torch": torch.__version__.partition("+")[0],
        **facts,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write("".join(f"{json.dumps(line)}\n" for line in (first, *rows)).encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another file") from error


def text(path: Path) -> str:
    """What a file says, unpacked where its name ends in ``.xz``.

    Args:
        path: of it.

    Raises:
        UserError: it cannot be read.
    """
    try:
        content = path.read_bytes()
        return (lzma.decompress(content) if path.suffix == ".xz" else content).decode()
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line of a record, and its rows.

    Args:
        path: of the file.

    Raises:
        UserError: it cannot be read, or is no record.
    """
    try:
        first, *rows = [json.loads(line) for line in text(path).splitlines()]
        first["command"], first["cpu"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no record of a measurement ({error})") from error
    return first, rows
