"""Images that live in memory as bytes and are augmented a whole batch at a time, on the target device.

No Python runs per image. A random crop of a padded image is a window into it, so cropping is the gather itself: one
``index_select`` on a strided view in which every byte is the corner of a window. A flip, one conversion to float32
and one multiply-add (the normalisation) complete a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# So many pairs of distortions are drawn for a global batch, each for some of its images, which pass together.
DISTORTIONS = 32
# A larger store stays in host memory: its batches are cut there and travel as bytes.
MAX_BYTES_ON_ACCELERATOR = 2 * 1024**3


@dataclass(frozen=True)
class Augmentation:
    """What is done at random to a training image, in this order.

    Attributes:
        crop: pad by that many black pixels on each side and cut a window of the original size; 0 for none.
        flip: mirror left and right, half of the time.
        distort: ``distort(pixels, seeds)``, of bytes; None for nothing.
        cutout: side of the one square hole, filled with the mean colour. Its centre may be any pixel, so the hole is
            clipped at the border (DeVries & Taylor, 2017); 0 for none.
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0
    distort: Callable[[Tensor, Tensor], Tensor] | None = None


class ImageStore:
    """Images and targets in memory, from which windows are cut a whole batch at a time.

    Args:
        images: uint8 ``[N, C, H, W]``.
        targets: int64 ``[N]``.
        padding: black pixels around each image, stored with it: the largest shift a crop can ask for.
        device: where batches are wanted; the store lives there if it is small, else in host memory.
    """

    def __init__(
        self, images: Tensor, targets: Tensor, *, padding: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}")
        if len(images) != len(targets):
            raise ValueError(f"targets must be as many as the {len(images)} images, got {len(targets)}")
        self.padding = padding
        self.shape = images.shape[1:]
        pixels = functional.pad(images, [padding] * 4).contiguous() if padding else images.contiguous()
        self.device = torch.device(device) if pixels.numel() <= MAX_BYTES_ON_ACCELERATOR else torch.device("cpu")
        pixels = pixels.to(self.device)
        self.targets = targets.to(self.device, torch.int64)

        channels, height, width = self.shape
        self._image_bytes, plane, self._row_bytes, _ = pixels.stride()
        last_byte = (channels - 1) * plane + (height - 1) * self._row_bytes + width - 1
        # windows[k] is the window [C, H, W] whose first byte is byte k of the store.
        self._windows = pixels.flatten().as_strided(
            (pixels.numel() - last_byte, channels, height, width), (1, plane, self._row_bytes, 1)
        )

    def __len__(self) -> int:
        return len(self.targets)

    def offsets(self, rows: Tensor, top: Tensor | int, left: Tensor | int) -> Tensor:
        """Where in the store the windows ``[top : top + H, left : left + W]`` of the padded images ``rows`` begin."""
        return rows * self._image_bytes + top * self._row_bytes + left

    def windows(self, offsets: Tensor) -> Tensor:
        """The windows that begin at ``offsets``: uint8 ``[len(offsets), C, H, W]``, a copy."""
        return self._windows.index_select(0, offsets)


class InMemoryLoader:
    """Serves a part of an `ImageStore` in batches; a `data.BatchLoader`.

    Each rank takes its share of each global batch, the shares one behind the other (which is how likelihoods draw
    targets and curvature takes a part of a batch), and the random numbers are drawn for the global batch: any number
    of ranks sees together exactly what one process sees.

    Args:
        store: the images.
        rows: int64 ``[n]``, which of them belong to this split.
        batch_size: of all ranks together.
        mean: a value a channel, in units of 0..1, subtracted from the pixels.
        std: a value a channel, by which they are then divided.
        training: shuffle every epoch and drop the last partial batch; otherwise every row once, in the given order
            (the shares of the last batch may then be unequal, and an empty share is skipped).
        augmentation: for training only.
        mix: for training only: ``mix(inputs, targets, seed)`` makes of a batch, behind the image before its first one,
            what is served; see ``data.tasks.mixing``.
        seed: of order and augmentation.
        device: of the batches.
        rank: this process, from 0.
        world_size: how many processes share each batch.

    Raises:
        ValueError: for a batch size that does not fit the ranks or the number of rows.
    """

    def __init__(
        self,
        store: ImageStore,
        rows: Tensor,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        training: bool,
        augmentation: Augmentation = Augmentation(),
        mix: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_batch_size(batch_size, len(rows), training, world_size)
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if training and augmentation.crop > store.padding:
            raise ValueError(f"crop must be at most the store's padding of {store.padding}, got {augmentation.crop}")
        self.store = store
        self.rows = rows
        self.batch_size = batch_size
        self.training = training
        self.augmentation = augmentation if training else Augmentation()
        self.mix = mix if training else None
        self.seed = seed
        self.device = torch.device(device)
        self.rank = rank
        self.world_size = world_size
        self.num_examples = len(rows) // batch_size * batch_size if training else len(rows)
        self.normalise(mean, std)

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """See DataModule."""
        mean_, std_ = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
        self._scale = (1 / (255 * std_)).to(self.device, torch.float32)
        self._shift = (-mean_ / std_).to(self.device, torch.float32)

    def preparation(self) -> dict[str, Any] | None:
        """How an image file becomes what is served, as ``data.kept.Preparation`` has it; None where nobody knows."""
        channels, height, width = self.store.shape
        return {
            "channels": channels,
            "size": [height, width],
            "resize": getattr(self.store, "resize", min(height, width)),
            "scale": self._scale.tolist(),
            "shift": self._shift.tolist(),
        }

    def __len__(self) -> int:
        """Batches an epoch, the same number on every rank."""
        return -(-self.num_examples // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from ``start`` on of an epoch, this rank's share: (float32 ``[b, C, H, W]``, int64 ``[b]``).

        Raises:
            ValueError: there is no batch ``start``.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start must be from 0 to the {len(self)} batches of an epoch, got {start}")
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self._mixed((self._batch(plan) for plan in self._plans(epoch, start)), epoch, start)

    def _plans(self, epoch: int, start: int) -> Iterator[Tensor]:
        """This rank's share of the plan of each global batch; to be mixed, behind the plan of the image before it."""
        rows = self.rows
        if self.training:
            rows = rows[torch.randperm(len(rows), generator=_generator(self.seed, epoch, 0))]
        for index in range(start, len(self)):
            batch = rows[index * self.batch_size : (index + 1) * self.batch_size]
            whole = self._plan(batch, _generator(self.seed, epoch, 1 + index))
            plan = whole.tensor_split(self.world_size, dim=1)[self.rank]
            if self.mix:
                before = self.rank * plan.shape[1] - 1  # of the first, the last
                plan = torch.cat([whole[:, [before]], plan], 1)
            if plan.shape[1]:
                yield plan

    def _mixed(
        self, batches: Iterator[tuple[Tensor, Tensor]], epoch: int, start: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches as they are served."""
        for index, (inputs, targets) in enumerate(batches, start):
            yield self.mix(inputs, targets, _seed(self.seed, epoch, 1 + index, 1)) if self.mix else (inputs, targets)

    def _plan(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """All that is random about a global batch, as one int64 tensor ``[6, b]``, so that one copy moves it.

        Its lines: row, offset of the window, whether to flip, row and column of the centre of the hole, and the seed of
        what distorts it.
        """
        _, height, width = self.store.shape
        crop, padding = self.augmentation.crop, self.store.padding

        def draw(low: int, high: int) -> Tensor:
            return torch.randint(low, high + 1, rows.shape, generator=generator)

        top, left = draw(padding - crop, padding + crop), draw(padding - crop, padding + crop)
        flip, hole_row, hole_column = draw(0, 1), draw(0, height - 1), draw(0, width - 1)
        seeds = torch.zeros_like(rows)
        if self.augmentation.distort:  # drawn last: all else is as without it
            seeds = torch.randint(2**62, (DISTORTIONS,), generator=generator)[draw(0, DISTORTIONS - 1)]
        return torch.stack([rows, self.store.offsets(rows, top, left), flip, hole_row, hole_column, seeds])

    def _batch(self, plan: Tensor) -> tuple[Tensor, Tensor]:
        seeds, plan = plan[5], plan[:5].to(self.store.device)
        pixels = self.store.windows(plan[1]).to(self.device, non_blocking=True)
        targets = self.store.targets[plan[0]].to(self.device, non_blocking=True)
        flip, hole_row, hole_column = plan[2:].to(self.device, non_blocking=True)
        if self.augmentation.flip:
            # x ^ ((x ^ y) * flip) is y where flip is 1: on bytes, four times as fast as torch.where.
            difference = pixels.flip(-1).bitwise_xor_(pixels).mul_(flip.to(torch.uint8).view(-1, 1, 1, 1))
            pixels.bitwise_xor_(difference)
        if self.augmentation.distort:
            pixels = self.augmentation.distort(pixels, seeds)
        inputs = pixels.to(torch.float32).mul_(self._scale).add_(self._shift)
        if self.augmentation.cutout:
            inputs.mul_(1 - self._holes(hole_row, hole_column))
        return inputs, targets

    def _holes(self, row: Tensor, column: Tensor) -> Tensor:
        """Float32 ``[b, 1, H, W]``, 1 inside the square around each centre and 0 outside."""
        _, height, width = self.store.shape
        rows, columns = (self._inside(size, centre) for size, centre in ((height, row), (width, column)))
        return rows[:, None, :, None] * columns[:, None, None, :]

    def _inside(self, size: int, centre: Tensor) -> Tensor:
        distance = torch.arange(size, device=centre.device) - centre[:, None] + self.augmentation.cutout // 2
        return ((distance >= 0) & (distance < self.augmentation.cutout)).to(torch.float32)


def pixel_statistics(images: Tensor, rows: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation a channel of ``images[rows]`` (uint8 ``[N, C, H, W]``), in units of 0..1.

    A channel that never varies gets a standard deviation of 1, so that it is centred and not blown up.
    """
    counts = torch.zeros(images.shape[1], 256, dtype=torch.float64)  # of each of the 256 values, hence exact
    for chunk in rows.split(1024):  # bounded memory, whatever the size of the set
        for channel, pixels in enumerate(images[chunk].unbind(1)):
            counts[channel] += pixels.flatten().bincount(minlength=256)
    values = torch.arange(256, dtype=torch.float64) / 255
    frequencies = counts / counts.sum(1, keepdim=True)
    mean = frequencies @ values
    variance = (frequencies * (values - mean[:, None]).square()).sum(1)
    std = torch.where(variance > 0, variance.sqrt(), 1.0)
    return mean.tolist(), std.tolist()


def _seed(*key: int) -> int:
    """A seed of its own for each key; well mixed, so that neighbouring keys have nothing in common."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(*key))


def _check_batch_size(batch_size: int, rows: int, training: bool, world_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if rows < 1:
        raise ValueError("rows must name at least one example, got none")
    if training and batch_size % world_size:
        raise ValueError(f"batch_size must be divisible by the number of processes, got {batch_size} for {world_size}")
    if training and rows < batch_size:
        raise ValueError(
            f"batch_size must be at most the {rows} examples that are left to train on, got {batch_size}: "
            "lower it, or raise limit_train"
        )
