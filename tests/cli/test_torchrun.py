"""Several processes: one run folder, one table, one error line; the processes are real, over gloo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import train
from tests.cli.conftest import QUICK, Outcome, metrics, runs, summary
from tests.conftest import ROOT, START
from tests.survival.conftest import places


def torchrun(work: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine, each with one thread."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    program = [*launcher, str(ROOT / "train.py"), *QUICK, *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(program, cwd=work, env=environment, start_new_session=True, **pipes) as launched:
        try:
            out, err = launched.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(launched.pid, signal.SIGKILL)  # the launcher's children too
            raise
    return subprocess.CompletedProcess(program, launched.returncode, out, err)


def rank(index: int, work: Path, argv: tuple[str, ...], variables: list[dict[str, str]]) -> None:
    """One of two processes: a command, and what it prints in a file."""
    os.environ.update(variables[index])
    os.chdir(work)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(work.parent / f"{work.name}_{name}{index}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    torch.set_num_threads(1)
    code = train.main((*QUICK, *argv))
    sys.stdout.flush(), sys.stderr.flush()
    sys.exit(code)


def pair(work: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Two processes as torchrun starts them, which need not import torch."""
    code = 0
    try:
        mp.start_processes(rank, args=(work, argv, places()), nprocs=2, start_method=START)
    except mp.ProcessExitedException as error:
        code = error.exit_code
    logs = ([work.parent / f"{work.name}_{name}{index}.txt" for index in (0, 1)] for name in ("out", "err"))
    return subprocess.CompletedProcess(argv, code, *("".join(log.read_text() for log in each) for each in logs))


def test_one_folder_and_a_resumed_run(work: Path) -> None:
    """Of a method whose curvature is shared out among the processes: checkpoints hold all of it."""
    done = pair(work, "logger=default", "optimizer=kfac", "resume=auto")
    assert done.returncode == 0, done.stderr
    (run,) = runs(work)
    assert summary(run)["status"] == "finished" and summary(run)["hardware"]["processes"] == 2
    assert done.stdout.count("run folder:") == 1 and done.stdout.count("no run of this configuration") == 1
    assert len(list((run / "tensorboard").iterdir())) == 1, "rank 0 alone writes"
    done = pair(work, "logger=default", f"resume={run}", "trainer.max_epochs=2")
    assert done.returncode == 0, done.stderr
    assert runs(work) == [run] and summary(run)["epochs"] == 2
    assert [event["epoch"] for event in metrics(run) if event["event"] == "eval"] == [1, 2]


def test_a_sentence_is_said_once(work: Path) -> None:
    done = torchrun(work, "dataset=image_folder", "dataset.root=photos")
    assert done.returncode == 1
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1, done.stderr
    assert list(work.iterdir()) == []


def test_other_ranks_keep_quiet(quick: Callable[..., Outcome], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    outcome = quick("optimizer.lrr=1")
    assert (outcome.code, outcome.out, outcome.err) == (1, "", "")


def test_a_sweep(work: Path) -> None:
    done = torchrun(work, "-m", "seed=0,1,2,3,4,5", "trainer.max_epochs=0.5")  # each job meets anew
    assert done.returncode == 0, done.stderr
    assert [summary(run)["status"] for run in runs(work, "multirun/*/*")] == ["finished"] * 6
    assert done.stdout.count("6 runs") == 1
