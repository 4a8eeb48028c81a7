"""Images too many for memory: decoded by worker processes when they are wanted, a batch at a time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.base import DataError
from data.memory import InMemoryLoader
from data.sources.images import decode


class ImageFiles(Dataset):
    """Images that are decoded when they are wanted, a batch at a time: uint8 ``[b, 3, size, size]`` and int64 ``[b]``.

    Args:
        files: the images and their targets.
        size: side of what is served.
        resize: the shorter side is brought to this many pixels and the centre is cut out; unless ``crop``.
        crop: cut out a random part instead and mirror half of the time (Szegedy et al., 2015).
        distort: what is done to each image then; None: nothing.
    """

    padding = 0  # as of an ImageStore: there is no margin to crop in

    def __init__(
        self, files: Sequence[tuple[Path, int]], size: int, resize: int, crop: bool, distort: Any = None
    ) -> None:
        from torchvision.transforms import v2  # takes a second

        # Arrays: workers would copy the pages of a million objects by counting references to them.
        self._files = np.array([os.fsencode(file) for file, _ in files])
        self.targets = torch.tensor([target for _, target in files])
        self.shape, self.resize = (3, size, size), resize
        resized: list[Any] = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        framed = resized if crop else [v2.Resize(resize), v2.CenterCrop(size)]
        self._transform = v2.Compose([*framed, *([distort] if distort else [])])

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, plan: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | str:
        """A batch, from each image's row and the seed of what is random about it; or what to say of a bad file."""
        from torchvision.transforms import functional

        images = []
        with torch.random.fork_rng(devices=[]):
            for row, seed in zip(*(part.tolist() for part in plan), strict=True):
                torch.default_generator.manual_seed(seed)  # of torch.manual_seed, GPUs would hear
                file = Path(os.fsdecode(self._files[row]))
                try:
                    images.append(functional.pil_to_tensor(self._transform(decode(file, "RGB"))))
                except DataError as error:
                    return str(error)
        return torch.stack(images), self.targets[plan[0]]


def _leave_stopping_to_parent(worker: int) -> None:
    """Ignore, in a worker, what a queue sends to all processes of a job: the step under way needs its batches."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
        if number := getattr(signal, name, None):  # Windows lacks two
            signal.signal(number, signal.SIG_IGN)


class StreamedLoader(InMemoryLoader):
    """Serves what is read, by worker processes ahead of time, when it is wanted; otherwise as an InMemoryLoader does.

    Args:
        store: gives, for the row and the seed of each example of a batch, inputs and targets; or a sentence about what
            cannot be read.
        rows: see InMemoryLoader.
        workers: processes; 0: none.
        prefetch: batches that each worker prepares ahead.
        options: see InMemoryLoader.
    """

    store: Any  # it is asked for what all kinds have

    def __init__(self, store: Any, rows: Tensor, *, workers: int, prefetch: int, **options: Any) -> None:
        super().__init__(store, rows, **options)
        self._options: dict[str, Any] = {"num_workers": workers, "prefetch_factor": prefetch if workers else None}

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self._mixed(self._read(epoch, start), epoch, start)

    def _read(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        served: DataLoader[Any] = DataLoader(
            self.store,
            sampler=map(self._batch, self._plans(epoch, start)),
            batch_size=None,  # each of these is a whole batch's
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # torch's own stays as it is
            worker_init_fn=_leave_stopping_to_parent,
            **self._options,
        )
        for batch in served:
            if isinstance(batch, str):
                raise DataError(batch)
            yield self._finished(*(part.to(self.device, non_blocking=True) for part in batch))

    def _finished(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A batch, on the device, as it is served."""
        return inputs.to(torch.float32).mul_(self._scale).add_(self._shift), targets

    def _plan(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Row and seed of each image of a global batch, int64 ``[2, b]``."""
        return torch.stack([rows, torch.randint(2**62, rows.shape, generator=generator)])

    def _batch(self, plan: Tensor) -> tuple[Tensor, Tensor]:
        """What the workers make a batch from."""
        rows, seeds = plan
        return rows, seeds
