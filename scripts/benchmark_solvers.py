"""What a rank-two fit of one layer's Fisher block costs: Gram matrices against the published iterations.

    python scripts/benchmark_solvers.py
    python scripts/benchmark_solvers.py --inputs 785 --outputs 400 --samples 64

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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from optimizers.curvature.rearranged import Pairs, leading_pairs


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def distance(found: Pairs, reference: Pairs) -> float:
    """``|F1 - F2| / |F2|`` of two sums of Kronecker products, from inner products of their factors."""

    def inner(first: Pairs, second: Pairs) -> Tensor:
        terms = [(a.double() * c.double()).sum() * (b.double() * d.double()).sum() for a, b in first for c, d in second]
        return torch.stack(terms).sum()

    squared = inner(found, found) - 2 * inner(found, reference) + inner(reference, reference)
    return float((squared.clamp(min=0) / inner(reference, reference)).sqrt())


def main() -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=785, help="width of the layer's input, bias included")
    parser.add_argument("--outputs", type=int, default=400)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    # Correlated, as what flows through a net is: singular values that fall off, not all alike.
    decay = torch.logspace(0, -2, options.samples).unsqueeze(1)
    a = (torch.randn(options.samples, options.samples) @ (decay * torch.randn(options.samples, options.inputs))).relu()
    g = torch.randn(options.samples, options.samples) @ (decay * torch.randn(options.samples, options.outputs))
    a, g = a.view(1, options.samples, 1, -1), g.view(1, options.samples, 1, -1) / options.samples
    reference = leading_pairs(a.double(), g.double(), 2)
    table = Table(title=f"{options.inputs} x {options.outputs}, {options.samples} samples, rank two, float32")
    for column in ("solver", "ms", "x gram", "error"):
        table.add_column(column, justify="left" if column == "solver" else "right")
    unit = None
    for solver in ("gram", "lanczos", "power"):
        fit = partial(leading_pairs, a, g, 2, solver=solver, max_iterations=2000)
        taken = seconds(fit, options.repeats)
        unit = unit or taken
        error = distance(fit(), reference)
        table.add_row(solver, f"{1e3 * taken:.1f}", f"{taken / unit:.0f}", f"{error:.1e}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
