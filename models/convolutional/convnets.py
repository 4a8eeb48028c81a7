"""Plain convolutional classifiers."""

from __future__ import annotations

from torch import nn

from models.parts.initialisation import initialise

VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))  # channels, with a pooling after each group
SMALLEST_CUDA_CONVNET = 8  # pixels that three halvings leave one of


def cuda_convnet(*, in_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """The net of cuda-convnet (Krizhevsky, 2012) that K-FAC for convolutions was tried on (Grosse & Martens, 2016).

    Three 5 × 5 convolutions with 32, 32 and 64 channels, each with an overlapping 3 × 3 pooling of stride 2 (first the
    maximum, then twice the average), and one Linear. As there, the last window may reach over the edge, so that each
    pooling halves the side.

    Args:
        in_channels: of the images.
        image_size: side of the images.
        num_classes: outputs.

    Returns:
        A module from ``[b, in_channels, image_size, image_size]`` to logits ``[b, num_classes]``. Its convolutions
        start at He's values.

    Raises:
        ValueError: for images that the poolings leave nothing of.
    """
    if image_size < SMALLEST_CUDA_CONVNET:
        raise ValueError(
            f"image_size must be at least {SMALLEST_CUDA_CONVNET} for cuda_convnet, which halves it three times, "
            f"got {image_size}: choose another model or larger images"
        )
    net = nn.Sequential(
        nn.Conv2d(in_channels, 32, kernel_size=5, padding=2),
        nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
        nn.ReLU(),
        nn.Conv2d(32, 32, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.AvgPool2d(kernel_size=3, stride=2, ceil_mode=True),
        nn.Conv2d(32, 64, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.AvgPool2d(kernel_size=3, stride=2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(64 * (image_size // 8) ** 2, num_classes),
    )
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            initialise(layer, "kaiming", "relu")
    return net


def vgg11(batch_norm: bool = True, *, in_channels: int, num_classes: int) -> nn.Module:
    """VGG-11 (Simonyan & Zisserman, 2015; configuration A) for small images: 3 × 3 convolutions and one Linear.

    The three wide fully connected layers of the original, most of its weights, are left out, as is usual on CIFAR.
    Images may have any size: sides are rounded up when halved, and what is left of the image is averaged.

    Args:
        batch_norm: normalise each convolution (its bias is then left out).
        in_channels: of the images.
        num_classes: outputs.

    Returns:
        A module from ``[b, in_channels, height, width]`` to logits ``[b, num_classes]``. The convolutions start at
        He's values, which a signal survives without batch norm.
    """
    layers: list[nn.Module] = []
    before = in_channels
    for group in VGG11:
        for width in group:
            conv = nn.Conv2d(before, width, kernel_size=3, padding=1, bias=not batch_norm)
            initialise(conv, "kaiming", "relu")
            layers += [conv, *([nn.BatchNorm2d(width)] if batch_norm else []), nn.ReLU()]
            before = width
        layers.append(nn.MaxPool2d(kernel_size=2, ceil_mode=True))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes))
