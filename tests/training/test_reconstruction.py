"""The reconstruction task: trained on a likelihood, reported a pixel; its pictures and its plateau."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional

import data
from training import RunFolder, Trainer, UserError, World, loggers, seed_everything, tasks
from training.callbacks import Callback, CurvePlots
from training.runs import checkpoints
from training.show.curves import plot_run
from training.show.reconstructions import ReconstructionPlots


def net(pixels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 24), nn.ReLU(inplace=True), nn.Linear(24, pixels))


def fit(
    folder: Path,
    sets: data.DataModule,
    resume: bool = False,
    callbacks: list[Callback] | None = None,
    lr: float = 3e-3,
    **trainer: Any,
) -> dict[str, Any]:
    seed_everything(0)
    model = net(sets.facts["in_channels"] * sets.facts["image_size"] ** 2)
    found = checkpoints.latest(folder / "checkpoints") if resume else None
    run_folder = RunFolder.open(folder) if resume else RunFolder.create(folder, "name: small\n")
    settings: dict[str, Any] = {"max_epochs": 2, "log_every_steps": 5, "deterministic": False}
    return Trainer(**settings | trainer).fit(
        model, torch.optim.Adam(model.parameters(), lr=lr), sets, tasks.build(sets.task, sets.facts), folder=run_folder,
        world=World(), callbacks=callbacks, loggers=[loggers.JSONLines(), loggers.TensorBoard()],
        resume=found[1] if found else None,
    )  # fmt: skip


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- the task ----------------------------------------------------------------------------------------------------------


def published_loss(likelihood: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over pixels that auto-encoders are compared by."""
    if likelihood == "gaussian":
        return functional.mse_loss(outputs, targets)
    return functional.binary_cross_entropy(outputs.sigmoid(), targets)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_trained_on_the_sum_and_reported_a_pixel(float64: None, likelihood: str) -> None:
    task = tasks.build("reconstruction", {"likelihood": likelihood})
    outputs, targets = 2 * torch.randn(7, 30), torch.rand(7, 30)
    expected = published_loss(likelihood, outputs, targets)
    torch.testing.assert_close(task.loss(outputs, targets), 30 * expected)
    for loss in (None, task.loss(outputs, targets)):
        meters = task.meters(torch.device("cpu"))
        task.measure(meters, outputs, targets, loss)
        values = meters.compute()
        assert values["loss"] == pytest.approx(float(expected), rel=1e-12)
        pixels = outputs.sigmoid() if likelihood == "bernoulli" else outputs
        assert values["mse"] == pytest.approx(float((pixels - targets).square().mean()), rel=1e-12)
    assert (task.main, task.metrics) == ("loss", {"loss": "min", "mse": "min"}) and meters.examples == 7


def test_on_real_images(shared_data: Callable[[str], Path]) -> None:
    mnist = data.mnist_autoencoder(str(shared_data("mnist")), download=False, limit_train=0.01, batch_size=100)
    inputs, targets = next(mnist.train.epoch(0))
    task = tasks.build(mnist.task, mnist.facts)
    outputs = net(784)(inputs).detach()
    assert float(task.loss(outputs, targets)) / 784 == pytest.approx(
        float(published_loss("bernoulli", outputs, inputs.flatten(1))), rel=1e-5
    )
    constant = targets.mean(0).clamp(1e-6, 1 - 1e-6).logit().expand_as(targets)
    assert float(task.loss(constant, targets)) / 784 == pytest.approx(mnist.plateau, rel=0.05)


def test_a_batch_counts_as_much_as_it_holds() -> None:
    task = tasks.build("reconstruction", {"likelihood": "bernoulli"})
    outputs, targets = torch.randn(10, 6), torch.rand(10, 6)
    whole, parts = (task.meters(torch.device("cpu")) for _ in range(2))
    task.measure(whole, outputs, targets)
    for part in (slice(0, 3), slice(3, 10)):
        task.measure(parts, outputs[part], targets[part])
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-6)


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="likelihood must be bernoulli or gaussian, got 'poisson'"):
        tasks.build("reconstruction", {"likelihood": "poisson"})
    with pytest.raises(ValueError, match=r"label_smoothing must be 0 for a reconstruction.*, got 0.1"):
        tasks.build("reconstruction", {"likelihood": "bernoulli"}, 0.1)
    with pytest.raises(ValueError, match=r"task must be one of .*reconstruction.*, got 'dreaming'"):
        tasks.build("dreaming", {})
    with pytest.raises(UserError, match=r"needs 64 outputs an image.* gives \[10\]: choose an auto-encoder"):
        tasks.build("reconstruction", {"likelihood": "gaussian"}).loss(torch.zeros(2, 10), torch.zeros(2, 64))


# -- a run -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_every_reported_loss_is_a_pixels(tmp_path: Path, likelihood: str) -> None:
    """Training with a rate of almost 0: the mean over an epoch is the loss of the initial weights."""
    sets = data.digits_autoencoder(likelihood=likelihood, batch_size=1294)
    summary = fit(tmp_path / "run", sets, lr=1e-12, max_epochs=1, log_every_steps=1)
    seed_everything(0)
    model = net(64)
    for split in ("train", "val", "test"):
        inputs, targets = (torch.cat(part) for part in zip(*getattr(sets, split).epoch(0), strict=True))
        expected = published_loss(likelihood, model(inputs), targets).item()
        assert summary["final"][f"{split}/loss"] == pytest.approx(expected, rel=1e-5), split
    assert (summary["monitor"], summary["best"]["value"]) == ("val/loss", summary["final"]["val/loss"])


def test_a_run_learns_and_leaves_its_pictures(tmp_path: Path) -> None:
    sets = data.digits_autoencoder(val_from="test", batch_size=32)
    plots = ReconstructionPlots(columns=8, rows=2, every_epochs=2.0)
    summary = fit(tmp_path / "run", sets, callbacks=[CurvePlots(), plots], max_epochs=6)
    assert summary["final"]["val/loss"] < 0.95 * sets.plateau

    logged = events(tmp_path / "run")
    assert [e["plateau/loss"] for e in logged if "plateau/loss" in e] == [sets.plateau]
    assert (logged[0]["event"], logged[0]["step"]) == ("start", 0)
    figure = plot_run(tmp_path / "run")["loss"]
    for axes in figure.axes[:2]:
        (line,) = [line for line in axes.get_lines() if str(line.get_label()).startswith("constant output")]
        assert set(line.get_ydata()) == {sets.plateau} and line.get_linestyle() == "--"

    picture = np.asarray(Image.open(tmp_path / "run" / "reconstructions.png"))
    assert picture.ndim == 2 and picture.dtype == np.uint8
    cell = 8 * (60 // 8) + 2
    assert picture.shape == (2 * (2 * cell + 8), 8 * cell + 8)
    inputs, _ = next(sets.val.epoch(0))
    first = picture[5 : 5 + cell - 2, 5 : 5 + cell - 2][3::7, 3::7] / 255  # an enlarged pixel is 7 × 7
    np.testing.assert_allclose(first, inputs[0, 0].numpy(), atol=0.003)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert [e.step // len(sets.train) for e in board.Images("reconstructions")] == [1, 2, 4, 6]
    assert board.Scalars("plateau/loss")[0].value == pytest.approx(sets.plateau)


def test_a_resumed_run_says_the_plateau_once_and_keeps_the_rhythm_of_pictures(tmp_path: Path) -> None:
    sets = data.digits_autoencoder(batch_size=100, limit_train=0.4)
    plots = partial(ReconstructionPlots, columns=3, rows=1, every_epochs=3)
    fit(tmp_path / "run", sets, callbacks=[plots()], max_epochs=4)
    fit(tmp_path / "run", sets, resume=True, callbacks=[plots()], max_epochs=7)
    assert sum("plateau/loss" in e for e in events(tmp_path / "run")) == 1
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert [e.step // len(sets.train) for e in board.Images("reconstructions")] == [1, 3, 6]


def test_pictures_leave_training_as_it_is(tmp_path: Path) -> None:
    sets = data.digits_autoencoder(batch_size=100, limit_train=0.4)
    with_, without = (
        fit(tmp_path / name, sets, callbacks=callbacks)["final"]
        for name, callbacks in (("with", [ReconstructionPlots(every_epochs=0.1)]), ("without", []))
    )
    assert with_ == without


def test_colour_and_centred_images_are_drawn(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    root = str(shared_data("cifar10-subset") / "test")
    colour = data.image_folder_autoencoder(root, batch_size=50, limit_train=0.05, limit_val=0.1)
    fit(tmp_path / "colour", colour, callbacks=[ReconstructionPlots()], max_epochs=None, max_steps=1)
    picture = Image.open(tmp_path / "colour" / "reconstructions.png")
    assert picture.mode == "RGB"
    faces = data.faces(str(shared_data("olivetti")), train_images=500, batch_size=250, download=False)
    fit(tmp_path / "faces", faces, callbacks=[ReconstructionPlots(columns=5)], max_epochs=None, max_steps=1)
    pixels = np.asarray(Image.open(tmp_path / "faces" / "reconstructions.png"))
    assert pixels[5:50].min() < 60 and pixels[5:50].max() > 200, "the inputs span the range of brightness"


def test_other_tasks_have_no_such_pictures(tmp_path: Path) -> None:
    from tests.training.small_run import fit as classify

    classify(tmp_path / "run", callbacks=[ReconstructionPlots()], max_steps=5)
    assert not (tmp_path / "run" / "reconstructions.png").exists()
    assert all("plateau/loss" not in event for event in events(tmp_path / "run"))


@pytest.mark.parametrize("name", ["columns", "rows", "every_epochs"])
def test_options_of_the_pictures(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*, got 0"):
        ReconstructionPlots(**{name: 0})
