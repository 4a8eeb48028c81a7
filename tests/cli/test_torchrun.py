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

from tests.cli.conftest import QUICK, Outcome, metrics, runs, summary
from tests.conftest import ROOT


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


def test_one_folder_and_a_resumed_run(work: Path) -> None:
    """Of a method whose curvature is shared out among the processes: checkpoints hold all of it."""
    done = torchrun(work, "logger=default", "optimizer=kfac", "resume=auto")
    assert done.returncode == 0, done.stderr
    (run,) = runs(work)
    assert summary(run)["status"] == "finished" and summary(run)["hardware"]["processes"] == 2
    assert done.stdout.count("run folder:") == 1 and done.stdout.count("no run of this configuration") == 1
    assert len(list((run / "tensorboard").iterdir())) == 1, "rank 0 alone writes"
    done = torchrun(work, "logger=default", f"resume={run}", "trainer.max_epochs=2")
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
