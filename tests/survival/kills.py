"""Commands in forked processes, killed or told to stop at a chosen file, short of disk, or without a right to write."""

from __future__ import annotations

import contextlib
import ctypes
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


def command(*argv: str, cwd: Path, before: Callable[[], None] = lambda: None, logs: Path | None = None) -> Ended:
    """Give a command, `train.py argv`; `before` is called first, in its process. What it prints lies in `logs`."""

    def body() -> int:
        os.chdir(cwd)
        before()
        return train.main(argv)

    return forked(body, logs or cwd)


def at_file(name: str, action: int | Callable[[], object] = signal.SIGKILL) -> Callable[[], None]:
    """Before a command: do something, or send its process a signal, when a file of this name is put in its place."""

    def arm() -> None:
        replace, done = Path.replace, []

        def hit(self: Path, target: Path) -> Path:
            if Path(target).name == name and not done:
                done.append(name)
                if callable(action):
                    replace(self, target)
                    action()
                    return Path(target)
                os.kill(os.getpid(), action)
            return replace(self, target)

        Path.replace = hit  # type: ignore[assignment, method-assign]

    return arm


def bound() -> None:
    """Before a command: root without its power over permissions, which bind it from now on."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("process", ctypes.c_int))

    class Sets(ctypes.Structure):
        _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))

    libc, header, sets = ctypes.CDLL(None, use_errno=True), Header(0x20080522, 0), (Sets * 2)()
    assert libc.capget(ctypes.byref(header), sets) == 0
    for kind in ("effective", "permitted"):
        setattr(sets[0], kind, getattr(sets[0], kind) & ~0b1110)  # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
    assert libc.capset(ctypes.byref(header), sets) == 0
