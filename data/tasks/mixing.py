"""Stronger augmentation of labelled images, by torchvision: random distortions, and two images in one.

Mixed images have probabilities for targets, ``[b, classes]``: of each class, its part in the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from data.options import Kind, Loading

STRONGEST = 30  # magnitude of RandAugment, which divides the range of each distortion by it


@dataclass(frozen=True)
class Classifying(Loading):
    """How a set of labelled images is split and served.

    Args:
        mixup: α: images of a batch are blended with their neighbours', λ of one and 1 - λ of the other, with λ from
            Beta(α, α), a batch one (Zhang et al., 2018); 0: not. With ``cutmix`` each batch gets one of the two.
        cutmix: α: likewise, a rectangle of 1 - λ of the area comes from the neighbour (Yun et al., 2019); 0: not.
        randaugment: magnitude, 0 to 30, of two random distortions of each image (Cubuk et al., 2020); null: none.

    Raises:
        ValueError: for an option out of its range.
    """

    kind: ClassVar[Kind | None] = Kind("classification", ("in_channels", "num_classes", "image_size"))
    mixup: float = 0.0
    cutmix: float = 0.0
    randaugment: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.randaugment is not None and not 0 <= self.randaugment <= STRONGEST:
            raise ValueError(f"randaugment must be from 0 to {STRONGEST}, or null, got {self.randaugment}")

    def distortion(self) -> Callable[[Any], Any] | None:
        """RandAugment of an image or a batch of bytes, which draws from torch's generator; None: none is asked for."""
        if self.randaugment is None:
            return None
        from torchvision.transforms import v2  # takes a second

        return v2.RandAugment(num_ops=2, magnitude=self.randaugment, interpolation=v2.InterpolationMode.BILINEAR)

    def mixture(self, num_classes: int) -> Mixture | None:
        """What mixes batches; None: nothing is asked for."""
        return Mixture(self.mixup, self.cutmix, num_classes) if self.mixup or self.cutmix else None


class Mixture:
    """Mixes the images of a batch, each with the one before it.

    Args:
        mixup: see Classifying.
        cutmix: see Classifying.
        num_classes: length of the targets that it makes.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int) -> None:
        from torchvision.transforms import v2

        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self._ways = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]

    def __call__(self, inputs: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Mix a batch whose first image is there for the second alone.

        Args:
            inputs: ``[1 + b, C, H, W]``.
            targets: int64 ``[1 + b]``.
            seed: of all that is random.

        Returns:
            ``[b, C, H, W]``, and float32 ``[b, classes]``.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of torch.manual_seed, GPUs would hear
            way = self._ways[int(torch.randint(len(self._ways), ()))]
            inputs, targets = way(inputs, targets)
        return inputs[1:], targets[1:]


def distorted(pixels: Tensor, seeds: Tensor, distortion: Callable[[Tensor], Tensor]) -> Tensor:
    """A batch of bytes with each image distorted as its seed says; those of one seed go together.

    Args:
        pixels: uint8 ``[b, C, H, W]``, changed in place.
        seeds: int64 ``[b]``, on the CPU.
        distortion: draws from torch's generator, alike for all images that it is given.
    """
    with torch.random.fork_rng(devices=[]):
        for seed in seeds.unique().tolist():
            torch.default_generator.manual_seed(seed)
            mine = (seeds == seed).nonzero().flatten().to(pixels.device)
            pixels[mine] = distortion(pixels[mine])
    return pixels
