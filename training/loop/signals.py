"""Requests to stop from outside: the run finishes its step, saves, and says with its exit code why it ended."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

#: sysexits.h's EX_TEMPFAIL, "try again": what a queue takes as a wish to be started again.
REQUEUE = 75
#: What shells report for a command stopped by Ctrl-C.
CTRL_C = 130


class Interrupted(Exception):
    """A run that a signal stopped; its last step is saved, and it can be resumed.

    Attributes:
        exit_code: what the process should exit with: 75 for SIGTERM and SIGUSR1, 130 for SIGINT.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopSignals:
    """While entered, SIGTERM, SIGUSR1 and SIGINT are noted instead of killing the process.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread, where Python allows no handlers, it
    does nothing.

    Attributes:
        exit_code: 0 until a signal came, then the code to exit with.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self._previous: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.exit_code == CTRL_C:
            raise KeyboardInterrupt
        self.exit_code = CTRL_C if number == signal.SIGINT else REQUEUE

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
                if number := getattr(signal, name, None):  # Windows lacks SIGUSR1
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
