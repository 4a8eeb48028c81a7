"""Folders of images: layouts, order, decoding, and what is said about bad files."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import data
from data.memory import InMemoryLoader
from data.sources.folders import find_splits, read_images

OPTIONS = {"batch_size": 4, "eval_batch_size": 4, "augment": "none"}


def write(path: Path, value: int = 0, size: tuple[int, int] = (6, 6), mode: str = "RGB") -> Path:
    """An image of one colour; `value` (below 2**16) is spread over the first two channels and names it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (value // 256, value % 256, 7) if mode == "RGB" else value % 256
    Image.new(mode, size, colour).save(path)
    return path


def tree(root: Path, layout: dict[str, int], size: tuple[int, int] = (6, 6)) -> None:
    """For each folder of the layout so many images, written in a random order, each of a value of its own."""
    jobs = [(root / folder / f"{i:03d}.png") for folder, count in layout.items() for i in range(count)]
    values = {job: value for value, job in enumerate(jobs)}
    random.Random(0).shuffle(jobs)
    for job in jobs:
        write(job, values[job], size)


def values_of(loader: data.BatchLoader) -> list[int]:
    """The images' values, recovered from normalised batches."""
    assert isinstance(loader, InMemoryLoader)
    found = []
    for inputs, _ in loader.epoch(0):
        pixels = ((inputs[:, :, 0, 0] - loader._shift.flatten()) / loader._scale.flatten()).round().long()
        found += (pixels[:, 0] * 256 + pixels[:, 1]).tolist()
    return found


# -------------------------------------------------------------------------------------------------------- layouts

CLASSES = {"cat": 20, "dog": 10}
LAYOUTS = {
    "classes only": ({"": 30}, {"train": 22, "val": 2, "test": 6}),
    "train, test": ({"train": 30, "test": 30}, {"train": 27, "val": 3, "test": 30}),
    "train, val": ({"train": 30, "val": 30}, {"train": 24, "val": 30, "test": 6}),
    "train, val, test": ({"train": 30, "val": 30, "test": 30}, {"train": 30, "val": 30, "test": 30}),
    "train, valid": ({"train": 30, "valid": 30}, {"train": 24, "val": 30, "test": 6}),
    "train": ({"train": 30}, {"train": 22, "val": 2, "test": 6}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_three_splits_that_share_no_image(tmp_path: Path, layout: str) -> None:
    folders, expected = LAYOUTS[layout]
    tree(tmp_path, {f"{folder}/{name}".strip("/"): count for folder in folders for name, count in CLASSES.items()})
    found = data.image_folder(str(tmp_path), **{**OPTIONS, "batch_size": 1})
    splits = {name: values_of(getattr(found, name)) for name in ("train", "val", "test")}
    assert {name: len(values) for name, values in splits.items()} == expected
    together = [value for values in splits.values() for value in values]
    assert sorted(together) == list(range(30 * len(folders)))  # every image once, none twice
    assert found.class_names == ["cat", "dog"]
    assert found.facts == {"in_channels": 3, "num_classes": 2, "image_size": 6}


def test_each_image_has_the_class_of_its_folder(tmp_path: Path) -> None:
    tree(tmp_path, {"cat": 20, "dog": 10, "eel/young/small": 10})
    found = data.image_folder(str(tmp_path), **OPTIONS)
    for split in (found.train, found.val, found.test):
        targets = torch.cat([targets for _, targets in split.epoch(0)]).tolist()
        assert targets == [0 if value < 20 else 1 if value < 30 else 2 for value in values_of(split)]


def test_train_may_be_the_name_of_a_class(tmp_path: Path) -> None:
    tree(tmp_path, {"car": 10, "train": 10})
    assert find_splits(tmp_path).class_names == ["car", "train"]


def test_the_order_of_files_is_that_of_their_names(tmp_path: Path) -> None:
    tree(tmp_path, CLASSES)
    files = find_splits(tmp_path).files["train"]
    assert [file.relative_to(tmp_path).as_posix() for file, _ in files] == sorted(
        f"{name}/{i:03d}.png" for name, count in CLASSES.items() for i in range(count)
    )


def test_hidden_files_and_other_files_are_no_images(tmp_path: Path) -> None:
    tree(tmp_path, CLASSES)
    for name in ("cat/._000.png", "cat/.DS_Store", "cat/notes.txt", ".ipynb_checkpoints/000.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "labels.csv").write_text("a,b")
    splits = find_splits(tmp_path)
    assert splits.class_names == ["cat", "dog"] and len(splits.files["train"]) == 30


@pytest.mark.parametrize(
    "layout, sentence",
    [
        ({}, "holds 0 class folders and at least 2 are needed: dataset.root must have the layout"),
        ({"cat": 3}, "holds 1 class folders"),
        ({"train": 5, "val": 5}, "train holds 0 class folders"),
        ({"train/cat": 3, "train/dog": 3, "val/cow": 1}, "val has a class 'cow' that .*train lacks"),
        ({"train/cat": 3, "train/dog": 3, "test": 4}, "test holds no images in class folders"),
    ],
)
def test_a_folder_without_a_layout_ends_in_a_sentence(tmp_path: Path, layout: dict[str, int], sentence: str) -> None:
    tree(tmp_path, layout)
    with pytest.raises(data.DataError, match=sentence):
        find_splits(tmp_path)


def test_an_absent_folder_and_an_empty_class_end_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"there is no folder .*absent: set dataset.root"):
        data.image_folder(str(tmp_path / "absent"))
    tree(tmp_path, CLASSES)
    (tmp_path / "eel").mkdir()
    with pytest.raises(data.DataError, match="eel holds no images: remove it, or fill it"):
        data.image_folder(str(tmp_path))


def test_too_few_images_to_split_end_in_a_sentence(tmp_path: Path) -> None:
    tree(tmp_path, {"cat": 1, "dog": 1})
    with pytest.raises(data.DataError, match="are too few to split"):
        data.image_folder(str(tmp_path), **OPTIONS)


# ------------------------------------------------------------------------------------------------------- decoding


def test_any_size_is_resized_and_cut_as_torchvision_does(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    sizes = [(40, 30), (30, 40), (17, 60), (20, 20), (9, 9)]
    for i, (width, height) in enumerate(sizes):
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    files = sorted(tmp_path.iterdir())
    images = read_images(files, 20, 1.0)
    assert images.shape == (5, 3, 20, 20) and images.dtype == torch.uint8
    reference = transforms.Compose([transforms.Resize(20), transforms.CenterCrop(20), transforms.PILToTensor()])
    for file, image in zip(files, images, strict=True):
        assert torch.equal(image, reference(Image.open(file)))


def test_grey_images_have_one_channel_unless_one_is_coloured(tmp_path: Path) -> None:
    grey = [write(tmp_path / f"{i}.png", 100 + i, mode="L") for i in range(3)]
    images = read_images(grey, None, 1.0)
    assert images.shape == (3, 1, 6, 6) and images[:, 0, 0, 0].tolist() == [100, 101, 102]
    mixed = read_images([*grey, write(tmp_path / "colour.png", 258)], None, 1.0)
    assert mixed.shape == (4, 3, 6, 6)
    assert mixed[0, :, 0, 0].tolist() == [100] * 3 and mixed[3, :, 0, 0].tolist() == [1, 2, 7]


def test_every_common_kind_of_file_is_read(tmp_path: Path) -> None:
    kinds = ["a.PNG", "b.jpg", "c.JPEG", "d.bmp", "e.gif", "f.tif", "g.webp", "h.ppm"]
    for name in kinds:
        write(tmp_path / "cat" / name, 300)
        write(tmp_path / "dog" / name, 300)
    Image.new("RGBA", (6, 6), (1, 44, 7, 0)).save(tmp_path / "cat" / "transparent.png")
    Image.new("1", (6, 6), 1).save(tmp_path / "cat" / "bitmap.png")
    images = read_images([file for file, _ in find_splits(tmp_path).files["train"]], None, 1.0)
    assert images.shape == (2 * len(kinds) + 2, 3, 6, 6)


@pytest.mark.parametrize("damage", ["text", "empty", "truncated", "scrambled"])
def test_an_unreadable_image_is_named(tmp_path: Path, damage: str) -> None:
    tree(tmp_path, CLASSES, size=(64, 64))
    bad = tmp_path / "cat" / "007.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(bad)
    content = bad.read_bytes()
    bad.write_bytes(
        {"text": b"no image", "empty": b"", "truncated": content[:2000], "scrambled": content[:60] + b"x" * 4000}[
            damage
        ]
    )
    with pytest.raises(data.DataError, match=r"cat/007.png cannot be read as an image: repair it, or remove it"):
        data.image_folder(str(tmp_path), **OPTIONS)


def test_deep_images_are_refused_and_not_clipped(tmp_path: Path) -> None:
    tree(tmp_path, CLASSES)
    Image.fromarray(np.full((6, 6), 40_000, dtype=np.uint16)).save(tmp_path / "dog" / "deep.png")
    with pytest.raises(data.DataError, match=r"dog/deep.png has more than 8 bits a channel"):
        data.image_folder(str(tmp_path), **OPTIONS)


@pytest.mark.parametrize("odd, sentence", [((5, 5), "5 × 5 pixels and 000.png 6 × 6"), ((6, 5), "6 × 5 pixels and")])
def test_images_of_several_sizes_ask_for_an_image_size(tmp_path: Path, odd: tuple[int, int], sentence: str) -> None:
    tree(tmp_path, CLASSES)
    write(tmp_path / "dog" / "004.png", size=odd)
    with pytest.raises(data.DataError, match=f"dog/004.png has {sentence}.*set dataset.image_size"):
        data.image_folder(str(tmp_path), **OPTIONS)
    assert data.image_folder(str(tmp_path), image_size=4, **OPTIONS).facts["image_size"] == 4


def test_images_of_one_size_that_is_not_square_ask_for_an_image_size(tmp_path: Path) -> None:
    tree(tmp_path, CLASSES, size=(8, 6))
    with pytest.raises(data.DataError, match=r"8 × 6 pixels: set dataset.image_size"):
        data.image_folder(str(tmp_path), **OPTIONS)


def test_a_set_too_large_for_memory_is_refused_before_decoding(tmp_path: Path) -> None:
    tree(tmp_path, CLASSES)
    (tmp_path / "cat" / "000.png").write_bytes((tmp_path / "cat" / "000.png").read_bytes()[:60])  # unread, so unnoticed
    sentence = r"30 images of 3 × 1000 × 1000 bytes take 0.09 GB of memory and dataset.max_gigabytes is 0.05: raise it"
    with pytest.raises(data.DataError, match=sentence):
        data.image_folder(str(tmp_path), image_size=1000, max_gigabytes=0.05, **OPTIONS)


@pytest.mark.parametrize("name, value", [("image_size", 0), ("max_gigabytes", 0.0)])
def test_options_out_of_range_end_in_a_sentence(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be"):
        data.image_folder(str(tmp_path), **{name: value})


def test_flip_is_the_users_choice(tmp_path: Path) -> None:
    tree(tmp_path, CLASSES)
    for flip in (True, False):
        train = data.image_folder(str(tmp_path), flip=flip, **{**OPTIONS, "augment": "standard"}).train
        assert isinstance(train, InMemoryLoader) and train.augmentation.flip is flip


# ------------------------------------------------------------------------------------------------------ real files


def test_the_real_cifar10_subset(shared_data: Callable[[str], Path]) -> None:
    root = shared_data("cifar10-subset")
    subset = data.image_folder(str(root), augment="none", limit_train=0.1)
    assert subset.facts == {"in_channels": 3, "num_classes": 10, "image_size": 32}
    assert subset.class_names[0] == "airplane" and subset.class_names[-1] == "truck"
    assert [split.num_examples for split in (subset.train, subset.val, subset.test)] == [896, 1000, 2000]
    assert isinstance(subset.val, InMemoryLoader) and isinstance(subset.test, InMemoryLoader)
    assert subset.val.store.targets[subset.val.rows].bincount().tolist() == [100] * 10
    inputs, targets = next(subset.test.epoch(0))
    assert targets.tolist() == [0] * 200 + [1] * 56
    first = transforms.PILToTensor()(Image.open(sorted((root / "test" / "airplane").iterdir())[0]))
    pixels = (inputs[0] - subset.test._shift) / subset.test._scale
    torch.testing.assert_close(pixels, first.float(), rtol=0, atol=1e-3)
    # The subset's own statistics are close to those published for the whole of CIFAR-10.
    mean = (-subset.test._shift / subset.test._scale / 255).flatten()
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), rtol=0, atol=0.01)
