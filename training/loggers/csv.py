"""A table of what a run logged, for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.loggers.recorded import Recorded
from training.loggers.values import HEADER
from training.runs.folder import Record, atomic_file, plain
from training.runs.run import Run

NAME = "metrics.csv"


class CSV(Recorded):
    """``metrics.csv``: a line an event, a column a metric; what an event does not tell of is empty.

    An event with a metric that no earlier one had adds a column behind the others, and the file is written anew, which
    the first events of each kind bring about and few later ones. A resumed run cuts off what came after its checkpoint.
    """

    def __init__(self) -> None:
        self._path = Path(NAME)
        self._columns = list(HEADER)
        self._rows = 0

    def start(self, run: Run) -> None:
        """See Logger."""
        self._path = run.folder.path / NAME
        rows = self._read()[: self._rows] if run.resumed else []
        if run.resumed and len(rows) < self._rows:
            self.warn_of_loss(self._path)
        self._columns, self._rows = [*(rows[0] if rows else HEADER)], len(rows)
        self._write(rows)

    def log(self, record: dict[str, Any]) -> None:
        """See Logger."""
        if new := [name for name in record if name not in self._columns]:
            self._columns += new
            self._write(self._read())
        self.record.append(self._lines([plain(record)]))
        self._rows += 1

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The whole file, with the columns that there are now; what follows is appended to it."""
        self.close()
        with atomic_file(self._path) as file:
            file.write(self._lines([{name: name for name in self._columns}, *rows]))
        self.record = Record(self._path)

    def _lines(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue().encode()

    def state_dict(self) -> dict[str, Any]:
        """See Logger."""
        return {"rows": self._rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Logger."""
        self._rows = state["rows"]
