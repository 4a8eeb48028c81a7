"""The end of a run is one thing: whole, or made by whoever resumes it, with an unharmed one's files."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import metrics, runs, summary
from tests.survival.kills import at_file, command
from tests.training.small_run import differences, fit
from tests.training.test_resume import scalars
from training import UserError
from training.callbacks import Callback
from training.runs import checkpoints
from training.runs.run import Run

RUN = (
    "model=conv_autoencoder", "dataset=digits_autoencoder", "dataset.limit_train=0.2", "optimizer=sgd",
    "optimizer.lr=0.01", "trainer.max_steps=6", "trainer.max_epochs=null", "trainer.eval_every_steps=2",
    "trainer.eval_every_epochs=null", "trainer.log_every_steps=4", "trainer.checkpoint_every_steps=4", "resume=auto",
)  # fmt: skip


def clean(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without what depends on the time."""
    final = {name: value for name, value in summary["final"].items() if not name.startswith("time/")}
    return {key: summary[key] for key in ("status", "best", "steps", "epochs", "error", "config_id")} | {"final": final}


def assert_same(one: Path, other: Path) -> None:
    """The same files with the same numbers; curves, which show seconds, are there."""
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    assert {path.name for path in (one / "checkpoints").iterdir()} == {
        path.name for path in (other / "checkpoints").iterdir()
    }
    assert metrics(one) == metrics(other) and scalars(one) == scalars(other)
    assert clean(summary(one)) == clean(summary(other))
    pictures = [np.asarray(Image.open(run / "reconstructions.png")) for run in (one, other)]
    assert (pictures[0] == pictures[1]).all()
    for name in ("best.pt", "step_00000006.pt"):
        states = [checkpoints.load(run / "checkpoints" / name) for run in (one, other)]
        for key in ("model", "optimizer", "counters", "best", "callbacks"):
            assert list(differences(states[0][key], states[1][key])) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    ended = command(*RUN, cwd=folder)
    assert ended.code == 0, ended.err
    return runs(folder)[0]


@pytest.mark.parametrize(
    ("file", "number"),
    [
        ("step_00000006.pt", signal.SIGKILL), ("loss.png", signal.SIGKILL), ("reconstructions.png", signal.SIGTERM),
        ("summary.json", signal.SIGKILL),
    ],
)  # fmt: skip
def test_an_end_that_was_cut_off_is_made_by_the_next_launch(
    whole: Path, tmp_path: Path, file: str, number: signal.Signals
) -> None:
    ended = command(*RUN, cwd=tmp_path, before=at_file(file, number))
    assert ended.code == (75 if number == signal.SIGTERM else -signal.SIGKILL), ended.err
    (run,) = runs(tmp_path)
    if number == signal.SIGTERM:
        assert summary(run)["status"] == "interrupted" and "makes what is missing" in ended.err
    else:
        assert not (run / "summary.json").exists()
    again = command(*RUN, cwd=tmp_path)
    assert again.code == 0 and f"resuming runs/{run.parent.name}/{run.name} from step_" in again.out, again.err
    assert runs(tmp_path) == [run] and list(run.rglob("*.tmp")) == []
    shutil.rmtree(tmp_path / "runs" / "none", ignore_errors=True)
    assert_same(whole, run)
    steps = [event["step"] for event in metrics(run) if event["event"] == "train"]
    assert steps == sorted(set(steps)), "no step twice"
    assert "not trained again" in command(*RUN, cwd=tmp_path).out, "once it is whole it stays so"


class Spoil(Callback):
    """In the last step: weights that are not the best, and a file of the best that is damaged."""

    def on_step(self, run: Run) -> None:
        if run.step == 7:
            run.optimizer.param_groups[0]["lr"] = 1.0
        if run.step == 8:
            content = bytearray((best := run.folder.checkpoints / "best.pt").read_bytes())
            content[len(content) // 2] ^= 1
            best.unlink()  # which is step_00000006.pt, too
            best.write_bytes(content)


def test_a_damaged_best_is_told_at_the_end_and_mended_by_the_next_launch(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options: dict[str, Any] = {"optimizer": "adam", "lr": 0.01, "schedule": "none", "max_steps": 8}
    options |= {"eval_every_steps": 2, "checkpoint_every_steps": 2, "monitor": "val/loss"}
    with pytest.raises(UserError, match=r"best.pt is damaged .* Resume the run: its end is made with the best"):
        fit(run, callbacks=[Spoil()], **options)
    assert "best.pt is damaged" in summary(run)["error"] and summary(run)["status"] == "failed"
    again, _ = fit(run, resume=True, **options)
    assert again["status"] == "finished" and again["best"]["step"] == 6
    assert again["best"]["test/loss"] < again["final"]["test/loss"]
    assert checkpoints.load(run / "checkpoints" / "best.pt")["best"]["step"] == 6
