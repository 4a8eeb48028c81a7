"""The Compact Convolutional Transformer: a small transformer on the pixels of a convolution."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from models.parts.checks import check_rates
from models.parts.plain import plain_layers
from models.wrapped import need_timm

WIDEST_TOKENIZER = 64  # channels of the convolutions before the last one


class Encoder(nn.Module):
    """Transformer blocks on tokens with positions, and their weighted mean.

    Args:
        blocks: the blocks.
        tokens: how many there are.
        width: of a token.
        positions: add a learned vector to each.
    """

    def __init__(self, blocks: list[nn.Module], tokens: int, width: int, positions: bool) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(1, tokens, width)) if positions else None
        if self.positions is not None:
            nn.init.trunc_normal_(self.positions, std=0.02)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """From an image ``[b, width, height, width]`` to ``[b, width]``."""
        x = x.flatten(2).transpose(1, 2)
        x = self.norm(self.blocks(x if self.positions is None else x + self.positions))
        return (self.pool(x).softmax(1).transpose(1, 2) @ x).squeeze(1)  # sequence pooling, equation 5


def cct(
    layers: int = 7,
    heads: int = 4,
    width: int = 256,
    mlp_ratio: float = 2.0,
    convolutions: int = 1,
    kernel_size: int = 3,
    positions: bool = True,
    attention_dropout: float = 0.1,
    drop_path: float = 0.1,
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
) -> nn.Module:
    """A Compact Convolutional Transformer (Hassani et al., 2021, arXiv 2104.05704); the defaults are CCT-7/3×1.

    Convolutions, each with a ReLU and a 3 × 3 maximum of stride 2, make the tokens; blocks normalise first and have no
    bias in queries, keys and values; instead of a class token, the tokens are averaged with learned weights.

    Args:
        layers: transformer blocks.
        heads: of each.
        width: of a token.
        mlp_ratio: width of a block's hidden layer, as a multiple of the token's.
        convolutions: that make the tokens; each halves the image's side at least.
        kernel_size: of each; its stride is 1 for kernels up to 5, and 2 for 7.
        positions: learn a vector for each position, which the convolutions make optional.
        attention_dropout: probability of dropping an attention weight.
        drop_path: probability of dropping a residual branch, of the last block; it rises linearly up to there.
        in_channels: of the images.
        num_classes: outputs.
        image_size: side of the images.

    Returns:
        A module from ``[b, in_channels, image_size, image_size]`` to logits ``[b, num_classes]``.

    Raises:
        ValueError: for an option out of its range.
    """
    for name, count in (("layers", layers), ("heads", heads), ("convolutions", convolutions)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if width < 1 or width % heads:
        raise ValueError(f"width must be a multiple of heads ({heads}), got {width}")
    if mlp_ratio <= 0:
        raise ValueError(f"mlp_ratio must be above 0, got {mlp_ratio}")
    if kernel_size not in (1, 3, 5, 7):
        raise ValueError(f"kernel_size must be 1, 3, 5 or 7, got {kernel_size}")
    check_rates(attention_dropout=attention_dropout, drop_path=drop_path)
    block = need_timm().models.vision_transformer.Block
    tokenizer: list[nn.Module] = []
    before, stride, side = in_channels, 2 if kernel_size == 7 else 1, image_size
    for index in range(convolutions):
        after = width if index == convolutions - 1 else WIDEST_TOKENIZER
        conv = nn.Conv2d(before, after, kernel_size, stride, kernel_size // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight)
        tokenizer += [conv, nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
        before, side = after, math.ceil(math.ceil(side / stride) / 2)
    blocks: list[nn.Module] = [
        block(width, heads, mlp_ratio, attn_drop=attention_dropout, drop_path=drop_path * index / max(layers - 1, 1))
        for index in range(layers)
    ]
    encoder, head = Encoder(blocks, side**2, width, positions), nn.Linear(width, num_classes)
    for part in (*encoder.modules(), head):
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    parts = OrderedDict[str, nn.Module](tokenizer=nn.Sequential(*tokenizer), encoder=encoder, head=head)
    return plain_layers(nn.Sequential(parts))
