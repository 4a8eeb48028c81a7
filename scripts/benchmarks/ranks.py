"""What shared-out second-order work saves: the same optimizers on several processes, with owners and without.

    python scripts/benchmarks/ranks.py model=resnet18 batch_size=8 rounds=4 optimizers=[kfac,ekfac,kpsvd]

Processes with one thread each train ResNet-18 together (gloo, DistributedDataParallel). In one run the two values of
``assign`` take turns: a step that gathers curvature and refreshes the inverses, then an ordinary one, each started
together. A step's wall time is that of the last process, and so is its processor time; medians over rounds. The refresh
is what ``step()`` takes beyond an ordinary one. Of the second-order state, factors and inverses, each process tells the
bytes that it holds.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel

from optimizers import CurvatureOptimizer
from scripts.benchmark import Options, make_model, make_optimizer, parsed, written
from training.show import heart

ASSIGNS = ("replicated", "balanced", "owned")
TIMES = ("due_whole", "refresh", "ordinary_whole", "ordinary_step", "due_passes")
COLUMNS = ("optimizer", "due step", "refresh", "ordinary step", "its step()", "passes", "MiB held")


@dataclass
class Shared(Options):
    """Command-line options: those of scripts/benchmark.py that say what is trained, and ``rounds``.

    Attributes:
        ranks: processes, each with one thread and a batch of its own.
        optimizers: what to compare with itself.
    """

    ranks: int = 2
    rounds: int = 4
    batch_size: int = 8
    optimizers: list[str] = field(default_factory=lambda: ["kfac", "ekfac", "kpsvd"])


class Arm:
    """One optimizer with one value of ``assign``, a model of its own and its steps' times.

    Args:
        entry: see scripts/benchmark.py.
        options: likewise.
    """

    def __init__(self, entry: str, options: Options) -> None:
        model, self.likelihood, self.batches = make_model(options)
        optimizer = make_optimizer(entry, model, self.likelihood)
        assert isinstance(optimizer, CurvatureOptimizer)
        self.optimizer, self.model = optimizer, DistributedDataParallel(model)
        self.times: dict[str, list[list[float]]] = {"due": [], "ordinary": []}
        self.count = 0

    def step(self) -> list[float]:
        """Seconds of forward and backward, and of ``step()``, by the wall's clock and by this process's own."""
        inputs, targets = self.batches[self.count % len(self.batches)]
        self.count += 1
        dist.barrier()
        marks = [(time.perf_counter(), time.process_time())]
        self.optimizer.zero_grad()
        outputs = self.model(inputs)
        self.optimizer.backward(self.likelihood.nll(outputs, targets), outputs)
        marks.append((time.perf_counter(), time.process_time()))
        self.optimizer.step()
        marks.append((time.perf_counter(), time.process_time()))
        (a, b), (c, d), (e, f) = marks
        return [c - a, e - c, d - b, f - d]

    def round(self) -> None:
        """A due step and an ordinary one."""
        self.optimizer.renew()
        self.times["due"].append(self.step())
        self.times["ordinary"].append(self.step())

    def held(self) -> int:
        """Bytes of factors and of what is worked out of them, on this process."""
        tensors = [t for block in self.optimizer.blocks.values() for t in block.factors.values()]
        tensors += [t for stack in getattr(self.optimizer, "_stacks", []) for t in stack.cache.values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
        return sum(storages.values())


def work(rank: int, options: Shared, folder: str) -> None:
    """What each process does.

    Args:
        rank: which it is.
        options: of the run.
        folder: where they meet and leave what they have found.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks)
    found: dict[str, dict[str, Any]] = {}
    for entry in options.optimizers:
        arms = {assign: Arm(f"{entry}:assign={assign}", options) for assign in ASSIGNS}
        for arm in arms.values():
            arm.round()
            arm.times = {"due": [], "ordinary": []}
        for index in range(options.rounds):
            for assign in ASSIGNS[:: 1 if index % 2 else -1]:
                arms[assign].round()
        for assign, arm in arms.items():
            found[f"{entry} {assign}"] = {"times": arm.times, "held": arm.held()}
        dist.barrier()
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def summary(results: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over rounds of the last process's times, in milliseconds; and the most and fewest bytes.

    Args:
        results: of each process, for one arm.
    """
    found: dict[str, float] = {}
    for kind in ("due", "ordinary"):
        rounds = list(zip(*(result["times"][kind] for result in results), strict=True))
        parts = {"passes": (0,), "step": (1,), "whole": (0, 1)}
        parts |= {f"{name}_cpu": tuple(index + 2 for index in indices) for name, indices in parts.items()}
        for name, indices in parts.items():
            last = [max(sum(one[i] for i in indices) for one in ranks) for ranks in rounds]
            found[f"{kind}_{name}"] = 1e3 * statistics.median(last)
    for clock in ("", "_cpu"):
        found[f"refresh{clock}"] = found[f"due_step{clock}"] - found[f"ordinary_step{clock}"]
    held = [result["held"] / 2**20 for result in results]
    return found | {"held_most": max(held), "held_least": min(held)}


def compare(options: Shared) -> list[dict[str, Any]]:
    """Run the benchmark and print its table.

    Args:
        options: of the run.

    Returns:
        Its numbers: of each optimizer with each value of ``assign``.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(options, folder), nprocs=options.ranks)
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(options.ranks)]
    rows = [{"optimizer": name} | summary([rank[name] for rank in ranks]) for name in ranks[0]]
    title = f"{options.model}, {options.ranks} processes of one thread, {options.batch_size} examples each"
    table = Table(title=title, caption="ms, wall | processor; refresh: what step() takes beyond an ordinary one")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for line in lines(rows):
        table.add_row(*line)
    Console(width=140).print(table)
    return rows


def lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows as text, and under those of an optimizer what ``replicated`` takes in units of the others.

    Args:
        rows: of ``compare``.
    """
    found = []
    for replicated, *others in (rows[at : at + len(ASSIGNS)] for at in range(0, len(rows), len(ASSIGNS))):
        for row in (replicated, *others):
            cells = [f"{row[name]:.0f} | {row[f'{name}_cpu']:.0f}" for name in TIMES]
            found.append([row["optimizer"], *cells, f"{row['held_least']:.0f} to {row['held_most']:.0f}"])
        for row in others:
            cells = [
                " | ".join(f"{replicated[name + clock] / row[name + clock]:.2f}" for clock in ("", "_cpu"))
                for name in TIMES[:3]
            ]
            held = f"{replicated['held_most'] / row['held_most']:.2f}"
            found.append([f"{row['optimizer']}: ratio", *cells, "", "", held])
    return found


if __name__ == "__main__":
    with heart.working("processes side by side"):
        given = parsed(Shared, sys.argv[1:])
        written(given, compare(given))
