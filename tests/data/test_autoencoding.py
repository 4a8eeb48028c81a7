"""Images to be reproduced: what is served, what is made, what is kept, and the sentences for users."""

from __future__ import annotations

import hashlib
import inspect
import logging
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy.io import loadmat, savemat

import data
from data import autoencoding
from data.memory import InMemoryLoader
from data.sources import synthetic
from data.sources.packaged import SVHN as _SVHN
from data.sources.synthetic import draw_curves, kept, turn_faces
from data.tasks.reproduced import pixel_moments

ROOT = Path(__file__).resolve().parents[2]
INJECTED = {"seed", "device", "rank", "world_size"}
BUILDERS = (
    "curves", "faces", "mnist_autoencoder", "cifar10_autoencoder", "digits_autoencoder", "image_folder_autoencoder",
    "svhn_autoencoder",
)  # fmt: skip


def rows(loader: data.BatchLoader) -> list[int]:
    assert isinstance(loader, InMemoryLoader)
    return loader.rows.tolist()


def entropy(p: torch.Tensor) -> float:
    return float((torch.special.entr(p) + torch.special.entr(1 - p)).mean())


@pytest.fixture
def few_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """CURVES of 60 + 30 images."""
    monkeypatch.setattr(autoencoding, "CURVES_TRAIN", 60)
    monkeypatch.setattr(autoencoding, "CURVES_TEST", 30)


# -- what is served ----------------------------------------------------------------------------------------------------


def test_targets_are_the_inputs_in_a_row_and_pixels_of_the_images() -> None:
    digits = data.digits_autoencoder(batch_size=100)
    assert (digits.task, digits.name, digits.class_names) == ("reconstruction", "digits_autoencoder", [])
    assert digits.facts == {"in_channels": 1, "image_size": 8, "likelihood": "bernoulli"}
    for loader in (digits.train, digits.val, digits.test):
        for inputs, targets in loader.epoch(0):
            assert inputs.shape[1:] == (1, 8, 8) and targets.shape == (len(inputs), 64)
            assert torch.equal(inputs.flatten(1), targets)
            assert inputs.data_ptr() != targets.data_ptr(), "an operation in place would change the targets"
            assert inputs.min() == 0 and inputs.max() == 1
    inputs, _ = next(digits.test.epoch(0))
    original = torch.from_numpy(data.readers.load_digits()[0])[rows(digits.test)]
    torch.testing.assert_close(inputs[:, 0].double(), original / 16, rtol=0, atol=0.003)


def test_splits_are_disjoint_and_validation_may_be_the_test_images() -> None:
    held_out = data.digits_autoencoder()
    parts = [rows(split) for split in (held_out.train, held_out.val, held_out.test)]
    assert sorted([*parts[0], *parts[1], *parts[2]]) == list(range(1797)) and [len(part) for part in parts] == [
        1294,
        144,
        359,
    ]
    published = data.digits_autoencoder(val_from="test", limit_val=0.5)
    assert rows(published.test) == rows(held_out.test) and len(rows(published.train)) == 1294 + 144
    assert rows(published.val) == rows(published.test)[: len(rows(published.val))] and len(rows(published.val)) == 180


def test_the_plateau_is_the_best_constant_outputs_loss(float64: None) -> None:
    """No constant image does better than the plateau, and the mean image reaches it."""
    for likelihood in ("bernoulli", "gaussian"):
        digits = data.digits_autoencoder(likelihood=likelihood, batch_size=1294)
        ((_, targets),) = digits.train.epoch(0)
        mean = targets.double().mean(0)

        def loss(constant: torch.Tensor, targets: torch.Tensor = targets, likelihood: str = likelihood) -> float:
            if likelihood == "gaussian":
                return float((targets - constant).square().mean())
            p = constant.clamp(1e-12, 1 - 1e-12)
            return float(-(targets * p.log() + (1 - targets) * (1 - p).log()).mean())

        assert digits.plateau == pytest.approx(loss(mean), rel=1e-6)
        assert all(loss((mean + 0.02 * torch.randn_like(mean)).clamp(0, 1)) > digits.plateau for _ in range(5))


def test_augmentation_moves_inputs_and_targets_alike() -> None:
    plain = data.digits_autoencoder(batch_size=50)
    moved = data.digits_autoencoder(batch_size=50, augment="standard")
    (before, _), (inputs, targets) = next(plain.train.epoch(0)), next(moved.train.epoch(0))
    assert torch.equal(inputs.flatten(1), targets) and not torch.equal(before, inputs)
    assert not moved.train.augmentation.flip, "a mirrored digit is no digit"


def test_moments_are_those_of_the_rows(float64: None) -> None:
    images = torch.randint(0, 256, (5000, 1, 3, 3)).to(torch.uint8)
    chosen = torch.randperm(5000)[:4500]
    mean, variance = pixel_moments(images, chosen)
    pixels = images[chosen].double() / 255
    torch.testing.assert_close(mean, pixels.mean(0))
    torch.testing.assert_close(variance, pixels.var(0, correction=0))


# -- curves ------------------------------------------------------------------------------------------------------------


def test_curves_are_those_of_their_seed_and_of_the_published_ink() -> None:
    images = draw_curves(4000)
    assert images.shape == (4000, 1, 28, 28) and images.dtype == torch.uint8
    assert torch.equal(images, draw_curves(4000)) and not torch.equal(images, draw_curves(4000, seed=1))
    pixels = images.double() / 255
    assert 0.15 < entropy(pixels.mean(0)) < 0.16, "the published constant-output loss is 0.153 to 0.157"
    assert 0.03 < pixels.mean() < 0.06 and pixels.amax((1, 2, 3)).min() > 0.5
    assert entropy(pixels) < 0.068, "the published losses of trained nets are from 0.07 on"


def test_a_curve_passes_its_points() -> None:
    points = torch.tensor([[[4.0, 20.0], [14.0, 6.0], [23.0, 20.0]], [[5.0, 5.0], [14.0, 14.0], [23.0, 23.0]]])
    images = synthetic._draw(points).float() / 255
    for image, through in zip(images, points, strict=True):
        for x, y in through.long().tolist():
            assert image[y, x] > 0.4, "ink at (x, y): the row is y"
    middle = images[1].diagonal()[8:20]  # a straight line of even ink, sampled finely enough
    assert middle.max() - middle.min() < 0.02
    assert float(middle.mean()) == pytest.approx(1 - np.exp(-synthetic.PEN_INK), abs=0.01)


def test_generated_curves_are_kept(tmp_path: Path, few_curves: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = data.curves(str(tmp_path / "set"), batch_size=10)
    assert first.facts == {"in_channels": 1, "image_size": 28, "likelihood": "bernoulli"}
    assert [loader.num_examples for loader in (first.train, first.val, first.test)] == [50, 6, 30]
    monkeypatch.setattr(autoencoding, "draw_curves", lambda count: pytest.fail("drawn again"))
    again = data.curves(str(tmp_path / "set"), batch_size=10)
    assert torch.equal(next(first.train.epoch(0))[0], next(again.train.epoch(0))[0])
    assert len(list((tmp_path / "set").glob("*.npz"))) == 1


@pytest.mark.parametrize("damage", ["cut short", "one bit"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def make() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"images": torch.arange(3000).to(torch.uint8)}

    made = kept(tmp_path, "set", make)["images"]
    path = tmp_path / "set.npz"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content[:1500] if damage == "cut short" else content)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(kept(tmp_path, "set", make)["images"], made)
    assert "set.npz is damaged" in caplog.text and len(calls) == 2
    assert torch.equal(kept(tmp_path, "set", make)["images"], made) and len(calls) == 2


def test_what_is_stopped_while_it_is_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "new", "set", stopped)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())

    def written(path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", written)
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "new", "set", lambda: {"images": torch.zeros(3)})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert len(kept(tmp_path / "file", "set", lambda: {"images": torch.zeros(3)})["images"]) == 3
    assert "cannot be written" in caplog.text


def test_the_original_curves_come_first(tmp_path: Path, few_curves: None) -> None:
    draw = np.random.default_rng(0)
    arrays = {"bdata": draw.random((60, 784)), "bdatatest": draw.random((30, 784))}
    savemat(tmp_path / "digs3pts_1.mat", arrays)
    found = data.curves(str(tmp_path), batch_size=10, val_from="test")
    inputs, _ = next(found.test.epoch(0))
    torch.testing.assert_close(inputs.flatten(1).double(), torch.from_numpy(arrays["bdatatest"]), rtol=0, atol=0.002)
    assert not list(tmp_path.glob("*.npz"))
    generated = data.curves(str(tmp_path), source="generated", batch_size=10)
    assert generated.plateau is not None and found.plateau is not None
    assert generated.plateau < 0.3 < found.plateau

    savemat(tmp_path / "digs3pts_1.mat", arrays | {"bdata": arrays["bdata"][:, :700]})
    with pytest.raises(data.DataError, match=r"bdata of shape \[60, 700\], not \[60, 784\]"):
        data.curves(str(tmp_path))
    savemat(tmp_path / "digs3pts_1.mat", arrays | {"bdata": 3 * arrays["bdata"]})
    with pytest.raises(data.DataError, match=r"values outside \[0, 1\]"):
        data.curves(str(tmp_path))
    (tmp_path / "digs3pts_1.mat").write_bytes(b"no such file" * 100)
    with pytest.raises(data.DataError, match=r"digs3pts_1.mat cannot be read"):
        data.curves(str(tmp_path))


def test_an_absent_original_ends_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:  # bound and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(autoencoding, "PUBLISHED", f"http://127.0.0.1:{closed.getsockname()[1]}/")
        for build, way_out in ((data.curves, "generated"), (data.faces, "olivetti")):
            for download in (False, True):
                with pytest.raises(data.DataError) as error:
                    build(str(tmp_path / "new"), source="original", download=download)
                sentence = str(error.value)
                assert "is absent" in sentence and f"use dataset.source={way_out}" in sentence and "\n" not in sentence
                assert ("cannot be downloaded" in sentence) == download
                assert ("set dataset.download=true" in sentence) != download


def test_the_original_is_downloaded(tmp_path: Path, few_curves: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    arrays = {"bdata": np.ones((60, 784)), "bdatatest": np.zeros((30, 784))}
    savemat(tmp_path / "there" / "digs3pts_1.mat", arrays)
    monkeypatch.setattr(autoencoding, "PUBLISHED", f"{(tmp_path / 'there').as_uri()}/")
    found = data.curves(str(tmp_path / "here"), download=True, batch_size=10)
    assert next(found.test.epoch(0))[0].max() == 0 and next(found.train.epoch(0))[0].min() == 1
    assert [path.name for path in (tmp_path / "here").glob("[!.]*")] == ["digs3pts_1.mat"]


# -- faces -------------------------------------------------------------------------------------------------------------


def write_olivetti(folder: Path) -> None:
    """A file in the format of the Olivetti faces, with a photograph that says who it is by its brightness."""
    brightness = np.repeat(np.arange(40), 10) * 5 + 20
    savemat(folder / "olivettifaces.mat", {"faces": np.tile(brightness, (64 * 64, 1)).astype(np.uint8)})


def test_faces_share_no_person_between_splits(tmp_path: Path) -> None:
    write_olivetti(tmp_path)
    faces = data.faces(str(tmp_path), train_images=600, batch_size=100, likelihood="bernoulli")
    seen = [
        {round(float(value) * 255) for inputs, _ in loader.epoch(0) for value in inputs[:, 0, 12, 12]}
        for loader in (faces.train, faces.val, faces.test)
    ]
    people = [sorted((brightness - 20) // 5 for brightness in part) for part in seen]
    assert people == [list(range(25)), list(range(25, 30)), list(range(30, 40))]
    assert [loader.num_examples for loader in (faces.train, faces.val, faces.test)] == [600, 150, 300]
    assert autoencoding.FACES_TRAIN == 103_500 and autoencoding.FACES_TEST == 41_400
    assert rows(data.faces(str(tmp_path), train_images=600, batch_size=100, val_from="test").val) == list(range(300))


def test_turned_faces() -> None:
    ramp = torch.linspace(0, 255, 64).round().to(torch.uint8).expand(64, 64)
    faces = torch.stack([ramp, ramp.mT, torch.full((64, 64), 99, dtype=torch.uint8)])
    turned = turn_faces(faces, 50)
    assert turned.shape == (150, 1, 25, 25) and torch.equal(turned[2::3].unique(), torch.tensor([99]).to(torch.uint8))
    assert torch.equal(turned[:30], turn_faces(faces, 10)), "the first of many are those that few would be"
    assert not torch.equal(turned, turn_faces(faces, 50, seed=1))
    upright = turned[0::3, 0].double()
    # A ramp stays a plane: its slope is 255 / scale over 25 pixels, whatever the angle.
    down, right = ((upright.diff(dim=dim) / (255 / 25)).mean((1, 2)) for dim in (1, 2))
    scale, angle = 1 / (down.square() + right.square()).sqrt(), torch.atan2(down, right).rad2deg()
    assert 1.38 < scale.min() < 1.5 and 1.7 < scale.max() < 1.82
    assert -91 < angle.min() < -45 and 45 < angle.max() < 91


def test_gaussian_faces_are_centred_with_an_average_variance_of_one(shared_data: Callable[[str], Path]) -> None:
    root = str(shared_data("olivetti"))
    faces = data.faces(root, train_images=2000, batch_size=2000, download=False)
    assert faces.facts == {"in_channels": 1, "image_size": 25, "likelihood": "gaussian"}
    ((inputs, targets),) = faces.train.epoch(0)
    assert inputs.mean(0).abs().max() < 1e-4
    assert float(inputs.var(0, correction=0).mean()) == pytest.approx(1, abs=1e-4) == faces.plateau
    assert torch.equal(inputs.flatten(1), targets)
    unseen, _ = next(faces.test.epoch(0))
    assert 0.5 < unseen.var() < 2 and unseen.mean().abs() < 0.5


def test_real_faces_are_upright_and_kept(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    root = shared_data("olivetti")
    found = autoencoding._photographs(root, download=False)
    raw = loadmat(root / "olivettifaces.mat")["faces"]
    assert found.shape == (400, 64, 64) and found[7, 10, 20] == raw[20 * 64 + 10, 7], "MATLAB stores columns"
    face = found.float().mean(0)  # left and right are alike in an average face, up and down are not
    across, down = (torch.corrcoef(torch.stack([face.flatten(), face.flip(dim).flatten()]))[0, 1] for dim in (1, 0))
    assert across > 0.9 > down
    options = {"cache": str(tmp_path), "train_images": 1000, "batch_size": 500, "likelihood": "bernoulli"}
    first, again = data.faces(str(root), **options), data.faces(str(root), **options)
    assert torch.equal(next(first.train.epoch(0))[0], next(again.train.epoch(0))[0])
    assert first.train.num_examples == 1000 and len(list(tmp_path.glob("faces_v1_4_*.npz"))) == 1


def test_the_original_faces_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoding, "FACES_AN_IMAGE", 2)
    write_olivetti(tmp_path)
    columns = np.random.default_rng(0).standard_normal((625, 800)).astype(np.float32)
    savemat(tmp_path / "newfaces_rot_single.mat", {"newfaces_single": columns})
    faces = data.faces(str(tmp_path), train_images=500, batch_size=500)
    assert [loader.num_examples for loader in (faces.train, faces.val, faces.test)] == [500, 100, 200]
    inputs, _ = next(faces.test.epoch(0))
    scaled = torch.from_numpy(columns.T[-200:])
    assert torch.corrcoef(torch.stack([inputs.flatten(), scaled.flatten()]))[0, 1] > 0.998, "bytes hold them"
    assert faces.plateau == pytest.approx(1, abs=1e-4)
    few = data.faces(str(tmp_path), train_images=40, batch_size=40)
    assert few.train.num_examples == 40


def test_absent_faces_end_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"Olivetti faces are absent from .*: set dataset.download=true, put"):
        data.faces(str(tmp_path / "new"), download=False)


# -- other sets --------------------------------------------------------------------------------------------------------


def test_real_mnist_is_served_in_full(shared_data: Callable[[str], Path]) -> None:
    mnist = data.mnist_autoencoder(str(shared_data("mnist")), download=False, val_from="test")
    assert [loader.num_examples for loader in (mnist.train, mnist.val, mnist.test)] == [59_904, 10_000, 10_000]
    assert mnist.plateau == pytest.approx(0.2628, abs=1e-4)


def test_house_numbers_are_served_unmirrored_and_in_units_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, images = np.random.default_rng(0), {}
    files: dict[str, list[str]] = {}
    for split, count in {"train": 20, "test": 8}.items():
        images[split] = draw.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        path = tmp_path / f"{split}_32x32.mat"
        savemat(path, {"X": images[split], "y": (np.arange(count)[:, None] % 10) + 1})
        files[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(_SVHN, "split_list", files)
    svhn = autoencoding.svhn_autoencoder(str(tmp_path), download=False, batch_size=5, augment="standard")
    assert svhn.facts == {"in_channels": 3, "image_size": 32, "likelihood": "bernoulli"}
    assert [split.num_examples for split in (svhn.train, svhn.val, svhn.test)] == [15, 2, 8]
    inputs, targets = next(svhn.test.epoch(0))
    expected = torch.from_numpy(images["test"]).permute(3, 2, 0, 1) / 255
    torch.testing.assert_close(inputs, expected, rtol=0, atol=1e-6)
    assert torch.equal(targets, inputs.flatten(1))
    assert isinstance(svhn.train, InMemoryLoader) and not svhn.train.augmentation.flip, "digits are not mirrored"


def test_a_folder_of_images(shared_data: Callable[[str], Path]) -> None:
    folder = data.image_folder_autoencoder(str(shared_data("cifar10-subset") / "test"), limit_train=0.1, limit_val=0.1)
    assert folder.facts == {"in_channels": 3, "image_size": 32, "likelihood": "bernoulli"}
    inputs, targets = next(folder.val.epoch(0))
    assert inputs.shape[1:] == (3, 32, 32) and targets.shape[1:] == (3072,)


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("batch_size", 0, "must be at least 1, got 0"),
        ("augment", "cutout", "must be none or standard, got 'cutout'"),
        ("val_from", "nowhere", "must be train or test, got 'nowhere'"),
        ("likelihood", "poisson", "must be bernoulli or gaussian, got 'poisson'"),
        ("val_fraction", 0.0, "must be between 0 and 1, both excluded, got 0.0"),
        ("limit_train", 1e-5, "must leave at least one of the 1294 examples, got 1e-05"),
    ],
)
def test_values_out_of_range_end_in_a_sentence_that_begins_with_the_option(
    name: str, value: object, sentence: str
) -> None:
    with pytest.raises(ValueError) as error:
        data.digits_autoencoder(**{name: value})
    assert str(error.value).startswith(f"{name} {sentence}")


def test_options_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    with pytest.raises(ValueError, match="source must be one of auto, generated, original, got 'drawn'"):
        data.curves(absent, source="drawn")
    with pytest.raises(ValueError, match="train_images must be from 1 to 103500, got 103501"):
        data.faces(absent, train_images=103_501)
    with pytest.raises(ValueError, match="image_size must be at least 1 or null, got 0"):
        data.image_folder_autoencoder(absent, image_size=0)
    with pytest.raises(ValueError, match="max_gigabytes must be positive, got 0"):
        data.image_folder_autoencoder(absent, max_gigabytes=0)
    assert not Path(absent).exists()


@pytest.mark.parametrize("name", BUILDERS)
def test_every_option_stands_in_the_yaml_with_a_comment(name: str) -> None:
    path = ROOT / "configs" / "dataset" / f"{name}.yaml"
    node = OmegaConf.load(path)
    signature = inspect.signature(getattr(data, name)).parameters
    assert node.pop("_target_") == f"data.{name}"
    assert set(node) == set(signature) - INJECTED
    for option, value in OmegaConf.to_container(node).items():
        if signature[option].default is not inspect.Parameter.empty and option != "cache":
            assert value == signature[option].default, option
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "_target_"))]
    assert all("  # " in line for line in lines)


@pytest.mark.parametrize("world_size", [2])
def test_ranks_share_a_batch(world_size: int) -> None:
    alone = next(data.digits_autoencoder(batch_size=20).train.epoch(0))
    shares = [
        next(data.digits_autoencoder(batch_size=20, rank=rank, world_size=world_size).train.epoch(0))
        for rank in range(world_size)
    ]
    for rank, share in enumerate(shares):
        assert all(torch.equal(part, whole.chunk(world_size)[rank]) for part, whole in zip(share, alone, strict=True))
