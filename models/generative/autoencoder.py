"""Auto-encoders: from images to as many logits as there are pixels. The likelihood says what the logits mean."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Literal

from torch import nn

from models.parts.initialisation import Init, initialise
from models.simple.mlp import ACTIVATIONS


def autoencoder(
    hidden: list[int],
    activation: Literal["relu", "tanh", "sigmoid"] = "relu",
    linear_code: bool = True,
    init: Init = "kaiming",
    *,
    in_channels: int,
    image_size: int,
) -> nn.Module:
    """A fully connected auto-encoder on flattened images, its decoder the mirror of its encoder.

    Nothing follows the last layer: its outputs are the logits of a Bernoulli or the means of a Gaussian likelihood.

    Args:
        hidden: widths of the encoder's layers, the first one first; the last one is the code's.
        activation: after each hidden layer.
        linear_code: no activation after the code (Hinton & Salakhutdinov, 2006).
        init: starting values. Behind a narrow code a deep decoder soon says the same of every image, and from a small
            start gradients take long to leave that plateau; ``kaiming`` is large enough. ``xavier`` and torch's
            ``default`` are small, and ``sparse`` is for tanh and sigmoid: with ReLU its outputs are huge. See
            ``models.parts.initialisation.initialise``.
        in_channels: of the images.
        image_size: side of the images.

    Returns:
        A module ``encoder`` and ``decoder`` from ``[b, in_channels, image_size, image_size]`` to logits
        ``[b, in_channels * image_size ** 2]``, in the order of ``images.flatten(1)``.

    Raises:
        ValueError: for a width, activation or initialisation that does not exist.
    """
    if not hidden or any(width < 1 for width in hidden):
        raise ValueError(f"hidden must hold one or more widths of at least 1, the last the code's, got {list(hidden)}")
    if activation not in ("relu", "tanh", "sigmoid"):
        raise ValueError(f"activation must be one of relu, tanh, sigmoid, got {activation!r}")
    widths = [in_channels * image_size**2, *hidden]

    def half(sizes: list[int], last_is_linear: bool) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for index, (fan_in, width) in enumerate(pairwise(sizes)):
            linear = last_is_linear and index == len(sizes) - 2
            layer = nn.Linear(fan_in, width)
            initialise(layer, init, "linear" if linear else activation)
            layers += [layer] if linear else [layer, ACTIVATIONS[activation]()]
        return layers

    encoder = nn.Sequential(nn.Flatten(), *half(widths, linear_code))
    return _joined(encoder, nn.Sequential(*half(widths[::-1], True)))


def conv_autoencoder(
    channels: list[int],
    kernel_size: int = 3,
    stride: int = 2,
    padding: int = 1,
    batch_norm: bool = False,
    linear_code: bool = True,
    *,
    in_channels: int,
    image_size: int,
) -> nn.Module:
    """A convolutional auto-encoder: strided convolutions, then transposed ones that give each size back, with ReLU.

    Args:
        channels: of the encoder's layers, the first one first; the last ones are the code's.
        kernel_size: side of every kernel.
        stride: of every layer.
        padding: of every layer, on each side.
        batch_norm: normalise after the activation of each hidden layer.
        linear_code: neither activation nor normalisation after the code.
        in_channels: of the images.
        image_size: side of the images; any size comes back as it was, odd or even.

    Returns:
        A module ``encoder`` and ``decoder`` from ``[b, in_channels, image_size, image_size]`` to logits
        ``[b, in_channels * image_size ** 2]``, in the order of ``images.flatten(1)``. It starts at He's values.

    Raises:
        ValueError: for a number out of its range, or a kernel that an image is too small for.
    """
    if not channels or any(count < 1 for count in channels):
        raise ValueError(f"channels must hold one or more numbers of at least 1, got {list(channels)}")
    if kernel_size < 1:
        raise ValueError(f"kernel_size must be at least 1, got {kernel_size}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if not 0 <= padding <= kernel_size // 2:
        raise ValueError(f"padding must be between 0 and half of kernel_size ({kernel_size // 2}), got {padding}")
    depths, size = [in_channels, *channels], image_size
    encoder: list[nn.Module] = []
    mirror: list[list[nn.Module]] = []  # the decoder's layers, the last one first
    for index, (before, after) in enumerate(pairwise(depths)):
        room = size + 2 * padding - kernel_size  # pixels that the kernel can move over
        if room < 0:
            raise ValueError(
                f"kernel_size must be at most {size + 2 * padding}, the padded side of what reaches layer {index + 1}, "
                f"got {kernel_size}: choose a smaller kernel, more padding or fewer channels"
            )
        is_code = linear_code and index == len(channels) - 1
        down = nn.Conv2d(before, after, kernel_size, stride, padding)
        # Rounding down, the convolution left out the last `room % stride` pixels.
        up = nn.ConvTranspose2d(after, before, kernel_size, stride, padding, output_padding=room % stride)
        initialise(down, "kaiming", "linear" if is_code else "relu")
        initialise(up, "kaiming", "linear" if index == 0 else "relu")
        encoder += [down, *([] if is_code else _after(after, batch_norm))]
        mirror.append([up, *([] if index == 0 else _after(before, batch_norm))])
        size = room // stride + 1
    decoder = [layer for block in reversed(mirror) for layer in block]
    return _joined(nn.Sequential(*encoder), nn.Sequential(*decoder, nn.Flatten()))


def _joined(encoder: nn.Module, decoder: nn.Module) -> nn.Module:
    """The two halves under their names."""
    return nn.Sequential(OrderedDict[str, nn.Module](encoder=encoder, decoder=decoder))


def _after(channels: int, batch_norm: bool) -> list[nn.Module]:
    """What follows a hidden convolution."""
    return [nn.ReLU(), nn.BatchNorm2d(channels)] if batch_norm else [nn.ReLU()]
