"""The training loop: one for every optimizer, every task, one process or several."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optimizers.wrapper import innermost
from training import schedules
from training.callbacks import Callback, Profiler
from training.errors import UserError
from training.loggers import Logger, log_file
from training.loop import rng, watch
from training.loop.budgets import Alarm, Budget, Every
from training.loop.distributed import World, barrier, maximum
from training.loop.precision import Precision
from training.loop.recompute import blocks_of, check_wanted, recomputing
from training.loop.signals import Interrupted, StopSignals
from training.runs import checkpoints, evaluation, provenance, step
from training.runs.averaging import averaged, averages, enter
from training.runs.finite import Diverged, require_finite, require_finite_loss
from training.runs.folder import RunFolder, WriteError, writing
from training.runs.provenance import keep_facts, summarise
from training.runs.run import Run
from training.schedules import Scalars, ScalarSchedule
from training.tasks import suited
from training.tasks.task import Task

if TYPE_CHECKING:
    from data import DataModule

Schedule = Callable[..., LRScheduler]

log = logging.getLogger(__name__)


class Trainer:
    """Trains a model within a budget, evaluates, keeps checkpoints, and can go on from any of them bit for bit.

    A step is one ``optimizer.step()``, of two players the critic's. Exactly one of ``max_epochs``, ``max_steps`` and
    ``max_time`` is given.

    Args:
        max_epochs: passes over the training set; fractions count.
        max_steps: steps.
        max_time: training seconds; evaluation, checkpoints and logging do not count. Ends within a step.
        accumulate: batches a step, averaged; k batches equal one of k times the size.
        clip_norm: largest gradient norm; None: no clipping.
        label_smoothing: of the training loss.
        precision: fp32, or autocast to bf16 or fp16 (with gradient scaling, GPUs only).
        eval_every_epochs: validate every so many epochs, fractions count; None: not by epochs.
        eval_every_steps: and every so many steps; None: not by steps. The end of training is always validated.
        log_every_steps: training metrics are averaged over, and checked to be finite after, so many steps.
        checkpoint_every_epochs: save every so many epochs; None: not by epochs.
        checkpoint_every_steps: and every so many steps. The end and the best weights are always saved.
        checkpoint_every_minutes: and after the step at which so many minutes of wall time, fractions count, have passed
            since the last: what a kill costs at most. None: not by time.
        keep_checkpoints: how many stay, besides the best.
        monitor: validation metric that chooses the best weights; None: the task's main one.
        test: measure the end on the test set; False: leave it untouched, as trials of a tuning do.
        device: auto, cpu, cuda, ...
        deterministic: ask for kernels that repeat themselves bit for bit.
        channels_last: memory layout for convolutions on tensor cores.
        compile: compile the model's training pass with torch.compile.
        recompute: drop what blocks would keep for the backward pass, and compute it again there: less memory, more
            time, the same numbers. True: entries of lists of modules; or a regular expression of modules' names.
        profile: watch a few steps with torch's profiler.

    Raises:
        ValueError: for a value out of its range.
    """

    def __init__(
        self,
        max_epochs: float | None = None,
        max_steps: int | None = None,
        max_time: float | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        label_smoothing: float = 0.0,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
        eval_every_epochs: float | None = 1,
        eval_every_steps: int | None = None,
        log_every_steps: int = 10,
        checkpoint_every_epochs: int | None = 1,
        checkpoint_every_steps: int | None = None,
        checkpoint_every_minutes: float | None = None,
        keep_checkpoints: int = 2,
        monitor: str | None = None,
        test: bool = True,
        device: str = "auto",
        deterministic: bool = True,
        channels_last: bool = False,
        compile: bool = False,
        recompute: bool | str = False,
        profile: bool = False,
    ) -> None:
        budgets = {"max_epochs": max_epochs, "max_steps": max_steps, "max_time": max_time}
        given = [name for name, value in budgets.items() if value is not None]
        if not given:
            raise ValueError("max_epochs, max_steps or max_time must be set: a run needs a budget")
        if len(given) > 1:
            raise ValueError(f"{given[-1]} and {given[0]} are both set and a run has one budget: set {given[0]}=null")
        every = {"eval_every_epochs": eval_every_epochs, "checkpoint_every_minutes": checkpoint_every_minutes}
        positive = budgets | {"clip_norm": clip_norm} | every
        for name, value in positive.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value!r}")
        counts = {
            "accumulate": accumulate,
            "eval_every_steps": eval_every_steps,
            "log_every_steps": log_every_steps,
            "checkpoint_every_epochs": checkpoint_every_epochs,
            "checkpoint_every_steps": checkpoint_every_steps,
            "keep_checkpoints": keep_checkpoints,
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count!r}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}")
        if precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"precision must be fp32, bf16 or fp16, got {precision!r}")
        check_wanted(recompute, compile)
        self.max_epochs, self.max_steps, self.max_time = max_epochs, max_steps, max_time
        self.accumulate, self.clip_norm, self.label_smoothing = accumulate, clip_norm, label_smoothing
        self.precision: Literal["fp32", "bf16", "fp16"] = precision
        self.eval_every_epochs, self.eval_every_steps = eval_every_epochs, eval_every_steps
        self.log_every_steps, self.checkpoint_every_minutes = log_every_steps, checkpoint_every_minutes
        self.checkpoint_every_epochs, self.checkpoint_every_steps = checkpoint_every_epochs, checkpoint_every_steps
        self.keep_checkpoints, self.monitor, self.test, self.device = keep_checkpoints, monitor, test, device
        self.deterministic, self.channels_last, self.compile = deterministic, channels_last, compile
        self.recompute, self.profile = recompute, profile

    # -- before --------------------------------------------------------------------------------------------------------

    def check(
        self,
        data: DataModule,
        task: Task,
        world: World | None = None,
        callbacks: Sequence[Callback] = (),
        *,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        schedule: Schedule | None = None,
        scalars: Mapping[str, ScalarSchedule] | None = None,
    ) -> None:
        """Raise what ``fit`` would refuse, before a run folder is made. ``fit`` calls it too.

        Args:
            data: see ``fit``.
            task: see ``fit``.
            world: see ``fit``.
            callbacks: see ``fit``.
            model: see ``fit``; None: whether its outputs suit the task is not checked, which takes a forward pass.
            optimizer: see ``fit``; None: whether it suits the trainer is not checked.
            schedule: see ``fit``; None: not checked.
            scalars: see ``fit``; checked together with the optimizer.

        Raises:
            ValueError: for a value that does not go with the data, the task or the optimizer.
            UserError: for something this machine cannot do.
        """
        Precision(self.precision, (world or World()).device)
        if len(data.train) == 0:
            raise ValueError("batch_size is larger than the training set: make it smaller, or limit_train larger")
        for callback in callbacks:  # one of which may have the task measure more
            try:
                callback.check(task)
            except ValueError as error:
                if not callback.where:
                    raise
                raise UserError(f"{callback.where}.{error}") from error
        known = [f"val/{name}" for name in task.metrics]
        if self.monitor is not None and self.monitor not in known:
            raise ValueError(f"monitor must be one of {', '.join(known)}, got {self.monitor!r}")
        if optimizer is not None:
            suited.check_optimizer(optimizer, task, compiled=self.compile, clipped=self.clip_norm is not None)
            Scalars(optimizer, scalars or {})
        if model is not None:
            suited.check_weights(model)
            blocks_of(model, self.recompute)
            suited.check_outputs(model, data, task)
        (schedule or schedules.none)(schedules.trial(), ticks=self._budget(data).ticks)

    def _budget(self, data: DataModule) -> Budget:
        return Budget(len(data.train) / self.accumulate, self.max_epochs, self.max_steps, self.max_time)

    def assemble(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        data: DataModule,
        task: Task,
        schedule: Schedule | None,
        scalars: Mapping[str, ScalarSchedule] | None,
        world: World,
        folder: RunFolder,
    ) -> Run:
        """A run that has not begun: nothing is written, no callback is called.

        Args:
            model: see ``fit``.
            optimizer: see ``fit``.
            data: see ``fit``.
            task: see ``fit``.
            schedule: see ``fit``.
            scalars: see ``fit``.
            world: see ``fit``.
            folder: see ``fit``; it need not exist.
        """
        precision = Precision(self.precision, world.device, self.channels_last)
        precision.place(model)
        budget = self._budget(data)
        forward: nn.Module = torch.compile(model) if self.compile else model  # type: ignore[assignment]
        if world.world_size > 1:
            if task.whole:
                devices = [world.device] if world.device.type == "cuda" else None
                forward = DistributedDataParallel(forward, device_ids=devices)
            rng.part_ways(world.rank)
        return Run(
            model=model,
            forward=forward,
            optimizer=optimizer,
            scheduler=(schedule or schedules.none)(optimizer, ticks=budget.ticks),
            scalars=Scalars(optimizer, scalars or {}),
            precision=precision,
            data=data,
            task=task,
            world=world,
            folder=folder,
            budget=budget,
            accumulate=self.accumulate,
            monitor=self.monitor or f"val/{task.main}",
            alarm=Alarm(self.checkpoint_every_minutes),
            saving=Every(self.checkpoint_every_steps, self.checkpoint_every_epochs, budget.steps_per_epoch),
        )

    # -- the run -------------------------------------------------------------------------------------------------------

    def fit(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        data: DataModule,
        task: Task,
        *,
        folder: RunFolder,
        schedule: Schedule | None = None,
        scalars: Mapping[str, ScalarSchedule] | None = None,
        world: World | None = None,
        callbacks: list[Callback] | None = None,
        loggers: list[Logger] | None = None,
        resume: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        config_id: str | None = None,
    ) -> dict[str, Any]:
        """Train, and leave the run folder complete however it ends.

        Args:
            model: the bare module; it holds the last weights afterwards, or their average where one is evaluated.
            optimizer: built on that module.
            data: training, validation and test set.
            task: loss and metrics.
            folder: where to write.
            schedule: ``schedule(optimizer, ticks=n)`` returns a scheduler; None: the learning rate stays.
            scalars: schedules of other scalars of the optimizer, by name.
            world: this process among the others; None: alone, on the CPU.
            callbacks: on every rank.
            loggers: used on rank 0.
            resume: what ``checkpoints.load`` returned; None: a fresh start.
            config: the resolved configuration, for the record.
            config_id: its short name.

        Returns:
            The summary, as in ``summary.json``.

        Raises:
            Diverged: the loss or a weight is no longer finite; the last good checkpoint is kept.
            Interrupted: a signal asked to stop; the state was saved.
            ValueError, UserError: see ``check``.
        """
        world, callbacks = world or World(), list(callbacks or [])
        callbacks += [Profiler()] if self.profile else []
        suited.check_weights(model)
        self.check(data, task, world, callbacks, optimizer=optimizer, schedule=schedule, scalars=scalars)
        with ExitStack() as stack:
            if world.is_main:
                folder.require_writable()
                stack.enter_context(log_file(folder.log_file))
            stack.enter_context(rng.deterministic(self.deterministic))
            stack.enter_context(recomputing(model, self.recompute))
            signals = stack.enter_context(StopSignals())
            run = None
            try:
                run = self.assemble(model, optimizer, data, task, schedule, scalars, world, folder)
                run.config, run.config_id = config or {}, config_id
                run.callbacks, run.loggers = callbacks, list(loggers or []) if world.is_main else []
                self._start(run, resume, stack)
                self._train(run, signals)
                return self._finish(run, signals)
            except BaseException as error:
                refused = resume is not None and not (run and run.resumed)
                if world.is_main and not refused:  # what was refused leaves the run as it found it
                    with suppress(WriteError):  # what went wrong first is what is told
                        self._fail(folder, run, watch.explained(error))
                raise

    def _start(self, run: Run, resume: dict[str, Any] | None, stack: ExitStack) -> None:
        for one in averages(run):
            one.train()
        if resume is not None:
            checkpoints.restore(run, resume)
            run.resumed = True
            run.seconds = run.clock.seconds()
            # As the last step left them: those that are attributes are in no checkpoint.
            run.scalars.set(run.budget.progress(max(run.step - 1, 0), run.seconds))
            log.info("resumed at step %d", run.step)
        if run.world.is_main:
            with writing(run.folder.summary_file):  # of an earlier session: a summary speaks of the end
                run.folder.summary_file.unlink(missing_ok=True)
            keep_facts(run)
        log.info("configuration %s, %s", run.config_id, provenance.hardware(run.world.device, run.world.world_size))
        if coverage := getattr(run.optimizer, "coverage", None):
            log.info("curvature of %s:\n%s", type(innermost(run.optimizer)).__name__, coverage())
        for logger in run.loggers:
            stack.callback(logger.close)
            logger.start(run)
        for callback in run.callbacks:
            stack.callback(callback.close)
            callback.on_fit_start(run)

    def _train(self, run: Run, signals: StopSignals) -> None:
        per_epoch = run.budget.steps_per_epoch
        log_due = Every(self.log_every_steps, None, per_epoch).due
        eval_due = Every(self.eval_every_steps, self.eval_every_epochs, per_epoch).due
        run.model.train()
        batches = run.batches()
        with run.clock.count("training"):
            signal = 0
            if run.resumed and eval_due(run.step) and run.evaluated != run.step:
                signal = evaluation.validate(run)  # that which stopped the run did not wait for it
                if not signal:
                    self._save(run)  # in place of the checkpoint that knows of no evaluation
            while not (run.done or run.stop_reason or signal):
                with watch.exchange():  # of gradients
                    step.take(run, batches, self.clip_norm)
                signal = run.advance(signals.exit_code)
                for callback in run.callbacks:
                    callback.on_step(run)
                for logger in run.loggers:
                    logger.on_step(run)
                if log_due(run.step) and run.window_steps:
                    self._log(run)
                if eval_due(run.step) and not signal:
                    signal = evaluation.validate(run)
                if run.saving.due(run.step) or run.overdue or run.done or run.stop_reason or signal:
                    self._save(run)
            if signal:
                raise Interrupted(f"Interrupted after step {run.step}: resume={run.folder.path} goes on.", signal)

    # -- what happens now and then -------------------------------------------------------------------------------------

    def _log(self, run: Run) -> None:
        window = run.window.compute()
        require_finite_loss(run, window["loss"])
        # A player that had no turn since the last log has nothing to report.
        values = {f"train/{name}": value for name, value in window.items() if not math.isnan(value)}
        with run.clock.count("other"):
            values["lr"] = run.lr
            values |= {f"schedule/{name}": float(value) for name, value in run.scalars.values.items()}
            if run.grad_norm is not None:
                values["train/grad_norm"] = float(run.grad_norm)
            values |= {f"time/{phase}": seconds for phase, seconds in run.phases.read().items()}
            if diagnostics := getattr(run.optimizer, "diagnostics", None):
                values |= diagnostics()
            run.window.reset()
            run.window_steps = 0
            run.emit("train", values)

    def _save(self, run: Run) -> None:
        require_finite(run)
        with averaged(run), run.clock.count("other"):
            checkpoints.store(run, self.keep_checkpoints)
            run.alarm.wind()
            barrier(run.world)

    # -- the end -------------------------------------------------------------------------------------------------------

    def _finish(self, run: Run, signals: StopSignals) -> dict[str, Any]:
        # Nothing here enters a step checkpoint: a run that is resumed after its last step makes its end anew, and one
        # resumed for longer goes on as if it had not ended. The summary is written last: what has one is complete.
        status = "finished" if run.done else "stopped_early"
        if run.stop_reason:
            log.info("stopped: %s", run.stop_reason)
        if run.window_steps:
            self._log(run)
        if run.evaluated != run.step and not run.unexamined:
            evaluation.validate(run)
        self._heed(run, signals)
        if not run.unexamined:
            enter(run)  # and so the model stays
            if self.test:
                evaluation.test(run)
        self._heed(run, signals)
        summary = summarise(run, status)
        for callback in run.callbacks:
            callback.on_fit_end(run, summary)
            self._heed(run, signals)
        for logger in run.loggers:
            logger.finish(run, summary)
        log.info("%s: %s", status, {k: v for k, v in run.latest.items() if not k.startswith("time/")})
        if run.world.is_main:
            if run.resumed:  # what a kill just after the last checkpoint has left
                checkpoints.tidy(run, self.keep_checkpoints)
            run.folder.write_summary(summary)
        return summary

    def _heed(self, run: Run, signals: StopSignals) -> None:
        """Stop between two parts of the end if any rank was asked to: the last step is saved."""
        if code := int(maximum([float(signals.exit_code)], run.world)[0]):
            raise Interrupted(f"Interrupted after the last step: resume={run.folder.path} makes what is missing.", code)

    def _fail(self, folder: RunFolder, run: Run | None, error: BaseException) -> None:
        interrupted = isinstance(error, (Interrupted, KeyboardInterrupt))
        status = "diverged" if isinstance(error, Diverged) else "interrupted" if interrupted else "failed"
        sentence = str(error) or type(error).__name__
        bug = error if status == "failed" and not isinstance(error, (UserError, ValueError)) else None
        summary: dict[str, Any] = {"status": status, "error": None if interrupted else sentence}
        try:
            if run is not None:
                summary = summarise(run, status, summary["error"])
                if status == "diverged":
                    for callback in run.callbacks:
                        callback.on_fit_end(run, summary)
            # For train.log alone: the terminal hears of it from whoever catches the exception.
            log.info("%s: %s", status, sentence, exc_info=bug)
        finally:
            with suppress(WriteError):  # one disk is full, or gone, for both: what is told is what went wrong first
                folder.write_summary(summary)
