"""Commands in forked processes, killed or told to stop at a chosen file, short of disk, or without a right to write."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import train
from models import build_model  # noqa: F401 - all that a command imports as it goes, once for all
from training import loggers, tasks  # noqa: F401
from training.command import verification  # noqa: F401
from training.show import curves, reconstructions  # noqa: F401

NOBODY = 65534


@dataclass
class Ended:
    """How a process ended: its exit code, negative for the signal that killed it, and what it printed."""

    code: int
    out: str
    err: str

    def sentence(self) -> str:
        """The last line on stderr, and no trace above it."""
        assert "Traceback" not in self.err, self.err
        return self.err.strip().splitlines()[-1]


def forked(body: Callable[[], int], folder: Path) -> Ended:
    """Call a function in a process of its own, forked from this one, which has imported all."""
    logs = [folder / ".out.txt", folder / ".err.txt"]
    child = os.fork()
    if child == 0:
        code = 70
        try:
            for number, log in enumerate(logs, 1):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            torch.set_num_threads(1)
            code = body()
        except BaseException as error:  # noqa: BLE001 - this process ends here, and the test reads why
            traceback.print_exception(error)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), *(log.read_text() for log in logs))


def command(*argv: str, cwd: Path, before: Callable[[], None] = lambda: None) -> Ended:
    """Give a command, `train.py argv`; `before` is called first, in its process."""

    def body() -> int:
        os.chdir(cwd)
        before()
        return train.main(argv)

    return forked(body, cwd)


def at_file(name: str, number: int = signal.SIGKILL, count: int = 1) -> Callable[[], None]:
    """Before a command: send its process a signal when a whole file of this name is to be put in its place."""

    def arm() -> None:
        replace, seen = Path.replace, [0]

        def hit(self: Path, target: Path) -> Path:
            if Path(target).name == name:
                seen[0] += 1
                if seen[0] == count:
                    os.kill(os.getpid(), number)
            return replace(self, target)

        Path.replace = hit  # type: ignore[assignment, method-assign]

    return arm


def as_nobody() -> None:
    """Before a command: without root's rights, which no permission binds."""
    os.setgid(NOBODY)
    os.setuid(NOBODY)
