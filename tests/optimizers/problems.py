"""The package's problems and, besides, torchvision's families of convolutional nets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from optimizers.testing.problems import PROBLEMS as OWN
from optimizers.testing.problems import (
    EmbeddingModel,
    Problem,
    Shape,
    ViTBlock,
    conv1d_net,
    conv_net,
    frozen_net,
    groupnorm_net,
    images,
    mlp,
    tokens,
)

__all__ = [
    "PROBLEMS",
    "TORCHVISION",
    "EmbeddingModel",
    "Problem",
    "Shape",
    "ViTBlock",
    "conv1d_net",
    "conv_net",
    "frozen_net",
    "groupnorm_net",
    "images",
    "mlp",
    "tokens",
]


def small_resnet() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)


def small_densenet() -> nn.Module:
    """Torchvision's DenseNet: an in-place ReLU after every norm, on concatenated features."""
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=4)


def small_mobilenet() -> nn.Module:
    """Torchvision's MobileNetV3: depthwise convolutions, squeeze and excitation, in-place hard swish; dropout off."""
    from torchvision.models import MobileNetV3
    from torchvision.models.mobilenetv3 import InvertedResidualConfig

    settings = [
        InvertedResidualConfig(8, 3, 16, 8, True, "RE", 2, 1, 0.5),
        InvertedResidualConfig(8, 5, 16, 8, True, "HS", 1, 1, 0.5),
    ]
    return MobileNetV3(settings, last_channel=16, num_classes=4, dropout=0.0)


def resnet_images(batch: int = 4) -> tuple[Tensor, Tensor]:
    x, y = images(batch)
    return F.interpolate(x, size=32), y


TORCHVISION: dict[str, Problem] = {
    "resnet": (small_resnet, resnet_images),
    "densenet": (small_densenet, resnet_images),
    "mobilenet": (small_mobilenet, resnet_images),
}
PROBLEMS: dict[str, Problem] = OWN | TORCHVISION
