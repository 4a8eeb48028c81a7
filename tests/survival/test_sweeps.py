"""Sweeps that are killed, and launched twice at once: every run once, whatever happens to some of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

import train
from tests.cli.conftest import QUICK

Launch = Callable[..., BaseProcess]


def _command(argv: tuple[str, ...], folder: Path, out: Path) -> None:
    """What a shell would do: a command in a folder, in a process group of its own, all that it says in a file."""
    import torch

    os.setsid()
    os.chdir(folder)
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    code = train.main(argv)
    sys.stdout.flush()
    os._exit(code)


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Start a command; what it says comes into a file, `outputs` in the order of their starts."""
    # Forked, for importing torch takes longer than such a run.
    context, count = multiprocessing.get_context("fork"), iter(range(100))

    def start(*argv: str) -> BaseProcess:
        process = context.Process(target=_command, args=(argv, tmp_path, tmp_path / f"{next(count):02}.out"))
        process.start()
        return process

    return start


def outputs(folder: Path) -> list[str]:
    """What each command has said, without the ends that killed ones left."""
    return [path.read_text() for path in sorted(folder.glob("*.out"))]


def summaries(folder: Path) -> dict[str, dict[str, Any]]:
    """The summary of each job of the sweep, by folder."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("multirun/*/*/summary.json"))}


def litter(folder: Path) -> list[Path]:
    """Locks, and what was left half-written."""
    return [path for path in folder.rglob(".*") if path.name == ".lock" or path.suffix == ".tmp"]


def test_two_launches_at_once_share_the_jobs(launch: Launch, tmp_path: Path) -> None:
    argv = ("-m", *QUICK, "seed=0,1,2,3,4,5")
    both = [launch(*argv), launch(*argv)]
    for process in both:
        process.join(100)
    first, second = outputs(tmp_path)
    assert [process.exitcode for process in both] == [0, 0], first + second
    assert (first + second).count(": skipped") == 6, "each job was trained by one of them"
    found = summaries(tmp_path)
    assert len(found) == 6 == len([path for path in tmp_path.glob("multirun/*/*") if path.is_dir()])
    assert {summary["status"] for summary in found.values()} == {"finished"}
    logs = [path.read_text() for path in tmp_path.glob("multirun/*/*/train.log")]
    assert [(log.count(" configuration "), log.count(" finished: ")) for log in logs] == [(1, 1)] * 6
    assert litter(tmp_path) == []
