"""What is freed stays with the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from training.loop.heap import SETTLED

#: Megabytes by which the heap is shorter after 48 of it were freed, which is more than glibc keeps by itself.
FREED = """
import ctypes, sys
from training.loop.heap import keep_freed
kept = keep_freed() if sys.argv[1] == "kept" else False
libc = ctypes.CDLL(None)
for name, what in {"malloc": [ctypes.c_size_t], "free": [ctypes.c_void_p], "sbrk": [ctypes.c_ssize_t]}.items():
    getattr(libc, name).argtypes, getattr(libc, name).restype = what, ctypes.c_void_p
libc.free(libc.malloc(16 << 20))  # from here on, blocks of this size come of the heap
blocks = [libc.malloc(12 << 20) for _ in range(4)]
before = libc.sbrk(0)
for block in blocks:
    libc.free(block)
print(kept, (before - libc.sbrk(0)) >> 20)
"""


def shorter(kept: str, **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if name not in SETTLED}
    done = subprocess.run(
        [sys.executable, "-c", FREED, kept], cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    settled, count = done.stdout.split()
    return settled, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap is Linux's")
def test_what_is_freed_is_not_given_back() -> None:
    settled, count = shorter("kept")
    if settled == "False":
        pytest.skip("this system's C library is not glibc")
    assert count == 0 and shorter("not")[1] > 30


def test_what_the_environment_says_of_it_holds() -> None:
    assert shorter("kept", MALLOC_TRIM_THRESHOLD_="100000")[0] == "False"
