"""Reconstruction: images become three loaders whose targets are the images themselves.

Inputs are pixels in [0, 1], targets the same pixels in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from data.base import DataModule
from data.memory import ImageStore, InMemoryLoader
from data.options import Kind, Loading
from data.splits import cut, limited, random_order
from data.tasks.labelled import LabelledImages, augmentation_of

CHUNK = 2000  # images looked at at once: bounded memory


@dataclass(frozen=True)
class Reproducing(Loading):
    """How a set is split and served: what all image sets share, and what there is to say of reconstruction.

    Args:
        likelihood: p(pixels | outputs) that is trained on.
        val_from: ``train`` validates on images that are not trained on, ``val_fraction`` of them unless the set has
            validation images; ``test`` validates on the test images.
        augment: ``standard`` crops with padding and mirrors where a mirrored image is still of its kind.

    Raises:
        ValueError: for an option out of its range.
    """

    kind: ClassVar[Kind | None] = Kind("reconstruction", ("in_channels", "image_size", "likelihood"))
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    val_from: Literal["train", "test"] = "train"
    augment: Literal["none", "standard"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augment not in ("none", "standard"):
            raise ValueError(f"augment must be none or standard, got {self.augment!r}")
        if self.val_from not in ("train", "test"):
            raise ValueError(f"val_from must be train or test, got {self.val_from!r}")
        if self.likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f"likelihood must be bernoulli or gaussian, got {self.likelihood!r}")


@dataclass(frozen=True)
class Images:
    """What a builder has read: uint8 ``[N, C, H, W]`` each. Splits that it does not have are taken off ``train``."""

    train: Tensor
    val: Tensor | None = None
    test: Tensor | None = None
    flip: bool = True  # whether a mirrored image is still of its kind
    centred: bool = False  # whether it is published with pixels of mean 0 and an average variance of 1


def unlabelled(images: LabelledImages) -> Images:
    """The images of a classification set, without their targets."""
    val, test = (part and part[0] for part in (images.val, images.test))
    return Images(images.train[0], val, test, flip=images.flip)


class ReconstructionLoader(InMemoryLoader):
    """Serves images with their own pixels as targets, in a row: ``[b, C, H, W]`` and ``[b, C·H·W]``.

    Args:
        store: the images; their targets are not used.
        rows: see InMemoryLoader.
        mean: image ``[C, H, W]`` that is subtracted, in units of 0..1.
        std: by which pixels are then divided.
        options: see InMemoryLoader.
    """

    def __init__(self, store: ImageStore, rows: Tensor, *, mean: Tensor, std: float, **options: Any) -> None:
        channels = store.shape[0]
        super().__init__(store, rows, mean=[0.0] * channels, std=[std] * channels, **options)
        self._shift = (-mean / std).to(self.device, torch.float32)

    def _batch(self, plan: Tensor) -> tuple[Tensor, Tensor]:
        inputs, _ = super()._batch(plan)
        return inputs, inputs.flatten(1).clone()  # a copy: a model may begin with an operation in place


def reproduced_set(name: str, images: Images, loading: Reproducing) -> DataModule:
    """Split what was read into train, val and test, and make their loaders."""
    channels, size, _ = images.train.shape[1:]
    augmentation = augmentation_of(loading.augment, size, images.flip)

    # One random order, cut in up to three: [test | val | train].
    order = random_order(len(images.train), loading.split_seed)
    test_rows, rest = cut(order, 0.0 if images.test is not None else loading.test_fraction)
    own_val = images.val is not None or loading.val_from == "test"
    val_rows, train_rows = cut(rest, 0.0 if own_val else loading.val_fraction)
    train_rows = limited(train_rows, "limit_train", loading.limit_train)

    mean, variance = pixel_moments(images.train, train_rows)
    centred = images.centred and loading.likelihood == "gaussian"
    std = float(variance.mean().sqrt()) or 1.0
    served: dict[str, Any] = {"mean": mean if centred else torch.zeros_like(mean), "std": std if centred else 1.0}
    # A constant output does best with each pixel's mean; its loss is then an entropy, or a variance.
    entropy = torch.special.entr(mean) + torch.special.entr(1 - mean)
    plateau = entropy if loading.likelihood == "bernoulli" else variance / served["std"] ** 2

    pool = _store(images.train, loading, padding=augmentation.crop)
    test = pool if images.test is None else _store(images.test, loading)
    if images.test is not None:
        test_rows = torch.arange(len(test))
    val = pool
    if loading.val_from == "test":
        val, val_rows = test, test_rows
    elif images.val is not None:
        val = _store(images.val, loading)
        val_rows = random_order(len(val), loading.split_seed)

    def loader(store: ImageStore, rows: Tensor, training: bool = False) -> ReconstructionLoader:
        return ReconstructionLoader(
            store,
            rows,
            augmentation=augmentation,
            **loading.serving(training),
            **served,
        )

    return DataModule(
        name=name,
        task="reconstruction",
        facts={"in_channels": channels, "image_size": size, "likelihood": loading.likelihood},
        train=loader(pool, train_rows, training=True),
        val=loader(val, limited(val_rows, "limit_val", loading.limit_val)),
        test=loader(test, limited(test_rows, "limit_test", loading.limit_test)),
        class_names=[],
        plateau=float(plateau.mean()),
    )


def pixel_moments(images: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every pixel over ``images[rows]`` (uint8 ``[N, C, H, W]``), float64, in units of 0..1."""
    total = torch.zeros(2, *images.shape[1:], dtype=torch.float64)
    for chunk in rows.split(CHUNK):  # bounded memory, whatever the size of the set
        pixels = images[chunk].double() / 255
        total += torch.stack([pixels.sum(0), pixels.square().sum(0)])
    mean, square = total / len(rows)
    return mean, (square - mean.square()).clamp(min=0)


def _store(images: Tensor, loading: Loading, padding: int = 0) -> ImageStore:
    return ImageStore(images, torch.zeros(len(images)), padding=padding, device=loading.device)
