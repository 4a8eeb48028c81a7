"""A check, what comes of it, and running one: whatever goes wrong in it is its result."""

from __future__ import annotations

import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch


class Skipped(Exception):
    """A check does not apply on this machine; the message says why."""


class TimeLimit(BaseException):
    """A check took longer than it may. Not an Exception, so that no library's recovery swallows it."""


@dataclass
class Result:
    """What came of a check.

    Attributes:
        name: of the check.
        status: ok, failed, skipped or not run.
        seconds: that it took.
        message: one line.
        trace: last lines of the traceback of a failure.
        data: numbers for the tables.
    """

    name: str
    status: str
    seconds: float = 0.0
    message: str = ""
    trace: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Check:
    """A named function that returns a message or numbers, and raises what it finds wrong.

    Attributes:
        name: ``kind what optimizer``.
        run: the function.
        limit: seconds it may take.
        cuda: whether it makes sense on CUDA alone.
        exact: matrices are multiplied without TF32.
    """

    name: str
    run: Callable[[], str | dict[str, Any]]
    limit: float = 30.0
    cuda: bool = False
    exact: bool = True


def expect(condition: bool, message: str) -> None:
    """Raise AssertionError unless a condition holds."""
    if not condition:
        raise AssertionError(message)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimit in the block after so many seconds (at the next line of Python)."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TimeLimit(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def tf32(off: bool) -> Iterator[None]:
    """Multiply matrices in full float32 in the block."""
    if not off:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def run_check(check: Check, device: torch.device, left: float) -> Result:
    """Run one check; whatever goes wrong in it is its result."""
    result = Result(check.name, "ok")
    start = time.perf_counter()
    try:
        if check.cuda and device.type != "cuda":
            raise Skipped("needs CUDA")
        with tf32(check.exact), time_limit(min(check.limit, max(left, 5.0))), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = check.run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # what fails late shall fail here
        result.message, result.data = (found, {}) if isinstance(found, str) else ("", found)
    except Skipped as reason:
        result.status, result.message = "skipped", str(reason)
    except (Exception, TimeLimit) as error:  # noqa: BLE001 - the report of whatever failed is the point
        result.status = "failed"
        result.message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:400]}"
        result.trace = traceback.format_exc().strip().splitlines()[-14:]
    result.seconds = time.perf_counter() - start
    return result
