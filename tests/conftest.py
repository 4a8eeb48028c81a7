"""Fixtures of all tests: real data where it is present, a clean random state, one thread a worker."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

#: How tests start processes: forked ones need not import torch, which forbids it where autograd has threads for CUDA.
START = "spawn" if torch.cuda.is_available() else "fork"

# Two xdist workers on two cores: more threads each would only fight over them.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: what is quick fills the workers up to the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay with one worker, which so makes its fixtures once; those of tests/slurm share one SLURM."""
    from xdist.scheduler import LoadFileScheduling

    class Rooms(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope = super()._split_scope(nodeid)
            return "tests/slurm" if scope.startswith("tests/slurm/") else scope

    return Rooms(config, log)


@pytest.fixture(autouse=True, scope="module")
def _settled() -> None:
    """What is there before a file's first test, is not looked through for garbage: half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves the default dtype alone."""
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def float64() -> Iterator[None]:
    """Double precision by default: what the dense oracles are computed in."""
    torch.set_default_dtype(torch.float64)
    yield


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """Path of a real data set, from $CURVLAB_DATA or the folder shared beside the project; skips where it is absent."""

    def find(name: str) -> Path:
        for folder in (os.environ.get("CURVLAB_DATA"), ROOT.parent / "shared" / "datasets"):
            if folder and (Path(folder) / name).exists():
                return Path(folder) / name
        pytest.skip(f"the real data set {name!r} is not on this machine (set CURVLAB_DATA to the folder that holds it)")

    return find
