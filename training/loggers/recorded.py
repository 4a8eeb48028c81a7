"""What the loggers have in common that add to one file of the run folder."""

from __future__ import annotations

import logging

from training.runs.folder import Record
from training.runs.run import Logger

log = logging.getLogger(__name__)


class Recorded(Logger):
    """A logger with one open file, which whoever follows it sees grow by whole events."""

    _open: Record | None = None

    @property
    def record(self) -> Record:
        """The file, between `start` and `close`."""
        assert self._open is not None
        return self._open

    @record.setter
    def record(self, record: Record) -> None:
        self._open = record

    @staticmethod
    def warn_of_loss(path: object) -> None:
        """Say that a resumed run's file ends before its checkpoint does."""
        log.warning("%s is shorter than the checkpoint says: what is missing stays missing.", path)

    def flush(self) -> None:
        """See Logger."""
        self.record.sync()

    def close(self) -> None:
        """See Logger."""
        if self._open is not None:
            self._open.close()
            self._open = None
