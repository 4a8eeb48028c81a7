"""Folders of image files: which file belongs to which split and class, and decoding them into memory."""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional, v2

from data.base import DataError
from data.memory import InMemoryLoader

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # by folder name
GREY_MODES = {"1", "L", "LA"}
DEEP_MODES = {"I", "F"}  # 16 bits or more a pixel ("I;16" and its kin begin with I): Pillow would clip them to white

# What Pillow raises at a damaged file, by format.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class FolderSplits:
    """The files of a folder: for each split that it has, its (file, target) pairs in a fixed order."""

    files: dict[str, list[tuple[Path, int]]]
    class_names: list[str]


def find_splits(root: Path) -> FolderSplits:
    """Find ``root/train/<class>/...`` with ``root/val`` and ``root/test`` where they exist, or ``root/<class>/...``.

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
    for split, folder in folders.items():
        unknown = [name for name in _folders(folder) if name not in classes]
        if unknown:
            raise DataError(
                f"{folder.absolute()} has a class {unknown[0]!r} that {train.absolute()} lacks: add or remove it"
            )
        files[split] = [(file, target) for target, name in enumerate(classes) for file in _images(folder / name)]
        if not files[split]:
            raise DataError(f"{folder.absolute()} holds no images in class folders: remove it, or fill it")
    filled = Counter(target for _, target in files["train"])
    empty = [name for target, name in enumerate(classes) if not filled[target]]
    if empty:
        raise DataError(f"{(train / empty[0]).absolute()} holds no images: remove it, or fill it")
    return FolderSplits(files, classes)


def find_tiny_imagenet(root: Path) -> FolderSplits:
    """Find ``root/train/<class>/images/...`` and ``root/val/images``, whose classes ``val_annotations.txt`` names.

    The latter are the test set. Classes are called by their words where ``words.txt`` has them.

    Raises:
        DataError: a file names a class that there is none of, or an image that is not there.
    """
    train = find_splits(root / "train")
    identifiers = {name: target for target, name in enumerate(train.class_names)}
    annotations = root / "val" / "val_annotations.txt"
    test = []
    for line in annotations.read_text().splitlines():
        name, identifier, *_ = [*line.split("\t"), "", ""]
        file = annotations.parent / "images" / name
        if identifier not in identifiers or not file.is_file():
            raise DataError(
                f"{annotations.absolute()} has a line without an image or a class of {root.absolute()}, {line!r}: "
                "put the published files there anew"
            )
        test.append((file, identifiers[identifier]))
    words = root / "words.txt"
    pairs = (line.partition("\t") for line in words.read_text().splitlines()) if words.is_file() else ()
    described = {identifier: text.split(",")[0] for identifier, _, text in pairs}
    names = [described.get(identifier, identifier) for identifier in train.class_names]
    return FolderSplits({"train": train.files["train"], "test": test}, names)


class ImageFiles(Dataset):
    """Images that are decoded when they are wanted, a batch at a time: uint8 ``[b, 3, size, size]`` and int64 ``[b]``.

    Args:
        files: the images and their targets.
        size: side of what is served.
        resize: the shorter side is brought to this many pixels and the centre is cut out; unless ``crop``.
        crop: cut out a random part instead and mirror half of the time (Szegedy et al., 2015).
    """

    padding = 0  # as of an ImageStore: there is no margin to crop in

    def __init__(self, files: Sequence[tuple[Path, int]], size: int, resize: int, crop: bool) -> None:
        # Arrays: workers would copy the pages of a million objects by counting references to them.
        self._files = np.array([os.fsencode(file) for file, _ in files])
        self.targets = torch.tensor([target for _, target in files])
        resized: list[Any] = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        self._transform = v2.Compose(resized if crop else [v2.Resize(resize), v2.CenterCrop(size)])

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, plan: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | str:
        """A batch, from each image's row and the seed of what is random about it; or what to say of a bad file."""
        images = []
        with torch.random.fork_rng(devices=[]):
            for row, seed in zip(*(part.tolist() for part in plan), strict=True):
                torch.manual_seed(seed)
                file = Path(os.fsdecode(self._files[row]))
                try:
                    with Image.open(file) as opened:
                        images.append(functional.pil_to_tensor(self._transform(opened.convert("RGB"))))
                except DECODING_ERRORS:
                    return str(_unreadable(file))
        return torch.stack(images), self.targets[plan[0]]


class FileLoader(InMemoryLoader):
    """Serves images that are decoded by worker processes ahead of time; otherwise as an InMemoryLoader does.

    Args:
        store: the images.
        rows: see InMemoryLoader.
        workers: processes; 0: none.
        prefetch: batches that each worker prepares ahead.
        options: see InMemoryLoader.
    """

    def __init__(self, store: ImageFiles, rows: Tensor, *, workers: int, prefetch: int, **options: Any) -> None:
        super().__init__(store, rows, **options)  # type: ignore[arg-type]  # it asks of the store what both kinds have
        self._options: dict[str, Any] = {"num_workers": workers, "prefetch_factor": prefetch if workers else None}

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        served: DataLoader[Any] = DataLoader(
            self.store,  # type: ignore[arg-type]
            sampler=super()._batches(epoch, start),
            batch_size=None,  # each of these is a whole batch's
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # torch's own stays as it is
            **self._options,
        )
        for batch in served:
            if isinstance(batch, str):
                raise DataError(batch)
            pixels, targets = (part.to(self.device, non_blocking=True) for part in batch)
            yield pixels.to(torch.float32).mul_(self._scale).add_(self._shift), targets

    def _plan(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Row and seed of each image of a global batch, int64 ``[2, b]``."""
        return torch.stack([rows, torch.randint(2**62, rows.shape, generator=generator)])

    def _batch(self, plan: Tensor) -> tuple[Tensor, Tensor]:
        """What the workers make a batch from."""
        rows, seeds = plan
        return rows, seeds


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
    headers = _in_threads(_header, files)
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


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """The images below a folder, sorted; hidden files (such as ``._cat.jpg``) are none."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    return sorted(found)


def _header(file: Path) -> tuple[tuple[int, int], str]:
    """Size (width, height) and mode of an image, without decoding it."""
    try:
        with Image.open(file) as image:
            size, mode = image.size, image.mode
    except DECODING_ERRORS as error:
        raise _unreadable(file) from error
    if mode in DEEP_MODES or mode.startswith("I;"):
        raise DataError(f"{file.absolute()} has more than 8 bits a channel (mode {mode}): convert it to 8 bits")
    return size, mode


def _decode(file: Path, mode: str, size: int) -> Tensor:
    """An image as uint8 ``[C, size, size]``."""
    try:
        with Image.open(file) as opened:
            image = opened.convert(mode)
    except DECODING_ERRORS as error:
        raise _unreadable(file) from error
    if image.size != (size, size):
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


def _unreadable(file: Path) -> DataError:
    return DataError(f"{file.absolute()} cannot be read as an image: repair it, or remove it")
