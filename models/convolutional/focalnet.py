"""timm's focal modulation networks, with patches that suit the image size."""

from __future__ import annotations

from typing import Literal

from torch import nn

from models.parts.checks import check_rates
from models.parts.stems import set_first
from models.wrapped import create_timm, finish, patch_side, published_by_timm


def focalnet(
    size: Literal["tiny", "small", "base"] = "tiny",
    field: Literal["srf", "lrf"] = "srf",
    patch_size: int | None = None,
    drop_path: float = 0.1,
    pretrained: bool | str = False,
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
) -> nn.Module:
    """A FocalNet (Yang et al., 2022).

    Args:
        size: of the published nets.
        field: small (two) or large (three levels of) receptive fields.
        patch_size: side of a patch; None: 4, and up to 64 pixels the largest divisor of the image's side that leaves
            16 patches a side, which three stages then halve.
        drop_path: probability of dropping a residual branch, of the last block; it rises linearly up to there.
        pretrained: true: the published weights, downloaded; or a path (see ``models.weights.files.read_weights``).
        in_channels: of the images.
        num_classes: outputs.
        image_size: side of the images.

    Returns:
        A module from ``[b, in_channels, image_size, image_size]`` to logits ``[b, num_classes]``.

    Raises:
        ValueError: for an option out of its range, or weights that cannot be had.
    """
    if size not in ("tiny", "small", "base"):
        raise ValueError(f"size must be tiny, small or base, got {size!r}")
    if field not in ("srf", "lrf"):
        raise ValueError(f"field must be srf or lrf, got {field!r}")
    check_rates(drop_path=drop_path)
    name = f"focalnet_{size}_{field}"
    net = create_timm(name, in_channels, num_classes, drop_path_rate=drop_path)
    if (side := patch_side(patch_size, image_size, 4, 16)) != 4:
        set_first(net, "stem.proj", in_channels, kernel_size=side, stride=side)
    return finish(net, name, in_channels, image_size, num_classes, pretrained, published_by_timm(name))
