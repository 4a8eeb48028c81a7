"""Small classifiers whose features compare images: their weights lie beside this file.

`scripts/studies/features.py` trains them. `mnist` names 98.5 % of MNIST's test images right, and `cifar10` 61.7 % of
the 2,000 test images of a subset of CIFAR-10, having seen 9,000 others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

Features = Literal["mnist", "cifar10"]
#: Channels and side of the images that each was trained on.
SHAPES: dict[str, tuple[int, int]] = {"mnist": (1, 28), "cifar10": (3, 32)}
FOLDER = Path(__file__).resolve().parent


class FeatureNet(nn.Module):
    """Three convolutions with batch norms, and the mean over what they leave of an image: 64 features.

    Args:
        in_channels: of the images it is trained on.
        image_size: their side.
        num_classes: what it learns its features by.

    Attributes:
        num_features: how many there are.
    """

    num_features = 64

    def __init__(self, in_channels: int, image_size: int, num_classes: int = 10) -> None:
        super().__init__()
        self.in_channels, self.image_size = in_channels, image_size
        layers: list[nn.Module] = []
        for before, after in ((in_channels, 16), (16, 32), (32, self.num_features)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [] if after == self.num_features else [nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[b, 64]`` of images in [-1, 1], ``[b, C, h, w]`` of any size, grey or coloured."""
        if images.shape[1] > self.in_channels:
            images = images.mean(1, keepdim=True)
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return self.body(images.expand(-1, self.in_channels, -1, -1))

    def classify(self, images: Tensor) -> Tensor:
        """Logits ``[b, num_classes]``."""
        return self.head(self(images))


def features(name: str) -> FeatureNet:
    """One of the classifiers, trained, in evaluation mode.

    Args:
        name: mnist or cifar10.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in get_args(Features):
        raise ValueError(f"features must be one of {', '.join(get_args(Features))}, got {name!r}")
    net = FeatureNet(*SHAPES[name]).float()
    net.load_state_dict(load_file(FOLDER / f"{name}.safetensors"))
    return net.eval().requires_grad_(False)
