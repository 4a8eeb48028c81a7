"""What a data set is to the rest of the framework: three loaders and a few facts."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


class DataError(Exception):
    """A data set that is absent, unreadable or unfit; the message is one sentence that says what to do."""


def told(error: BaseException) -> str:
    """An exception of a user's code in words: what, and in which line, the innermost that no package has."""
    frames = traceback.extract_tb(error.__traceback__)
    packaged = ("site-packages", str(Path(__file__).resolve().parents[1]))
    theirs = [frame for frame in frames if not any(part in frame.filename for part in packaged)] or frames
    place = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


class BatchLoader(Protocol):
    """One split of a data set, served in batches on the target device.

    Attributes:
        num_examples: examples an epoch serves, over all ranks (in training without the partial batch it drops).
    """

    num_examples: int

    def __len__(self) -> int:
        """Batches an epoch, the same number on every rank."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches ``start, start + 1, ...`` of an epoch, this rank's share of each.

        A pure function of (seed, epoch, batch index): going on in the middle of an epoch needs no saved state.

        Args:
            epoch: which pass over the data, from 0.
            start: the first batch to serve, from 0 to ``len(self)``.

        Returns:
            Inputs (float32, normalised) and targets, on the loader's device.
        """
        ...


@runtime_checkable
class Normalising(Protocol):
    """A loader of images that can be told how to normalise them."""

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """See DataModule."""
        ...


@dataclass
class DataModule:
    """A data set, split in three that share no example: train to learn, val to choose, test to report once.

    Attributes:
        name: as in the configuration, such as ``cifar10``.
        task: what is learned from it, such as ``classification``.
        facts: what a model factory may ask for, such as ``{"in_channels": 3, "num_classes": 10, "image_size": 32}``.
        train: shuffled and augmented; drops the last partial batch.
        val: every example once, in a fixed order.
        test: every example once, in a fixed order.
        class_names: names of the classes, by target; empty where there are none.
        plateau: the training loss, as it is reported, of the best output that is the same for every example; None
            where nobody has worked it out.
    """

    name: str
    task: str
    facts: dict[str, Any]
    train: BatchLoader
    val: BatchLoader
    test: BatchLoader
    class_names: list[str]
    plateau: float | None = None

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Serve images normalised otherwise than by their own statistics, as pretrained weights expect it.

        Args:
            mean: a value a channel, in units of 0..1, subtracted from the pixels; of grey images the average of them.
            std: a value a channel, by which they are then divided; likewise.

        Raises:
            DataError: this is no set of images.
        """
        if self.facts.get("in_channels") == 1:
            mean, std = ([sum(values) / len(values)] for values in (mean, std))
        for loader in (self.train, self.val, self.test):
            if not isinstance(loader, Normalising):
                raise DataError(f"{self.name} holds no images for pretrained weights: choose another data set")
            loader.normalise(mean, std)
