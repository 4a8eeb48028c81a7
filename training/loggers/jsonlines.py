"""The record that everything else is drawn from: an event a line."""

from __future__ import annotations

import json
from typing import Any

from training.loggers.recorded import Recorded
from training.runs.folder import Record, plain
from training.runs.run import Run


class JSONLines(Recorded):
    """``metrics.jsonl``: an event a line. A resumed run cuts off what was written after its checkpoint."""

    def __init__(self) -> None:
        self._offset = 0

    def start(self, run: Run) -> None:
        """See Logger."""
        record = self.record = Record(run.folder.metrics_file, self._offset)
        if record.size < self._offset:
            self.warn_of_loss(record.path)
            content = record.read()
            record.cut(content.rfind(b"\n") + 1)  # half a line would spoil the next one

    def log(self, record: dict[str, Any]) -> None:
        """See Logger."""
        # Whoever follows the file sees whole lines, and a killed process loses none.
        self.record.append((json.dumps(plain(record), allow_nan=False) + "\n").encode())

    def state_dict(self) -> dict[str, Any]:
        """See Logger."""
        return {"offset": self.record.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Logger."""
        self._offset = state["offset"]
