"""Batch scripts: what is asked for, in the words of two systems; what cannot be, in a sentence; samples are current."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from scripts import submit
from scripts.cluster import samples, site, systems
from scripts.cluster.script import render
from training import UserError
from training.command.cluster import read_time

FULL = [
    "nodes=2", "gpus=4", "cpus=8", "time=1d12h", "memory=64G", "account=ab1", "partition=a100", "qos=long",
    "constraint=nvlink", "exclusive=true", "mail=a@b.org", "modules=[cuda/12.4]", "flags=[--hint=nomultithread]",
    "environment={NCCL_DEBUG: INFO}", "scratch=$SCRATCH/x", "offline=true", "signal=300", "requeue=3",
]  # fmt: skip


def script(*argv: str) -> str:
    words = list(argv)
    return render(site.describe(site.read(words)), site.as_typed(words))


def directives(text: str, prefix: str) -> set[str]:
    return {line.removeprefix(prefix).strip() for line in text.splitlines() if line.startswith(prefix)}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90m", 5400), ("24h", 86400), ("1d12h", 129600), ("30s", 30), ("36:00:00", 129600), ("2-00:30:00", 174600)],
)
def test_times(text: str, seconds: int) -> None:
    assert read_time(text) == seconds


@pytest.mark.parametrize("text", ["60", "soon", "", "1h30", "0h", "12:00", "-5m"])
def test_times_that_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="24h"):
        read_time(text)


def test_one_description_in_two_languages() -> None:
    slurm = directives(script("cluster=slurm", *FULL, "--", "model=mlp"), "#SBATCH")
    assert slurm == {
        "--job-name=mlp", "--output=%x_%j.out", "--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=8", "--mem=64G",
        "--time=1-12:00:00", "--account=ab1", "--partition=a100", "--qos=long", "--exclusive", "--gpus-per-node=4",
        "--constraint=nvlink", "--signal=USR1@300", "--requeue", "--open-mode=append", "--mail-user=a@b.org",
        "--mail-type=END,FAIL", "--hint=nomultithread",
    }  # fmt: skip
    msub = directives(script("cluster=msub", *FULL, "--", "model=mlp"), "#MSUB")
    raw = (
        "--gpus-per-node=4 --constraint=nvlink --signal=USR1@300 --requeue --open-mode=append --mail-user=a@b.org "
        "--mail-type=END,FAIL --hint=nomultithread"
    )
    assert msub == {
        "-r mlp", "-o mlp_%I.out", "-e mlp_%I.out", "-N 2", "-n 8", "-c 8", "-M 2000", "-T 129600", "-A ab1", "-q a100",
        "-Q long", "-m work,scratch", "-x", f'-E "{raw}"',
    }  # fmt: skip


def test_what_a_script_does() -> None:
    text = script("cluster=slurm", *FULL, "--", "model=mlp", "schedules={damping: {end: 1e-3}}")
    for line in (
        "module load cuda/12.4", "source .venv/bin/activate", "export NCCL_DEBUG=INFO", "export OMP_NUM_THREADS=8",
        'export CURVLAB_DATA="$SCRATCH/x/datasets"',
    ):  # fmt: skip
        assert line in text.splitlines()
    start = text[text.index("\nsrun") :]
    assert start.startswith("\nsrun --cpus-per-task=8 --kill-on-bad-exit=1 python train.py model=mlp")
    assert "'schedules={damping: {end: 1e-3}}'" in start and 'paths.runs=$SCRATCH/x/runs/job_$SLURM_JOB_ID"' in start
    assert "resume=auto" in start and "resume=auto" not in script("cluster=slurm", "--", "resume=runs/x")
    assert "[ \"${SLURM_RESTART_COUNT:-0}\" -ge 3 ]" in text


def test_torchrun_ignores_the_signal_that_its_workers_hear() -> None:
    text = script("cluster=slurm", "nodes=2", "gpus=4", "launcher=torchrun", "--", "model=mlp")
    assert {"--ntasks-per-node=1", "--cpus-per-task=16"} <= directives(text, "#SBATCH")
    assert re.search(r"trap \"\" USR1; exec python -m torch\.distributed\.run --nnodes=2 --nproc-per-node=4", text)


SAMPLES = [pytest.param(path, id=f"{path.parent.name}/{path.name}") for path in samples.samples()]


@pytest.mark.parametrize("path", SAMPLES)
def test_samples_are_what_the_program_writes(path: Path) -> None:
    assert path.read_text() == samples.samples()[path], "python -m scripts.cluster.samples writes them anew"
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    lines = path.read_text().splitlines()
    system = systems.find(path.parent.name)
    assert any(line.startswith(system.prefix) for line in lines) and max(map(len, lines)) <= 250
    assert {p for p in path.parent.iterdir() if p.suffix == path.suffix} <= set(samples.samples())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--", "model=mlp"], "which cluster? Give cluster=NAME"),
        (["cluster=slrum", "--", "model=mlp"], "(did you mean 'slurm'?)"),
        (["cluster=slurm", "time=60", "--", "model=mlp"], "time=60 has no unit"),
        (["cluster=slurm", "time=soon", "--", "model=mlp"], "time=soon cannot be read"),
        (["cluster=slurm", "acount=ab1", "--", "model=mlp"], "(did you mean 'account'?)"),
        (["cluster=slurm", "gpus=all", "--", "model=mlp"], "gpus must be a whole number"),
        (["cluster=slurm", "gpus=-1", "--", "model=mlp"], "gpus must be a whole number"),
        (["cluster=slurm", "flags=-x", "--", "model=mlp"], "write flags=[-x]"),
        (["cluster=slurm", "memory=much", "--", "model=mlp"], "memory=much cannot be read"),
        (["cluster=slurm", "time=60s", "--", "model=mlp"], "is before its beginning"),
        (["cluster=slurm", "launcher=mpirun", "--", "model=mlp"], "launcher must be one of srun, torchrun"),
        (["cluster=slurm", "system=pbs", "--", "model=mlp"], "system must be one of slurm, msub"),
        (["cluster=slurm", "array=2", "side=2", "--", "seed=0,1"], "give one of them"),
        (["cluster=slurm", "array=2", "--", "seed=0"], "array and side are for a sweep"),
        (["cluster=slurm", "--", "seed=0,1"], "this is a sweep of 2 runs"),
        (["cluster=slurm", "side=3", "gpus=2", "--", "seed=0,1,2"], "need a GPU each"),
        (["cluster=slurm", "side=2", "launcher=torchrun", "--", "seed=0,1"], "there is no torchrun"),
        (["cluster=slurm", "model=mlp"], "unknown option 'model'"),
        (["cluster=slurm", "--dryrun"], "unknown flag '--dryrun'"),
        (["cluster=slurm", "nodes"], "'nodes' is no option"),
        (["cluster=slurm", "--", "seeed=1"], "(did you mean 'seed'?)"),
    ],
)  # fmt: skip
def test_what_cannot_be(argv: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert submit.main(["--dry-run", *argv]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and says in told.err and len(told.err.splitlines()) == 1, told.err
    assert not told.out


def test_sites_of_one_s_own_and_no_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text("system: slurm\naccount: ab1\ntime: 90:00\n")
    argv = ["cluster=mine", "--config-dir", ".", "--no-check", "--", "model=mlp"]
    assert submit.main(argv) == 1
    assert "put quotes around time" in capsys.readouterr().err
    (tmp_path / "cluster" / "mine.yaml").write_text("system: slurm\naccount: ab1\nlogs: out/logs\n")
    assert submit.main(argv) == 1
    assert "there is no sbatch here" in capsys.readouterr().err
    (kept,) = (tmp_path / "jobs").iterdir()
    assert "--account=ab1" in kept.read_text() and (tmp_path / "out" / "logs").is_dir()
