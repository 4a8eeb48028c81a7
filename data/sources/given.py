"""What users have for a data set (torch's, Hugging Face's, a list), read item by item or a batch at a time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, Subset, default_collate

from data.base import DataError, told

# What items that are mappings call their two parts, the likeliest first.
INPUTS = ("pixel_values", "image", "img", "inputs", "input", "x", "features", "data")
TARGETS = ("labels", "label", "fine_label", "targets", "target", "y", "class")
SPLITS = {"val": ("validation", "val", "valid", "dev"), "test": ("test",)}


@dataclass
class Source(Dataset):
    """One split as it was given, item by item or a batch at a time.

    Attributes:
        dataset: has a length and items.
        keys: of input and target where items are mappings; None where they are none.
        batch_size: of the ``DataLoader`` that it came in; None without.
        workers: likewise.
        collate: what makes a batch of items; None: they are stacked.
        channels: that images are brought to; None: no images.
        classes: how many; None: it is no classification.
        reproduced: whether inputs are the targets.
    """

    dataset: Any
    keys: tuple[str, str | None] | None = None
    batch_size: int | None = None
    workers: int = 0
    collate: Any = None
    channels: int | None = None
    classes: int | None = None
    reproduced: bool = False

    padding = 0  # as of an ImageStore: there is no margin to crop in

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def shape(self) -> torch.Size:
        """Of an input."""
        return self.example(0)[0].shape

    def __getitem__(self, plan: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | str:
        """A batch, from each item's row and the seed of what is random about it; or what to say of a bad item."""
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()
        found = []
        try:
            for row, seed in zip(*(part.tolist() for part in plan), strict=True):
                torch.default_generator.manual_seed(seed)
                np.random.seed(seed % 2**32)
                random.seed(seed)
                found.append(self.dataset[row])
            batch = self._batch(found)
        except DataError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - whatever a user's data set raises is said where it was raised
            return f"the data set failed with {told(error)}"
        finally:
            torch.set_rng_state(before[0])
            np.random.set_state(before[1])
            random.setstate(before[2])
        if self.classes is None:
            return batch
        inputs, targets = batch
        for target in targets.tolist():
            if not 0 <= target < self.classes:
                return f"a target of the data set is {target}, and its {self.classes} classes are numbered from 0"
        return inputs, targets.long()  # of numbers of another size, or of truth values

    def _batch(self, items: list[Any]) -> tuple[Tensor, Tensor]:
        if self.collate is not None:
            inputs, targets = self._parts(self.collate(items))
            return _tensor(inputs), _tensor(targets)
        examples = [self._example(item) for item in items]
        shapes = {tuple(image.shape) for image, _ in examples}
        if len(shapes) > 1:
            one, other = sorted(shapes)[:2]
            raise DataError(
                f"inputs of the data set differ in shape ({list(one)} and {list(other)}): bring them to one size in "
                "its transform"
            )
        return torch.stack([image for image, _ in examples]), torch.stack([target for _, target in examples])

    def example(self, row: int) -> tuple[Tensor, Tensor]:
        """An item as it is served, but for what is done to whole batches.

        Raises:
            DataError: it cannot be read, or is none.
        """
        if not len(self):
            raise DataError("the data set is empty: give one with examples")
        try:
            item = self.dataset[row]
            if self.collate is None:
                return self._example(item)
            inputs, targets = self._parts(self.collate([item]))
            return _tensor(inputs)[0], _tensor(targets)[0]
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"the data set failed with {told(error)}") from error

    def _parts(self, item: Any) -> tuple[Any, Any]:
        if isinstance(item, Mapping):
            assert self.keys is not None
            return item[self.keys[0]], item[self.keys[1]] if self.keys[1] is not None else 0
        if isinstance(item, tuple | list):
            return item[0], item[1] if len(item) > 1 else 0
        return item, 0

    def _example(self, item: Any) -> tuple[Tensor, Tensor]:
        image, target = self._parts(item)
        pixels = _pixels(image, self.channels)
        if self.channels is None and pixels.dim() == 3:
            self.channels = len(pixels)
        return pixels, _tensor(target)

    def class_names(self) -> list[str]:
        """The names that the data set itself knows; none where it knows none."""
        at = self.dataset
        while isinstance(at, Subset):
            at = at.dataset
        features = getattr(at, "features", None)  # of Hugging Face's
        named = features.get(self.keys[1]) if isinstance(features, Mapping) and self.keys else None
        names = getattr(named, "names", None) or getattr(at, "classes", None) or []
        return [str(name) for name in names]

    def labels(self, first: int) -> Tensor | None:
        """All targets, where they can be had without reading all items, int64; None otherwise.

        Args:
            first: the target of the first item, which a list of them must agree with.
        """
        found = _labels(self.dataset, self.keys and self.keys[1])
        if found is None or len(found) != len(self) or int(found[0]) != first:
            return None
        return found


def splits_of(found: Mapping[str, Any], val: Any, test: Any) -> tuple[Any, Any, Any]:
    """Train, validation and test set of a dictionary of splits.

    Args:
        found: by name, as Hugging Face calls them.
        val: in the place of its own; None: its own.
        test: likewise.

    Raises:
        DataError: none is called train.
    """
    if "train" not in found:
        raise DataError(f"a dictionary of splits needs one that is called train, and this one has {', '.join(found)}")
    others = {split: next((found[name] for name in names if name in found), None) for split, names in SPLITS.items()}
    return found["train"], val if val is not None else others["val"], test if test is not None else others["test"]


def open_source(split: str, given: Any, inputs: str | None, targets: str | None) -> Source:
    """What was given for a split, to be read.

    Args:
        split: its name, for the sentences.
        given: a data set, or what holds one.
        inputs: key of inputs where items are mappings; None: a usual one.
        targets: likewise of targets.

    Raises:
        DataError: it is no data set.
    """
    source = Source(given)
    if isinstance(given, DataLoader):
        order = type(given.sampler) in (SequentialSampler, RandomSampler)
        if given.batch_size is None or not order:
            raise DataError(
                f"the {split} DataLoader has a sampler of its own, and the order of examples is the run's, so that it "
                "can be resumed: give its data set"
            )
        collate = given.collate_fn if given.collate_fn is not default_collate else None
        source = Source(given.dataset, None, given.batch_size, given.num_workers, collate)
    if isinstance(given, type):
        raise DataError(f"the {split} set is the class {given.__name__} itself: give one of it, {given.__name__}(...)")
    if not (hasattr(source.dataset, "__len__") and hasattr(source.dataset, "__getitem__")):
        kind = type(source.dataset).__name__
        raise DataError(
            f"the {split} set is of type {kind}, which has no length or no items by number: give a torch Dataset, a "
            "DataLoader, a Hugging Face data set or a list; of a stream, list(itertools.islice(stream, N))"
        )
    if not len(source):
        raise DataError(f"the {split} set is empty: give one with examples")
    try:
        item = source.dataset[0]
        item = item if source.collate is None else source.collate([item])
    except Exception as error:
        raise DataError(f"the {split} set failed with {told(error)}") from error
    if not isinstance(item, Mapping):
        return source
    return replace(source, keys=(_key(item, inputs, INPUTS, "inputs"), _key(item, targets, TARGETS, "targets", None)))


def _key(item: Mapping[str, Any], asked: str | None, usual: Sequence[str], option: str, *without: None) -> Any:
    """The key of an item's part."""
    found = asked if asked is not None else next((name for name in usual if name in item), None)
    if found in item or (found is None and without):
        return found
    held = ", ".join(map(str, item))
    raise DataError(f"items of the data set have {held}: say which of them is meant by {option}='NAME'")


def _labels(dataset: Any, key: str | None) -> Tensor | None:
    if isinstance(dataset, Subset):
        whole = _labels(dataset.dataset, key)
        return None if whole is None else whole[torch.as_tensor(list(dataset.indices))]
    if getattr(dataset, "target_transform", None) is not None:
        return None
    found: Any = getattr(dataset, "targets", None)
    if found is None and isinstance(tensors := getattr(dataset, "tensors", None), tuple) and len(tensors) > 1:
        found = tensors[1]
    if found is None and key is not None and key in getattr(dataset, "column_names", ()):
        found = dataset[key]
    try:
        labels = torch.as_tensor(found if isinstance(found, Tensor | np.ndarray) else list(found))
    except (TypeError, ValueError, RuntimeError):
        return None
    return labels.long() if labels.dim() == 1 and not labels.is_floating_point() else None


def _pixels(image: Any, channels: int | None) -> Tensor:
    """An input as a tensor: images and arrays of bytes as uint8 ``[C, H, W]``, all else as it is."""
    if hasattr(image, "convert") and hasattr(image, "mode"):  # of PIL's
        grey = channels == 1 if channels else image.mode in ("1", "L", "I", "I;16", "LA")
        image = np.array(image.convert("L" if grey else "RGB"))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim == 3 and image.shape[-1] in (1, 3, 4):
            image = np.ascontiguousarray(image.transpose(2, 0, 1))
    tensor = _tensor(image)
    if tensor.dtype != torch.uint8:
        return tensor
    return tensor[None] if tensor.dim() == 2 else tensor if tensor.dim() == 3 else tensor.float()


def _tensor(value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(value).__name__
        raise DataError(
            f"the data set yields what is of type {kind}, no tensor, array or image: bring it to one in its transform"
        ) from error
    return tensor.float() if tensor.dtype in (torch.float64, torch.float16) else tensor
