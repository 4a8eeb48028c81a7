"""timm's vision transformers, with patches that suit the image size."""

from __future__ import annotations

from typing import Literal

from torch import nn

from models.parts.checks import check_rates
from models.parts.stems import LARGEST_SMALL_IMAGE
from models.wrapped import create_timm, finish, patch_side, published_by_timm

SWIN = {
    "tiny": "swin_tiny_patch4_window7_224",
    "small": "swin_small_patch4_window7_224",
    "base": "swin_base_patch4_window7_224",
    "large": "swin_large_patch4_window7_224",
}


def vit(
    size: Literal["tiny", "small", "base"],
    patch_size: int | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    pretrained: bool | str = False,
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
) -> nn.Module:
    """A vision transformer (Dosovitskiy et al., 2021; the tiny and small ones as in Touvron et al., 2021).

    Args:
        size: widths of 192, 384 and 768 with 3, 6 and 12 heads, in 12 blocks.
        patch_size: side of a patch; None: 16, and up to 64 pixels the largest divisor of the image's side that leaves
            8 patches a side.
        dropout: probability of dropping a unit of a projection or before the head.
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
    check_rates(dropout=dropout, drop_path=drop_path)
    name = f"vit_{size}_patch16_224"
    net = create_timm(
        name, in_channels, num_classes, img_size=image_size, patch_size=patch_side(patch_size, image_size, 16, 8),
        drop_rate=dropout, proj_drop_rate=dropout, drop_path_rate=drop_path,
    )  # fmt: skip
    return finish(net, name, in_channels, image_size, num_classes, pretrained, published_by_timm(name))


def swin(
    size: Literal["tiny", "small", "base", "large"],
    patch_size: int | None = None,
    window_size: int | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.1,
    pretrained: bool | str = False,
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
) -> nn.Module:
    """A Swin transformer (Liu et al., 2021).

    Args:
        size: of the four published nets.
        patch_size: side of a patch; None: 4, and up to 64 pixels the largest divisor of the image's side that leaves
            16 patches a side, which three stages then halve.
        window_size: patches a side within which attention stays; None: 7, and 4 up to 64 pixels.
        dropout: probability of dropping a unit of a projection or before the head.
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
    if size not in SWIN:
        raise ValueError(f"size must be one of {', '.join(SWIN)}, got {size!r}")
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size must be at least 1, got {window_size}")
    check_rates(dropout=dropout, drop_path=drop_path)
    window = window_size or (4 if image_size <= LARGEST_SMALL_IMAGE else 7)
    net = create_timm(
        SWIN[size], in_channels, num_classes, img_size=image_size, window_size=window,
        patch_size=patch_side(patch_size, image_size, 4, 16), drop_rate=dropout, proj_drop_rate=dropout,
        drop_path_rate=drop_path,
    )  # fmt: skip
    published = published_by_timm(SWIN[size])
    return finish(net, SWIN[size], in_channels, image_size, num_classes, pretrained, published)
