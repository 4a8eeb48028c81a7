"""SVHN, Tiny ImageNet and ImageNet: layouts as published, decoding by workers, and the sentences for users."""

from __future__ import annotations

import hashlib
import inspect
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from scipy.io import savemat
from torch import Tensor
from torchvision.transforms import functional

import data
from data import vision
from data.memory import InMemoryLoader
from data.sources.packaged import SVHN as _SVHN
from data.vision import IMAGENET_STATISTICS

ROOT = Path(__file__).resolve().parents[2]
INJECTED = {"seed", "device", "rank", "world_size"}


def rows(loader: data.BatchLoader) -> list[int]:
    assert isinstance(loader, InMemoryLoader)
    return loader.rows.tolist()


def together(loader: data.BatchLoader, epoch: int = 0, start: int = 0) -> tuple[Tensor, Tensor]:
    """All batches of an epoch as one."""
    inputs, targets = zip(*loader.epoch(epoch, start), strict=True)
    return torch.cat(inputs), torch.cat(targets)


# ----------------------------------------------------------------------------------------------------------- SVHN


def test_svhn_in_its_own_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, images = np.random.default_rng(0), {}
    files: dict[str, list[str]] = {}
    for split, count in {"train": 60, "test": 20}.items():
        images[split] = draw.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        path = tmp_path / f"{split}_32x32.mat"
        savemat(path, {"X": images[split], "y": (np.arange(count)[:, None] % 10) + 1})  # 10 stands for the digit 0
        files[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(_SVHN, "split_list", files)
    svhn = data.svhn(str(tmp_path), download=False, batch_size=6)
    assert svhn.facts == {"in_channels": 3, "num_classes": 10, "image_size": 32}
    assert [split.num_examples for split in (svhn.train, svhn.val, svhn.test)] == [54, 6, 20]
    inputs, targets = together(svhn.test)
    assert targets.tolist() == [(i + 1) % 10 for i in range(20)]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.4377, 0.4438, 0.4728], [0.1980, 0.2010, 0.1970]))
    expected = (torch.from_numpy(images["test"]).permute(3, 2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(inputs, expected, rtol=0, atol=1e-5)
    assert isinstance(svhn.train, InMemoryLoader) and not svhn.train.augmentation.flip, "digits are not mirrored"
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(data.DataError, match=r"svhn is absent from .*dataset.download=true"):
        data.svhn(str(tmp_path), download=False)


# -------------------------------------------------------------------------------------------------- Tiny ImageNet


def write_tiny(root: Path) -> None:
    """Two classes in the published layout; an image's colour says which it is."""
    colour = 0
    for identifier in ("n02", "n01"):
        folder = root / "train" / identifier / "images"
        folder.mkdir(parents=True)
        (root / "train" / identifier / f"{identifier}_boxes.txt").write_text("no image\n")
        for index in range(10):
            colour += 1
            Image.new("RGB", (8, 8), (colour, 0, 0)).save(folder / f"{identifier}_{index}.png")
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for index, identifier in enumerate(["n02", "n01", "n02"]):
        Image.new("L" if index == 1 else "RGB", (8, 8), 100 + index).save(root / "val" / "images" / f"val_{index}.png")
        lines.append(f"val_{index}.png\t{identifier}\t0\t0\t7\t7\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "words.txt").write_text("n01\tbullfrog, Rana catesbeiana\nn02\tcat\nn03\tdog\n")


def test_tiny_imagenet_in_its_own_layout(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    tiny = data.tiny_imagenet(str(tmp_path), download=False, batch_size=4, augment="none", val_fraction=0.2)
    assert tiny.facts == {"in_channels": 3, "num_classes": 2, "image_size": 8}
    assert tiny.class_names == ["bullfrog", "cat"]
    assert [split.num_examples for split in (tiny.train, tiny.val, tiny.test)] == [16, 4, 3]
    assert together(tiny.test)[1].tolist() == [1, 0, 1], "as the annotations say"
    inputs, targets = together(tiny.val)
    assert isinstance(tiny.val, InMemoryLoader)
    red = ((inputs[:, 0, 0, 0] - tiny.val._shift[0]) / tiny.val._scale[0]).round().flatten()
    assert [int(value <= 10) for value in red] == targets.tolist(), "the first ten are of n02"
    assert not set(rows(tiny.train)) & set(rows(tiny.val))
    limited = data.tiny_imagenet(str(tmp_path), batch_size=4, val_fraction=0.2, limit_train=0.5, limit_val=0.5)
    assert (len(rows(limited.train)), len(rows(limited.val)), limited.test.num_examples) == (8, 2, 3)


def test_a_slice_of_the_real_tiny_imagenet(shared_data: Callable[[str], Path]) -> None:
    root = shared_data("tiny-imagenet-200")
    tiny = data.tiny_imagenet(str(root), download=False)
    assert tiny.facts == {"in_channels": 3, "num_classes": 10, "image_size": 64}
    assert tiny.test.num_examples == 100 and "Egyptian cat" in tiny.class_names
    inputs, targets = together(tiny.test)
    name, identifier, *_ = (root / "val" / "val_annotations.txt").read_text().splitlines()[0].split("\t")
    identifiers = sorted(folder.name for folder in (root / "train").iterdir())
    assert identifiers[int(targets[0])] == identifier
    assert isinstance(tiny.test, InMemoryLoader)
    shown = (inputs[0] - tiny.test._shift) / tiny.test._scale
    raw = np.asarray(Image.open(root / "val" / "images" / name).convert("RGB"))
    torch.testing.assert_close(shown, torch.from_numpy(raw.copy()).permute(2, 0, 1).float(), rtol=0, atol=0.01)


@pytest.mark.parametrize("fault", ["val_9.png\tn01\t0\t0\t7\t7", "val_0.png\tn77\t0\t0\t7\t7", "val_0.png"])
def test_annotations_that_name_nothing_end_in_a_sentence(tmp_path: Path, fault: str) -> None:
    write_tiny(tmp_path)
    with (tmp_path / "val" / "val_annotations.txt").open("a") as file:
        file.write(fault + "\n")
    with pytest.raises(data.DataError, match=r"val_annotations.txt has a line without an image or a class"):
        data.tiny_imagenet(str(tmp_path))


def test_a_missing_tiny_imagenet_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:  # bound and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(vision, "TINY_IMAGENET", (f"http://127.0.0.1:{closed.getsockname()[1]}/x.zip", "0" * 32))
        for download in (True, False):
            with pytest.raises(data.DataError) as error:
                data.tiny_imagenet(str(tmp_path / "new"), download=download)
            sentence = str(error.value)
            assert sentence.startswith(f"tiny_imagenet is absent from {tmp_path}") and "\n" not in sentence
            assert ("cannot be downloaded" in sentence) == download != ("dataset.download=true" in sentence)
    write_tiny(tmp_path / "made" / "tiny")
    archive = Path(shutil.make_archive(str(tmp_path / "new" / "tiny"), "zip", tmp_path / "made"))
    # An archive that is there already, and whole, is not fetched again.
    monkeypatch.setattr(vision, "TINY_IMAGENET", ("http://x/tiny.zip", hashlib.md5(archive.read_bytes()).hexdigest()))
    assert data.tiny_imagenet(str(tmp_path / "new"), batch_size=4).test.num_examples == 3
    assert not archive.exists()


# ------------------------------------------------------------------------------------------------------- ImageNet


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two classes of small photographs, wide and tall, coloured and grey."""
    draw = np.random.default_rng(0)
    for split, count in {"train": 10, "val": 3}.items():
        for label in ("cat", "dog"):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                shape = [(40, 60, 3), (60, 40, 3), (50, 50)][index % 3]
                Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{index:02d}.png")
    return tmp_path / "photos"


SMALL: dict[str, Any] = {
    "image_size": 16, "resize": 20, "workers": 0, "batch_size": 4, "eval_batch_size": 4, "val_fraction": 0.2,
}  # fmt: skip


def test_imagenet_splits_and_evaluates_the_centre(photographs: Path) -> None:
    found = data.imagenet(str(photographs), **SMALL)
    assert found.facts == {"in_channels": 3, "num_classes": 2, "image_size": 16}
    assert (found.task, found.class_names) == ("classification", ["cat", "dog"])
    assert [split.num_examples for split in (found.train, found.val, found.test)] == [16, 4, 6]
    assert not set(rows(found.train)) & set(rows(found.val))
    inputs, targets = together(found.test)
    assert targets.tolist() == [0, 0, 0, 1, 1, 1] and inputs.shape == (6, 3, 16, 16)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET_STATISTICS)
    for index, file in enumerate(sorted((photographs / "val").rglob("*.png"))):
        image = functional.center_crop(functional.resize(Image.open(file).convert("RGB"), [20]), [16, 16])
        expected = (functional.pil_to_tensor(image) / 255 - mean) / std
        torch.testing.assert_close(inputs[index], expected, rtol=0, atol=1e-5)
    limited = data.imagenet(str(photographs), **SMALL, limit_train=0.5, limit_val=0.5)
    assert (len(rows(limited.train)), len(rows(limited.val)), limited.test.num_examples) == (8, 2, 6)


def test_training_images_are_parts_of_the_photographs(photographs: Path) -> None:
    plain = data.imagenet(str(photographs), **SMALL, augment="none")
    moved = data.imagenet(str(photographs), **SMALL)
    before, labels = together(plain.train)
    (after, same), (later, _) = (together(moved.train, epoch) for epoch in (0, 1))
    assert torch.equal(labels, same) and not torch.equal(before, after)
    assert not torch.equal(after, later), "another epoch, other parts"
    assert torch.equal(together(data.imagenet(str(photographs), **SMALL).train)[0], after)
    assert not torch.equal(together(data.imagenet(str(photographs), **SMALL, seed=1).train)[0], after)
    assert torch.equal(together(moved.val, 0)[0], together(moved.val, 1)[0])


def test_workers_resuming_and_ranks_change_nothing(photographs: Path) -> None:
    state = torch.get_rng_state()
    alone = data.imagenet(str(photographs), **SMALL).train
    whole = together(alone, 3)
    by_workers = data.imagenet(str(photographs), **SMALL | {"workers": 2}).train
    for found, expected in zip(together(by_workers, 3), whole, strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(together(alone, 3, start=2), whole, strict=True):
        assert torch.equal(found, expected[8:])
    shares = [data.imagenet(str(photographs), **SMALL, rank=rank, world_size=2).train for rank in (0, 1)]
    joint = [torch.cat(pair) for pair in zip(*([x for x, _ in s.epoch(3)] for s in shares), strict=True)]
    assert torch.equal(torch.cat(joint), whole[0])
    assert torch.equal(torch.get_rng_state(), state), "the run's own random numbers stay as they are"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_ends_in_one_sentence(photographs: Path, workers: int) -> None:
    (photographs / "val" / "cat" / "01.png").write_bytes(b"no image")
    found = data.imagenet(str(photographs), **SMALL | {"workers": workers})
    with pytest.raises(data.DataError) as error:
        together(found.test)
    assert str(error.value).endswith("01.png cannot be read as an image: repair it, or remove it")
    assert str(error.value).startswith(str(photographs))


def test_real_photographs(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    files = sorted(shared_data("imagenet-sample").glob("*.JPEG"))
    for index, file in enumerate(files):
        folder = tmp_path / ("val" if index % 4 == 0 else "train") / file.name[:9]
        for split in {"train", folder.parent.name}:
            (tmp_path / split / folder.name).mkdir(parents=True, exist_ok=True)
            (tmp_path / split / folder.name / file.name).symlink_to(file)
    found = data.imagenet(str(tmp_path), workers=1, batch_size=4, val_fraction=0.1)
    inputs, _ = together(found.train)
    assert inputs.shape == (12, 3, 224, 224) and inputs.dtype == torch.float32
    assert abs(inputs.mean()) < 1 and 0.5 < inputs.std() < 2
    assert together(found.test)[0].shape == (4, 3, 224, 224)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"image_size": 300}, r"image_size must be at least 1 and at most resize \(20\), got 300"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"prefetch": 0}, "prefetch must be at least 1, got 0"),
        ({"augment": "cutout"}, "augment must be none or standard, got 'cutout'"),
        ({"batch_size": 50}, "batch_size must be at most the 16 examples that are left to train on, got 50"),
        ({"limit_val": 0.01}, "limit_val must leave at least one of the 4 examples, got 0.01"),
    ],
)
def test_options_of_imagenet(photographs: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        data.imagenet(str(photographs), **SMALL | options)


def test_another_layout_ends_in_a_sentence(photographs: Path) -> None:
    with pytest.raises(data.DataError, match=r"must hold train/<class>/... and val/<class>/... .*dataset=image_folder"):
        data.imagenet(str(photographs / "train"))
    with pytest.raises(data.DataError, match="there is no folder"):
        data.imagenet(str(photographs / "absent"))


# --------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize("name", ["svhn", "tiny_imagenet", "imagenet"])
def test_every_option_stands_in_the_yaml(name: str) -> None:
    node = OmegaConf.load(ROOT / "configs" / "dataset" / f"{name}.yaml")
    assert node.pop("_target_") == f"data.{name}"
    assert set(node) == set(inspect.signature(getattr(data, name)).parameters) - INJECTED
