"""`-m hydra/launcher=slurm` on a real SLURM: jobs that end, fail, are asked to stop and vanish; sentences without."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome, command, quick, work  # noqa: F401 - fixtures
from tests.conftest import ROOT
from tests.slurm.conftest import PATIENCE, QUICK, Slurm, started, summary, until


@pytest.mark.slow
def test_a_sweep(slurm: Slurm) -> None:
    sweep = slurm.work / "multirun" / "queued"
    given = [
        sys.executable, "train.py", "--config-dir", str(slurm.work / "site"), "-m", "hydra/launcher=slurm",
        "hydra.launcher.cluster=toy", *QUICK, "callbacks=slow", "trainer.max_steps=300",
        "trainer.checkpoint_every_steps=10", "seed=0,1,2", "init_from=null,missing.pt", "name=queued",
        f"paths.sweeps={slurm.work}/multirun",
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(given, cwd=ROOT, env=slurm.environment, text=True, **pipes) as driver:
        try:
            acts = {0: ("scancel", "--signal=USR2"), 1: ("scancel", "--signal=KILL"), 2: ("scancel",)}
            while acts:  # each once it has saved for the first time
                seed = until(lambda: [seed for seed in acts if _begun(sweep, seed)], "a start", slurm.log)[0]
                job = f"{_number(slurm)}_{2 * seed}" + (".0" if seed == 1 else "")  # the step alone, not the job
                assert slurm.run(*acts.pop(seed), job).returncode == 0
            out, err = driver.communicate(timeout=PATIENCE)
        finally:
            driver.kill()
    assert driver.returncode == 1, err
    number = _number(slurm)

    def ended() -> list[str]:  # a job ends a moment after it has written what the driver waits for
        states = [slurm.state(f"{number}_{index}") for index in range(6)]
        return states if not {"RUNNING", "COMPLETING"} & {*states} else []

    assert until(ended, "the last end", slurm.log) == [
        "COMPLETED", "FAILED", "FAILED", "FAILED", "CANCELLED", "FAILED"
    ]  # fmt: skip
    found = summary(_folder(sweep, "null", 0))
    assert (found["status"], found["steps"]) == ("finished", 300)
    for seed in range(3):
        assert "no such file" in summary(_folder(sweep, "missing.pt", seed))["error"]
    assert [slurm.restarts(f"{number}_{index}") for index in (0, 2, 4)] == [1, 0, 0]
    table = [line.split("│")[1:3] for line in out.splitlines() if line.startswith("│")]
    told = {name.strip(): status.strip() for name, status in table}
    assert told == {"init_from-null": "1 finished, 2 failed", "init_from-missing.pt": "3 failed"}
    assert "the job has left the queue without a result" in out and "ended by scancel" in out


def _begun(sweep: Path, seed: int) -> bool:
    return any(started(path) for path in sweep.glob(f"init_from-null_seed-{seed}_*"))


def _folder(sweep: Path, which: str, seed: int) -> Path:
    (folder,) = sweep.glob(f"init_from-{which}_seed-{seed}_*")
    return folder


def _number(slurm: Slurm) -> str:
    """The array's number."""
    shown = slurm.run("scontrol", "-o", "show", "job").stdout.splitlines()
    return next(line for line in shown if "JobName=queued" in line).partition("ArrayJobId=")[2].split()[0]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("hydra.launcher.cluster=mine",), "there is no cluster=mine"),
        (("hydra.launcher.cluster=msub",), "scripts/submit.py array=N does it there"),
        (("hydra.launcher.time=soon",), "time=soon cannot be read"),
        ((), "there is no sbatch here"),
    ],
)
def test_what_cannot_be(
    quick: Callable[..., Outcome],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argv: tuple[str, ...], says: str,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = quick("-m", "seed=0,1", "hydra/launcher=slurm", *argv)
    assert outcome.code == 1 and says in outcome.sentence()


def test_a_cluster_is_no_group_of_a_run(quick: Callable[..., Outcome]) -> None:  # noqa: F811
    assert "cluster=slurm is for scripts/submit.py" in quick("cluster=slurm").sentence()
