"""Checkpoint files: whole or absent, verified, rotated."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from training import UserError
from training.runs import checkpoints
from training.runs.checkpoints import CheckpointError
from training.runs.folder import RunFolder, atomic_file


def state(step: int = 1, size: int = 100) -> dict:
    return {"format": checkpoints.FORMAT, "step": step, "tensor": torch.full((size,), float(step))}


def test_round_trip(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "a.pt", state())
    loaded = checkpoints.load(tmp_path / "a.pt")
    assert loaded["step"] == 1 and torch.equal(loaded["tensor"], torch.ones(100))


def test_every_flipped_byte_of_the_content_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    checkpoints.save(path, state())
    content = path.read_bytes()
    start = content.index(torch.ones(100).numpy().tobytes())
    for position in (start, start + 200, start + 399):
        damaged = bytearray(content)
        damaged[position] ^= 64
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoints.load(path)


@pytest.mark.parametrize("content", [b"", b"no zip file", b"PK\x03\x04 half"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.load(tmp_path / "a.pt")


def test_truncated_absent_foreign_and_pickled_files(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoints.load(path)
    checkpoints.save(path, state())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.load(path)
    torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoints.load(path)
    torch.save(state() | {"format": 999}, path)
    with pytest.raises(CheckpointError, match="format 999"):
        checkpoints.load(path)
    torch.save(state() | {"code": Path("/")}, path)  # an arbitrary object: loading it could run code
    with pytest.raises(CheckpointError, match="holds other objects than tensors and is not a checkpoint"):
        checkpoints.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    checkpoints.save(path, state(1))
    with pytest.raises(RuntimeError, match="half-way"), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError("half-way")
    assert checkpoints.load(path)["step"] == 1
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path; from training.runs import checkpoints\n"
        "from tests.training.test_checkpoints import state\n"
        "path = Path(sys.argv[1]); checkpoints.save(path, state(1))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: checkpoints.save(path, state(2, 100_000))\n"
        "except (OSError, RuntimeError): sys.exit(7)\n"
    )
    path = tmp_path / "a.pt"
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert checkpoints.load(path)["step"] == 1
    assert os.listdir(tmp_path) == ["a.pt"]


def test_kill_9_while_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    script = (
        "import itertools, sys; from pathlib import Path; from training.runs import checkpoints\n"
        "from tests.training.test_checkpoints import state\n"
        "for i in itertools.count(1):\n"
        "    checkpoints.save(Path(sys.argv[1]), state(i, 1_000_000)); print(i, flush=True)\n"
    )
    path = tmp_path / "a.pt"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(random.Random(time.time_ns()).uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    loaded = checkpoints.load(path)
    assert torch.equal(loaded["tensor"], torch.full((1_000_000,), float(loaded["step"])))


def test_latest_passes_over_broken_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert checkpoints.latest(tmp_path) is None
    for step in (5, 10, 100):
        checkpoints.save(checkpoints.step_file(tmp_path, step), state(step))
    checkpoints.save(tmp_path / "best.pt", state(999))
    checkpoints.step_file(tmp_path, 100).write_bytes(b"torn")
    found = checkpoints.latest(tmp_path)
    assert found is not None and found[0].name == "step_00000010.pt" and found[1]["step"] == 10
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "step_00000100.pt is damaged" in caplog.text
    for path in tmp_path.glob("step_*"):
        path.write_bytes(b"torn")
    assert checkpoints.latest(tmp_path) is None


def test_rotation(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10, 11):
        checkpoints.save(checkpoints.step_file(tmp_path, step), state(step))
    checkpoints.save(tmp_path / "best.pt", state(2))
    (tmp_path / ".step_00000012.pt.77.tmp").write_bytes(b"left by a killed process")
    checkpoints.rotate(tmp_path, keep=2, newest=10)  # 11 is of a past that was taken back
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "step_00000009.pt", "step_00000010.pt"]
    checkpoints.rotate(tmp_path, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "step_00000010.pt"]


def test_what_a_signal_asked_for_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    """Stopped at 7, at 8 and at 10, and else saved every three steps: what stays is what an unstopped run leaves."""
    for step in (3, 6, 7, 8, 9, 10, 12):
        checkpoints.save(checkpoints.step_file(tmp_path, step), state(step))
        checkpoints.rotate(tmp_path, keep=2, newest=step, planned=lambda step: step % 3 == 0)
        before = step - 1 - (step - 1) % 3
        wanted = [at for at in (before, step) if at]
        assert [checkpoints.step_file(tmp_path, at).name for at in wanted] == sorted(os.listdir(tmp_path))


def test_link_replaces_and_outlives_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, step = tmp_path / "best.pt", tmp_path / "step_00000001.pt"
    checkpoints.save(best, state(2))
    checkpoints.save(step, state(1))
    checkpoints.link(best, step)
    checkpoints.save(best, state(3))  # must not write through to the other name
    assert checkpoints.load(step)["step"] == 2

    def refuse(*_: object) -> None:
        raise OSError("this file system has no links")

    monkeypatch.setattr(os, "link", refuse)
    checkpoints.link(best, step)
    assert checkpoints.load(step)["step"] == 3 and sorted(os.listdir(tmp_path)) == [best.name, step.name]


def test_a_place_that_is_no_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written .*: set paths\.runs"):
        RunFolder.create(tmp_path / "runs" / "run", "")
    with pytest.raises(UserError, match="is not a run folder"):
        RunFolder.open(tmp_path)


def test_run_folders_never_collide(tmp_path: Path) -> None:
    folders = [RunFolder.create(tmp_path / "a" / "run", f"n: {i}\n") for i in range(3)]
    assert [f.path.name for f in folders] == ["run", "run-2", "run-3"]
    assert RunFolder.open(folders[1].path).config_file.read_text() == "n: 1\n"
    assert folders[0].read_summary() is None
    folders[0].write_summary({"loss": float("nan"), "best": {"value": float("inf")}, "steps": 3})
    assert folders[0].read_summary() == {"loss": None, "best": {"value": None}, "steps": 3}
