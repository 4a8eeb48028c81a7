"""A run of the version before files moved: its name, its values and its checkpoint mean what they meant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Outcome, metrics, summary
from training.settings.composition import compose

STORED = Path(__file__).parent / "stored_run"
COMMAND = [
    "model=mlp", "model.hidden=[6]", "optimizer=kfac", "dataset.limit_train=0.2", "trainer.max_epochs=null",
    "trainer.max_steps=4", "trainer.checkpoint_every_steps=2", "trainer.eval_every_epochs=null",
    "trainer.eval_every_steps=2", "callbacks=early_stopping", "callbacks.early_stopping.patience=5",
]  # fmt: skip


def test_its_command_is_the_same_run_still() -> None:
    assert compose(COMMAND).id == json.loads((STORED / "summary.json").read_text())["config_id"]


def test_it_goes_on_from_its_checkpoint(command: Callable[..., Outcome], work: Path) -> None:
    run = work / "runs" / "before"
    shutil.copytree(STORED, run)
    before, moved = summary(run), yaml.safe_load((run / "config.yaml").read_text())["callbacks"]["samples"]
    assert moved["_target_"] == "training.adversarial.SamplePlots", "not where it lies today"
    outcome = command(f"resume={run}/checkpoints/step_00000002.pt")
    assert outcome.code == 0, outcome.err
    after = summary(run)
    assert after["status"] == "finished" and after["steps"] == 4
    assert after["final"] == pytest.approx(before["final"], rel=1e-4)  # other processors round otherwise
    assert [(e["event"], e["step"]) for e in metrics(run)] == [("eval", 2), ("eval", 4), ("train", 4), ("test", 4)]
