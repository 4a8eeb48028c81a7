"""Residual nets: torchvision's, with the stem that suits the image size, and the thin ones made for CIFAR."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from models.parts.stems import set_first, small_stem
from models.weights.published import load_pretrained, published_by_torchvision


def resnet(
    depth: Literal[18, 34, 50, 101, 152],
    stem: Literal["auto", "cifar", "imagenet"] = "auto",
    zero_init_residual: bool = False,
    pretrained: bool | str = False,
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
) -> nn.Module:
    """A ResNet (He et al., 2016).

    Args:
        depth: number of layers.
        stem: ``imagenet``: 7 × 7 convolution with stride 2, then max-pooling; ``cifar``: 3 × 3 convolution with stride
            1 and no pooling, for small images; ``auto``: cifar up to 64 pixels.
        zero_init_residual: start each block as the identity (the last norm's weight at 0).
        pretrained: true: the published weights, downloaded; or a path (see ``models.weights.files.read_weights``). The
            stem for small images stays fresh.
        in_channels: of the images.
        num_classes: outputs.
        image_size: side of the images, for ``stem="auto"``.

    Returns:
        A module from ``[b, in_channels, image_size, image_size]`` to logits ``[b, num_classes]``.

    Raises:
        ValueError: for a depth or stem that does not exist, or weights that cannot be had.
    """
    if depth not in (18, 34, 50, 101, 152):
        raise ValueError(f"depth must be one of 18, 34, 50, 101 and 152, got {depth}")
    small = small_stem(stem, image_size)
    from torchvision import models  # takes seconds

    net = models.get_model(
        f"resnet{depth}", weights=None, num_classes=num_classes, zero_init_residual=zero_init_residual
    )
    if small:
        set_first(net, "conv1", in_channels, kernel_size=3, stride=1, padding=1)
        net.maxpool = nn.Identity()
    elif in_channels != 3:
        set_first(net, "conv1", in_channels)
    load_pretrained(net, pretrained, published_by_torchvision(f"resnet{depth}"))
    return net


class PaddedShortcut(nn.Module):
    """Every second pixel, and zeros for the channels that are added: a shortcut without parameters ("option A").

    Args:
        added: channels.
    """

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        """From ``[b, channels, height, width]`` to ``[b, channels + added, height / 2, width / 2]``, rounded up."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))


def cifar_resnet(depth: int, width: int = 16, *, in_channels: int, num_classes: int) -> nn.Module:
    """The thin ResNet for small images (He et al., 2016, section 4.2): 6n + 2 layers in three stages.

    Args:
        depth: number of layers: 20, 32, 44, 56, 110 or any other 6n + 2.
        width: channels of the first stage; the others have two and four times as many.
        in_channels: of the images.
        num_classes: outputs.

    Returns:
        A module from ``[b, in_channels, height, width]`` (of any size) to logits ``[b, num_classes]``.

    Raises:
        ValueError: for a depth that is not 6n + 2, or a width below 1.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6n + 2 (20, 32, 44, 56, ...), got {depth}")
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    from torchvision.models.resnet import BasicBlock  # takes seconds

    parts: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False)),
        ("bn1", nn.BatchNorm2d(width)),
        ("relu", nn.ReLU(inplace=True)),
    ]
    for stage, before in enumerate((width, width, 2 * width)):
        after = width * 2**stage
        first = BasicBlock(before, after, 1 + (stage > 0), PaddedShortcut(after - before) if stage else None)
        rest = [BasicBlock(after, after) for _ in range((depth - 2) // 6 - 1)]
        parts.append((f"layer{stage + 1}", nn.Sequential(first, *rest)))
    parts += [
        ("avgpool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("fc", nn.Linear(4 * width, num_classes)),
    ]
    net = nn.Sequential(OrderedDict(parts))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return net
