"""The live state of one training run, and what may look on: callbacks, which run beside the loop, and loggers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from training.loop.budgets import Alarm, Budget, Clock, Every, Pace, Phases
from training.loop.distributed import World, maximum
from training.loop.precision import Precision
from training.runs.folder import RunFolder
from training.schedules import Scalars
from training.tasks.metrics import Meters
from training.tasks.task import Task, Turn

if TYPE_CHECKING:
    from data import DataModule


@dataclass
class Run:
    """Everything of a run in one place; callbacks and loggers read it, the trainer writes it.

    Attributes:
        model: the bare module, on its device.
        forward: what training calls: the model, compiled and wrapped as asked for.
        optimizer: trains it; `Players` where the model has two.
        scheduler: drives the optimizer's learning rates.
        scalars: drives its other scalars.
        precision: number formats.
        scaler: of fp16 gradients; does nothing otherwise.
        data: the three sets.
        task: loss and metrics.
        world: this process among the others.
        folder: where the run writes.
        budget: how long it lasts.
        accumulate: batches a step.
        monitor: the metric that chooses the best weights, "val/...".
        alarm: tells rank 0 that a checkpoint is due by the minutes since the last.
        saving: says that one is due by the steps.
        overdue: whether it told so after the last step; the same on every rank.
        config: the resolved configuration.
        config_id: its short name.
        callbacks: on every rank.
        loggers: on rank 0; none elsewhere.
        step: optimizer steps done.
        tick: how far the schedule has been driven.
        seconds: training seconds that the budget was last decided on, the same on every rank.
        lr: learning rate of the last step, of the first parameter group.
        grad_norm: gradient norm of the last step before clipping, still on the device; None without clipping.
        window: training metrics since the last log.
        window_steps: steps in it.
        best_written: step at which this process last wrote best.pt.
        best: {"metric", "value", "step", "epoch", and the values of that evaluation}, or None before the first.
        latest: the last known value of every metric.
        evaluated: the step last evaluated at.
        resumed: whether it goes on from a checkpoint.
        stop_reason: why to stop before the budget is used up.
        unexamined: whether the end is neither validated nor tested, since nothing was to be learned.
        training_buffers: while the model is as it is evaluated, with averaged weights: its buffers in training, by
            name.
        calibrated: step and statistics of the last calibration.
    """

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    optimizer: Optimizer
    scheduler: LRScheduler
    scalars: Scalars
    precision: Precision
    data: DataModule
    task: Task
    world: World
    folder: RunFolder
    budget: Budget
    accumulate: int
    monitor: str
    alarm: Alarm = field(default_factory=lambda: Alarm(None))
    saving: Every = field(default_factory=lambda: Every(None, None, 1.0))
    overdue: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    config_id: str | None = None
    callbacks: list[Callback] = field(default_factory=list)
    loggers: list[Logger] = field(default_factory=list)
    step: int = 0
    tick: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    grad_norm: Tensor | None = None
    best: dict[str, Any] | None = None
    latest: dict[str, float] = field(default_factory=dict)
    evaluated: int | None = None
    resumed: bool = False
    stop_reason: str | None = None
    unexamined: bool = False
    training_buffers: dict[str, Tensor] | None = None
    calibrated: tuple[int, dict[str, Tensor]] | None = None
    scaler: torch.amp.GradScaler = field(init=False)
    clock: Clock = field(init=False)
    phases: Phases = field(init=False)
    window: Meters = field(init=False)
    window_steps: int = 0
    best_written: int | None = None

    def __post_init__(self) -> None:
        device = self.world.device
        self.scaler = self.precision.scaler()
        self.clock = Clock(device)
        self.phases = Phases(device)
        self.window = self.task.meters(device)
        self._pace = Pace(self.clock, device)

    @property
    def replicated(self) -> bool:
        """Whether backward passes average gradients over the ranks by themselves."""
        return isinstance(self.forward, DistributedDataParallel)

    @property
    def position(self) -> tuple[int, int]:
        """(epoch, batch) of the next batch to train on."""
        epoch, batch = divmod(self.step * self.accumulate, len(self.data.train))
        return epoch, batch

    @property
    def epoch(self) -> float:
        """Passes over the training set so far."""
        return self.step * self.accumulate / len(self.data.train)

    @property
    def done(self) -> bool:
        """Whether the budget is used up."""
        return self.budget.done(self.step, self.seconds)

    @property
    def progress(self) -> float:
        """Share of the budget that is used up, in [0, 1]."""
        return self.budget.progress(self.step, self.seconds)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches from the present position on, epoch after epoch, without end."""
        epoch, start = self.position
        while True:
            yield from self.data.train.epoch(epoch, start)
            epoch, start = epoch + 1, 0

    def advance(self, signal: int) -> int:
        """End a step: drive the schedule, and agree with the other ranks on the time, on signals, on what is due.

        Args:
            signal: the exit code this rank was asked to stop with, or 0.

        Returns:
            The exit code any rank was asked to stop with, or 0.
        """
        self.step += 1
        self.window_steps += 1
        timed = self.budget.max_time is not None
        seconds = self._pace.seconds() if timed and self.world.is_main else 0.0
        overdue = float(self.world.is_main and self.alarm.rings())
        # Without others, what was passed.
        asked, self.seconds, overdue = maximum([float(signal), seconds, overdue], self.world)
        self.overdue = bool(overdue)
        self.tick = self.budget.advance(self.scheduler, self.tick, self.step, self.seconds)
        return int(asked)

    def stop(self, reason: str) -> None:
        """Ask the loop to end after this step. Every rank must ask alike."""
        self.stop_reason = reason

    def emit(self, event: str, values: dict[str, float], remember: bool = True) -> None:
        """Hand an event to the loggers.

        Args:
            event: its kind.
            values: what it tells.
            remember: whether they become the last known values of the run, which checkpoints hold.
        """
        if remember:
            self.latest |= values
        record = {
            "event": event,
            "step": self.step,
            "epoch": round(self.epoch, 6),
            "seconds": self.clock.seconds(),
            "wall": self.clock.seconds("wall"),
            **values,
        }
        for logger in self.loggers:
            logger.log(record)

    def improves(self, values: dict[str, float]) -> bool:
        """Whether an evaluation is the best so far; of two that are equally good, the one with the lower loss."""
        value, name = values[self.monitor], self.monitor.partition("/")[2]
        if self.best is None:
            return True
        if value == self.best["value"]:
            return values["val/loss"] < self.best.get("val/loss", -math.inf)
        return value < self.best["value"] if self.task.metrics[name] == "min" else value > self.best["value"]


class Callback:
    """Called at fixed points of a run, on every rank; each method does nothing unless overridden.

    A callback whose decisions depend on the past returns that past from ``state_dict``: plain tensors and primitives.

    Attributes:
        where: its place in the configuration, for the sentences; "" without one.
    """

    where = ""

    def check(self, task: Task) -> None:
        """Before anything is written: raise ValueError if the callback cannot work on this task."""

    def on_fit_start(self, run: Run) -> None:
        """Before the first step, after a checkpoint was restored."""

    def on_batch(self, run: Run, turn: Turn, inputs: Tensor, targets: Tensor) -> None:
        """Before a forward pass of training, with its batch."""

    def on_gradients(self, run: Run, turn: Turn, losses: Sequence[Tensor]) -> None:
        """Before an update: gradients are those of all its batches and ranks, not clipped yet; losses, a batch each."""

    def on_step(self, run: Run) -> None:
        """After every optimizer step."""

    def on_evaluation(self, run: Run, values: dict[str, float]) -> None:
        """After an evaluation on the validation set, with its values ("val/loss", ...)."""

    def on_fit_end(self, run: Run, summary: dict[str, Any]) -> None:
        """When training has ended by itself: finished, stopped early or diverged."""

    def close(self) -> None:
        """However the run ended. Idempotent."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned."""


class Logger:
    """Receives the events of a run. What cannot be written raises: a run without its record is not worth its time."""

    def start(self, run: Run) -> None:
        """Open whatever is written to; the run's counters say where a resumed run goes on."""

    def log(self, record: dict[str, Any]) -> None:
        """One event: event, step, epoch, seconds, wall, and its values."""

    def image(self, name: str, image: torch.Tensor, step: int) -> None:
        """A picture, uint8 ``[C, H, W]`` with one channel or three."""

    def text(self, name: str, text: str, step: int) -> None:
        """Some lines of text."""

    def on_step(self, run: Run) -> None:
        """After every optimizer step; values that lie on the device are not to be read."""

    def flush(self) -> None:
        """Bring everything to the disk: a checkpoint is about to rely on it."""

    def finish(self, run: Run, summary: dict[str, Any]) -> None:
        """The run ended by itself."""

    def close(self) -> None:
        """Let go of files and of the terminal, however the run ended. Idempotent."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain tensors and primitives."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned. Called before ``start``."""
