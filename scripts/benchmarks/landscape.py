"""What a point of a loss surface costs: seconds of a core, and what 51 x 51 of them take of two.

    python scripts/benchmarks/landscape.py
    python scripts/benchmarks/landscape.py model=resnet18 sizes=[32] examples=500

A point is scripts/landscape.py's: weights put in place, statistics of BatchNorm estimated on 500 of the examples or
fixed, and all examples evaluated. Weights and images are random, which does not matter to what they cost; seconds are
the processor's, on one thread, the least of several.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

import torch

from analysis import landscape, records
from analysis.landscape.losses import Format, Statistics
from scripts import benchmark
from training import tasks
from training.settings.composition import compose
from training.settings.schema import build
from training.show import heart
from training.show.snapshots import state

POINTS = 51 * 51


@dataclass
class Options:
    """Command-line options, ``key=value``.

    Attributes:
        model: by the name of its configuration.
        sizes: sides of the images.
        examples: that a point is evaluated on.
        batch_size: of the evaluation.
        repeats: points that are measured; the quickest counts.
        json: also write the rows to this file, as scripts/benchmark.py does.
    """

    model: str = "resnet20"
    sizes: list[int] = field(default_factory=lambda: [8, 16, 32])
    examples: int = 2000
    batch_size: int = 100
    repeats: int = 4
    json: str | None = None


def measure(options: Options, size: int, precision: Format, statistics: Statistics) -> float:
    """Seconds of a core a point."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(options.examples, 3, size, size, generator=generator)
    targets = torch.randint(10, (options.examples,), generator=generator)
    batches = zip(inputs.split(options.batch_size), targets.split(options.batch_size), strict=True)
    torch.manual_seed(0)
    model = build(compose([f"model={options.model}"]).values["model"], "model", in_channels=3, num_classes=10)
    plane = landscape.Plane(state(model)[0], tuple(landscape.random_direction(model, seed) for seed in (0, 1)))
    task = tasks.build("classification", {"num_classes": 10}, 0.0, 0)
    ground = landscape.Ground(
        model, task, landscape.Examples(list(batches)), plane, statistics=statistics, precision=precision
    )
    found = []
    for number in range(options.repeats + 1):  # the first one also prepares
        before = time.process_time()
        ground.measure(("plane", (0.01 * number, 0.02)))
        found.append(time.process_time() - before)
    return min(found[1:])


def main(arguments: list[str]) -> None:
    """Measure, print the rows and, if asked for, write them."""
    options = benchmark.parsed(Options, arguments)
    torch.set_num_threads(1)
    rows = []
    for size in options.sizes:
        for precision in get_args(Format):
            row: dict[str, object] = {"pixels": f"{size} × {size}", "precision": precision}
            for statistics in get_args(Statistics):
                seconds = measure(options, size, precision, statistics)
                row |= {f"{statistics}, s": seconds, f"51 × 51, {statistics}, min": seconds * POINTS / 2 / 60}
            rows.append(row)
            print(*(f"{value:.3g}" if isinstance(value, float) else value for value in row.values()), flush=True)
    if options.json:
        records.write(Path(options.json), rows, options=asdict(options))


if __name__ == "__main__":
    with heart.working("what a point costs"):
        main(sys.argv[1:])
