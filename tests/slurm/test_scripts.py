"""Scripts of scripts/submit.py on a real SLURM: every way to start, to be stopped and to go on, and to fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.conftest import QUICK, Slurm, runs, started, summary, until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]

#: Steps for which a minute is too short: the signal comes half a minute before the end, or later.
LONG = 1100
SLOW = (*QUICK, "callbacks=slow", "trainer.checkpoint_every_steps=10")
#: What is written of runs that end at once.
FAST = (*QUICK, "callbacks=none", "trainer.max_steps=6")


@pytest.fixture(scope="module")
def jobs(slurm: Slurm) -> dict[str, str]:
    """All jobs, submitted at once, so that they wait for their ends together; the longest one starts first."""
    given: dict[str, str] = {}

    def submit(name: str, *options: str, train: tuple[str, ...], cluster: str = "toy") -> None:
        given[name] = slurm.submit(name, *options, train=train, cluster=cluster)

    submit("limit", "time=60s", "signal=3", train=(*SLOW, f"trainer.max_steps={LONG}"))
    until(lambda: started(folder(slurm, given["limit"])), "the first checkpoint", slurm.log)
    submit("taken", "partition=low", train=(*SLOW, "trainer.max_steps=300"))
    submit("srun", "nodes=2", train=(*SLOW, "trainer.max_steps=300", "seed=1"))
    submit("torchrun", "nodes=2", "launcher=torchrun", train=(*SLOW, "trainer.max_steps=300", "seed=2"))
    submit("gone", train=(*SLOW, "trainer.max_steps=300", "seed=4"))
    submit("array", "array=2", train=(*FAST, "init_from=null,missing.pt", "name=array"))
    submit("side", "side=4", "nodes=2", "gpus=2", train=(*FAST, "seed=0,1,2,3", "name=side", "trainer.device=cpu"))
    submit("msub", "nodes=2", train=(*FAST, "seed=3"), cluster="bridge")
    submit("beside", "side=2", train=(*FAST, "init_from=null,missing.pt", "name=beside"), cluster="bridge")
    acts = {
        "taken": ("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"),
        "srun": ("scontrol", "requeue", given["srun"]),
        "torchrun": ("scancel", "--signal=USR1", given["torchrun"]),
        "gone": ("scancel", given["gone"]),
    }
    while acts:  # each is stopped once it has saved for the first time
        name = until(lambda: next((n for n in acts if started(folder(slurm, given[n]))), None), "a start", slurm.log)
        assert slurm.run(*acts.pop(name)).returncode == 0
    return given


def folder(slurm: Slurm, number: str) -> Path:
    """Where a job's run is."""
    return slurm.work / "runs" / f"job_{number}"


def ends(slurm: Slurm, number: str, steps: int, restarts: int = 0, processes: int = 1) -> None:
    """Assert how a job of one run ends: in one folder, with so many steps, whatever happened on the way."""
    assert slurm.wait(number) == "COMPLETED", slurm.log()
    (run,) = runs(folder(slurm, number))
    found = summary(run)
    assert (found["status"], found["steps"], found["hardware"]["processes"]) == ("finished", steps, processes)
    assert slurm.restarts(number) >= restarts, slurm.log()


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


def test_out_of_time(slurm: Slurm, jobs: dict[str, str]) -> None:
    ends(slurm, jobs["limit"], LONG, restarts=1)


def test_nothing_is_left_beside_the_runs(slurm: Slurm, jobs: dict[str, str]) -> None:
    kept = {path.name for path in slurm.work.glob(".stopped*")}
    assert kept <= {f".stopped_{jobs['gone']}"}, "scancel ends the script before it has tidied up"
