"""Where the events of a run go: a file of JSON lines, TensorBoard, the terminal, and a log in words. Rank 0 only."""

from __future__ import annotations

import json
import logging
import math
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import rich.console
import torch
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from torch.utils.tensorboard.summary import histogram, hparams, scalar
from torch.utils.tensorboard.summary import image as image_summary
from torch.utils.tensorboard.summary import text as text_summary

from training.runs.folder import Record, plain
from training.runs.run import Logger, Run
from training.show import heart, report
from training.show.event_file import EventFile, sizes, take_back
from training.show.header import header, shown
from training.show.report import duration

#: Keys of an event that are not metrics.
HEADER = ("event", "step", "epoch", "seconds", "wall")
# Limits of a histogram's bins, as TensorBoard's own writers have them: each a tenth beyond the one before.
_POSITIVE = [1e-12 * 1.1**power for power in range(774)]
BINS = [*(-limit for limit in reversed(_POSITIVE)), 0.0, *_POSITIVE]

__all__ = ["Console", "JSONLines", "Logger", "TensorBoard"]

log = logging.getLogger(__name__)


class JSONLines(Logger):
    """``metrics.jsonl``: an event a line. A resumed run cuts off what was written after its checkpoint."""

    def __init__(self) -> None:
        self._record: Record | None = None
        self._offset = 0

    def start(self, run: Run) -> None:
        """See Logger."""
        record = self._record = Record(run.folder.metrics_file, self._offset)
        if record.size < self._offset:
            log.warning("%s is shorter than the checkpoint says: what is missing stays missing.", record.path)
            content = record.read()
            record.cut(content.rfind(b"\n") + 1)  # half a line would spoil the next one

    def log(self, record: dict[str, Any]) -> None:
        """See Logger."""
        assert self._record is not None  # whoever follows the file sees whole lines, and a killed process loses none
        self._record.append((json.dumps(plain(record), allow_nan=False) + "\n").encode())

    def flush(self) -> None:
        """See Logger."""
        assert self._record is not None
        self._record.sync()

    def close(self) -> None:
        """See Logger."""
        if self._record is not None:
            self._record.close()
            self._record = None

    def state_dict(self) -> dict[str, Any]:
        """See Logger."""
        assert self._record is not None
        return {"offset": self._record.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Logger."""
        self._offset = state["offset"]


class TensorBoard(Logger):
    """Event files: scalars, the configuration, hyper-parameters beside their results, histograms on request.

    Args:
        histograms: of every weight and gradient at each evaluation. Slow for large models.
        flush_seconds: how often the file is brought up to date for those who watch.

    Raises:
        ValueError: for a value out of its range.
    """

    def __init__(self, histograms: bool = False, flush_seconds: int = 30) -> None:
        if flush_seconds < 1:
            raise ValueError(f"flush_seconds must be at least 1, got {flush_seconds}")
        self.histograms, self.flush_seconds = histograms, flush_seconds
        self._file: EventFile | None = None
        self._run: Run | None = None
        self._written: dict[str, int] | None = None

    def start(self, run: Run) -> None:
        """See Logger."""
        self._run = run
        if self._written is not None:
            take_back(run.folder.tensorboard, self._written)
        # A board that is open forgets what it has read about the steps that are now repeated.
        purge = run.step + 1 if run.resumed else 0
        self._file = EventFile(run.folder.tensorboard, purge, self.flush_seconds)
        if not run.resumed:
            self.text("config", run.folder.config_file.read_text(), 0)
            # SummaryWriter.add_hparams would open a run of its own in a sub-folder.
            experiment, start, _ = hparams(_hyperparameters(run.config), dict.fromkeys(self._results(run), 0.0))
            self._file.add(experiment, 0)
            self._file.add(start, 0)
        self._file.flush()

    @staticmethod
    def _results(run: Run) -> list[str]:
        """Tags that the hyper-parameter tab shows."""
        names = [f"{split}/{metric}" for split in ("val", "test") for metric in run.task.metrics]
        return [f"{which}/{name}" for which in ("final", "best") for name in names]

    def log(self, record: dict[str, Any]) -> None:
        """See Logger."""
        assert self._file is not None and self._run is not None
        step = record["step"]
        for name, value in record.items():
            if name not in HEADER and isinstance(value, (int, float)):
                self._file.add(scalar(name, value), step)
        if self.histograms and record["event"] == "eval":
            for name, parameter in self._run.model.named_parameters():
                self._histogram(f"weights/{name}", parameter, step)
                self._histogram(f"gradients/{name}", parameter.grad, step)

    def image(self, name: str, image: torch.Tensor, step: int) -> None:
        """See Logger."""
        assert self._file is not None
        self._file.add(image_summary(name, image, dataformats="CHW"), step)

    def text(self, name: str, text: str, step: int) -> None:
        """See Logger."""
        assert self._file is not None
        self._file.add(text_summary(name, "".join(f"    {line}\n" for line in text.splitlines())), step)  # as it is

    def _histogram(self, name: str, tensor: torch.Tensor | None, step: int) -> None:
        assert self._file is not None
        if tensor is not None and bool(tensor.isfinite().all()):  # an overflowed fp16 gradient has no histogram
            values = tensor.detach().float().cpu().numpy()
            self._file.add(histogram(name, values, BINS), step)

    def flush(self) -> None:
        """See Logger."""
        assert self._file is not None
        self._file.sync()

    def finish(self, run: Run, summary: dict[str, Any]) -> None:
        """See Logger."""
        assert self._file is not None
        for name in self._results(run):
            which, _, metric = name.partition("/")
            value = (summary[which] or {}).get(metric)
            if value is not None:
                self._file.add(scalar(name, value), run.step)
        _, _, end = hparams({}, {})
        self._file.add(end, run.step)
        self._file.sync()

    def close(self) -> None:
        """See Logger."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def state_dict(self) -> dict[str, Any]:
        """See Logger."""
        assert self._file is not None
        return {"written": sizes(self._file.folder)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Logger."""
        self._written = state["written"]


def _hyperparameters(config: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """What runs are compared by: the choices under their groups' names, and the values that shape the training."""
    groups = ("dataset", "model", "optimizer", "step_length", "averaging", "scheduler")
    choices = {group: choice for group, choice in (config.get("choices") or {}).items() if group in groups}
    kept = {key: value for key, value in config.items() if key in (*groups, "trainer", "seed", "init_from")}
    return choices | {key: value for key, value in _flat(kept).items() if not key.endswith("_target_")}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Dotted names and plain values of a nested configuration; everything TensorBoard has no type for becomes text."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            number = isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
            flat[prefix + key] = value if number else str(value)
    return flat


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
        self._out = rich.console.Console(highlight=False)
        self._stack = ExitStack()

    def start(self, run: Run) -> None:
        """See Logger."""
        self._out = rich.console.Console(highlight=False)
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


class _LogFile(logging.Handler):
    """A log file whose failures raise; logging's own habit is to print them and go on."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._record = Record(path)

    def emit(self, record: logging.LogRecord) -> None:
        """Append the line."""
        self._record.append((self.format(record) + "\n").encode())

    def close(self) -> None:
        """Let go of the file."""
        self._record.close()
        super().close()


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Whatever our packages log goes to a file, appended; warnings are still shown on the terminal.

    Args:
        path: ``train.log`` of a run.
    """
    root = logging.getLogger()
    handlers: list[logging.Handler] = [_LogFile(path)]
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if not root.handlers and logging.lastResort is not None:
        handlers.append(logging.lastResort)  # logging itself falls back to it only while there is no other handler
    ours = [logging.getLogger(name) for name in ("training", "optimizers", "data", "models", "analysis")]
    levels = [logger.level for logger in ours]
    for handler in handlers:
        root.addHandler(handler)
    for logger in ours:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(ours, levels, strict=True):
            logger.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
        handlers[0].close()
