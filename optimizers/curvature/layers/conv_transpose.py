"""``nn.ConvTranspose2d``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .affine import AffineLayer
from .layer import ImageRows
from .registry import adapts


@adapts(nn.ConvTranspose2d, operations={torch.conv_transpose2d: ("input", "weight")})
class ConvTransposeLayer(ImageRows, AffineLayer):
    """``nn.ConvTranspose2d`` with any stride, padding, output padding, dilation and groups.

    ``y[t] = sum over i, k of W[i, :, k] x[i, s]`` wherever ``t = stride s - padding + dilation k``. With zeros put
    between the pixels of x (stride - 1 of them) that is an ordinary convolution of stride 1 with the kernel turned
    around, padded by ``dilation (kernel - 1) - padding``: so ``a_t`` is a patch of the stretched image, read backwards.
    """

    def __init__(self, name: str, module: nn.ConvTranspose2d) -> None:
        super().__init__(name, module)
        self.groups = module.groups
        self._per_group = module.in_channels // module.groups
        self._kernel = tuple(module.kernel_size)
        self._taps = self._kernel[0] * self._kernel[1]
        self.d_in = self._per_group * self._taps
        self.d_out = module.out_channels // module.groups
        self._stride, self._dilation = tuple(module.stride), tuple(module.dilation)
        self._extra = tuple(module.output_padding)
        self._lead: list[int] = []  # padding before, by axis; negative: cropped
        self._trail: list[int] = []
        for axis in range(2):
            padding, extra = module.padding[axis], module.output_padding[axis]
            assert isinstance(padding, int)
            reach = self._dilation[axis] * (self._kernel[axis] - 1)
            self._lead.append(reach - padding)
            self._trail.append(reach - padding + extra)

    def leading(self, x: Tensor, g: Tensor) -> int:
        """See Layer."""
        return g.dim() - 3

    def _patches(self, x: Tensor) -> Tensor:
        """``[batch, channels, taps, positions]``, taps in the order of the weight's."""
        batch, channels, height, width = x.shape
        stretched = x.new_zeros(batch, channels, (height - 1) * self._stride[0] + 1, (width - 1) * self._stride[1] + 1)
        stretched[:, :, :: self._stride[0], :: self._stride[1]] = x
        padded = F.pad(stretched, (self._lead[1], self._trail[1], self._lead[0], self._trail[0]))
        unfolded = F.unfold(padded, self._kernel, dilation=self._dilation)
        return unfolded.view(batch, channels, self._taps, -1).flip(2)

    def respond(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """See Layer."""
        bias = tensors[1] if self.has_bias else None
        padding = tuple(d * (k - 1) - lead for d, k, lead in zip(self._dilation, self._kernel, self._lead, strict=True))
        return F.conv_transpose2d(x, tensors[0], bias, self._stride, padding, self._extra, self.groups, self._dilation)

    def grid(self, g: Tensor) -> tuple[int, int]:
        """See AffineLayer."""
        return g.shape[-2], g.shape[-1]

    def patches(self, x: Tensor) -> Tensor:
        """See AffineLayer."""
        unfolded = self._patches(x)
        return unfolded.flatten(1, 2).unflatten(1, (self.groups, self.d_in)).permute(1, 0, 3, 2)

    def gradients(self, g: Tensor) -> Tensor:
        """See AffineLayer."""
        return g.flatten(2).unflatten(1, (self.groups, self.d_out)).permute(1, 0, 3, 2)

    def input_square_sums(self, x: Tensor) -> tuple[Tensor, int]:
        """See AffineLayer."""
        patches = self._patches(x.square().sum(0, keepdim=True))
        return self._append_count(patches.sum(-1).view(self.groups, self.d_in), len(x) * patches.shape[-1])

    def gradient_square_sums(self, g: Tensor) -> Tensor:
        """See AffineLayer."""
        return self.gradients(g).square().sum((1, 2))

    def to_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See AffineLayer. The weight is ``[in, out / groups, kernel]``."""
        weight = weight.reshape(self.groups, self._per_group, self.d_out, self._taps).transpose(1, 2)
        return super().to_matrix(weight, bias)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """See AffineLayer."""
        weight = matrix[..., : self.d_in].reshape(self.groups, self.d_out, self._per_group, self._taps)
        weight = weight.transpose(1, 2).reshape(self.parameters[0].shape)
        return [weight, matrix[..., -1].flatten()] if self.has_bias else [weight]
