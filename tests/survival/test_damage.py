"""Files that a disk, a crash or a hand has damaged: a sentence, a step back to what is good, and nothing lost."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import train
from tests.cli.conftest import QUICK, Outcome, command, metrics, quick, runs, summary, work  # noqa: F401 - fixtures
from training.runs import checkpoints
from training.runs.checkpoints import CheckpointError

Give = Callable[..., Outcome]
RUN = (*QUICK, "optimizer=sgd", "optimizer.lr=0.01", "trainer.max_epochs=3", "logger=default", "callbacks=default",
       "trainer.keep_checkpoints=9", "resume=auto")  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main(RUN) == 0
    yield runs(folder)[0]


@pytest.fixture
def partial(whole: Path, work: Path) -> Path:  # noqa: F811
    """A run that was killed after its third epoch: its last checkpoint is not written, nor its end."""
    run = work / "runs" / whole.parent.name / whole.name
    shutil.copytree(whole, run)
    (run / "summary.json").unlink()
    sorted((run / "checkpoints").glob("step_*.pt"))[-1].unlink()
    return run


def steps(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step_*.pt"))


def test_any_flipped_bit_is_noticed(tmp_path: Path, whole: Path) -> None:
    """Of the whole file, where its archive's own checksums cover contents alone: names, lengths, places, comments."""
    path = tmp_path / "a.pt"
    content = steps(whole)[0].read_bytes()
    chance = random.Random(1)
    ends = {*range(400), *range(len(content) - 400, len(content))}  # headers, the directory, the checksum
    for place in sorted(ends | {chance.randrange(len(content)) for _ in range(300)}):
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoints.load(path)
    for length in (0, 1, 20, len(content) // 2, len(content) - 30, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoints.load(path)


@pytest.mark.parametrize("damage", ["name", "folder", "keys", "inner keys"])
def test_a_damaged_newest_checkpoint_is_a_step_back(
    partial: Path, whole: Path, command: Give, damage: str  # noqa: F811
) -> None:
    first, newest = steps(partial)
    state = checkpoints.load(newest)
    newest.unlink()
    if damage == "folder":
        (newest / "inside").mkdir(parents=True)
    elif damage == "name":  # of an entry, as an archive without our checksum has it
        import torch

        torch.save(state, newest)
        newest.write_bytes(newest.read_bytes().replace(b"/data/0", b"/d\xe1ta/0"))
    else:
        del (state if damage == "keys" else state["counters"])["optimizer" if damage == "keys" else "step"]
        checkpoints.save(newest, state)
    outcome = command(*RUN)
    if damage == "inner keys":  # nobody writes such a file by accident: a sentence
        assert outcome.code == 1 and "is incomplete (KeyError('step')): use an earlier one" in outcome.err
        outcome = command(*RUN[:-1], f"resume={first}")
    assert outcome.code == 0, outcome.err
    assert f"from {first.name}" in outcome.out
    assert metrics(partial) == metrics(whole) and summary(partial)["best"] == summary(whole)["best"]
    kept = [path.name for path in partial.glob("checkpoints/step_*.pt")]
    assert sorted(kept) == [path.name for path in steps(whole)]


@pytest.mark.parametrize("content", ["", "[1]", "\x00\xff"])
def test_a_damaged_summary_is_made_anew(
    partial: Path, whole: Path, command: Give, caplog: pytest.LogCaptureFixture, content: str  # noqa: F811
) -> None:
    (partial / "summary.json").write_text(content, encoding="latin-1")
    outcome = command(*RUN)
    assert outcome.code == 0 and "summary.json is damaged: what it said is made anew" in caplog.text
    assert summary(partial)["best"] == summary(whole)["best"] and metrics(partial) == metrics(whole)


def test_damaged_metrics_cost_the_damaged_lines_alone(
    partial: Path, whole: Path, command: Give, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:
    file = partial / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    expected = metrics(whole)
    cut = b"".join(lines[:2]) + lines[2][:20]  # in mid-line, before what the checkpoint relies on
    file.write_bytes(cut)
    outcome = command(*RUN)
    assert outcome.code == 0 and "what is missing stays missing" in caplog.text, outcome.err
    after = metrics(partial)
    assert after[:2] == expected[:2] and after[2:] == expected[-len(after[2:]) :] and after[-1]["event"] == "test"
    assert (partial / "loss.png").exists()

    (partial / "summary.json").unlink()
    spoilt = file.read_bytes().replace(b'"event"', b'\xff"event"', 1)
    file.write_bytes(spoilt)
    for picture in partial.glob("*.png"):
        picture.unlink()
    outcome = command(*RUN)
    assert outcome.code == 0 and "line 1 of" in caplog.text and "is left out" in caplog.text
    assert (partial / "loss.png").exists()


def test_a_damaged_configuration(
    partial: Path, command: Give, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:
    file = partial / "config.yaml"
    good = file.read_text()
    for content in ("", "a: [", good.replace("trainer:", "trained:"), "\x00", "[1, 2]"):
        file.write_text(content)
        assert str(file.relative_to(Path.cwd())) in command(f"resume={partial.relative_to(Path.cwd())}").sentence()
        assert file.read_text() == content
    outcome = command(*RUN)  # which says all that the file would
    assert outcome.code == 0 and "it is written anew" in caplog.text
    assert file.read_text().split("\n", 1)[1] == good.split("\n", 1)[1]


def test_all_checkpoints_damaged(partial: Path, command: Give) -> None:  # noqa: F811
    for path in steps(partial):
        path.write_bytes(b"torn")
    assert "holds no checkpoint that can be read" in command(f"resume={partial}").err
    before = {path: path.stat().st_mtime_ns for path in partial.rglob("*") if path.name != ".lock"}
    outcome = command(*RUN)
    assert outcome.code == 0 and "are damaged, starting a new run" in outcome.out
    assert len(runs(Path.cwd())) == 2, "in a folder of its own"
    assert {path: path.stat().st_mtime_ns for path in before if path.is_file()} == {
        path: at for path, at in before.items() if path.is_file()
    }
    assert json.loads((runs(Path.cwd())[-1] / "summary.json").read_text())["status"] == "finished"
