"""Folders of image files: which file belongs to which split and class, and decoding them into memory."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from data.base import DataError
from data.sources.images import GREY_MODES, SUFFIXES, decode, read_header
from data.sources.reading import read_lines

log = logging.getLogger(__name__)

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # by folder name
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class FolderSplits:
    """The files of a folder: for each split that it has, its (file, target) pairs in a fixed order."""

    files: dict[str, list[tuple[Path, int]]]
    class_names: list[str]


def find_splits(root: Path, expected: str = "") -> FolderSplits:
    """Find ``root/train/<class>/...`` with ``root/val`` and ``root/test`` where they exist, or ``root/<class>/...``.

    A warning counts the files that are passed over because their names are no images', by suffix
    (``data.sources.images`` has the suffixes that are), and another one names the classes that a split has no images
    of.

    Args:
        root: the folder.
        expected: a suffix of files that belong to the set beside its images, and are not worth a word.

    Returns:
        The files of each split, and the classes.

    Raises:
        DataError: the folder is absent, has no such layout, or an evaluation split has a class that train lacks.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root.absolute()}: set dataset.root to one that holds a folder a class")
    folders = {SPLITS[name]: root / name for name in SPLITS if (root / name).is_dir()}
    if "train" not in folders or (not _folders(folders["train"]) and not SPLITS.keys() >= set(_folders(root))):
        folders = {"train": root}  # a folder "train" full of images, beside others, is a class
    train = folders["train"]
    classes = _folders(train)
    if len(classes) < 2:
        raise DataError(
            f"{train.absolute()} holds {len(classes)} class folders and at least 2 are needed: "
            "dataset.root must have the layout root/<class>/... or root/train/<class>/..."
        )
    files: dict[str, list[tuple[Path, int]]] = {}
    passed: Counter[str] = Counter()
    if train != root:
        _outside(root, passed)
    for split, folder in folders.items():
        unknown = [name for name in _folders(folder) if name not in classes]
        if unknown:
            raise DataError(
                f"{folder.absolute()} has a class {unknown[0]!r} that {train.absolute()} lacks: add or remove it"
            )
        _outside(folder, passed)
        found = [_images(folder / name, passed) for name in classes]
        files[split] = [(file, target) for target, images in enumerate(found) for file in images]
        empty = [name for name, images in zip(classes, found, strict=True) if not images]
        instead = f" (files passed over: {_counted(passed)})" if passed else ""
        if not files[split]:
            raise DataError(f"{folder.absolute()} holds no images in class folders: remove it, or fill it{instead}")
        if empty and split == "train":
            raise DataError(f"{(folder / empty[0]).absolute()} holds no images: remove it, or fill it{instead}")
        if empty:
            log.warning("%s has no images of %d of %d classes: %s", folder, len(empty), len(classes), ", ".join(empty))
    passed.pop(expected, None)
    if passed:
        log.warning("%s: %d files are passed over as no images: %s", root, passed.total(), _counted(passed))
    return FolderSplits(files, classes)


def find_tiny_imagenet(root: Path) -> FolderSplits:
    """Find ``root/train/<class>/images/...`` and ``root/val/images``, whose classes ``val_annotations.txt`` names.

    The latter are the test set. Classes are called by their words where ``words.txt`` has them.

    Raises:
        DataError: a file names a class that there is none of, or an image that is not there.
    """
    train = find_splits(root / "train", expected=".txt")
    identifiers = {name: target for target, name in enumerate(train.class_names)}
    annotations = root / "val" / "val_annotations.txt"
    test = []
    for line in _lines(annotations):
        name, identifier, *_ = [*line.split("\t"), "", ""]
        file = annotations.parent / "images" / name
        if identifier not in identifiers or not file.is_file():
            raise DataError(
                f"{annotations.absolute()} has a line without an image or a class of {root.absolute()}, {line!r}: "
                "put the published files there anew"
            )
        test.append((file, identifiers[identifier]))
    words = root / "words.txt"
    pairs = (line.partition("\t") for line in _lines(words)) if words.is_file() else ()
    described = {identifier: text.split(",")[0] for identifier, _, text in pairs}
    names = [described.get(identifier, identifier) for identifier in train.class_names]
    return FolderSplits({"train": train.files["train"], "test": test}, names)


def read_images(files: list[Path], image_size: int | None, max_gigabytes: float) -> Tensor:
    """Decode images into one tensor, many at a time.

    Args:
        files: the images.
        image_size: side to bring them to (shorter side resized, centre cut); None: they are square and of one size.
        max_gigabytes: the most memory the tensor may take.

    Returns:
        uint8 ``[N, C, H, W]``, with one channel if all images are grey, else three.

    Raises:
        DataError: an image is unreadable, the sizes differ, or the tensor would be too large.
    """
    headers = _in_threads(partial(read_header, sized=not image_size), files)
    size = image_size or _common_size(files, [size for size, _ in headers])
    mode = "L" if all(mode in GREY_MODES for _, mode in headers) else "RGB"
    gigabytes = len(files) * len(mode) * size * size / 1e9
    if gigabytes > max_gigabytes:
        raise DataError(
            f"{len(files)} images of {len(mode)} × {size} × {size} bytes take {gigabytes:.3g} GB of memory and "
            f"dataset.max_gigabytes is {max_gigabytes:g}: raise it, or lower dataset.image_size"
        )
    images = torch.empty(len(files), len(mode), size, size, dtype=torch.uint8)

    def fill(index: int) -> None:
        images[index] = _decode(files[index], mode, size)

    _in_threads(fill, range(len(files)))
    return images


def _in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results in order (Pillow decodes outside Python's lock); the first failure, in order, cancels the rest."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(function, items))


def _lines(file: Path) -> list[str]:
    """The lines of a text that belongs to a set, without their ends."""
    try:
        return [line.rstrip("\n") for line in read_lines(file)]
    except (OSError, ValueError) as error:
        raise DataError(f"{file.absolute()} cannot be read as text ({error}): put the published file there") from error


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path, passed: Counter[str]) -> list[Path]:
    """The images below a folder, sorted; hidden files (such as ``._cat.jpg``) are none.

    Args:
        folder: where to look; it need not exist.
        passed: gets the files that are none, by their suffix.
    """
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        for name in [name for name in folders if name.startswith(".")]:
            folders.remove(name)
            passed["hidden"] += sum(len(files) for *_, files in os.walk(Path(parent, name)))
        for name in names:
            kind = _kind(name)
            if kind in SUFFIXES:
                found.append(Path(parent, name))
            else:
                passed[kind] += 1
    return sorted(found)


def _kind(name: str) -> str:
    """A file's suffix in lower case; or what there is to say in its place."""
    return "hidden" if name.startswith(".") else Path(name).suffix.lower() or "without a suffix"


def _outside(folder: Path, passed: Counter[str]) -> None:
    """Count the files that lie in a folder of classes, and in its hidden folders, instead of in a class."""
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name.startswith("."):
            passed["hidden"] += sum(len(files) for *_, files in os.walk(entry))
        elif entry.is_file():
            kind = _kind(entry.name)
            passed[f"{kind} outside the class folders" if kind in SUFFIXES else kind] += 1


def _counted(passed: Counter[str]) -> str:
    """Files passed over, the most frequent kinds first."""
    return ", ".join(f"{count} × {kind}" for kind, count in passed.most_common())


def _decode(file: Path, mode: str, size: int) -> Tensor:
    """An image as uint8 ``[C, size, size]``."""
    image = decode(file, mode)
    if image.size != (size, size):
        from torchvision.transforms import functional  # takes a second

        image = functional.center_crop(functional.resize(image, [size]), [size, size])
    return torch.from_numpy(np.array(image)).view(size, size, len(mode)).permute(2, 0, 1)


def _common_size(files: list[Path], sizes: list[tuple[int, int]]) -> int:
    """The side that all images have."""
    first = sizes[0]
    for file, size in zip(files, sizes, strict=True):
        if size != first or size[0] != size[1]:
            others = f" and {files[0].name} {first[0]} × {first[1]}" if size != first else ""
            raise DataError(
                f"{file.absolute()} has {size[0]} × {size[1]} pixels{others}: "
                "set dataset.image_size to bring all images to one square size"
            )
    return first[0]
