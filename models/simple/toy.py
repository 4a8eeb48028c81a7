"""Nets small or simple enough that what an optimizer does on them can be worked out exactly."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from models.parts.initialisation import initialise


def deep_linear(
    hidden: list[int], bias: bool = True, *, in_channels: int, image_size: int, num_classes: int
) -> nn.Module:
    """A deep net of Linear layers without activations: an affine map, written as a product.

    Its layers' Jacobians do not depend on the example. With a Gaussian likelihood the Kronecker product of K-FAC is
    then not an approximation: it is the layer's block of the Fisher matrix.

    Args:
        hidden: widths of the hidden layers, the first one first; none at all make logistic regression.
        bias: of every layer.
        in_channels: of the images.
        image_size: side of the images.
        num_classes: outputs.

    Returns:
        A module from ``[b, in_channels, image_size, image_size]`` to logits ``[b, num_classes]``. It starts at Xavier's
        values, which neither shrink nor blow up a signal that no activation dampens.

    Raises:
        ValueError: for a width out of its range.
    """
    if any(width < 1 for width in hidden):
        raise ValueError(f"hidden must hold widths of at least 1, got {list(hidden)}")
    widths = [in_channels * image_size**2, *hidden, num_classes]
    layers = [nn.Linear(fan_in, width, bias=bias) for fan_in, width in pairwise(widths)]
    for layer in layers:
        initialise(layer, "xavier")
    return nn.Sequential(nn.Flatten(), *layers)


def toynet(channels: list[int], *, in_channels: int, num_classes: int) -> nn.Module:
    """A convolutional net of a few thousand parameters, for quick looks and dense matrices.

    Per entry of ``channels`` a 3 × 3 convolution of stride 2 and a ReLU, then the mean over the image and one Linear.

    Args:
        channels: of the convolutions, the first one first.
        in_channels: of the images.
        num_classes: outputs.

    Returns:
        A module from ``[b, in_channels, height, width]`` (of any size) to logits ``[b, num_classes]``.

    Raises:
        ValueError: for a number of channels out of its range.
    """
    if not channels or any(count < 1 for count in channels):
        raise ValueError(f"channels must hold one or more numbers of at least 1, got {list(channels)}")
    layers: list[nn.Module] = []
    for before, after in pairwise([in_channels, *channels]):
        conv = nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1)
        initialise(conv, "kaiming", "relu")
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], num_classes))
