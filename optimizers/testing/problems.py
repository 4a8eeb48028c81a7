"""Small models that between them hold every kind of layer and many a trap, with a batch for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ViTBlock(nn.Module):
    """Patch embedding, class token, positional embedding, one pre-norm transformer block, a head."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8) * 0.02)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 4)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``[batch, 3, 8, 8]``."""
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.position
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=not self.fused)[0]
        tokens = tokens + self.mlp(self.norm2(tokens))
        return self.head(tokens[:, 0])


class EmbeddingModel(nn.Module):
    """An embedding as wide as its vocabulary before a square Linear: shapes that shape-matching confuses."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 6)
        self.linear = nn.Linear(6, 6)
        self.head = nn.Linear(6, 6, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of tokens ``[batch, length]``."""
        return self.head(torch.tanh(self.linear(self.embedding(tokens)))).mean(1)


class Shape(nn.Module):
    """A reshape as a layer."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with the shape behind its first dimension."""
        return x.reshape(len(x), *self.shape)


def conv_net() -> nn.Sequential:
    """In-place activations, grouped, dilated and strided convolutions, GroupNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=4, dilation=2, padding=2, bias=False),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 4, 2, stride=2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    )


def groupnorm_net() -> nn.Sequential:
    """No statistics over the batch, no parameter without a gradient: what equality tests need."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(36, 4)
    )


def conv1d_net() -> nn.Sequential:
    """A convolution in one dimension, with batch statistics."""
    return nn.Sequential(
        Shape(3, 64), nn.Conv1d(3, 4, 5, stride=2), nn.BatchNorm1d(4), nn.SiLU(), nn.Flatten(), nn.Linear(120, 4)
    )


def frozen_net() -> nn.Sequential:
    """First and last layers frozen."""
    model = conv_net()
    for p in (*model[0].parameters(), *model[-1].parameters()):
        p.requires_grad_(False)
    return model


def mlp() -> nn.Sequential:
    """Two linear layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Tanh(), nn.Linear(6, 4))


def images(batch: int = 6) -> tuple[Tensor, Tensor]:
    """Always the same noise ``[batch, 3, 8, 8]`` and classes of four, in the default dtype."""
    generator = torch.Generator().manual_seed(7)
    dtype = torch.get_default_dtype()
    return (
        torch.randn(batch, 3, 8, 8, generator=generator, dtype=dtype),
        torch.randint(0, 4, (batch,), generator=generator),
    )


def tokens(batch: int = 6) -> tuple[Tensor, Tensor]:
    """Every token of the vocabulary occurs, some twice in an example."""
    inputs = (torch.arange(batch * 3).view(batch, 3) * 5 // 2) % 6
    inputs[0] = torch.tensor([1, 1, 4])
    return inputs, torch.arange(batch) % 6


#: A model and ``data(batch)`` for it.
Problem = tuple[Callable[[], nn.Module], Callable[..., tuple[Tensor, Tensor]]]

#: By name; all of four or six classes.
PROBLEMS: dict[str, Problem] = {
    "mlp": (mlp, images),
    "conv": (conv_net, images),
    "groupnorm": (groupnorm_net, images),
    "conv1d": (conv1d_net, images),
    "vit": (ViTBlock, images),
    "vit_fused": (lambda: ViTBlock(fused=True), images),
    "embedding": (EmbeddingModel, tokens),
    "tied": (lambda: EmbeddingModel(tied=True), tokens),
    "frozen": (frozen_net, images),
}
