"""torchvision's residual nets, with the stem that suits the image size."""

from __future__ import annotations

from typing import Literal

from torch import nn
from torchvision import models

LARGEST_SMALL_IMAGE = 64  # pixels up to which stem=auto takes the CIFAR stem


def resnet(
    depth: Literal[18, 34, 50, 101, 152],
    stem: Literal["auto", "cifar", "imagenet"] = "auto",
    zero_init_residual: bool = False,
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
) -> nn.Module:
    """A ResNet (He et al., 2016), not pretrained.

    Args:
        depth: number of layers.
        stem: ``imagenet``: 7 × 7 convolution with stride 2, then max-pooling; ``cifar``: 3 × 3 convolution with stride
            1 and no pooling, for small images; ``auto``: cifar up to 64 pixels.
        zero_init_residual: start each block as the identity (the last norm's weight at 0).
        in_channels: of the images.
        num_classes: outputs.
        image_size: side of the images, for ``stem="auto"``.

    Returns:
        A module from ``[b, in_channels, image_size, image_size]`` to logits ``[b, num_classes]``.

    Raises:
        ValueError: for a depth or stem that does not exist.
    """
    if depth not in (18, 34, 50, 101, 152):
        raise ValueError(f"depth must be one of 18, 34, 50, 101 and 152, got {depth}")
    if stem not in ("auto", "cifar", "imagenet"):
        raise ValueError(f"stem must be auto, cifar or imagenet, got {stem!r}")
    small = stem == "cifar" or (stem == "auto" and image_size <= LARGEST_SMALL_IMAGE)
    net = models.get_model(
        f"resnet{depth}", weights=None, num_classes=num_classes, zero_init_residual=zero_init_residual
    )
    if small:
        net.conv1 = _first(in_channels, kernel_size=3, stride=1)
        net.maxpool = nn.Identity()
    elif in_channels != 3:
        net.conv1 = _first(in_channels, kernel_size=7, stride=2)
    return net


def _first(in_channels: int, kernel_size: int, stride: int) -> nn.Conv2d:
    """A first convolution, initialised as torchvision initialises its own."""
    conv = nn.Conv2d(in_channels, 64, kernel_size, stride, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
