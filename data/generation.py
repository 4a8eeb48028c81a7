"""Images to be imitated: any labelled set served with pixels in [-1, 1], which is what a generator's tanh yields.

The sets, their splits and their files are those of classification. The labels are served too, and not learned from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch

from data.base import DataModule
from data.memory import InMemoryLoader
from data.vision import cifar10, digits, image_folder, mnist

Frechet = Literal["mnist", "cifar10", "inception"]


def digits_generation(
    frechet: Frechet = "mnist",
    eval_images: int = 2000,
    batch_size: int = 64,
    eval_batch_size: int = 500,
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
    """scikit-learn's bundled handwritten digits, to be imitated: 1797 grey 8 × 8 images; nothing to download.

    Args:
        frechet: whose features compare real and generated images in evaluation.
        eval_images: how many real images, and as many generated ones, an evaluation takes at most.
        batch_size: of all ranks together.
        eval_batch_size: for validation and test, of all ranks together.
        val_fraction: share of what is not test that is held out for validation.
        split_seed: which examples go where; independent of ``seed``.
        limit_train: share of the train split that is used.
        limit_val: share of the validation split that is used.
        seed: of the order.
        device: of the batches.
        rank: this process.
        world_size: how many processes there are.

    Raises:
        ValueError: for an option out of its range.
    """
    labelled = digits(
        batch_size, eval_batch_size, "none", val_fraction, split_seed, limit_train, limit_val,
        seed=seed, device=device, rank=rank, world_size=world_size,
    )  # fmt: skip
    return _imitated(labelled, frechet, eval_images)


def image_folder_generation(
    root: str,
    image_size: int | None = None,
    max_gigabytes: float = 8.0,
    frechet: Frechet = "cifar10",
    eval_images: int = 2000,
    batch_size: int = 64,
    eval_batch_size: int = 500,
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
    """Any images, to be imitated: folders as of ``image_folder``.

    Args:
        root: the folder.
        image_size: bring the shorter side to this many pixels and cut the centre square; None: the images are square
            and of one size already.
        max_gigabytes: refuse a set that takes more memory than this once decoded.
        frechet: whose features compare real and generated images in evaluation.
        eval_images: how many real images, and as many generated ones, an evaluation takes at most.
        batch_size: of all ranks together.
        eval_batch_size: for validation and test, of all ranks together.
        val_fraction: share of the train images (less those for test) held out where there is no ``root/val``.
        test_fraction: share of the train images held out where there is no ``root/test``.
        split_seed: which images go where; independent of ``seed``.
        limit_train: share of the train split that is used.
        limit_val: share of the validation split that is used.
        seed: of the order.
        device: of the batches.
        rank: this process.
        world_size: how many processes there are.

    Raises:
        ValueError: for an option out of its range.
        DataError: for a folder without such a layout, an unreadable image, or a set too large for memory.
    """
    labelled = image_folder(
        root, image_size, False, max_gigabytes, batch_size, eval_batch_size, "none", val_fraction, test_fraction,
        split_seed, limit_train, limit_val, seed=seed, device=device, rank=rank, world_size=world_size,
    )  # fmt: skip
    return _imitated(labelled, frechet, eval_images)


def _published(name: str, source: Callable[..., DataModule], features: Frechet, summary: str) -> Callable:
    """A builder for one of torchvision's sets."""

    def build(
        root: str,
        download: bool = True,
        frechet: Frechet = features,
        eval_images: int = 2000,
        batch_size: int = 64,
        eval_batch_size: int = 500,
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
        labelled = source(
            root, download, batch_size, eval_batch_size, "none", val_fraction, split_seed, limit_train, limit_val,
            seed=seed, device=device, rank=rank, world_size=world_size,
        )  # fmt: skip
        return _imitated(labelled, frechet, eval_images)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{summary}

    Args:
        root: folder of the set, in torchvision's own layout.
        download: fetch the set if it is not there.
        frechet: whose features compare real and generated images in evaluation.
        eval_images: how many real images, and as many generated ones, an evaluation takes at most.
        batch_size: of all ranks together.
        eval_batch_size: for validation and test, of all ranks together.
        val_fraction: share of the train images that is held out for validation.
        split_seed: which images are held out; independent of ``seed``.
        limit_train: share of the train split that is used.
        limit_val: share of the validation split that is used.
        seed: of the order.
        device: of the batches.
        rank: this process.
        world_size: how many processes there are.

    Raises:
        ValueError: for an option out of its range.
        DataError: the set is not there and cannot be fetched.
    """
    return build


mnist_generation = _published(
    "mnist_generation", mnist, "mnist",
    "MNIST, to be imitated: 60,000 + 10,000 grey 28 × 28 images of handwritten digits.",
)  # fmt: skip
cifar10_generation = _published(
    "cifar10_generation", cifar10, "cifar10",
    "CIFAR-10, to be imitated: 50,000 + 10,000 colour 32 × 32 photographs.",
)  # fmt: skip


def _imitated(labelled: DataModule, frechet: str, eval_images: int) -> DataModule:
    """A classification set with pixels in [-1, 1], and no more than ``eval_images`` in an evaluation."""
    if frechet not in ("mnist", "cifar10", "inception"):
        raise ValueError(f"frechet must be mnist, cifar10 or inception, got {frechet!r}")
    if eval_images < 2:
        raise ValueError(f"eval_images must be at least 2, got {eval_images}")

    def loader(of: InMemoryLoader) -> InMemoryLoader:
        rows, grey = of.rows, [0.5] * of.store.shape[0]
        if not of.training:
            count = min(eval_images, len(rows))
            rows = rows[torch.arange(count) * len(rows) // count]  # spread evenly: a test set may be sorted by class
        return InMemoryLoader(
            of.store, rows, batch_size=of.batch_size, mean=grey, std=grey, training=of.training, seed=of.seed,
            device=of.device, rank=of.rank, world_size=of.world_size,
        )  # fmt: skip

    sets = (labelled.train, labelled.val, labelled.test)
    train, val, test = (loader(part) for part in sets if isinstance(part, InMemoryLoader))
    if val.num_examples < 2:
        raise ValueError("limit_val must leave at least 2 images, whose spread is compared")
    facts = {key: labelled.facts[key] for key in ("in_channels", "image_size")}
    return replace(
        labelled, name=f"{labelled.name}_generation", task="generation", facts=facts | {"frechet": frechet},
        train=train, val=val, test=test,
    )  # fmt: skip
