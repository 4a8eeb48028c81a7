"""optimizer.damping=auto as a user types it, on every kind of data set that has targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Outcome, metrics, runs, summary, unfinish
from training.runs import checkpoints

STEPS = (
    "callbacks=none", "logger=quiet", "trainer.max_epochs=null", "trainer.max_steps=8", "trainer.log_every_steps=2",
    "trainer.eval_every_epochs=null", "optimizer.damping=auto",
)  # fmt: skip
IMAGES = ("dataset=digits_autoencoder", "model=autoencoder_curves", "model.hidden=[32]")
TEXT = (
    "dataset=text_file", "dataset.path=text.txt", "dataset.sequence=8", "dataset.batch_size=4", "model=gpt1_mini",
    "model.layers=1", "model.width=16",
)  # fmt: skip
KINDS = {
    "classification": ("model=mlp", "model.hidden=[16]", "trainer.label_smoothing=0.1", "trainer.accumulate=2"),
    "bernoulli": IMAGES,
    "gaussian": (*IMAGES, "dataset.likelihood=gaussian", "trainer.precision=bf16"),
    "language": TEXT,
}


@pytest.mark.parametrize("optimizer", ["kfac", "exact_ng"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run(kind: str, optimizer: str, command: Callable[..., Outcome], work: Path) -> None:
    (work / "text.txt").write_text("the cat sat on the mat and the dog lay by the door\n" * 60)
    outcome = command(*STEPS, *KINDS[kind], f"optimizer={optimizer}", "optimizer.damping_unit=layer")
    assert outcome.code == 0, outcome.err
    assert "the likelihood's" not in outcome.err  # the loss is it
    (folder,) = runs(work)
    logged = [event for event in metrics(folder) if event["event"] == "train"]
    assert summary(folder)["status"] == "finished" and logged
    assert all(event["curvature/damping"] > 0 for event in logged)
    assert 0 < logged[0]["curvature/reduction_ratio"] < 2


def test_it_resumes_by_itself(command: Callable[..., Outcome], work: Path) -> None:
    words = (*STEPS, *KINDS["classification"], "optimizer=ekfac", "trainer.checkpoint_every_steps=4")
    assert command(*words).code == 0
    (folder,) = runs(work)
    whole, lines = checkpoints.load(folder / "checkpoints" / "step_00000008.pt"), metrics(folder)
    unfinish(folder)
    outcome = command(*words, "resume=auto")
    assert outcome.code == 0, outcome.err
    again = checkpoints.load(folder / "checkpoints" / "step_00000008.pt")
    assert all(torch.equal(again["model"][key], value) for key, value in whole["model"].items())
    assert metrics(folder) == lines


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("optimizer=kfac", "trainer.clip_norm=1"), "trainer.clip_norm must be null where damping is auto"),
        (
            ("dataset=digits_generation", "model=dcgan", "optimizer@critic=kfac", "critic.damping=auto"),
            "damping must be a number for generation",
        ),
        (("optimizer=kfac", "optimizer.damping=much"), "optimizer.damping must be a number or one of auto, got 'much'"),
        (("optimizer=adafisher",), "optimizer.damping must be a number, got 'auto'"),
    ],
)
def test_what_cannot_be(words: tuple[str, ...], sentence: str, command: Callable[..., Outcome], work: Path) -> None:
    own = ("optimizer.damping=auto",) if not any("damping=" in word for word in words) else ()
    outcome = command("logger=quiet", "callbacks=none", *words, *own)
    assert outcome.code == 1 and outcome.sentence().startswith(sentence), outcome.err
    assert not (work / "runs").exists()
