"""A SLURM that lives as long as the tests of this folder, and what they ask of it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

HERE = Path(__file__).parent
NEEDED = ("sbatch", "srun", "slurmctld", "slurmd", "munged")
#: Seconds within which whatever is waited for must have happened, on a machine that does other things, too.
PATIENCE = 300
#: A small net on the embedded digits.
QUICK = ("model=mlp", "model.hidden=[16]", "optimizer=sgd", "logger=quiet", "trainer.max_epochs=null")

#: Steps for which a minute is too short: the signal comes half a minute before the end, or later.
LONG = 1100
SLOW = (*QUICK, "callbacks=slow", "trainer.checkpoint_every_steps=10")
#: What is written of runs that end at once.
FAST = (*QUICK, "callbacks=none", "trainer.max_steps=6")


@dataclass
class Slurm:
    """A running SLURM, and a site that describes it.

    Attributes:
        folder: its own.
        work: where jobs write.
        environment: of commands.
    """

    folder: Path
    work: Path
    environment: dict[str, str]

    def run(self, *words: str, **further: Any) -> subprocess.CompletedProcess[str]:
        """A command, as a user would give it in the clone."""
        return subprocess.run(words, cwd=ROOT, env=self.environment, capture_output=True, text=True, **further)

    def submit(self, name: str, *options: str, train: tuple[str, ...], cluster: str = "toy") -> str:
        """Submit by scripts/submit.py; the job's number."""
        site = ("--config-dir", str(self.work / "site"))
        given = (*site, "--no-check", "--output", str(self.work / f"{name}.sh"), f"cluster={cluster}", f"name={name}")
        done = self.run(sys.executable, "scripts/submit.py", *given, *options, "--", *site, *train)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[3]

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job."""
        shown = self.run("scontrol", "-o", "show", "job", number).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def state(self, number: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, ..."""
        return self.job(number).get("JobState", "UNKNOWN")

    def wait(self, number: str) -> str:
        """The state in which a job ended."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
        until(lambda: self.state(number) in over, f"job {number} to end", self.log)
        return self.state(number)

    def restarts(self, number: str) -> int:
        """How often a job has come back to the queue."""
        return int(self.job(number).get("Restarts", "0"))

    def log(self) -> str:
        """What all jobs have printed."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.work.glob("*.out")))


def until(condition: Callable[[], Any], what: str, explain: Callable[[], str] = str) -> Any:
    """Wait for something; its value."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"waited {PATIENCE} s for {what}\n{explain()}")


def runs(folder: Path) -> list[Path]:
    """The run folders below a folder."""
    return sorted(path.parent for path in folder.rglob("config.yaml"))


def summary(run: Path) -> dict[str, Any]:
    """How a run ended."""
    return json.loads((run / "summary.json").read_text())


def started(folder: Path) -> bool:
    """Whether a run below a folder has saved its first checkpoint."""
    return any(folder.rglob("step_*.pt"))


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


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM of three pretend machines, ended with the tests, whatever becomes of them."""
    if missing := [name for name in NEEDED if not shutil.which(name)]:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    folder, work = (tmp_path_factory.mktemp(name) for name in ("slurm", "work"))
    toy = str(HERE / "toy.sh")
    for _ in range(5):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1] - 10
        done = subprocess.run([toy, "start", str(folder), str(port)], capture_output=True, text=True)
        if done.returncode == 0:
            break
        subprocess.run([toy, "stop", str(folder)], capture_output=True)
    else:
        pytest.skip(f"SLURM is installed, but does not start here: {done.stderr.strip()[-300:]}")
    guard = subprocess.Popen([toy, "guard", str(folder), str(os.getpid())], start_new_session=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "CURVLAB_"))}
    environment |= {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{HERE / 'bin'}:{os.environ['PATH']}"}
    _describe(work)
    try:
        yield Slurm(folder, work, environment)
    finally:
        guard.kill()
        guard.wait()
        subprocess.run([toy, "stop", str(folder)], capture_output=True, timeout=60)


def _describe(work: Path) -> None:
    """The site's two files, and a configuration that makes runs last."""
    common = {
        "cpus": 1, "python": sys.executable, "scratch": str(work), "logs": str(work), "time": "10m", "signal": 25,
        "environment": {} if _resolves("n1") else {"MASTER_ADDR": "127.0.0.1"},
    }  # fmt: skip
    (work / "site" / "cluster").mkdir(parents=True)
    for name, system in (("toy", "slurm"), ("bridge", "msub")):
        further = {"filesystems": ["work"]} if system == "msub" else {}
        text = json.dumps({"system": system, **common, **further})  # which is YAML, too
        (work / "site" / "cluster" / f"{name}.yaml").write_text(text)
    (work / "site" / "callbacks").mkdir()
    (work / "site" / "callbacks" / "slow.yaml").write_text(
        "# Runs that last.\nslow:\n  _target_: tests.slurm.slow.Slow\n  seconds: 0.05\n"
    )


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


@pytest.fixture(scope="session")
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
