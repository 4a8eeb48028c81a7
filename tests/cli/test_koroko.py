"""The auto-encoder experiments: each optimizer comes with the hyper-parameters found for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Outcome, metrics, runs, summary
from training.settings.composition import compose

NAMES = ("curves", "mnist", "faces")
PIXELS = {"curves": 784, "mnist": 784, "faces": 625}


@pytest.mark.parametrize("name", NAMES)
def test_the_published_protocol(name: str) -> None:
    values = compose([f"experiment=koroko/{name}"]).values
    batch = {"curves": 256, "mnist": 512, "faces": 1024}[name]
    likelihood = "gaussian" if name == "faces" else "bernoulli"
    published = {"batch_size": batch, "val_from": "test", "likelihood": likelihood, "augment": "none"}
    assert values["dataset"] | published == values["dataset"]
    assert values["trainer"]["max_epochs"] == 200 and values["scheduler"]["_target_"] == "training.schedules.none"
    assert values["model"]["activation"] == "relu"


@pytest.mark.parametrize("name", NAMES)
def test_sgd_has_the_published_rate_for_the_sum_over_pixels(name: str) -> None:
    rate = compose([f"experiment=koroko/{name}", "optimizer=sgd"]).values["optimizer"]["lr"]
    assert rate == pytest.approx(0.3 / PIXELS[name], rel=1e-6)


def test_a_value_on_the_command_line_wins() -> None:
    for command in (["optimizer=sgd", "optimizer.lr=0.5"], ["optimizer.lr=0.5", "optimizer=sgd"]):
        values = compose(["experiment=koroko/curves", *command]).values["optimizer"]
        assert (values["lr"], values["nesterov"]) == (0.5, True)


def test_an_optimizer_without_an_entry_keeps_its_own() -> None:
    own = compose(["optimizer=adamw"]).values["optimizer"]
    assert compose(["experiment=koroko/curves", "optimizer=adamw"]).values["optimizer"] == own


def test_without_the_experiment_nothing_is_preset() -> None:
    assert compose(["optimizer=sgd", "dataset=curves", "model=autoencoder_curves"]).values["optimizer"]["lr"] == 0.1


TINY = ("trainer.max_epochs=null", "trainer.max_steps=2", "trainer.eval_every_epochs=null", "dataset.limit_val=0.02")


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name: str, command: Callable[..., Outcome], work: Path, shared_data, monkeypatch) -> None:
    root = []
    if name == "curves":
        monkeypatch.setattr("data.autoencoding.CURVES_TRAIN", 1000)
        monkeypatch.setattr("data.autoencoding.CURVES_TEST", 500)
    if name == "mnist":
        root = [f"dataset.root={shared_data('mnist')}", "dataset.limit_train=0.02", "model.hidden=[20]"]
    if name == "faces":
        root = [f"dataset.root={shared_data('olivetti')}", "dataset.train_images=1500", "model.hidden=[20]"]
    outcome = command(f"experiment=koroko/{name}", "optimizer=sgd", "logger=quiet", *TINY, *root)
    assert outcome.code == 0, outcome.err
    (folder,) = runs(work)
    assert summary(folder)["steps"] == 2 and summary(folder)["monitor"] == "val/loss"
    assert {path.name for path in folder.glob("*.png")} >= {"loss.png", "reconstructions.png"}
    (plateau,) = [event["plateau/loss"] for event in metrics(folder) if "plateau/loss" in event]
    final = summary(folder)["final"]
    assert final["val/loss"] == pytest.approx({"curves": 0.6, "mnist": 0.65, "faces": 1.0}[name], rel=0.6)
    assert final["val/loss"] > 0.9 * plateau
    caches = {path.name for path in (work / "datasets").rglob("*.npz")}
    assert len(caches) == {"curves": 1, "mnist": 0, "faces": 1}[name]


def test_a_sweep_and_a_resumed_run(command: Callable[..., Outcome], work: Path, monkeypatch) -> None:
    monkeypatch.setattr("data.autoencoding.CURVES_TRAIN", 600)
    monkeypatch.setattr("data.autoencoding.CURVES_TEST", 300)
    small = ("experiment=koroko/curves", "logger=quiet", "callbacks=none", *TINY, "model.hidden=[20]")
    assert command("-m", *small, "optimizer=sgd,adam,adamw").code == 0
    rates = {}
    for folder in runs(work, "multirun/*/*"):
        saved = yaml.safe_load((folder / "config.yaml").read_text())
        rates[saved["choices"]["optimizer"]] = saved["optimizer"]["lr"]
    assert rates == {"sgd": pytest.approx(0.3 / 784), "adam": 1e-3, "adamw": pytest.approx(1e-3)}

    assert command(*small, "optimizer=sgd", "optimizer.lr=0.001").code == 0
    (folder,) = runs(work)
    outcome = command(f"resume={folder}", "trainer.max_steps=3")
    assert outcome.code == 0, outcome.err
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert summary(folder)["steps"] == 3 and saved["optimizer"]["lr"] == 0.001 and saved["optimizer"]["nesterov"]


def test_a_model_that_is_no_auto_encoder_is_refused(command: Callable[..., Outcome], work: Path) -> None:
    outcome = command("dataset=digits_autoencoder", "model=mlp", "logger=quiet")
    assert outcome.code == 1
    assert "mlp needs num_classes, which this data set does not have" in outcome.sentence()
    assert not (work / "runs").exists()
    smoothed = command("dataset=digits_autoencoder", "model=autoencoder_curves", "trainer.label_smoothing=0.1")
    assert smoothed.sentence().startswith("trainer.label_smoothing must be 0 for a reconstruction")


@pytest.mark.parametrize("mode", ["smoke", "overfit"])
def test_debug_modes(mode: str, command: Callable[..., Outcome], work: Path) -> None:
    small = ("dataset=digits_autoencoder", "model=autoencoder_curves", "model.hidden=[32]", "optimizer=adam")
    outcome = command(f"debug={mode}", *small, "logger=quiet", "callbacks=none")
    assert outcome.code == 0, outcome.err
