"""What was measured, in a file that a later call goes on with."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from analysis import records
from analysis.fisher.measure import Row, as_dict
from training.errors import UserError
from training.runs.folder import atomic_file


class Results:
    """Rows in ``fisher_quality.jsonl``: a line of settings, then one a row, written anew after each unit of work.

    Args:
        folder: where the file lies; made if need be.
        settings: all that the numbers depend on besides net, step and damping.
        fresh: rows of an earlier call are left behind.

    Raises:
        UserError: the file is of other settings, or is none of these.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], fresh: bool = False) -> None:
        self.path = folder / "fisher_quality.jsonl"
        self.settings = json.loads(json.dumps(settings))
        self.rows: list[Row] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [] if fresh or not self.path.exists() else self.path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"out: {folder} cannot be used ({error.strerror}); give another folder") from error
        if not lines:
            return
        ways_out = "give another folder with --out, or --fresh to replace it"
        try:
            known, self.rows = _parsed(lines)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"out: {self.path} is no file of these results ({error}); {ways_out}") from error
        if other := [key for key in {**known, **self.settings} if known.get(key) != self.settings.get(key)]:
            key = other[0]
            raise UserError(
                f"out: {self.path} has results with {key}={known.get(key)}, here it is {self.settings.get(key)}; "
                f"{ways_out}"
            )

    def has(self, net: str, step: int, damping: float) -> bool:
        """Whether a unit of work is done.

        Args:
            net: of it.
            step: of it.
            damping: of it.
        """
        return any((row.net, row.step, row.damping) == (net, step, damping) for row in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Keep a unit's rows, on disk too.

        Args:
            rows: of one unit.
        """
        self.rows += rows
        lines = [{"settings": self.settings}, *map(as_dict, self.rows)]
        with atomic_file(self.path) as file:
            file.write("".join(f"{json.dumps(line)}\n" for line in lines).encode())

    def of(self, net: str, damping: float) -> list[Row]:
        """All rows of a net at a damping, by step.

        Args:
            net: its name.
            damping: lambda.
        """
        own = [row for row in self.rows if (row.net, row.damping) == (net, damping)]
        return sorted(own, key=lambda row: row.step)


def kept(path: Path) -> list[Row]:
    """The rows of a file of results.

    Args:
        path: of it, or of what was packed of it.

    Raises:
        UserError: it is none.
    """
    try:
        return _parsed(records.text(path).splitlines())[1]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of these results ({error})") from error


def _parsed(lines: Sequence[str]) -> tuple[dict[str, Any], list[Row]]:
    first, *rest = [json.loads(line) for line in lines]
    return first["settings"], [_row(values) for values in rest]


def _row(values: dict[str, Any]) -> Row:
    known = {field.name for field in fields(Row)}
    if set(values) != known:
        raise ValueError(f"a row has {sorted(set(values) ^ known)[0]!r} or lacks it")
    entries: dict[str, Any] = {key: math.nan if value is None else value for key, value in values.items()}
    return Row(**entries)
