"""What happened, in words: ``train.log``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.runs.folder import Record


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Whatever our packages log goes to a file, appended; warnings are still shown on the terminal.

    Args:
        path: ``train.log`` of a run.
    """
    root = logging.getLogger()
    handlers: list[logging.Handler] = [_LogFile(path)]
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if not root.handlers and logging.lastResort is not None:
        handlers.append(logging.lastResort)  # logging itself falls back to it only while there is no other handler
    ours = [logging.getLogger(name) for name in ("training", "optimizers", "data", "models", "analysis")]
    levels = [logger.level for logger in ours]
    for handler in handlers:
        root.addHandler(handler)
    for logger in ours:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(ours, levels, strict=True):
            logger.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
        handlers[0].close()


class _LogFile(logging.Handler):
    """A log file whose failures raise; logging's own habit is to print them and go on."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._record = Record(path)

    def emit(self, record: logging.LogRecord) -> None:
        """Append the line."""
        self._record.append((self.format(record) + "\n").encode())

    def close(self) -> None:
        """Let go of the file."""
        self._record.close()
        super().close()
