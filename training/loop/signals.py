"""Requests to stop from outside: the run finishes its step, saves, and says with its exit code why it ended."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from training.loop.launch import is_main

#: sysexits.h's EX_TEMPFAIL, "try again": what a queue takes as a wish to be started again.
REQUEUE = 75
#: What shells report for a command stopped by Ctrl-C.
CTRL_C = 130
#: Signals that ask to stop, and the exit code of each.
CODES = {"SIGTERM": REQUEUE, "SIGUSR1": REQUEUE, "SIGUSR2": REQUEUE, "SIGINT": CTRL_C}
#: Seconds within which a second signal is an echo of the first, where a launcher passes on what its queue sends too.
ECHO = 2.0
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")


class Interrupted(Exception):
    """A run that a signal stopped; its last step is saved, and it can be resumed.

    Attributes:
        exit_code: what the process should exit with: 75 for SIGTERM, SIGUSR1 and SIGUSR2, 130 for SIGINT.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopSignals:
    """While entered, SIGTERM, SIGUSR1, SIGUSR2 and SIGINT are noted instead of killing the process.

    Entered once around a whole command, it notes what comes at any time: entering another one inside gives the outer
    one. A second signal does not wait: the command ends the process at once (files are replaced whole or not at all,
    so nothing is damaged), even in a long computation or where other processes are waited for; without a command,
    in a script or a notebook, KeyboardInterrupt is raised. Outside the main thread, where Python allows no handlers,
    it installs none. Forked children leave stopping to this process.

    Args:
        command: whether the process is a command's, which a second signal may end.

    Attributes:
        exit_code: 0 until a signal came, then the code to exit with: that of the first.
    """

    def __init__(self, command: bool = False) -> None:
        self.exit_code = 0
        self._command = command
        self._since: float | None = None
        self._previous: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup = -1

    def check(self, what: str) -> None:
        """Stop here if a signal asked to: for what comes between steps, such as the build or a plot.

        Args:
            what: the sentence of the exception: what was left, and how it goes on.

        Raises:
            Interrupted: a signal came.
        """
        if self.exit_code:
            raise Interrupted(what, self.exit_code)

    def __enter__(self) -> StopSignals:
        global _active
        if _active is not None:
            return _active
        if threading.current_thread() is not threading.main_thread():
            return self
        _active = self
        for number in _CODES:
            self._previous[number] = signal.signal(number, self._note)
        if self._command:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            # Handlers run between two instructions of Python; this is told of a signal in the midst of any of them.
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self._pipe[0],), name="signals", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        global _active
        if _active is not self:
            return
        _active = None
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            os.close(self._pipe[1])  # which ends the thread
            self._pipe = None
        # A command that was stopped is about to end: what its launcher sends once more must not change its exit code.
        stopped = self._command and self.exit_code != 0
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if stopped and number != signal.SIGINT else handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = self.exit_code or _CODES[number]
        if not self._command and self._is_second():
            raise KeyboardInterrupt

    def _watch(self, pipe: int) -> None:
        code = 0
        while came := os.read(pipe, 1):  # the number of a signal; nothing once the other end is closed
            if came[0] not in _CODES:
                continue
            self.exit_code = code = code or _CODES[came[0]]  # the handler waits for an exchange, which may not end
            if self._is_second():
                if is_main():
                    os.write(2, b"\nStopped at once by a second signal: the last checkpoint is what can be resumed.\n")
                os._exit(code)
        os.close(pipe)

    def _is_second(self) -> bool:
        """Note that a signal came; whether it is one more than the first."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            return False
        return now - self._since > (ECHO if any(name in os.environ for name in LAUNCHERS) else 0.0)

    def _forget(self) -> None:
        """In a forked child: what is sent to a group of processes is this process's parent's to answer."""
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            for end in self._pipe:
                os.close(end)
        for number in self._previous:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def requested() -> int:
    """The exit code that a signal has asked for; 0 while none came, or nobody listens."""
    return _active.exit_code if _active is not None else 0


def _after_fork() -> None:
    global _active
    if _active is not None:
        _active._forget()
        _active = None


_CODES = {getattr(signal, name): code for name, code in CODES.items() if hasattr(signal, name)}  # Windows lacks two
_active: StopSignals | None = None
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
