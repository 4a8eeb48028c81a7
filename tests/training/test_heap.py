"""What tensors free stays with the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from training.loop.heap import SETTLED

#: Faults of the second of two rounds of steps of Adam, whose results between are 9 MB large each.
STEPS = """
import resource, sys, torch
from training.loop.heap import keep_freed
kept = keep_freed() if sys.argv[1] == "kept" else False
weights = [torch.nn.Parameter(torch.ones(2_400_000)) for _ in range(4)]
optimizer = torch.optim.Adam(weights)
for weight in weights:
    weight.grad = torch.ones_like(weight)
for count in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    optimizer.step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: str, **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if name not in SETTLED}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, kept], cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    settled, count = done.stdout.split()
    return settled, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap is Linux's")
def test_a_step_takes_the_memory_of_the_last() -> None:
    settled, few = faults("kept")
    if settled == "False":
        pytest.skip("this system's C library is not glibc")
    _, many = faults("not")
    assert few < 500 < many / 4, (few, many)


def test_what_the_environment_says_of_it_holds() -> None:
    assert faults("kept", MALLOC_TRIM_THRESHOLD_="100000")[0] == "False"
