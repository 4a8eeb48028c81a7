"""The record that everything else is drawn from: an event a line."""

from __future__ import annotations

import json
import logging
from typing import Any

from training.runs.folder import Record, plain
from training.runs.run import Logger, Run

log = logging.getLogger(__name__)


class JSONLines(Logger):
    """``metrics.jsonl``: an event a line. A resumed run cuts off what was written after its checkpoint."""

    def __init__(self) -> None:
        self._record: Record | None = None
        self._offset = 0

    def start(self, run: Run) -> None:
        """See Logger."""
        record = self._record = Record(run.folder.metrics_file, self._offset)
        if record.size < self._offset:
            log.warning("%s is shorter than the checkpoint says: what is missing stays missing.", record.path)
            content = record.read()
            record.cut(content.rfind(b"\n") + 1)  # half a line would spoil the next one

    def log(self, record: dict[str, Any]) -> None:
        """See Logger."""
        assert self._record is not None  # whoever follows the file sees whole lines, and a killed process loses none
        self._record.append((json.dumps(plain(record), allow_nan=False) + "\n").encode())

    def flush(self) -> None:
        """See Logger."""
        assert self._record is not None
        self._record.sync()

    def close(self) -> None:
        """See Logger."""
        if self._record is not None:
            self._record.close()
            self._record = None

    def state_dict(self) -> dict[str, Any]:
        """See Logger."""
        assert self._record is not None
        return {"offset": self._record.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Logger."""
        self._offset = state["offset"]
