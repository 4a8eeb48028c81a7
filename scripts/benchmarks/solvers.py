"""What a rank-two fit of one layer's Fisher block costs: Gram matrices against the published iterations.

    python scripts/benchmarks/solvers.py
    python scripts/benchmarks/solvers.py --samples 128

Errors are of the sum of two Kronecker products, in Frobenius norm, relative to the closed form in float64.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from analysis import records
from data.sources.synthetic import draw_curves
from models.generative.autoencoder import autoencoder
from optimizers import Bernoulli
from optimizers.curvature.rearranged import Pairs, leading_pairs
from training.show import heart


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after one that does not count; on one thread those of this process alone."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    function()
    times = []
    for _ in range(repeats):
        start = clock()
        function()
        times.append(clock() - start)
    return statistics.median(times)


def distance(found: Pairs, reference: Pairs) -> float:
    """``|F1 - F2| / |F2|`` of two sums of Kronecker products, from inner products of their factors."""

    def inner(first: Pairs, second: Pairs) -> Tensor:
        terms = [(a.double() * c.double()).sum() * (b.double() * d.double()).sum() for a, b in first for c, d in second]
        return torch.stack(terms).sum()

    squared = inner(found, found) - 2 * inner(found, reference) + inner(reference, reference)
    return float((squared.clamp(min=0) / inner(reference, reference)).sqrt())


def first_layer(samples: int) -> tuple[Tensor, Tensor]:
    """What the first layer of the CURVES auto-encoder sees of generated curves, and its sampled gradients."""
    torch.manual_seed(0)
    images = draw_curves(samples, seed=0).float().view(samples, -1) / 255
    hidden = [400, 200, 100, 50, 25, 6]
    model = autoencoder(hidden=hidden, in_channels=1, image_size=28)
    flow: dict[str, Tensor] = {}
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    layer.register_forward_hook(lambda _module, _inputs, output: flow.update(y=output))
    outputs = model(images.view(samples, 1, 28, 28))
    likelihood = Bernoulli()
    (g,) = torch.autograd.grad(outputs, flow["y"], likelihood.score(outputs, likelihood.sample(outputs)))
    return nn.functional.pad(images, (0, 1), value=1.0).view(1, samples, 1, -1), g.view(1, samples, 1, -1)


def main() -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="of a record, which docs/results is made of (none)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    a, g = first_layer(options.samples)
    reference = leading_pairs(a.double(), g.double(), 2)
    table = Table(title=f"785 x 400 layer of autoencoder_curves, {options.samples} samples, rank two, float32")
    for column in ("solver", "ms", "x gram", "error"):
        table.add_column(column, justify="left" if column == "solver" else "right")
    unit, rows = None, []
    runs = [("gram", torch.float32, 1e-6), ("lanczos", torch.float32, 1e-6), ("power", torch.float32, 1e-6)]
    runs += [("power", torch.float64, 1e-8)]  # what it takes to be as close as the closed form is in float32
    for solver, dtype, tolerance in runs:
        fit = partial(
            leading_pairs, a.to(dtype), g.to(dtype), 2, solver=solver, max_iterations=5000, tolerance=tolerance
        )
        taken = seconds(fit, options.repeats)
        unit = unit or taken
        error = distance(fit(), reference)
        name = solver if dtype == torch.float32 else f"{solver}, {str(dtype).removeprefix('torch.')}"
        rows.append({"solver": name, "ms": 1e3 * taken, "× gram": taken / unit, "error": error})
        table.add_row(name, f"{1e3 * taken:.1f}", f"{taken / unit:.0f}", f"{error:.1e}")
    Console(width=100).print(table)
    if options.json:
        records.write(options.json, rows)


if __name__ == "__main__":
    with heart.working("solvers"):
        main()
