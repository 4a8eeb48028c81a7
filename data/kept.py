"""What of a data set a trained model needs: kept beside its weights, so that it predicts where the data are not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor

from data.base import BatchLoader, DataError, DataModule
from data.memory import InMemoryLoader

#: The file of a run folder that holds it.
FILE = "data.json"


@dataclass(frozen=True)
class Preparation:
    """How an image file becomes an input, exactly as the loaders have made it of theirs.

    Attributes:
        channels: 1 or 3.
        size: height and width of an input.
        resize: the shorter side is brought to so many pixels before the centre is cut out.
        scale: what bytes are multiplied by, nested lists of float32 that broadcast to ``[C, H, W]``.
        shift: what is then added, likewise.
    """

    channels: int
    size: list[int]
    resize: int
    scale: list[Any]
    shift: list[Any]

    def read(self, file: str | Path) -> Tensor:
        """The bytes of an image, uint8 ``[C, H, W]``.

        Args:
            file: any image.

        Raises:
            DataError: it cannot be read as one.
        """
        from torchvision.transforms import functional

        from data.sources.images import decode

        image = decode(Path(file), "L" if self.channels == 1 else "RGB")
        height, width = self.size
        if image.size != (width, height):
            image = functional.center_crop(functional.resize(image, [self.resize]), self.size)
        return torch.from_numpy(np.array(image)).view(height, width, self.channels).permute(2, 0, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Inputs of bytes, float32 ``[..., C, H, W]``."""
        scale, shift = (torch.tensor(values, device=pixels.device) for values in (self.scale, self.shift))
        return pixels.to(torch.float32).mul_(scale).add_(shift)

    def back(self, inputs: Tensor) -> Tensor:
        """The bytes that inputs, or what a model has made of them, stand for, uint8."""
        scale, shift = (torch.tensor(values, device=inputs.device) for values in (self.scale, self.shift))
        return ((inputs - shift) / scale).round().nan_to_num().clamp(0, 255).to(torch.uint8)


def describe(data: DataModule) -> dict[str, Any]:
    """What of a data set is to be kept, in plain values that JSON holds as they are.

    Args:
        data: as it is served.
    """
    prepared = preparation(data)
    facts = {name: value for name, value in data.facts.items() if _is_plain(value)}
    return {
        "name": data.name,
        "task": data.task,
        "facts": facts,
        "whole": len(facts) == len(data.facts),  # whether models can be built of them
        "class_names": [] if data.class_names == facts.get("words") else list(data.class_names),
        "plateau": data.plateau,
        "preparation": asdict(prepared) if prepared is not None else None,
    }


def preparation(data: DataModule) -> Preparation | None:
    """How image files become inputs of a data set; None where it has no images, or nobody knows how."""
    loader = data.test
    found = loader.preparation() if isinstance(loader, InMemoryLoader) else None
    return Preparation(**found) if found is not None else None


def recalled(held: Mapping[str, Any], build: Callable[[], DataModule]) -> DataModule:
    """A data set of which there is what ``describe`` kept, until an example is asked for.

    Args:
        held: that.
        build: makes the set, or says why it cannot; called once at most.
    """
    train, val, test = (cast(BatchLoader, Deferred(build, split)) for split in ("train", "val", "test"))
    names = held["class_names"] or held["facts"].get("words", [])
    return DataModule(held["name"], held["task"], dict(held["facts"]), train, val, test, names, held["plateau"])


def read(folder: Path) -> dict[str, Any] | None:
    """What a run folder keeps of its data set; None where it keeps nothing, as those of earlier versions.

    Args:
        folder: of a run.

    Raises:
        DataError: it is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        held: dict[str, Any] = json.loads(path.read_bytes())
        kinds = {"name": str, "task": str, "facts": dict, "whole": bool, "class_names": list}
        strange = [name for name, kind in kinds.items() if not isinstance(held[name], kind)]
        if held["preparation"] is not None:
            Preparation(**held["preparation"])
        if strange or not isinstance(held["plateau"], float | None):
            return _refuse(path, ", ".join(strange) or "plateau")
    except (OSError, ValueError, TypeError, KeyError) as error:
        return _refuse(path, repr(error))
    return held


def _refuse(path: Path, why: str) -> NoReturn:
    raise DataError(f"{path} is damaged ({why}): copy it anew, or delete it where the data set is")


class Deferred:
    """A loader of a set that is made when it is first asked for something; it may not be here.

    Args:
        build: makes the set.
        split: train, val or test.
    """

    def __init__(self, build: Callable[[], DataModule], split: str) -> None:
        self._build, self._split = build, split

    def _loader(self) -> Any:
        return getattr(self._build(), self._split)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of copies and pickles, which look for methods of this kind
            raise AttributeError(name)
        return getattr(self._loader(), name)

    def __len__(self) -> int:
        return len(self._loader())

    @property
    def num_examples(self) -> int:
        """See BatchLoader."""
        return self._loader().num_examples

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See BatchLoader."""
        return self._loader().epoch(epoch, start)

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """See DataModule."""
        self._loader().normalise(mean, std)


def _is_plain(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False
