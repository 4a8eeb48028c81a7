"""A line now and then while nothing else is said: what a command is at, and how far."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from training.loop.launch import is_main
from training.show.report import duration

#: Seconds without a line after which one is written.
SILENCE = 25.0
_LOOK = 1.0

_last = time.monotonic()
_stack: list[Callable[[], str]] = []
_begun: list[float] = []


def spoke() -> None:
    """Note that a line was written."""
    global _last
    _last = time.monotonic()


@contextmanager
def at(what: Callable[[], str]) -> Iterator[None]:
    """Within it, that is what a command is at.

    Args:
        what: says it; called from another thread. "" says nothing, where a bar is drawn.
    """
    _stack.append(what)
    _begun.append(time.monotonic())
    try:
        yield
    finally:
        _stack.pop()
        _begun.pop()


@contextmanager
def beating(stream: TextIO | None = None) -> Iterator[None]:
    """Within it, silence is broken, by the first of several processes alone.

    Args:
        stream: where; None: standard output.
    """
    over = threading.Event()
    if not is_main():
        yield
        return
    spoke()
    thread = threading.Thread(target=_beat, args=(over, stream), name="heart", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Work:
    """What a script is at.

    Attributes:
        text: in words.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def of(self, done: int, total: int | None, what: str = "") -> None:
        """Note how far it is, behind what it was called first."""
        name = self.text.partition(":")[0]
        self.text = f"{name}: {done}{f' of {total}' if total else ''}{f' {what}' if what else ''}"


@contextmanager
def working(text: str, *, bar: bool = False) -> Iterator[Work]:
    """Within it, a script says what it is at, on standard error: its output is for others to read.

    Args:
        text: what it is at.
        bar: whether it draws a bar on a terminal, where nothing is said then.

    Yields:
        What can be told of it.
    """
    work = Work(text)
    with beating(sys.stderr), at(lambda: "" if bar and sys.stderr.isatty() else work.text):
        yield work


def _beat(over: threading.Event, stream: TextIO | None) -> None:
    while not over.wait(min(_LOOK, SILENCE)):
        if _stack and time.monotonic() - _last >= SILENCE and (text := _stack[-1]()):
            out = stream or sys.stdout
            with suppress(OSError):  # nobody reads it any more
                out.write(f"{text}  ({duration(time.monotonic() - _begun[-1], 0)})\n")
                out.flush()
            spoke()
