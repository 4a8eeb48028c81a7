"""torchvision's densely connected nets, with the stem that suits the image size."""

from __future__ import annotations

from typing import Literal

from torch import nn

from models.parts.checks import check_rates
from models.parts.stems import set_first, small_stem
from models.weights.published import published_by_torchvision
from models.wrapped import finish, widen


def densenet(
    depth: Literal[121, 161, 169, 201],
    stem: Literal["auto", "cifar", "imagenet"] = "auto",
    dropout: float = 0.0,
    pretrained: bool | str = False,
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
) -> nn.Module:
    """A DenseNet (Huang et al., 2017).

    Args:
        depth: number of layers.
        stem: ``imagenet``: 7 × 7 convolution with stride 2, then max-pooling; ``cifar``: 3 × 3 convolution with stride
            1 and no pooling, for small images; ``auto``: cifar up to 64 pixels.
        dropout: probability of dropping an output of a dense layer.
        pretrained: true: the published weights, downloaded; or a path (see ``models.weights.files.read_weights``).
        in_channels: of the images.
        num_classes: outputs.
        image_size: side of the images.

    Returns:
        A module from ``[b, in_channels, image_size, image_size]`` to logits ``[b, num_classes]``.

    Raises:
        ValueError: for an option out of its range, images that the poolings leave nothing of, or weights that cannot
            be had.
    """
    if depth not in (121, 161, 169, 201):
        raise ValueError(f"depth must be one of 121, 161, 169 and 201, got {depth}")
    check_rates(dropout=dropout)
    name = f"densenet{depth}"
    from torchvision import models  # takes seconds

    net = models.get_model(name, weights=None, num_classes=num_classes, drop_rate=dropout)
    if small_stem(stem, image_size):
        set_first(net, "features.conv0", in_channels, kernel_size=3, stride=1, padding=1)
        net.features.pool0 = nn.Identity()
    widen(net, in_channels)
    return finish(net, name, in_channels, image_size, num_classes, pretrained, published_by_torchvision(name))
