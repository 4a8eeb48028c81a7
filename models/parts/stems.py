"""First convolutions: which suits an image size, and how one is put in another's place."""

from __future__ import annotations

from typing import Any

from torch import nn

LARGEST_SMALL_IMAGE = 64  # pixels up to which stem=auto takes the CIFAR stem


def set_first(net: nn.Module, name: str, in_channels: int, **changes: Any) -> None:
    """Replace a convolution by a fresh one, at He's values (fan out, as torchvision).

    Args:
        net: changed in place.
        name: of the convolution in it.
        in_channels: the new one's.
        changes: other arguments of ``nn.Conv2d`` that differ from the old one's.
    """
    old = net.get_submodule(name)
    assert isinstance(old, nn.Conv2d)
    same = {key: getattr(old, key) for key in ("out_channels", "kernel_size", "stride", "padding", "dilation")}
    conv = nn.Conv2d(in_channels, **(same | {"bias": old.bias is not None} | changes))
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, conv)


def small_stem(stem: str, image_size: int) -> bool:
    """Whether a stem is the one for small images.

    Args:
        stem: auto, cifar or imagenet.
        image_size: decides where the stem is auto.

    Raises:
        ValueError: for a stem that does not exist.
    """
    if stem not in ("auto", "cifar", "imagenet"):
        raise ValueError(f"stem must be auto, cifar or imagenet, got {stem!r}")
    return stem == "cifar" or (stem == "auto" and image_size <= LARGEST_SMALL_IMAGE)
