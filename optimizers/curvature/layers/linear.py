"""``nn.Linear``, the input projection of ``nn.MultiheadAttention``, and GPT-2's layer ``y = x W + b``."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .affine import AffineLayer
from .registry import adapts


@adapts(nn.Linear, operations={F.linear: ("input", "weight")})
class LinearLayer(AffineLayer):
    """``nn.Linear``, or any matrix and vector used as one, on ``[batch, ..., d_in]``; middle dimensions are shared."""

    def __init__(self, name: str, module: nn.Module, keys: tuple[str, str] = ("weight", "bias")) -> None:
        super().__init__(name, module, keys)
        self.d_out, self.d_in = self.parameters[0].shape

    @staticmethod
    def _batched(x: Tensor) -> Tensor:
        return x.reshape(1, len(x), x[0].numel() // x.shape[-1] if len(x) else 1, x.shape[-1])

    def leading(self, x: Tensor, g: Tensor) -> int:
        """See Layer."""
        return g.dim() - 1

    def patches(self, x: Tensor) -> Tensor:
        """See AffineLayer."""
        return self._batched(x)

    def gradients(self, g: Tensor) -> Tensor:
        """See AffineLayer."""
        return self._batched(g)

    def kept(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """See Layer."""
        return self._batched(x)[0], self._batched(g)[0]

    def respond(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """See Layer."""
        return F.linear(x, *tensors)

    def combine(self, x: Tensor, g: Tensor, weights: Tensor) -> list[Tensor]:
        """See Layer."""
        weighted = (g * weights.view(-1, 1, 1)).flatten(0, 1)
        weight = weighted.mT @ x.flatten(0, 1)
        return [weight, weighted.sum(0)] if self.has_bias else [weight]

    def input_square_sums(self, x: Tensor) -> tuple[Tensor, int]:
        """See AffineLayer."""
        rows = x.reshape(-1, self.d_in)
        return self._append_count(rows.square().sum(0, keepdim=True), len(rows))

    def gradient_square_sums(self, g: Tensor) -> Tensor:
        """See AffineLayer."""
        return g.reshape(-1, self.d_out).square().sum(0, keepdim=True)


@adapts(nn.MultiheadAttention)
def _input_projection(name: str, module: nn.MultiheadAttention) -> LinearLayer | None:
    plain = module.in_proj_weight is not None and module.bias_k is None and module.bias_v is None
    return LinearLayer(name, module, ("in_proj_weight", "in_proj_bias")) if plain else None


@adapts("transformers.pytorch_utils.Conv1D")
class TransposedLinearLayer(LinearLayer):
    """A linear layer that keeps its weight as ``[d_in, d_out]``: ``Conv1D`` of the package transformers."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.d_in, self.d_out = self.parameters[0].shape

    def to_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See AffineLayer."""
        return super().to_matrix(weight.mT, bias)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """See AffineLayer."""
        weight = matrix[0, :, : self.d_in].mT
        return [weight, matrix[..., -1].flatten()] if self.has_bias else [weight]

    def respond(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """See Layer."""
        return F.linear(x, tensors[0].mT, *tensors[1:])

    def combine(self, x: Tensor, g: Tensor, weights: Tensor) -> list[Tensor]:
        """See Layer."""
        weight, *bias = super().combine(x, g, weights)
        return [weight.mT, *bias]
