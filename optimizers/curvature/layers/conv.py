"""``nn.Conv1d`` and ``nn.Conv2d``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .affine import AffineLayer
from .layer import ImageRows
from .registry import adapts


@adapts(nn.Conv1d, nn.Conv2d, operations={torch.conv1d: ("input", "weight"), torch.conv2d: ("input", "weight")})
class ConvLayer(ImageRows, AffineLayer):
    """``nn.Conv1d`` and ``nn.Conv2d`` with any stride, dilation, groups and padding mode.

    Positions are the pixels of the output. A 1-D convolution is the 2-D one on an image of height 1.
    """

    def __init__(self, name: str, module: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__(name, module)
        self.groups = module.groups
        self.d_in = module.weight[0].numel()
        self.d_out = module.out_channels // module.groups
        self._flat = isinstance(module, nn.Conv1d)
        lift: tuple[int, ...] = (1,) if self._flat else ()
        self._kernel = lift + tuple(module.kernel_size)
        self._stride = lift + tuple(module.stride)
        self._dilation = lift + tuple(module.dilation)
        # torch's own padding amounts in F.pad order; they cover padding="same" too. What is not padded with zeros is
        # padded before the operation.
        zeros = module.padding_mode == "zeros"
        self._padding = tuple(module._reversed_padding_repeated_twice) if zeros else ()

    def leading(self, x: Tensor, g: Tensor) -> int:
        """See Layer."""
        return g.dim() - (2 if self._flat else 3)

    def _padded(self, x: Tensor) -> Tensor:
        """The padded input as ``[batch, channels, height, width]``."""
        x = F.pad(x, self._padding) if any(self._padding) else x
        return x.unsqueeze(2) if self._flat else x

    def respond(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """See Layer."""
        weight = tensors[0].unsqueeze(2) if self._flat else tensors[0]
        bias = tensors[1] if self.has_bias else None
        return F.conv2d(self._padded(x), weight, bias, self._stride, dilation=self._dilation, groups=self.groups)

    def grid(self, g: Tensor) -> tuple[int, int]:
        """See AffineLayer."""
        return (1 if self._flat else g.shape[-2]), g.shape[-1]

    def _unfold(self, x: Tensor) -> Tensor:
        """``[batch, channels * kernel, positions]``."""
        return F.unfold(x, self._kernel, dilation=self._dilation, stride=self._stride)

    def patches(self, x: Tensor) -> Tensor:
        """See AffineLayer."""
        unfolded = self._unfold(self._padded(x))
        return unfolded.unflatten(1, (self.groups, self.d_in)).permute(1, 0, 3, 2)

    def gradients(self, g: Tensor) -> Tensor:
        """See AffineLayer."""
        return g.flatten(2).unflatten(1, (self.groups, self.d_out)).permute(1, 0, 3, 2)

    def input_square_sums(self, x: Tensor) -> tuple[Tensor, int]:
        """See AffineLayer. Examples are summed before the patches are cut: one image is unfolded, not the batch."""
        padded = self._padded(x)
        unfolded = self._unfold(padded.square().sum(0, keepdim=True))
        return self._append_count(unfolded.sum(-1).view(self.groups, self.d_in), len(padded) * unfolded.shape[-1])

    def gradient_square_sums(self, g: Tensor) -> Tensor:
        """See AffineLayer."""
        channels = -2 if self._flat else -3
        others = [d for d in range(g.dim()) if d != g.dim() + channels]
        return g.square().sum(others).view(self.groups, self.d_out)
