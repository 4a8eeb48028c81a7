"""Image sets that are read for several tasks: the embedded digits, torchvision's small sets, folders of images.

Each yields labelled images; what becomes of them is the tasks' business.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.options import Options
from data.tasks.labelled import LabelledImages


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: float64 images ``[1797, 8, 8]`` from 0 to 16, and int64 targets.

    From the package's file, where it has one: to import the package takes longer than a short run.
    """
    found = importlib.util.find_spec("sklearn")
    places = [Path(place) for place in (found and found.submodule_search_locations) or ()]
    files = [path for place in places if (path := place / "datasets" / "data" / "digits.csv.gz").exists()]
    if files:
        table = np.loadtxt(files[0], delimiter=",")
        return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    from sklearn import datasets

    bundled = datasets.load_digits()
    return bundled.images, bundled.target


def read_digits() -> LabelledImages:
    """1797 grey 8 × 8 images in ten classes; never mirrored, since a mirrored digit is no digit."""
    pixels, targets = load_digits()
    images = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8)[:, None]  # from 0..16
    names = [str(digit) for digit in range(10)]
    return LabelledImages((images, torch.from_numpy(targets)), names, flip=False)


@dataclass(frozen=True)
class Published(Options):
    """Where one of torchvision's sets lies.

    Args:
        root: folder of the set, in torchvision's own layout.
        download: fetch the set if it is not there.
    """

    root: str
    download: bool = True

    def read(
        self, name: str, source: str | type, flip: bool, statistics: tuple[list[float], list[float]] | None = None
    ) -> LabelledImages:
        """The train and test images.

        Args:
            name: of the set, for the sentences.
            source: torchvision's class or its name.
            flip: whether a mirrored image still shows its class.
            statistics: the published mean and std of the train images; None: of the train split.

        Raises:
            DataError: the set is not there and cannot be fetched.
        """
        from data.sources.packaged import labelled_images, torchvision_set, torchvision_sets

        found = torchvision_set(source) if isinstance(source, str) else source
        train, test = torchvision_sets(name, found, Path(self.root).expanduser(), self.download)
        return LabelledImages(
            labelled_images(train), list(train.classes), test=labelled_images(test), statistics=statistics, flip=flip
        )


@dataclass(frozen=True)
class Folder(Options):
    """A folder of images, one folder a class.

    Args:
        root: the folder.
        image_size: bring the shorter side to this many pixels and cut the centre square; None: the images are square
            and of one size already.
        flip: whether ``augment`` may mirror the images.
        max_gigabytes: refuse a set that takes more memory than this once decoded.

    Raises:
        ValueError: for an option out of its range.
    """

    root: str
    image_size: int | None = None
    flip: bool = True
    max_gigabytes: float = 8.0

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be at least 1 or null, got {self.image_size}")
        if self.max_gigabytes <= 0:
            raise ValueError(f"max_gigabytes must be positive, got {self.max_gigabytes}")

    def read(self) -> LabelledImages:
        """The images, decoded.

        Raises:
            DataError: for a folder without such a layout, an unreadable image, or a set too large for memory.
        """
        from data.sources.folders import find_splits, read_images

        splits = find_splits(Path(self.root).expanduser())
        files = [file for split in splits.files.values() for file, _ in split]
        images = read_images(files, self.image_size, self.max_gigabytes)
        parts = images.split([len(split) for split in splits.files.values()])
        labelled = {
            name: (part, torch.tensor([target for _, target in split]))
            for (name, split), part in zip(splits.files.items(), parts, strict=True)
        }
        return LabelledImages(
            labelled["train"], splits.class_names, val=labelled.get("val"), test=labelled.get("test"), flip=self.flip
        )
