"""How long a run lasts, what drives its schedule, and the clocks that tell training seconds from all the others."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.optim.lr_scheduler import LRScheduler

#: Resolution of a schedule that is driven by time.
TIME_TICKS = 1000


@dataclass(frozen=True)
class Budget:
    """How long to train: exactly one of epochs, steps and seconds.

    Attributes:
        steps_per_epoch: optimizer steps a pass over the training set (a fraction, if accumulation straddles epochs).
        max_epochs: passes over the training set; fractions count.
        max_steps: optimizer steps.
        max_time: training seconds; evaluation, checkpoints and logging do not count.
    """

    steps_per_epoch: float
    max_epochs: float | None = None
    max_steps: int | None = None
    max_time: float | None = None

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None for a time budget."""
        if self.max_epochs is not None:
            return max(1, round(self.max_epochs * self.steps_per_epoch))
        return self.max_steps

    @property
    def ticks(self) -> int:
        """Length of the schedule: a tick a step, or a thousandth of a time budget."""
        return self.total_steps or TIME_TICKS

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is used up, in [0, 1]."""
        used = seconds / self.max_time if self.max_time is not None else step / self.ticks
        return min(used, 1.0)

    def done(self, step: int, seconds: float) -> bool:
        """Whether the budget is used up."""
        return self.progress(step, seconds) >= 1

    def advance(self, scheduler: LRScheduler, tick: int, step: int, seconds: float) -> int:
        """Move a schedule from ``tick`` to where the progress is.

        Counted in steps this is one ``scheduler.step()`` an optimizer step, as in any torch script.

        Returns:
            The new tick; at the end of the budget it is ``ticks``, never more.
        """
        now = int(self.progress(step, seconds) * self.ticks) if self.max_time is not None else min(step, self.ticks)
        for _ in range(tick, now):
            scheduler.step()
        return max(tick, now)

    @staticmethod
    def replay(scheduler: LRScheduler, tick: int) -> None:
        """Bring a new schedule to ``tick`` when its saved state was for another budget."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)` before")
            for _ in range(tick):
                scheduler.step()


@dataclass(frozen=True)
class Every:
    """When something is due: every so many steps, every so many epochs, or at either.

    Attributes:
        steps: None for never.
        epochs: None for never; fractions count.
        steps_per_epoch: optimizer steps a pass over the training set.
    """

    steps: int | None
    epochs: float | None
    steps_per_epoch: float

    def due(self, step: int) -> bool:
        """Whether it is due after this many steps."""
        if self.steps is not None and step % self.steps == 0:
            return True
        if self.epochs is None:
            return False
        period = self.epochs * self.steps_per_epoch
        return math.floor(step / period + 1e-9) > math.floor((step - 1) / period + 1e-9)


class Alarm:
    """Goes off when so many minutes have passed since it was wound, whatever they were spent on.

    Args:
        minutes: fractions count; None: never.
    """

    def __init__(self, minutes: float | None) -> None:
        self._seconds = math.inf if minutes is None else 60 * minutes
        self.wind()

    def wind(self) -> None:
        """Count from now on."""
        self._since = time.monotonic()

    @property
    def never(self) -> bool:
        """Whether it does not go off."""
        return math.isinf(self._seconds)

    def rings(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() - self._since >= self._seconds


class Clock:
    """Seconds of a run: training, evaluation, and wall. It goes on where a resumed run's checkpoint left it.

    Args:
        device: waited for when a clock is switched, so that work queued on a GPU counts where it belongs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._total = {"training": 0.0, "evaluation": 0.0, "other": 0.0, "wall": 0.0}
        self._kind = "other"
        self._since = time.perf_counter()

    def _switch(self, kind: str) -> str:
        if self._device.type == "cuda" and kind != self._kind:
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._total[self._kind] += now - self._since
        self._total["wall"] += now - self._since
        previous, self._kind, self._since = self._kind, kind, now
        return previous

    @contextmanager
    def count(self, kind: Literal["training", "evaluation", "other"]) -> Iterator[None]:
        """Seconds inside the block are of this kind, and no longer of the kind outside it."""
        previous = self._switch(kind)
        try:
            yield
        finally:
            self._switch(previous)

    @property
    def kind(self) -> str:
        """What seconds are counted as now."""
        return self._kind

    def seconds(self, kind: Literal["training", "evaluation", "other", "wall"] = "training") -> float:
        """Seconds of a kind so far."""
        running = time.perf_counter() - self._since if kind in (self._kind, "wall") else 0.0
        return self._total[kind] + running

    def state_dict(self) -> dict[str, float]:
        """Seconds of every kind."""
        self._switch(self._kind)
        return dict(self._total)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Count on from saved seconds."""
        self._switch(self._kind)
        for kind, seconds in state.items():
            self._total[kind] = seconds


@dataclass
class Phases:
    """Where the time of training steps goes: seconds between marks, without waiting for a GPU at any of them.

    Attributes:
        device: on a GPU the marks are events in its queue, read once ``read`` is called.
    """

    device: torch.device
    _steps: int = 0
    _marks: list[tuple[str, torch.cuda.Event]] = field(default_factory=list)
    _seconds: dict[str, float] = field(default_factory=dict)
    _last: float = 0.0

    def mark(self, phase: str | None) -> None:
        """What ran since the previous mark was this phase; "": no part of a step; None: nor that, and a step begins."""
        self._steps += phase is None
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase or "", event))
            return
        now = time.perf_counter()
        if phase:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def read(self) -> dict[str, float]:
        """Mean seconds a step of each phase, and of the whole ``step``, since the last call. Waits for the GPU."""
        if self._marks:
            self._marks[-1][1].synchronize()
            for (_, start), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
                if phase:
                    self._seconds[phase] = self._seconds.get(phase, 0.0) + start.elapsed_time(end) / 1000
            self._marks = self._marks[-1:]
        means = {phase: seconds / self._steps for phase, seconds in self._seconds.items()}
        self._seconds, self._steps = {}, 0
        return means | {"step": sum(means.values())} if means else {}


class Pace:
    """The training seconds that a time budget is decided on, on a GPU whose queue the host runs ahead of.

    The host waits for the *previous* step only, so the GPU is never idle, and takes the step in the queue to last as
    long as that one: the run still ends within a step of its budget.

    Args:
        clock: the run's clock.
        device: where it trains.
    """

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self._clock = clock
        self._queued: torch.cuda.Event | None = None
        self._finished: float | None = None
        self._cuda = device.type == "cuda"

    def seconds(self) -> float:
        """Training seconds at the end of the step just queued."""
        if not self._cuda:
            return self._clock.seconds()
        previous, self._queued = self._queued, torch.cuda.Event()
        self._queued.record()
        if previous is None:
            return self._clock.seconds()
        previous.synchronize()
        now, before = self._clock.seconds(), self._finished
        self._finished = now
        return now + (now - before if before is not None else 0.0)
