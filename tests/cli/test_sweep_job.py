"""One job of a sweep by its number, as an element of a queue's array is told: the sweep's folders, and none twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome, runs, summary


def test_one_job_of_a_sweep(quick: Callable[..., Outcome], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = ("-m", "optimizer=sgd", "seed=0,1", "optimizer.lr=0.1,0.01")
    monkeypatch.setenv("CURVLAB_SWEEP_JOB", "2")
    outcome = quick(*sweep)
    assert outcome.code == 0, outcome.err
    (run,) = runs(work, "multirun/*/*/")
    assert run.name.startswith("optimizer.lr-0.1_seed-1_")
    monkeypatch.setenv("CURVLAB_SWEEP_JOB", "4")
    outcome = quick(*sweep)
    assert outcome.code == 1 and "CURVLAB_SWEEP_JOB=4, but this sweep has jobs 0 to 3" in outcome.sentence()
    monkeypatch.delenv("CURVLAB_SWEEP_JOB")
    outcome = quick(*sweep)
    assert outcome.code == 0, outcome.err
    assert f"{run.name} is finished: skipped" in " ".join(outcome.out.split())
    folders = runs(work, "multirun/*/*/")
    assert len(folders) == 4 and run in folders
    assert [summary(folder)["status"] for folder in folders] == ["finished"] * 4
