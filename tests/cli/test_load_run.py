"""A run folder opened again: its model with the weights of any checkpoint, its data and task, and nothing it brings."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Outcome, summary
from training.errors import UserError
from training.runs import checkpoints
from training.settings.loading import load_run

RUN = [
    "model=mlp", "model.hidden=[6]", "optimizer=kfac", "dataset.limit_train=0.2", "trainer.max_epochs=null",
    "trainer.max_steps=4", "trainer.checkpoint_every_steps=2", "trainer.eval_every_epochs=null",
    "trainer.eval_every_steps=2", "trainer.keep_checkpoints=5", "callbacks=none", "name=loaded",
]  # fmt: skip


def test_a_run_is_opened_with_the_weights_that_are_asked_for(command: Callable[..., Outcome], work: Path) -> None:
    outcome = command(*RUN)
    assert outcome.code == 0, outcome.err
    (folder,) = (work / "runs" / "loaded").iterdir()
    before = torch.get_rng_state()
    run = load_run(folder, "last")
    assert torch.equal(torch.get_rng_state(), before), "the caller's own draws go on as they were"
    assert run.step == 4 and not run.model.training and [step for step, _ in run.checkpoints()] == [2, 4]
    saved = checkpoints.load(folder / "checkpoints" / "step_00000004.pt")["model"]
    assert all(torch.equal(run.model.state_dict()[name], value) for name, value in saved.items())
    with torch.no_grad():
        losses = [run.task.loss(run.model(x), y) * len(y) for x, y in run.data.val.epoch(0)]
    mean = float(sum(losses)) / sum(len(y) for _, y in run.data.val.epoch(0))
    assert mean == pytest.approx(summary(folder)["final"]["val/loss"], rel=1e-5), "its data and loss are the run's own"

    assert run.load(2) == 2 and run.load("best") in (2, 4)
    begun, again = load_run(folder / "checkpoints", None), load_run(folder, None).model.state_dict()
    assert begun.step == 0 and all(torch.equal(again[k], v) for k, v in begun.model.state_dict().items())
    assert not any(torch.equal(again[name], saved[name]) for name in saved), "untrained"
    assert type(run.build_optimizer()).__name__ == "KFAC"

    with pytest.raises(UserError, match=r"no checkpoint step_00000003\.pt; steps that are there: 2, 4"):
        run.load(3)
    with pytest.raises(UserError, match="there is no such file or folder"):
        load_run(work / "nowhere")
    shutil.copytree(folder, work / "foreign")
    text = (folder / "config.yaml").read_text()
    (work / "foreign" / "config.yaml").write_text(text.replace("_target_: models.mlp", "_target_: os.path.join"))
    with pytest.raises(UserError, match=r"model._target_=os.path.join, which is no part of Curvlab"):
        load_run(work / "foreign")
