"""Image classification sets: the embedded digits, torchvision's small sets, and folders of images.

Each builder only reads its images; `labelled_set` splits them and makes the loaders, the same way for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data.base import DataError, DataModule
from data.options import served
from data.readers import Folder, Published, read_digits
from data.splits import cut, limited, stratified_order
from data.tasks.labelled import LabelledImages, labelled_set
from data.tasks.mixing import Classifying

TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
IMAGENET_STATISTICS = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # mean and std of the train images, as published


@served(batch_size=64)
def digits(*, loading: Classifying) -> DataModule:
    """scikit-learn's bundled handwritten digits: 1797 real 8 × 8 grey images in ten classes; nothing to download.

    A fifth of each class is the test set. Images are never mirrored, since a mirrored digit is no digit; ``cutout``
    cuts a 4 × 4 hole.

    Args:
        loading: how it is split and served.

    Raises:
        ValueError: for an option out of its range.
    """
    return labelled_set("digits", read_digits(), loading)


@served(without=(), eval_batch_size=256)
def image_folder(*, folder: Folder, loading: Classifying) -> DataModule:
    """Any images, one folder a class, decoded once into memory.

    Layouts: ``root/train/<class>/...`` beside ``root/val`` and ``root/test`` (each optional), or ``root/<class>/...``.
    A split that is not there is taken off the train images, ``test_fraction`` of them first, then ``val_fraction`` of
    the others; ``root/val`` is used as validation, never as test. If all images are grey, the set has one channel,
    otherwise three.

    Args:
        folder: the images.
        loading: how they are split and served.

    Raises:
        ValueError: for an option out of its range.
        DataError: for a folder without such a layout, an unreadable image, or a set too large for memory.
    """
    return labelled_set("image_folder", folder.read(), loading)


@served(eval_batch_size=256)
def tiny_imagenet(
    root: str,
    download: bool = True,
    max_gigabytes: float = 8.0,
    *,
    loading: Classifying,
) -> DataModule:
    """Tiny ImageNet: 100,000 + 10,000 colour 64 × 64 images in two hundred classes, decoded once into memory.

    The published validation images are the test set, as nobody has the labels of the published test images; some of
    the train images are held out for validation.

    Args:
        root: the folder ``tiny-imagenet-200`` as it is published, or where to put it.
        download: fetch the set if it is not there.
        max_gigabytes: refuse a set that takes more memory than this once decoded.
        loading: how it is split and served.

    Raises:
        ValueError: for an option out of its range.
        DataError: the set is not there and cannot be fetched, an image cannot be read, or memory does not suffice.
    """
    if max_gigabytes <= 0:
        raise ValueError(f"max_gigabytes must be positive, got {max_gigabytes}")
    from data.sources.downloads import fetch_archive
    from data.sources.folders import find_tiny_imagenet, read_images

    folder, (url, md5) = Path(root).expanduser(), TINY_IMAGENET
    places = (folder, folder / Path(url).stem)  # the archive holds a folder

    def there() -> Path | None:
        return next((place for place in places if (place / "val" / "val_annotations.txt").is_file()), None)

    splits = find_tiny_imagenet(fetch_archive("tiny_imagenet", folder, there, url, md5, download))
    train, test = splits.files["train"], splits.files["test"]
    images = read_images([file for file, _ in [*train, *test]], None, max_gigabytes)
    targets = torch.tensor([target for _, target in [*train, *test]])
    parts = zip(*(tensor.split([len(train), len(test)]) for tensor in (images, targets)), strict=True)
    labelled_train, labelled_test = parts
    found = LabelledImages(labelled_train, splits.class_names, test=labelled_test)
    return labelled_set("tiny_imagenet", found, loading)


@dataclass(frozen=True)
class Streaming(Classifying):
    """How a set that does not fit into memory is split and served.

    Args:
        augment: ``standard`` cuts out 8 to 100 % of the area at a ratio of 3:4 to 4:3, and mirrors.

    Raises:
        ValueError: for an option out of its range.
    """

    augment: Literal["none", "standard"] = "standard"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augment not in ("none", "standard"):
            raise ValueError(f"augment must be none or standard, got {self.augment!r}")


@served(batch_size=256, eval_batch_size=256, val_fraction=0.02)
def imagenet(
    root: str,
    image_size: int = 224,
    resize: int = 256,
    workers: int = 8,
    prefetch: int = 2,
    *,
    loading: Streaming,
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
        loading: how it is split and served.

    Raises:
        ValueError: for an option out of its range.
        DataError: for a folder without such a layout; later, for an image that cannot be read.
    """
    if not 1 <= image_size <= resize:
        raise ValueError(f"image_size must be at least 1 and at most resize ({resize}), got {image_size}")
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    if prefetch < 1:
        raise ValueError(f"prefetch must be at least 1, got {prefetch}")
    from data.sources.folders import find_splits
    from data.sources.streamed import ImageFiles, StreamedLoader

    folder = Path(root).expanduser()
    splits = find_splits(folder)
    if splits.files.keys() != {"train", "val"}:
        raise DataError(
            f"{folder.absolute()} must hold train/<class>/... and val/<class>/... for dataset=imagenet: name another "
            "folder with dataset.root, or use dataset=image_folder"
        )
    mean, std = IMAGENET_STATISTICS
    mix = loading.mixture(len(splits.class_names))

    def loader(split: str, rows: Tensor, training: bool = False) -> StreamedLoader:
        distort = loading.distortion() if training else None
        return StreamedLoader(
            ImageFiles(splits.files[split], image_size, resize, training and loading.augment == "standard", distort),
            rows,
            workers=workers,
            prefetch=prefetch,
            mean=mean,
            std=std,
            mix=mix,
            **loading.serving(training),
        )

    order = stratified_order(torch.tensor([target for _, target in splits.files["train"]]), loading.split_seed)
    val_rows, train_rows = cut(order, loading.val_fraction)
    return DataModule(
        name="imagenet",
        task="classification",
        facts={"in_channels": 3, "num_classes": len(splits.class_names), "image_size": image_size},
        train=loader("train", limited(train_rows, "limit_train", loading.limit_train), training=True),
        val=loader("train", limited(val_rows, "limit_val", loading.limit_val)),
        test=loader("val", limited(torch.arange(len(splits.files["val"])), "limit_test", loading.limit_test)),
        class_names=splits.class_names,
    )


def _published(
    name: str, source: str | type, mean: list[float], std: list[float], flip: bool, summary: str
) -> Callable[..., DataModule]:
    """A builder for one of torchvision's sets, with the published mean and std of its train images."""

    def build(*, place: Published, loading: Classifying) -> DataModule:
        return labelled_set(name, place.read(name, source, flip, (mean, std)), loading)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{summary}{"" if flip else " They are never mirrored."}

    Args:
        place: where it lies.
        loading: how it is split and served.

    Raises:
        ValueError: for an option out of its range.
        DataError: the set is not there and cannot be fetched.
    """
    return served()(build)


mnist = _published(
    "mnist", "MNIST", [0.1307], [0.3081], False,
    "Handwritten digits: 60,000 + 10,000 grey 28 × 28 images in ten classes.",
)  # fmt: skip
fashion_mnist = _published(
    "fashion_mnist", "FashionMNIST", [0.2860], [0.3530], True,
    "Photographs of clothes: 60,000 + 10,000 grey 28 × 28 images in ten classes.",
)  # fmt: skip
cifar10 = _published(
    "cifar10", "CIFAR10", [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616], True,
    "Small photographs: 50,000 + 10,000 colour 32 × 32 images in ten classes.",
)  # fmt: skip
cifar100 = _published(
    "cifar100", "CIFAR100", [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762], True,
    "Small photographs: 50,000 + 10,000 colour 32 × 32 images in a hundred classes.",
)  # fmt: skip
svhn = _published(
    "svhn", "SVHN", [0.4377, 0.4438, 0.4728], [0.1980, 0.2010, 0.1970], False,
    "Street View House Numbers: 73,257 + 26,032 colour 32 × 32 photographs of digits in ten classes.",
)  # fmt: skip
