"""The terminal."""

from __future__ import annotations

import math
import shlex
import time
from contextlib import ExitStack
from typing import Any

import rich.console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from training.loggers.values import HEADER
from training.runs.run import Logger, Run
from training.show import heart, report
from training.show.header import header, shown
from training.show.report import duration


class Console(Logger):
    """The terminal: what the run is, a live progress bar, a line an evaluation, and a table of results at the end.

    Where output is no terminal there is no bar, and a line at least every half a minute. Of a sweep's runs it draws the
    bar alone.

    Args:
        progress: whether to draw the bar at all.
    """

    def __init__(self, progress: bool = True) -> None:
        self.progress = progress
        self._bar: Progress | None = None
        self._shown: dict[str, float] = {}
        self._next = 0.0
        self._since = (0.0, 0.0)
        self._out: rich.console.Console = report.Terminal(highlight=False)
        self._stack = ExitStack()

    def start(self, run: Run) -> None:
        """See Logger."""
        self._out = report.Terminal(highlight=False)
        if not report.brief():
            self._print(header(run))
        self._stack.enter_context(heart.at(lambda: "" if self._bar is not None else _at(run, self._shown)))
        screen = self._out if self._out.is_terminal else rich.console.Console(stderr=True)
        if self.progress and screen.is_terminal:
            width = max(5, min(40, screen.width - 75))
            columns = TextColumn("{task.description}"), BarColumn(width), TextColumn("{task.fields[values]}")
            self._bar = Progress(*columns, console=screen, transient=True)  # what it says is over with the run
            task = self._bar.add_task("starting", total=1.0, values="")
            self._bar.update(task, completed=run.progress)
            self._bar.start()
        self._since = time.perf_counter(), run.progress
        if run.resumed and not report.brief():
            self._print(f"resumed at step {run.step}, epoch {run.epoch:.2f}")

    def _print(self, text: str) -> None:
        out = self._bar.console if self._bar is not None and self._out.is_terminal else self._out
        out.print(text, soft_wrap=True, markup=False)
        heart.spoke()

    def log(self, record: dict[str, Any]) -> None:
        """See Logger."""
        self._shown |= {k: v for k, v in record.items() if k not in HEADER}
        if record["event"] == "eval" and not report.brief():
            self._print(epoch_line(record, self._shown.get("train/loss")))

    def on_step(self, run: Run) -> None:
        """See Logger."""
        now = time.perf_counter()
        if self._bar is None or now < self._next:
            return
        self._next = now + 0.1
        began, before = self._since
        gained = run.progress - before
        left = (now - began) * (1 - run.progress) / gained if gained > 0 else math.nan
        shown = [f"{k} {self._shown[k]:.4g}" for k in ("train/loss", run.monitor) if k in self._shown]
        if "time/step" in self._shown:
            shown.append(f"{1000 * self._shown['time/step']:.3g} ms/step")
        if math.isfinite(left):
            shown.append(f"{duration(left)} left")
        self._bar.update(
            self._bar.task_ids[0], description=_position(run), completed=run.progress, values="  ".join(shown)
        )

    def finish(self, run: Run, summary: dict[str, Any]) -> None:
        """See Logger."""
        self.close()
        if report.brief():
            return
        path = shown(run.folder.path)
        seconds = summary["seconds"]
        self._print(
            f"{summary['status'].replace('_', ' ')} after {summary['steps']} steps, {summary['epochs']:.4g} epochs, "
            f"{duration(seconds['training'])} of training and {duration(seconds['evaluation'])} of evaluation"
        )
        self._out.print(_results_table(summary, list(run.task.metrics)))
        if remark := summary.get("remark"):
            self._print(remark)
        self._print(f"run folder:   {path}")
        self._print(f"TensorBoard:  tensorboard --logdir {shlex.quote(path)}")

    def close(self) -> None:
        """See Logger."""
        self._stack.close()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def epoch_line(record: dict[str, Any], loss: float | None, width: int = 80) -> str:
    """What an evaluation found, in a line that fits.

    Args:
        record: the event.
        loss: of training, last; None: unknown.
        width: of the line: with less room there are fewer digits, then fewer metrics.
    """
    begin = [f"epoch {record['epoch']:.2f}", f"step {record['step']}"]
    metrics = {name: value for name, value in record.items() if name.startswith("val/")}
    end = [duration(record["seconds"])]
    line = ""
    for digits, kept in ((4, len(metrics)), *((3, count) for count in range(len(metrics), 0, -1))):
        parts = [f"{name} {_figure(name, value, digits)}" for name, value in metrics.items()][:kept]
        train = [f"train {loss:.{digits}g}"] if loss is not None else []
        line = "  ".join([*begin, *parts, *train, *end])
        if len(line) <= width:
            break
    return line


def _results_table(summary: dict[str, Any], metrics: list[str]) -> Table:
    """Final and best metrics of a run."""
    final, best = summary["final"], summary["best"]
    table = Table("metric")
    table.add_column("last weights", justify="right")
    if best:
        table.add_column(f"best {best['metric']} (step {best['step']})", justify="right")
    for name in (f"{split}/{metric}" for split in ("train", "val", "test") for metric in metrics):
        if name in final:
            cells = [_figure(name, final[name]), *([_figure(name, best[name]) if name in best else ""] if best else [])]
            table.add_row(name, *cells)
    return table


def _figure(name: str, value: float, digits: int = 4) -> str:
    return f"{100 * value:.{digits - 2}f} %" if name.endswith("accuracy") else f"{value:.{digits}g}"


def _at(run: Run, shown: dict[str, float]) -> str:
    """Where a run is, for those who watch no bar."""
    doing = {"training": "training", "evaluation": "evaluating"}.get(run.clock.kind, "at work")
    if run.clock.kind == "training" and run.step == 0:
        doing = "in its first step"
    loss = f"  train/loss {shown['train/loss']:.4g}" if "train/loss" in shown else ""
    return f"{_position(run)}  {doing}{loss}"


def _position(run: Run) -> str:
    """Where a run is in its budget, in the budget's own unit."""
    if run.budget.max_time is not None:
        return f"{duration(run.seconds)} of {duration(run.budget.max_time)}"
    if run.budget.max_steps is not None:
        return f"step {run.step}/{run.budget.max_steps}"
    return f"epoch {run.epoch:.2f}/{run.budget.max_epochs:g}"
