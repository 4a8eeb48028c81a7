"""torchvision's MobileNetV3, with the stem that suits the image size."""

from __future__ import annotations

from typing import Literal

from torch import nn

from models.parts.stems import small_stem
from models.weights.published import published_by_torchvision
from models.wrapped import finish, widen


def mobilenetv3(
    size: Literal["small", "large"] = "large",
    stem: Literal["auto", "cifar", "imagenet"] = "auto",
    pretrained: bool | str = False,
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
) -> nn.Module:
    """MobileNetV3 (Howard et al., 2019).

    Args:
        size: of the two published nets.
        stem: ``imagenet``: the first convolution has stride 2; ``cifar``: stride 1, for small images; ``auto``: cifar
            up to 64 pixels.
        pretrained: true: the published weights, downloaded; or a path (see ``models.weights.files.read_weights``).
        in_channels: of the images.
        num_classes: outputs.
        image_size: side of the images.

    Returns:
        A module from ``[b, in_channels, image_size, image_size]`` to logits ``[b, num_classes]``.

    Raises:
        ValueError: for an option that does not exist, or weights that cannot be had.
    """
    if size not in ("small", "large"):
        raise ValueError(f"size must be small or large, got {size!r}")
    name = f"mobilenet_v3_{size}"
    from torchvision import models  # takes seconds

    net = models.get_model(name, weights=None, num_classes=num_classes)
    widen(net, in_channels)
    if small_stem(stem, image_size):
        net.features[0][0].stride = (1, 1)  # the kernel stays: pretrained weights fit
    return finish(net, name, in_channels, image_size, num_classes, pretrained, published_by_torchvision(name))
