"""A line now and then while nothing else is said: what a command is at, and how far."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
def beating() -> Iterator[None]:
    """Within it, silence is broken, by the first of several processes alone."""
    over = threading.Event()
    if not is_main():
        yield
        return
    spoke()
    thread = threading.Thread(target=_beat, args=(over,), name="heart", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _beat(over: threading.Event) -> None:
    while not over.wait(min(_LOOK, SILENCE)):
        if _stack and time.monotonic() - _last >= SILENCE and (text := _stack[-1]()):
            sys.stdout.write(f"{text}  ({duration(time.monotonic() - _begun[-1], 0)})\n")
            sys.stdout.flush()
            spoke()
