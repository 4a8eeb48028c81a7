"""What a sweep of many tiny runs costs beyond their training: until the first begins, a run, and in memory.

    python scripts/benchmarks/sweep.py
    python scripts/benchmarks/sweep.py --runs 200 -- callbacks=none

Seconds are those of the processor, which other programs on the machine do not change. Everything is on by default:
pictures, event files, checkpoints. They go to a folder of the system's for temporary files, and with it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

TINY = ("model=mlp", "model.hidden=[16]", "trainer.max_epochs=1", "dataset.limit_train=0.2", "dataset.limit_val=0.2")


def main() -> int:
    """The command line; returns the exit code of the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="how many (200)")
    parser.add_argument("overrides", nargs="*", help="of train.py, behind --")
    options = parser.parse_args()
    clock = time.process_time
    import torch  # noqa: F401 - what all wait for

    imported = clock()
    import train
    from training.command import jobs
    from training.runs import resume

    entered: list[float] = []
    enter = resume.enter

    def into(*run: Any) -> Any:
        entered.append(clock())
        return enter(*run)

    vars(resume)["enter"] = into

    begun: list[float] = []
    costs: list[float] = []
    sizes: list[float] = []
    perform = jobs.perform

    def timed(*job: Any) -> dict[str, Any]:
        begun.append(clock())
        wall = time.perf_counter()
        summary = perform(*job)
        spent, passed = clock() - begun[-1], time.perf_counter() - wall
        # Training is measured by the clock on the wall: its share of that is its share of the processor's time.
        costs.append(spent * (1 - (summary.get("seconds") or {}).get("training", 0.0) / passed))
        sizes.append(_megabytes())
        return summary

    vars(jobs)["perform"] = timed
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nothing,
        contextlib.redirect_stdout(nothing),
    ):
        given = (*TINY, *options.overrides, f"paths.sweeps={folder}", f"seed=range({options.runs})")
        code = train.main(["-m", *given])
    late = [(index, size) for index, size in enumerate(sizes) if index >= len(sizes) // 2]
    growth = statistics.linear_regression(*zip(*late, strict=True)).slope if len(late) > 2 else float("nan")
    print(f"torch is imported after                    {imported:.2f} s")
    print(f"the first run is in its folder after       {entered[0]:.2f} s")
    print(f"it costs beyond its training               {costs[0]:.2f} s")
    print(f"another one, median of {len(costs) - 1:<5}               {statistics.median(costs[1:] or costs):.2f} s")
    print(f"memory at the end                          {sizes[-1]:.0f} MiB")
    print(f"and a run of the second half adds          {1024 * growth:.1f} KiB")
    return code


def _megabytes() -> float:
    """The memory that this process has now."""
    pages = Path("/proc/self/statm")
    if not pages.exists():  # no Linux
        return float("nan")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    sys.exit(main())
