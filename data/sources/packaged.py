"""Sets that other packages know how to read: torchvision's, and the digits that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets

from data.base import DataError
from data.sources.downloads import UNLOADABLE, alone, reason


class SVHN(datasets.SVHN):
    """torchvision's SVHN under the conventions of its other sets."""

    classes = [str(digit) for digit in range(10)]  # noqa: RUF012

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        super().__init__(root, split="train" if train else "test", download=download)
        self.data: Any = self.data.transpose(0, 2, 3, 1)
        self.targets = self.labels


def torchvision_set(name: str) -> type:
    """One of torchvision's sets by the name of its class, such as ``MNIST``."""
    return SVHN if name == "SVHN" else getattr(datasets, name)


def torchvision_sets(name: str, source: type, root: Path, download: bool) -> tuple[Any, Any]:
    """Train and test set, from the folder if they are there, else downloaded (by one process at a time).

    Args:
        name: of the set, for the sentences.
        source: a class of torchvision's form.
        root: the folder.
        download: fetch them if they are not there.

    Raises:
        DataError: they are not there and are not or cannot be fetched.
    """
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
        with alone(root):  # other ranks and runs wait, then find it
            return source(str(root), train=True, download=True), source(str(root), train=False)
    except UNLOADABLE as error:
        raise DataError(f"{absent}, and cannot be downloaded ({reason(error)}): {ways_out}") from error


def labelled_images(source: Any) -> tuple[Tensor, Tensor]:
    """Images and targets of a torchvision set: grey ones are [N, H, W], coloured ones [N, H, W, C]."""
    images = torch.as_tensor(source.data)
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2), torch.as_tensor(source.targets)
