"""What callbacks=curvature costs: steps that are looked at beside those that are not, in one run of each optimizer.

    python scripts/benchmarks/watching.py
    python scripts/benchmarks/watching.py model=resnet18 batch_size=32 optimizers=[sgd,kfac] steps=60

Every eighth step is looked at. What it takes beyond the median of steps of its kind (with curvature work or without)
is shared out over the interval at its default, and given in percent of the mean step without it. Models and batches are
those of scripts/benchmark.py; seconds are the processor's, on one thread.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer

from analysis import records
from data import DataModule
from scripts import benchmark
from training import RunFolder, Trainer, tasks
from training.runs.run import Callback, Run
from training.show import heart
from training.show.watching.diagnostics import CurvatureDiagnostics

EVERY = 8


@dataclass
class Options:
    """Command-line options, ``key=value``.

    Attributes:
        model: see scripts/benchmark.py.
        optimizers: see scripts/benchmark.py.
        batch_size: examples a step.
        image_size: side of the images.
        steps: of each run.
        json: also write the rows to this file, as scripts/benchmark.py does.
    """

    model: str = "autoencoder"
    optimizers: list[str] = field(default_factory=lambda: ["sgd", "adafisher", "kfac", "ekfac"])
    batch_size: int = 256
    image_size: int = 32
    steps: int = 160
    json: str | None = None


@dataclass
class Batches:
    """A loader of a few batches, again and again."""

    batches: list[tuple[Tensor, Tensor]]

    def __post_init__(self) -> None:
        self.num_examples = sum(len(targets) for _, targets in self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See BatchLoader."""
        yield from self.batches[start:]


class Timer(Callback):
    """Seconds of the processor from the end of each step to that of the next."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step(self, run: Run) -> None:
        """See Callback."""
        self.marks.append(time.process_time())


def trained(given: benchmark.Options, entry: str, callbacks: Sequence[Callback], **trainer: Any) -> Optimizer:
    """The optimizer of a run on random batches, after it.

    Args:
        given: what is trained, as by scripts/benchmark.py.
        entry: the optimizer.
        callbacks: of the run.
        trainer: options of the trainer.
    """
    model, likelihood, batches = benchmark.make_model(given)
    rebuilds = len(batches[0][1].shape) > 1
    kind = "reconstruction" if rebuilds else "classification"
    facts = {"likelihood": "bernoulli"} if rebuilds else {"num_classes": 10}
    data = DataModule("random", kind, facts, Batches(batches), Batches(batches[:1]), Batches(batches[:1]), [])
    optimizer = benchmark.make_optimizer(entry, model, likelihood)
    quiet = {"eval_every_epochs": None, "log_every_steps": 10**6, "checkpoint_every_epochs": None, "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        Trainer(**quiet | trainer).fit(
            model, optimizer, data, tasks.build(kind, facts, 0.0, 0), folder=RunFolder.create(Path(folder) / "run", ""),
            callbacks=[*callbacks],
        )  # fmt: skip
    return optimizer


def measure(options: Options, entry: str) -> tuple[float, float]:
    """Seconds of a mean step that is not looked at, and what a look adds to a step."""
    given = benchmark.Options(model=options.model, batch_size=options.batch_size, image_size=options.image_size)
    timer = Timer()
    optimizer = trained(given, entry, [CurvatureDiagnostics(every=EVERY), timer], max_steps=options.steps)
    interval = getattr(optimizer, "update_every", 1)
    kinds: dict[tuple[bool, bool], list[float]] = {}
    for index in range(2 * EVERY, options.steps):  # of which the first ones are others
        seconds = timer.marks[index] - timer.marks[index - 1]
        kinds.setdefault((index % interval == 0 and interval > 1, (index + 1) % EVERY == 0), []).append(seconds)
    usual = {due: statistics.median(kinds[due, False]) for due, _ in kinds if (due, False) in kinds}
    surplus = [seconds - usual[due] for (due, seen), many in kinds.items() if seen and due in usual for seconds in many]
    mean = usual[False] + (usual.get(True, usual[False]) - usual[False]) / interval
    return mean, statistics.median(surplus)


def main(arguments: list[str]) -> None:
    """Measure, print a table and, if asked for, write it."""
    options = benchmark.parsed(Options, arguments)
    torch.set_num_threads(1)
    default = CurvatureDiagnostics().every
    table = Table(title=f"{options.model}, batch {options.batch_size}: callbacks=curvature, every {default} steps")
    for column in ("optimizer", "step ms", "a look ms", "% of a step"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    rows = []
    for entry in options.optimizers:
        mean, surplus = measure(options, entry)
        percent = 100 * surplus / default / mean
        rows.append({"optimizer": entry, "step, ms": 1e3 * mean, "a look, ms": 1e3 * surplus, "% of a step": percent})
        table.add_row(entry, f"{1e3 * mean:.1f}", f"{1e3 * surplus:.1f}", f"{percent:.2f}")
    Console(width=120).print(table)
    if options.json:
        records.write(Path(options.json), rows, options=asdict(options))


if __name__ == "__main__":
    with heart.working("what watching costs"):
        main(sys.argv[1:])
