"""What checkpoints cost: how large one is, how long it takes to write, and what share of a hundred steps that is.

    python scripts/benchmarks/checkpoints.py
    python scripts/benchmarks/checkpoints.py optimizers=[kfac] image_sizes=[8] batch_size=64

Each optimizer trains a ResNet-18 on random images and writes a checkpoint every few steps. Seconds are the clock's, and
reach from gathering the state to the last fsync, as train.log has them; medians of the checkpoints and of the steps
between them. A step is a mean one: what is due every so many steps, as curvature is, is shared out over these.
"""

from __future__ import annotations

import logging
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

from analysis import records
from scripts import benchmark
from scripts.benchmarks.watching import trained
from training.runs.checkpoints import stores
from training.runs.run import Callback, Run
from training.show import heart


@dataclass
class Options:
    """Command-line options, ``key=value``.

    Attributes:
        model: see scripts/benchmark.py.
        optimizers: see scripts/benchmark.py.
        batch_size: examples a step.
        image_sizes: sides of the images.
        steps: of each run.
        every: steps between checkpoints.
        json: also write the rows to this file, as scripts/benchmark.py does.
    """

    model: str = "resnet18"
    optimizers: list[str] = field(default_factory=lambda: ["sgd", "adafisher", "kfac"])
    batch_size: int = 64
    image_sizes: list[int] = field(default_factory=lambda: [8, 32])
    steps: int = 24
    every: int = 6
    json: str | None = None


class Clock(Callback):
    """Seconds of each step, without checkpoints."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._before = 0.0

    def on_step(self, run: Run) -> None:
        """See Callback."""
        self.seconds.append(run.clock.seconds("training") - self._before)
        self._before = run.clock.seconds("training")


class Written(logging.Handler):
    """What train.log says of checkpoints."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.megabytes, self.seconds = 0.0, list[float]()

    def emit(self, record: logging.LogRecord) -> None:
        """See Handler."""
        if "written in" in record.msg and isinstance(record.args, tuple):
            _, self.megabytes, seconds = cast(tuple[str, float, float], record.args)
            self.seconds.append(seconds)


def measure(options: Options, entry: str, size: int) -> dict[str, Any]:
    """A row of the table."""
    given = benchmark.Options(model=options.model, batch_size=options.batch_size, image_size=size)
    clock, written = Clock(), Written()
    stores.log.addHandler(written)
    try:
        optimizer = trained(given, entry, [clock], max_steps=options.steps, checkpoint_every_steps=options.every)
    finally:
        stores.log.removeHandler(written)
    interval = getattr(optimizer, "update_every", 1)
    late = range(2, options.steps)  # the first ones are others
    due = [clock.seconds[i] for i in late if interval > 1 and i % interval == 0]
    usual = statistics.median(clock.seconds[i] for i in late if interval == 1 or i % interval)
    step = usual + ((statistics.median(due) - usual) / interval if due else 0.0)
    seconds = statistics.median(written.seconds)
    return {
        "optimizer": entry, "images": f"{size} × {size}", "MB": written.megabytes, "written in, s": seconds,
        "a step, s": step, "% of 100 steps": seconds / step,
    }  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measure, print the rows and, if asked for, write them."""
    options = benchmark.parsed(Options, arguments)
    rows = []
    for size in options.image_sizes:
        for entry in options.optimizers:
            rows.append(measure(options, entry, size))
            print(*(f"{value:.3g}" if isinstance(value, float) else value for value in rows[-1].values()), flush=True)
    if options.json:
        records.write(Path(options.json), rows, options=asdict(options))


if __name__ == "__main__":
    with heart.working("what checkpoints cost"):
        main(sys.argv[1:])
