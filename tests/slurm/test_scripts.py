"""Scripts of scripts/submit.py on a real SLURM: every way to start, to be stopped and to go on, and to fail."""

from __future__ import annotations

import pytest

from tests.slurm.conftest import Slurm, ends, folder, runs, summary

pytestmark = pytest.mark.slow


def test_taken_by_another_partition(slurm: Slurm, jobs: dict[str, str]) -> None:
    ends(slurm, jobs["taken"], 300, restarts=1)
    text = (slurm.work / f"taken_{jobs['taken']}.out").read_text()
    assert "Interrupted after step" in text and "resuming" in text, text


def test_queued_again_by_hand_with_two_processes_of_srun(slurm: Slurm, jobs: dict[str, str]) -> None:
    ends(slurm, jobs["srun"], 300, restarts=1, processes=2)


def test_asked_to_stop_with_two_processes_of_torchrun(slurm: Slurm, jobs: dict[str, str]) -> None:
    ends(slurm, jobs["torchrun"], 300, restarts=1, processes=2)


def test_cancelled_it_stays_so(slurm: Slurm, jobs: dict[str, str]) -> None:
    assert slurm.wait(jobs["gone"]) == "CANCELLED" and slurm.restarts(jobs["gone"]) == 0
    (run,) = runs(folder(slurm, jobs["gone"]))
    assert summary(run)["status"] == "interrupted"


def test_a_sweep_as_an_array_one_of_which_fails(slurm: Slurm, jobs: dict[str, str]) -> None:
    states = [slurm.wait(f"{jobs['array']}_{element}") for element in (0, 1)]
    assert states == ["COMPLETED", "FAILED"], slurm.log()
    found = [summary(run) for run in runs(slurm.work / "multirun" / "array")]
    assert sorted(one["status"] for one in found) == ["failed", "finished"]
    assert any("missing.pt" in one.get("error", "") for one in found)


def test_four_side_by_side(slurm: Slurm, jobs: dict[str, str]) -> None:
    assert slurm.wait(jobs["side"]) == "COMPLETED", slurm.log()
    found = runs(slurm.work / "multirun" / "side")
    assert [(summary(run)["status"], summary(run)["steps"]) for run in found] == [("finished", 6)] * 4
    assert len({run.name.rpartition("_")[0] for run in found}) == 4


def test_msub(slurm: Slurm, jobs: dict[str, str]) -> None:
    ends(slurm, jobs["msub"], 6, processes=2)


def test_msub_side_by_side_one_of_which_fails(slurm: Slurm, jobs: dict[str, str]) -> None:
    assert slurm.wait(jobs["beside"]) == "FAILED", slurm.log()
    assert sorted(summary(run)["status"] for run in runs(slurm.work / "multirun" / "beside")) == ["failed", "finished"]
    assert "1 of 2 runs failed" in (slurm.work / f"beside_{jobs['beside']}.out").read_text()
