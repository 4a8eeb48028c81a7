"""Looking after the other processes: who fails says why, who hangs is named, and none outlives its launcher."""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from training.errors import ProcessLost, UserError
from training.loop import signals
from training.loop.launch import is_main

#: The variable that says how many seconds a process waits for the others, and what it waits without one.
TIMEOUT, DEFAULT = "CURVLAB_TIMEOUT", 1800.0
BEAT = 2.0  # seconds between two signs of life
WORD = 60.0  # seconds of waiting after which it is said for whom
GRACE = 15.0  # seconds that a process which was asked to stop waits for one that gives no sign of life
ANSWER = timedelta(seconds=5)  # that the store has
SLOW = 30.0  # and, besides three times the longest step so far, for one that does
_PROJECT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1


def timeout() -> timedelta:
    """How long a process waits for the others: ``CURVLAB_TIMEOUT`` in seconds, or half an hour.

    Raises:
        UserError: the variable is no such number.
    """
    text = os.environ.get(TIMEOUT, str(DEFAULT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise UserError(f"{TIMEOUT} must be seconds above 0, got {text!r}")
    return timedelta(seconds=seconds)


def die_with_launcher() -> None:
    """Have the kernel send SIGTERM when torchrun is gone, killed perhaps: the run saves and ends (Linux alone)."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def meeting() -> Iterator[None]:
    """Within it, the processes are waited for at their start: a signal ends this one, since nothing is begun yet."""
    met = threading.Event()

    def look() -> None:
        while not met.wait(BEAT / 10):
            if code := signals.requested():
                if is_main():
                    os.write(2, b"Stopped while the other processes were waited for: nothing was begun.\n")
                os._exit(code)

    (thread := threading.Thread(target=look, name="meeting", daemon=True)).start()
    try:
        yield
    finally:
        met.set()
        thread.join()


class Watch:
    """Signs of life among processes, while entered: a thread of each tells where it is, and looks on while it waits.

    Args:
        store: that all share; a client of its own is made, since one that waits is no use to another thread.
        rank: of this process.
        world_size: how many there are.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store, self.rank, self.world_size = store.clone(), rank, world_size
        self.saved = ""
        self._limit = timeout()
        self._beat = min(BEAT, self._limit.total_seconds() / 20)
        self._word = min(WORD, self._limit.total_seconds() / 4)
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._waiting = False
        self._since, self._longest = time.monotonic(), 0.0  # the last exchange; the longest time between two
        self._asked: float | None = None
        self._worded = False
        self._heard: dict[int, tuple[str, float]] = {}
        self._reason: Exception | None = None

    def __enter__(self) -> Watch:
        global _active
        _active = self
        self._tell(0)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        global _active
        _active = None
        self._over.set()
        self._thread.join(timeout=2 * self._beat)

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Within it, this process waits for the others."""
        self._waiting = True
        try:
            yield
        finally:
            now = time.monotonic()
            self._longest, self._since = max(self._longest, now - self._since), now
            self._waiting = self._worded = False

    def explained(self, error: BaseException) -> BaseException:
        """What to raise in place of an error: where exchanges broke off, why; the others are told of one's own."""
        if not isinstance(error, Exception) or isinstance(error, ProcessLost):
            return error
        if _of_exchange(error):
            self._reason = self._reason or self._why(error)
            return self._reason
        code = error.exit_code if isinstance(error, signals.Interrupted) else 0
        with suppress(RuntimeError):  # the store went with its launcher
            self._store.set_timeout(ANSWER)
            self._store.compare_set("ended", "", json.dumps([self.rank, _sentence(error), code]))
        return error

    def _why(self, error: Exception) -> Exception:
        first = True
        with suppress(RuntimeError):
            self._store.set_timeout(ANSWER)
            if self._store.check(["ended"]):
                rank, sentence, code = json.loads(self._store.get("ended"))
                return signals.Interrupted(sentence, code) if code else UserError(f"rank {rank}: {sentence}")
            first = self._store.add("lost", 1) == 1
        silent = self._silent(time.monotonic())
        which = f"{self._described(silent)}," if silent else "another process"
        how = "ended without a word (killed, perhaps for want of memory)"
        if "imed out" in str(error) or "imeout" in str(error):
            how = f"gave no answer for {self._limit.total_seconds():g} s ({TIMEOUT})"
        return ProcessLost(f"{which} {how}: {self._advice()}", first)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        beats = 0
        with suppress(RuntimeError):  # the store went with its launcher: whoever remains finds out in an exchange
            while not self._over.wait(self._beat):
                beats += 1
                self._tell(beats)
                self._look(time.monotonic())

    def _tell(self, beats: int) -> None:
        self._store.set(f"beat-{self.rank}", json.dumps([beats, self._waiting, self._where()]))

    def _look(self, now: float) -> None:
        stalled = now - self._since
        if stalled < 2 * self._beat:
            return
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        if not self._store.check(keys := [f"beat-{rank}" for rank in others]):
            return  # one has not given its first yet
        for rank, told in zip(others, self._store.multi_get(keys), strict=True):
            if self._heard.get(rank, ("", 0.0))[0] != told.decode():
                self._heard[rank] = (told.decode(), now)
        silent = self._silent(now)
        if signals.requested():
            self._asked = self._asked or now
            grace = min(GRACE, self._limit.total_seconds() / 2) if silent else SLOW + 3 * self._longest
            if now - max(self._since, self._asked) > grace and (silent or self._waiting):
                self._say(silent, "asked to stop, this run cannot save: ", f" gives no answer. {self._advice()}")
                os._exit(signals.requested())
        if stalled > self._word and not self._worded and (silent or self._waiting):
            self._worded = True
            until = f" (until {self._limit.total_seconds():g} s, {TIMEOUT})"
            self._say(silent, f"waiting for {stalled:.0f} s: ", until)

    def _silent(self, now: float) -> list[int]:
        """Ranks that gave no sign of life for several beats."""
        return [rank for rank, (_, heard) in self._heard.items() if now - heard > 5 * self._beat]

    def _say(self, silent: list[int], before: str, after: str) -> None:
        """A line on stderr, from the first of the ranks that live and wait."""
        busy = [rank for rank, (told, _) in self._heard.items() if not json.loads(told)[1]]
        if all(rank in [*silent, *busy] for rank in range(self.rank)):
            line = before + self._described(silent or busy or [*self._heard]) + after
            os.write(2, f"{line}\n".encode())

    def _described(self, ranks: list[int]) -> str:
        now, words = time.monotonic(), []
        for rank in ranks:
            told, heard = self._heard[rank]
            words.append(f"rank {rank}, last heard of {now - heard:.0f} s ago at {json.loads(told)[2]}")
        return ", ".join(words)

    def _advice(self) -> str:
        return f"the last checkpoint, {self.saved}, can be resumed" if self.saved else "no checkpoint was written yet"

    def _where(self) -> str:
        """The innermost line of this project that the main thread is in."""
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(_PROJECT) and path.name != Path(__file__).name and ".venv" not in path.parts:
                return f"{path.relative_to(_PROJECT)}:{frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        return "the start"


_active: Watch | None = None


@contextmanager
def exchange() -> Iterator[None]:
    """Within it, this process waits for the others, if there are any."""
    if _active is None:
        yield
    else:
        with _active.exchange():
            yield


def saved(path: Path) -> None:
    """Remember the last checkpoint, for the sentence of a process that has to end without another one."""
    if _active is not None:
        _active.saved = str(path)


def explained(error: BaseException) -> BaseException:
    """What to raise in place of an error, see ``Watch.explained``; alone, the error itself."""
    return error if _active is None else _active.explained(error)


def _of_exchange(error: BaseException) -> bool:
    """Whether an error is a broken exchange with other processes, and none of this one's own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _sentence(error: Exception) -> str:
    from data import DataError  # with torchvision; a process that has none of its errors has imported it by now

    text = " ".join(str(error).split())
    known = isinstance(error, (UserError, DataError, signals.Interrupted))
    return text if known else f"{type(error).__name__}: {text}"
