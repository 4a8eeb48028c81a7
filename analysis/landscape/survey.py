"""Values at many points: kept as they come, so that a killed survey goes on; by several processes if asked for."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from analysis.landscape.losses import Ground, Point
from training.errors import UserError
from training.runs.folder import Record

Values = dict[str, float]
#: Points that a process is given at a time.
SHARE = 4


class Kept:
    """Values by the number of their point, in a file of JSON lines that only grows.

    Args:
        path: of the file, which is begun anew if it is of other points or of another model.
        fingerprint: of what the values depend on.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.values: dict[int, Values] = {}
        self._record = Record(path)
        content = self._record.read()
        end = content.rfind(b"\n") + 1  # half a line is what a kill has left
        lines = content[:end].splitlines()
        try:
            if lines and json.loads(lines[0]) == {"survey": fingerprint}:
                self.values = {int(number): values for number, values in map(json.loads, lines[1:])}
        except (ValueError, TypeError):  # damaged: what it held is found anew
            self.values = {}
        if not self.values:
            self._record.cut(0)
            self._record.append(json.dumps({"survey": fingerprint}).encode() + b"\n")
        else:
            self._record.cut(end)

    def add(self, number: int, values: Values) -> None:
        """Keep the values at a point. Floats come back as they were, bit for bit."""
        self.values[number] = values
        self._record.append(json.dumps([number, values]).encode() + b"\n")

    def close(self) -> None:
        """Let go of the file."""
        self._record.close()


def survey(
    ground: Ground,
    points: Sequence[Point],
    *,
    folder: Path | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Values]:
    """The metrics at some points, in their order; the model is then as it was.

    Args:
        ground: what is evaluated.
        points: where.
        folder: where values are kept as they come, in a file named after all that they depend on: the same survey goes
            on from there, to the same result. None: nowhere.
        workers: processes, each with a copy of the ground and its share of torch's threads; another number rounds
            otherwise.
        progress: told how many values there are, of how many.

    Raises:
        ValueError: fewer than one worker.
        UserError: the model cannot be handed to another process, or one of them has died.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    kept = None
    if folder is not None:
        fingerprint = ground.fingerprint(points)
        kept = Kept(folder / f"survey_{fingerprint}.jsonl", fingerprint)
    found = dict(kept.values) if kept else {}
    left = [number for number in range(len(points)) if number not in found]
    progress(len(points) - len(left), len(points))
    try:
        with ground.restored():
            for number, values in _alone(ground, points, left) if workers == 1 else _several(
                ground, points, left, workers
            ):
                found[number] = values
                if kept:
                    kept.add(number, values)
                progress(len(found), len(points))
    finally:
        if kept:
            kept.close()
    return [found[number] for number in range(len(points))]


def _alone(ground: Ground, points: Sequence[Point], left: Sequence[int]) -> Iterator[tuple[int, Values]]:
    for number in left:
        yield number, ground.measure(points[number])


def _several(
    ground: Ground, points: Sequence[Point], left: Sequence[int], workers: int
) -> Iterator[tuple[int, Values]]:
    advice = "give workers=1"
    try:
        content = pickle.dumps(ground)
    except Exception as error:  # whatever an object says against being pickled
        raise UserError(f"the model cannot be handed to other processes ({error}): {advice}") from error
    threads = max(1, torch.get_num_threads() // workers)
    shares = [list(left[at : at + SHARE]) for at in range(0, len(left), SHARE)]
    pool = ProcessPoolExecutor(
        min(workers, max(len(shares), 1)),
        mp_context=multiprocessing.get_context("spawn"),  # torch's threads do not survive a fork
        initializer=_begin,
        initargs=(content, threads),
    )
    try:
        running: set[Future[list[Values]]] = set()
        numbers: dict[Future[list[Values]], list[int]] = {}
        waiting = iter(shares)
        while True:
            while len(running) < 2 * workers and (share := next(waiting, None)):
                future = pool.submit(_measure, [points[number] for number in share])
                running.add(future)
                numbers[future] = share
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield from zip(numbers.pop(future), future.result(), strict=True)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that evaluates points has died, for lack of memory perhaps, or because it does not find the "
            f"model's class: {advice}, or launch it again to go on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# -- in a worker -------------------------------------------------------------------------------------------------------

_ground: list[Ground] = []


def _begin(content: bytes, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent ends its workers
    threading.Thread(target=_follow, daemon=True).start()
    torch.set_num_threads(threads)
    _ground[:] = [pickle.loads(content)]


def _follow() -> None:
    """End when the parent has, however it did."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _measure(points: Sequence[Point]) -> list[Values]:
    return [_ground[0].measure(point) for point in points]
