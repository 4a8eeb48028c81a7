"""Image classification sets: the embedded digits, torchvision's small sets, and folders of images.

Each builder only reads its images; `_module` splits them and makes the loaders, the same way for all.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from filelock import FileLock
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive

from data.base import DataError, DataModule
from data.folders import FileLoader, ImageFiles, find_splits, find_tiny_imagenet, read_images
from data.memory import Augmentation, ImageStore, InMemoryLoader, pixel_statistics

Augment = Literal["none", "standard", "cutout"]
Labelled = tuple[Tensor, Tensor]  # images uint8 [N, C, H, W], targets int64 [N]

DOWNLOAD_SILENCE = 20.0  # seconds without a byte after which a download is given up
TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
IMAGENET_STATISTICS = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # mean and std of the train images, as published

# What torchvision raises where a set is absent (RuntimeError), cut short, or out of reach.
UNLOADABLE = (RuntimeError, OSError, AssertionError, ValueError, EOFError, HTTPException)


@dataclass(frozen=True)
class Loading:
    """How a set is split and served: the options that all builders share, checked before anything is read."""

    batch_size: int
    eval_batch_size: int
    augment: Augment
    val_fraction: float
    split_seed: int
    limit_train: float
    limit_val: float
    seed: int
    device: torch.device | str
    rank: int
    world_size: int
    test_fraction: float = 0.2  # where the set has no test images of its own

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("split_seed", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, both excluded, got {getattr(self, name)}")
        for name in ("limit_train", "limit_val"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if self.augment not in ("none", "standard", "cutout"):
            raise ValueError(f"augment must be none, standard or cutout, got {self.augment!r}")
        if self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size must be divisible by the number of processes, got {self.batch_size} for {self.world_size}"
            )

    def serving(self, training: bool) -> dict[str, Any]:
        """What every loader takes of these, for training or for evaluation."""
        return {
            "batch_size": self.batch_size if training else self.eval_batch_size,
            "training": training,
            "seed": self.seed,
            "device": self.device,
            "rank": self.rank,
            "world_size": self.world_size,
        }


@dataclass(frozen=True)
class _Images:
    """What a builder has read. Splits that it does not have are taken off ``train``."""

    train: Labelled
    class_names: list[str]
    val: Labelled | None = None
    test: Labelled | None = None
    statistics: tuple[list[float], list[float]] | None = None  # mean and std; None: of the train split
    flip: bool = True  # whether a mirrored image still shows its class


def digits(
    batch_size: int = 64,
    eval_batch_size: int = 512,
    augment: Augment = "standard",
    val_fraction: float = 0.1,
    split_seed: int = 0,
    limit_train: float = 1.0,
    limit_val: float = 1.0,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> DataModule:
    """scikit-learn's bundled handwritten digits: 1797 real 8 × 8 grey images in ten classes; nothing to download.

    A fifth of each class is the test set. Images are never mirrored, since a mirrored digit is no digit.

    Args:
        batch_size: of all ranks together.
        eval_batch_size: for validation and test, of all ranks together.
        augment: ``standard`` crops with padding 1, ``cutout`` also cuts a 4 × 4 hole.
        val_fraction: share of what is not test that is held out for validation.
        split_seed: which examples go where; independent of ``seed``.
        limit_train: share of the train split that is used.
        limit_val: share of the validation split that is used.
        seed: of order and augmentation.
        device: of the batches.
        rank: this process.
        world_size: how many processes there are.

    Raises:
        ValueError: for an option out of its range.
    """
    loading = Loading(
        batch_size, eval_batch_size, augment, val_fraction, split_seed, limit_train, limit_val,
        seed, device, rank, world_size,
    )  # fmt: skip
    bundled = load_digits()
    images = torch.from_numpy(bundled.images).mul(255 / 16).round().to(torch.uint8)[:, None]  # from 0..16
    names = [str(digit) for digit in range(10)]
    return _module("digits", _Images((images, torch.from_numpy(bundled.target)), names, flip=False), loading)


def image_folder(
    root: str,
    image_size: int | None = None,
    flip: bool = True,
    max_gigabytes: float = 8.0,
    batch_size: int = 128,
    eval_batch_size: int = 256,
    augment: Augment = "standard",
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    limit_train: float = 1.0,
    limit_val: float = 1.0,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> DataModule:
    """Any images, one folder a class, decoded once into memory.

    Layouts: ``root/train/<class>/...`` beside ``root/val`` and ``root/test`` (each optional), or ``root/<class>/...``.
    A split that is not there is taken off the train images; ``root/val`` is used as validation, never as test.
    If all images are grey, the set has one channel, otherwise three.

    Args:
        root: the folder.
        image_size: bring the shorter side to this many pixels and cut the centre square; None: the images are square
            and of one size already.
        flip: whether ``augment`` may mirror the images.
        max_gigabytes: refuse a set that takes more memory than this once decoded.
        batch_size: of all ranks together.
        eval_batch_size: for validation and test, of all ranks together.
        augment: ``standard`` crops (padding 4) and mirrors, ``cutout`` also cuts a 16 × 16 hole; both are scaled down
            for images below 32 pixels.
        val_fraction: share of the train images (less those for test) held out where there is no ``root/val``.
        test_fraction: share of the train images held out where there is no ``root/test``.
        split_seed: which examples go where; independent of ``seed``.
        limit_train: share of the train split that is used.
        limit_val: share of the validation split that is used.
        seed: of order and augmentation.
        device: of the batches.
        rank: this process.
        world_size: how many processes there are.

    Raises:
        ValueError: for an option out of its range.
        DataError: for a folder without such a layout, an unreadable image, or a set too large for memory.
    """
    loading = Loading(
        batch_size, eval_batch_size, augment, val_fraction, split_seed, limit_train, limit_val,
        seed, device, rank, world_size, test_fraction,
    )  # fmt: skip
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 or null, got {image_size}")
    if max_gigabytes <= 0:
        raise ValueError(f"max_gigabytes must be positive, got {max_gigabytes}")
    splits = find_splits(Path(root).expanduser())
    files = [file for split in splits.files.values() for file, _ in split]
    images = read_images(files, image_size, max_gigabytes).split([len(split) for split in splits.files.values()])
    labelled = {
        name: (part, torch.tensor([target for _, target in split]))
        for (name, split), part in zip(splits.files.items(), images, strict=True)
    }
    read = _Images(labelled["train"], splits.class_names, val=labelled.get("val"), test=labelled.get("test"), flip=flip)
    return _module("image_folder", read, loading)


def tiny_imagenet(
    root: str,
    download: bool = True,
    max_gigabytes: float = 8.0,
    batch_size: int = 128,
    eval_batch_size: int = 256,
    augment: Augment = "standard",
    val_fraction: float = 0.1,
    split_seed: int = 0,
    limit_train: float = 1.0,
    limit_val: float = 1.0,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> DataModule:
    """Tiny ImageNet: 100,000 + 10,000 colour 64 × 64 images in two hundred classes, decoded once into memory.

    The published validation images are the test set, as nobody has the labels of the published test images; some of
    the train images are held out for validation.

    Args:
        root: the folder ``tiny-imagenet-200`` as it is published, or where to put it.
        download: fetch the set if it is not there.
        max_gigabytes: refuse a set that takes more memory than this once decoded.
        batch_size: of all ranks together.
        eval_batch_size: for validation and test, of all ranks together.
        augment: ``standard`` crops with padding 4 and mirrors, ``cutout`` also cuts a 16 × 16 hole.
        val_fraction: share of the train images that is held out for validation.
        split_seed: which images are held out; independent of ``seed``.
        limit_train: share of the train split that is used.
        limit_val: share of the validation split that is used.
        seed: of order and augmentation.
        device: of the batches.
        rank: this process.
        world_size: how many processes there are.

    Raises:
        ValueError: for an option out of its range.
        DataError: the set is not there and cannot be fetched, or cannot be read.
    """
    loading = Loading(
        batch_size, eval_batch_size, augment, val_fraction, split_seed, limit_train, limit_val,
        seed, device, rank, world_size,
    )  # fmt: skip
    if max_gigabytes <= 0:
        raise ValueError(f"max_gigabytes must be positive, got {max_gigabytes}")
    splits = find_tiny_imagenet(_tiny_imagenet_folder(Path(root).expanduser(), download))
    train, test = splits.files["train"], splits.files["test"]
    images = read_images([file for file, _ in [*train, *test]], None, max_gigabytes)
    targets = torch.tensor([target for _, target in [*train, *test]])
    parts = zip(*(tensor.split([len(train), len(test)]) for tensor in (images, targets)), strict=True)
    labelled_train, labelled_test = parts
    return _module("tiny_imagenet", _Images(labelled_train, splits.class_names, test=labelled_test), loading)


def imagenet(
    root: str,
    image_size: int = 224,
    resize: int = 256,
    workers: int = 8,
    prefetch: int = 2,
    batch_size: int = 256,
    eval_batch_size: int = 256,
    augment: Literal["none", "standard"] = "standard",
    val_fraction: float = 0.02,
    split_seed: int = 0,
    limit_train: float = 1.0,
    limit_val: float = 1.0,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> DataModule:
    """ImageNet (ILSVRC 2012), or any set too large for memory: ``root/train/<class>/...`` and ``root/val/<class>/...``.

    Images are decoded, cropped and resized by worker processes, travel as bytes and are normalised on the device. The
    published validation images are the test set, as nobody has the labels of the published test images; some of the
    train images are held out for validation.

    Args:
        root: the folder that holds ``train`` and ``val``.
        image_size: side of what the model sees.
        resize: in evaluation, and without augmentation, the shorter side is brought to this many pixels and the
            centre is cut out.
        workers: processes that decode; 0: none, this one does.
        prefetch: batches that each worker prepares ahead.
        batch_size: of all ranks together.
        eval_batch_size: for validation and test, of all ranks together.
        augment: ``standard`` cuts out 8 to 100 % of the area at a ratio of 3:4 to 4:3, and mirrors.
        val_fraction: share of the train images that is held out for validation.
        split_seed: which images are held out; independent of ``seed``.
        limit_train: share of the train split that is used.
        limit_val: share of the validation split that is used.
        seed: of order and augmentation.
        device: of the batches.
        rank: this process.
        world_size: how many processes there are.

    Raises:
        ValueError: for an option out of its range.
        DataError: for a folder without such a layout; later, for an image that cannot be read.
    """
    loading = Loading(
        batch_size, eval_batch_size, augment, val_fraction, split_seed, limit_train, limit_val,
        seed, device, rank, world_size,
    )  # fmt: skip
    if loading.augment == "cutout":
        raise ValueError("augment must be none or standard, got 'cutout'")
    if not 1 <= image_size <= resize:
        raise ValueError(f"image_size must be at least 1 and at most resize ({resize}), got {image_size}")
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    if prefetch < 1:
        raise ValueError(f"prefetch must be at least 1, got {prefetch}")
    folder = Path(root).expanduser()
    splits = find_splits(folder)
    if splits.files.keys() != {"train", "val"}:
        raise DataError(
            f"{folder.absolute()} must hold train/<class>/... and val/<class>/... for dataset=imagenet: name another "
            "folder with dataset.root, or use dataset=image_folder"
        )
    mean, std = IMAGENET_STATISTICS

    def loader(split: str, rows: Tensor, training: bool = False) -> FileLoader:
        return FileLoader(
            ImageFiles(splits.files[split], image_size, resize, crop=training and loading.augment == "standard"),
            rows,
            workers=workers,
            prefetch=prefetch,
            mean=mean,
            std=std,
            **loading.serving(training),
        )

    order = _stratified_order(torch.tensor([target for _, target in splits.files["train"]]), loading.split_seed)
    val_rows, train_rows = cut(order, loading.val_fraction)
    return DataModule(
        name="imagenet",
        task="classification",
        facts={"in_channels": 3, "num_classes": len(splits.class_names), "image_size": image_size},
        train=loader("train", limited(train_rows, "limit_train", loading.limit_train), training=True),
        val=loader("train", limited(val_rows, "limit_val", loading.limit_val)),
        test=loader("val", torch.arange(len(splits.files["val"]))),
        class_names=splits.class_names,
    )


def _published(
    name: str, source: type, mean: list[float], std: list[float], flip: bool, summary: str
) -> Callable[..., DataModule]:
    """A builder for one of torchvision's sets, with the published mean and std of its train images."""

    def build(
        root: str,
        download: bool = True,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        augment: Augment = "standard",
        val_fraction: float = 0.1,
        split_seed: int = 0,
        limit_train: float = 1.0,
        limit_val: float = 1.0,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> DataModule:
        loading = Loading(
            batch_size, eval_batch_size, augment, val_fraction, split_seed, limit_train, limit_val,
            seed, device, rank, world_size,
        )  # fmt: skip
        train, test = torchvision_sets(name, source, Path(root).expanduser(), download)
        names = list(train.classes)
        read = _Images(labelled_images(train), names, test=labelled_images(test), statistics=(mean, std), flip=flip)
        return _module(name, read, loading)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{summary}

    Args:
        root: folder of the set, in torchvision's own layout.
        download: fetch the set if it is not there.
        batch_size: of all ranks together.
        eval_batch_size: for validation and test, of all ranks together.
        augment: ``standard`` crops with padding{" and mirrors" if flip else ", never mirrors"}, ``cutout`` also
            cuts a hole of half the image's side.
        val_fraction: share of the train images that is held out for validation.
        split_seed: which images are held out; independent of ``seed``.
        limit_train: share of the train split that is used.
        limit_val: share of the validation split that is used.
        seed: of order and augmentation.
        device: of the batches.
        rank: this process.
        world_size: how many processes there are.

    Raises:
        ValueError: for an option out of its range.
        DataError: the set is not there and cannot be fetched.
    """
    return build


mnist = _published(
    "mnist", datasets.MNIST, [0.1307], [0.3081], False,
    "Handwritten digits: 60,000 + 10,000 grey 28 × 28 images in ten classes.",
)  # fmt: skip
fashion_mnist = _published(
    "fashion_mnist", datasets.FashionMNIST, [0.2860], [0.3530], True,
    "Photographs of clothes: 60,000 + 10,000 grey 28 × 28 images in ten classes.",
)  # fmt: skip
cifar10 = _published(
    "cifar10", datasets.CIFAR10, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616], True,
    "Small photographs: 50,000 + 10,000 colour 32 × 32 images in ten classes.",
)  # fmt: skip
cifar100 = _published(
    "cifar100", datasets.CIFAR100, [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762], True,
    "Small photographs: 50,000 + 10,000 colour 32 × 32 images in a hundred classes.",
)  # fmt: skip


class _SVHN(datasets.SVHN):
    """torchvision's SVHN under the conventions of its other sets."""

    classes = [str(digit) for digit in range(10)]  # noqa: RUF012

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        super().__init__(root, split="train" if train else "test", download=download)
        self.data: Any = self.data.transpose(0, 2, 3, 1)
        self.targets = self.labels


svhn = _published(
    "svhn", _SVHN, [0.4377, 0.4438, 0.4728], [0.1980, 0.2010, 0.1970], False,
    "Street View House Numbers: 73,257 + 26,032 colour 32 × 32 photographs of digits in ten classes.",
)  # fmt: skip


def _tiny_imagenet_folder(root: Path, download: bool) -> Path:
    """The folder of the set, downloaded if it is not there (by one process at a time)."""
    url, md5 = TINY_IMAGENET
    places = (root, root / Path(url).stem)  # the archive holds a folder

    def there() -> Path | None:
        return next((place for place in places if (place / "val" / "val_annotations.txt").is_file()), None)

    if found := there():
        return found
    absent = f"tiny_imagenet is absent from {root.absolute()}"
    ways_out = "put its files there, or name another folder with dataset.root"
    if not download:
        raise DataError(f"{absent}: set dataset.download=true, {ways_out}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock"), socket_timeout(DOWNLOAD_SILENCE):
            if not there():  # no other rank or run has fetched it meanwhile
                download_and_extract_archive(url, str(root), md5=md5, remove_finished=True)
    except UNLOADABLE as error:
        reason = shorten(str(error), 120)
        raise DataError(f"{absent} and cannot be downloaded ({reason}): {ways_out}") from error
    if found := there():
        return found
    raise DataError(f"{absent}, and the archive that was downloaded does not hold it: {ways_out}")


def torchvision_sets(name: str, source: type, root: Path, download: bool) -> tuple[Any, Any]:
    """Train and test set, from the folder if they are there, else downloaded (by one process at a time)."""
    absent = f"{name} is absent from {root.absolute()}, or damaged there"
    ways_out = (
        "put its files there anew, name another folder with dataset.root, or use the embedded set, dataset=digits"
    )
    try:
        return source(str(root), train=True), source(str(root), train=False)
    except UNLOADABLE as error:
        if not download:
            raise DataError(f"{absent}: set dataset.download=true, {ways_out}") from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock"), socket_timeout(DOWNLOAD_SILENCE):  # other ranks and runs wait, then find it
            return source(str(root), train=True, download=True), source(str(root), train=False)
    except UNLOADABLE as error:
        reason = shorten(str(error), 120)
        raise DataError(f"{absent}, and cannot be downloaded ({reason}): {ways_out}") from error


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """Within it, a silent server raises in place of waiting for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def labelled_images(source: Any) -> Labelled:
    """Images and targets of a torchvision set: grey ones are [N, H, W], coloured ones [N, H, W, C]."""
    images = torch.as_tensor(source.data)
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2), torch.as_tensor(source.targets)


def _module(name: str, images: _Images, loading: Loading) -> DataModule:
    """Split what was read into train, val and test, and make their loaders."""
    channels, size, _ = images.train[0].shape[1:]
    augmentation = _augmentation(loading.augment, size, images.flip)

    # One stratified order, cut in up to three: [test | val | train].
    order = _stratified_order(images.train[1], loading.split_seed)
    test_rows, rest = cut(order, 0.0 if images.test else loading.test_fraction)
    val_rows, train_rows = cut(rest, 0.0 if images.val else loading.val_fraction)
    mean, std = images.statistics or pixel_statistics(images.train[0], train_rows)

    pool = ImageStore(*images.train, padding=augmentation.crop, device=loading.device)
    val, test = (ImageStore(*part, device=loading.device) if part else None for part in (images.val, images.test))
    if val:
        val_rows = _stratified_order(val.targets.cpu(), loading.split_seed)
    if test:
        test_rows = torch.arange(len(test))

    def loader(store: ImageStore, rows: Tensor, training: bool = False) -> InMemoryLoader:
        return InMemoryLoader(
            store,
            rows,
            mean=mean,
            std=std,
            augmentation=augmentation,
            **loading.serving(training),
        )

    return DataModule(
        name=name,
        task="classification",
        facts={"in_channels": channels, "num_classes": len(images.class_names), "image_size": size},
        train=loader(pool, limited(train_rows, "limit_train", loading.limit_train), training=True),
        val=loader(val or pool, limited(val_rows, "limit_val", loading.limit_val)),
        test=loader(test or pool, test_rows),
        class_names=images.class_names,
    )


def _augmentation(augment: Augment, size: int, flip: bool) -> Augmentation:
    """As published for 32 pixels (crop 4, hole 16); smaller images get a crop of an eighth and a hole of half."""
    if augment == "none":
        return Augmentation()
    return Augmentation(crop=min(4, size // 8), flip=flip, cutout=min(16, size // 2) if augment == "cutout" else 0)


def _stratified_order(targets: Tensor, seed: int) -> Tensor:
    """A random order of the examples in which every stretch holds the classes in their proportions.

    Each example gets a place in (0, 1) by its rank among its own class, and all are sorted by place.
    """
    shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    place = torch.empty(len(targets), dtype=torch.float64)
    for label in targets.unique():
        mine = (targets[shuffled] == label).nonzero().flatten()
        place[mine] = (torch.arange(len(mine), dtype=torch.float64) + 0.5) / len(mine)
    return shuffled[place.argsort(stable=True)]


def cut(order: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """The first ``fraction`` of an order (at least one example, unless it is 0), and the rest."""
    count = max(1, round(fraction * len(order))) if fraction else 0
    if count >= len(order):
        raise DataError(f"the {len(order)} examples found are too few to split into train, validation and test")
    return order[:count], order[count:]


def limited(rows: Tensor, name: str, limit: float) -> Tensor:
    """The first ``limit`` of the rows."""
    count = round(limit * len(rows))
    if not count:
        raise ValueError(f"{name} must leave at least one of the {len(rows)} examples, got {limit}")
    return rows[:count]
