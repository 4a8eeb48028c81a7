"""The edge of the disk: full, read-only, without a right, gone. A sentence, nothing lost, and later it goes on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import QUICK, metrics, runs, summary
from tests.survival import kills
from training.runs import checkpoints

RUN = (*QUICK, "optimizer=adam", "model.hidden=[256]", "trainer.max_epochs=2", "logger=default", "callbacks=default",
       "trainer.checkpoint_every_steps=15", "resume=auto")  # fmt: skip
SIZE = 8 << 20
root = pytest.mark.skipif(
    sys.platform != "linux" or os.getuid() != 0, reason="only root on Linux mounts a small disk, or gives up its rights"
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", place], check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    ended = kills.command(*RUN, cwd=folder)
    assert ended.code == 0, ended.err
    return runs(folder)[0]


def filling(disk: Path) -> Callable[[], None]:
    def fill() -> None:
        with (disk / "filler").open("ab", buffering=0) as file:
            for size in (1 << 16, 1 << 10, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:
                    continue

    return fill


def assert_goes_on(folder: Path, whole: Path) -> None:
    again = kills.command(*RUN, cwd=folder)
    assert again.code == 0, again.err
    (run,) = runs(folder)
    assert metrics(run) == metrics(whole) and summary(run)["status"] == "finished"
    assert summary(run)["best"] == summary(whole)["best"]
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}


# What has just been written when the disk is full; what comes next finds no room.
@root
@pytest.mark.parametrize("last", ["config.yaml", "best.pt", "accuracy.png"])
def test_a_full_disk(disk: Path, whole: Path, last: str) -> None:
    ended = kills.command(*RUN, cwd=disk, before=kills.at_file(last, filling(disk)), logs=disk.parent)
    assert ended.code == 1, "not 0, whatever it is in"
    assert "cannot be written (No space left on device): make room" in ended.sentence(), ended.err
    (run,) = runs(disk)
    for path in (run / "checkpoints").glob("*.pt"):
        checkpoints.load(path)  # all that is there is whole
    assert last == "config.yaml" or [*run.glob("checkpoints/step_*.pt")], "what is good stays"
    for line in (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else ():
        json.loads(line)
    assert not (run / "summary.json").exists() or summary(run)["status"] != "finished"
    assert list(run.rglob("*.tmp")) == []
    (disk / "filler").unlink()
    assert_goes_on(disk, whole)


@root
def test_a_disk_that_is_full_from_the_start(disk: Path) -> None:
    filling(disk)()
    ended = kills.command(*RUN, f"paths.runs={disk}/runs", cwd=disk.parent)
    assert ended.code == 1 and "cannot be written (No space left on device): set paths.runs" in ended.sentence()
    assert not list(disk.rglob("config.yaml"))


def test_a_checkpoint_that_does_not_fit_costs_none_that_is_there(whole: Path, tmp_path: Path) -> None:
    """A limit of a file's size stands in for the disk; the reason is told, not what torch makes of it."""
    size = (whole / "checkpoints" / "best.pt").stat().st_size

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size))

    ended = kills.command(*RUN, cwd=tmp_path, before=kills.at_file("step_00000015.pt", limit))
    (run,) = runs(tmp_path)
    assert ended.code == 1 and "cannot be written (File too large): make room, and resume the run" in ended.sentence()
    assert summary(run)["status"] == "failed" and "File too large" in summary(run)["error"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000015.pt"]
    assert_goes_on(tmp_path, whole)


def test_a_folder_that_is_deleted_under_a_run(tmp_path: Path) -> None:
    def delete() -> None:
        shutil.rmtree(runs(tmp_path)[0])

    ended = kills.command(*RUN, cwd=tmp_path, before=kills.at_file("step_00000015.pt", delete))
    assert ended.code == 1 and "cannot be written (No such file or directory): its folder was moved or" in ended.err
    assert "Traceback" not in ended.err


@root
@pytest.mark.parametrize("place", [".", "checkpoints", "tensorboard", "metrics.jsonl", "train.log"])
def test_what_may_not_be_written_is_told_before_the_first_step(whole: Path, tmp_path: Path, place: str) -> None:
    run = tmp_path / "runs" / whole.parent.name / whole.name
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    sorted((run / "checkpoints").glob("step_*.pt"))[-1].unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (run / place).chmod(0o555 if (run / place).is_dir() else 0o444)
    ended = kills.command(*RUN, cwd=tmp_path, before=kills.bound)
    assert ended.code == 1 and "cannot be written (Permission denied): see to it that this user may" in ended.sentence()
    assert {path: path.read_bytes() for path in before} == before, "no step was taken"


@root
def test_a_read_only_disk(whole: Path, disk: Path) -> None:
    run = disk / "runs" / whole.parent.name / whole.name
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for argv in ((*RUN, f"paths.runs={disk}/runs"), (*RUN[:-1], f"paths.runs={disk}/runs")):
        ended = kills.command(*argv, cwd=disk.parent)
        assert ended.code == 1 and "cannot be written (Read-only file system)" in ended.sentence(), ended.err
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert_goes_on(disk, whole)
