"""TensorBoard's event files: written at once and in one's own thread, ordered by number, and cut back on a resume."""

from __future__ import annotations

import io
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter

from training.runs.folder import Record, writing

# What the name of an event file begins with, and the seconds that order them.
NAME = re.compile(r"events\.out\.tfevents\.(\d+)\..*")


def files(folder: Path) -> dict[str, Path]:
    """The event files of a folder by their names, in TensorBoard's order."""
    return {path.name: path for path in sorted(folder.glob("events.out.tfevents.*")) if NAME.fullmatch(path.name)}


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every event file of a folder, by name: what ``take_back`` goes back to."""
    return {name: path.stat().st_size for name, path in files(folder).items()}


def take_back(folder: Path, written: Mapping[str, int]) -> None:
    """Forget what was written since ``sizes`` returned ``written``: no event is there twice, of no past that is gone.

    Raises:
        WriteError: a file cannot be cut or deleted.
    """
    for name, path in files(folder).items():
        if name in written:
            Record(path, written[name]).close()
        else:
            with writing(path):
                path.unlink()


class EventFile:
    """A new event file of a folder, which TensorBoard reads after those that are there, whatever the clock says.

    It orders files by their names: events.out.tfevents, the second, the host, the process and a counter. The second of
    a new file is later than that of every other.

    Args:
        folder: where to make it.
        purge: a board that is open forgets all events from this step on.
        flush_seconds: events are gathered for so long.

    Raises:
        WriteError: it cannot be written.
    """

    def __init__(self, folder: Path, purge: int, flush_seconds: float) -> None:
        self.folder, self._every = folder, flush_seconds
        with writing(folder):
            folder.mkdir(exist_ok=True)
            there = [int(match[1]) for match in map(NAME.fullmatch, files(folder)) if match]
        number = max([int(time.time()), *(second + 1 for second in there)])
        self._record = Record(folder / f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}.0")
        self._gathered = io.BytesIO()
        self._writer = RecordWriter(self._gathered)
        self._flushed = time.monotonic()
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=purge, session_log=start))

    def add(self, summary: Any, step: int) -> None:
        """Add what a function of torch.utils.tensorboard.summary returned.

        Raises:
            WriteError: the file cannot be written.
        """
        self._write(Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed >= self._every:
            self.flush()

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())

    def flush(self) -> None:
        """Let those who watch see what was added.

        Raises:
            WriteError: the file cannot be written.
        """
        content = self._gathered.getvalue()
        self._gathered.seek(0)
        self._gathered.truncate()
        self._flushed = time.monotonic()
        self._record.append(content)

    def sync(self) -> None:
        """Bring it to the disk.

        Raises:
            WriteError: the file cannot be written.
        """
        self.flush()
        self._record.sync()

    def close(self) -> None:
        """Let go of the file; what was added since the last ``flush`` is written, if it can be."""
        try:
            self.flush()
        finally:
            self._record.close()
