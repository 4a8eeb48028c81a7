"""``nn.Embedding``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .affine import paired
from .layer import ElementwiseLayer
from .registry import adapts


class EmbeddingLayer(ElementwiseLayer):
    """``nn.Embedding``: a row's gradient in one example is the sum over its occurrences there."""

    indexed = True

    def leading(self, x: Tensor, g: Tensor) -> int:
        """See Layer."""
        return x.dim()

    def square_sums(self, calls: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """See ElementwiseLayer."""
        found = [self.kept(x, g) for x, g in calls]
        tokens = torch.cat([x for x, _ in found], 1).long()
        flat = torch.cat([g for _, g in found], 1).flatten(0, 1)
        rows, width = self.parameters[0].shape
        keys = tokens + rows * torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
        pairs, where = keys.flatten().unique(return_inverse=True)
        summed = flat.new_zeros(len(pairs), width).index_add_(0, where, flat)
        return [flat.new_zeros(rows, width).index_add_(0, pairs % rows, summed.square())]

    def kept(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """See Layer. As an affine layer whose inputs have a single 1, at the token's place."""
        padding = getattr(self.module, "padding_idx", None)
        x, g = x.reshape(len(x), -1).int(), g.reshape(len(x), -1, g.shape[-1])
        return x, (g if padding is None else g * (x != padding).unsqueeze(-1))  # the padding row has no gradient

    def respond(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """See Layer."""
        return F.embedding(x, tensors[0])

    def combine(self, x: Tensor, g: Tensor, weights: Tensor) -> list[Tensor]:
        """See Layer."""
        weighted = (g * weights.view(-1, 1, 1)).flatten(0, 1)
        return [g.new_zeros(self.parameters[0].shape).index_add_(0, x.flatten(), weighted)]

    def rows(self, x: Tensor, g: Tensor) -> Tensor:
        """See Layer."""
        result = g.new_zeros(len(x), *self.parameters[0].shape)
        return result.scatter_add_(1, x.long().unsqueeze(-1).expand_as(g), g).flatten(1)

    def gram(self, x: Tensor, g: Tensor) -> Tensor:
        """See Layer. Positions of different tokens have nothing in common."""
        return paired(x.view(1, *x.shape, 1), g.unsqueeze(0).double(), lambda a, b: (a == b.mT).double())


@adapts(nn.Embedding, operations={F.embedding: ("input", "weight")})
def _plain(name: str, module: nn.Embedding) -> EmbeddingLayer | None:
    return None if module.sparse or module.scale_grad_by_freq else EmbeddingLayer(name, module)
