"""One adapter a layer type: what flows through the layer, brought to one shape, and its parameters, to one matrix.

An *affine* layer computes ``y_t = W a_t + b`` at every shared position t (token, pixel, or the only one), so its
curvature factorizes over inputs ``a`` and output gradients ``g``:

- ``inputs(x)``: ``a`` as ``[groups, batch, shared, d_in (+ 1)]``; the last entry is 1 where the layer has a bias;
- ``gradients(g)``: ``[groups, batch, shared, d_out]``;
- ``to_matrix`` / ``from_matrix``: parameters as ``[groups, d_out, d_in (+ 1)]``, row-major, bias last.

``groups`` is 1 but for grouped convolutions, whose Fisher is block-diagonal over groups.

An *elementwise* layer (norms, Embedding) multiplies or looks up: the exact diagonal of its Fisher is as cheap as a
factor, so that is what it offers: ``square_sums(x, g)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer:
    """A module with curvature of its own.

    Args:
        name: the module's name in the model, without any wrapper's prefix.
        module: the module itself.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module

    #: Whether a row of (x, g) is one example's alone. Where examples mix, rows may not be left out.
    separable: bool = True

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weight, then bias where the layer has one."""
        found = (getattr(self.module, key, None) for key in ("weight", "bias"))
        return [p for p in found if p is not None]

    @property
    def has_bias(self) -> bool:
        """Whether the layer adds a bias."""
        return getattr(self.module, "bias", None) is not None


class AffineLayer(Layer, ABC):
    """A layer ``y_t = W a_t + b``. Subclasses say how ``a`` is cut out of the input."""

    groups: int = 1
    d_in: int
    d_out: int

    @property
    def columns(self) -> int:
        """Width of the parameter matrix: d_in, and one more for the bias."""
        return self.d_in + self.has_bias

    @abstractmethod
    def patches(self, x: Tensor) -> Tensor:
        """``a`` without the bias entry: ``[groups, batch, shared, d_in]``."""

    @abstractmethod
    def gradients(self, g: Tensor) -> Tensor:
        """Output gradients as ``[groups, batch, shared, d_out]``."""

    @abstractmethod
    def input_square_sums(self, x: Tensor) -> tuple[Tensor, int]:
        """Squares of ``a`` summed over examples and positions, ``[groups, columns]``, and how many were summed."""

    @abstractmethod
    def gradient_square_sums(self, g: Tensor) -> Tensor:
        """Squares of ``g`` summed over examples and positions, ``[groups, d_out]``."""

    def grid(self, g: Tensor) -> tuple[int, int]:
        """Height and width of the grid that the shared positions of an output gradient lie on, row by row."""
        return 1, self.gradients(g).shape[2]

    def inputs(self, x: Tensor) -> Tensor:
        """``a`` as ``[groups, batch, shared, columns]``."""
        a = self.patches(x)
        return F.pad(a, (0, 1), value=1.0) if self.has_bias else a

    def to_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Tensors shaped like the parameters as one ``[groups, d_out, columns]`` matrix."""
        matrix = weight.reshape(self.groups, self.d_out, self.d_in)
        if not self.has_bias:
            return matrix
        assert bias is not None
        return torch.cat([matrix, bias.reshape(self.groups, self.d_out, 1)], dim=-1)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """Inverse of ``to_matrix``: one tensor a parameter, views where possible."""
        weight = matrix[..., : self.d_in].reshape(self.parameters[0].shape)
        return [weight, matrix[..., -1].flatten()] if self.has_bias else [weight]

    def _append_count(self, sums: Tensor, count: int) -> tuple[Tensor, int]:
        # The bias entry is 1 everywhere, so its squares add up to the count.
        return (F.pad(sums, (0, 1), value=float(count)) if self.has_bias else sums), count


class LinearLayer(AffineLayer):
    """``nn.Linear`` on ``[batch, ..., d_in]``; every middle dimension is shared."""

    def __init__(self, name: str, module: nn.Linear) -> None:
        super().__init__(name, module)
        self.d_in, self.d_out = module.in_features, module.out_features

    @staticmethod
    def _batched(x: Tensor) -> Tensor:
        return x.reshape(1, x.shape[0], -1, x.shape[-1]) if x.dim() > 1 else x.reshape(1, 1, 1, -1)

    def patches(self, x: Tensor) -> Tensor:
        """See AffineLayer."""
        return self._batched(x)

    def gradients(self, g: Tensor) -> Tensor:
        """See AffineLayer."""
        return self._batched(g)

    def input_square_sums(self, x: Tensor) -> tuple[Tensor, int]:
        """See AffineLayer."""
        rows = x.reshape(-1, self.d_in)
        return self._append_count(rows.square().sum(0, keepdim=True), len(rows))

    def gradient_square_sums(self, g: Tensor) -> Tensor:
        """See AffineLayer."""
        return g.reshape(-1, self.d_out).square().sum(0, keepdim=True)


class ConvLayer(AffineLayer):
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
        # torch's own padding amounts in F.pad order; they cover padding="same" too.
        self._padding = tuple(module._reversed_padding_repeated_twice)
        self._mode = "constant" if module.padding_mode == "zeros" else module.padding_mode

    def _padded(self, x: Tensor) -> Tensor:
        """The padded input as ``[batch, channels, height, width]``."""
        wanted = 3 if self._flat else 4
        x = x if x.dim() == wanted else x.unsqueeze(0)
        x = F.pad(x, self._padding, mode=self._mode) if any(self._padding) else x
        return x.unsqueeze(2) if self._flat else x

    def grid(self, g: Tensor) -> tuple[int, int]:
        """See AffineLayer."""
        return (1 if self._flat else g.shape[-2]), g.shape[-1]

    def _unfold(self, x: Tensor) -> Tensor:
        """``[batch, channels * kernel, positions]``."""
        return F.unfold(x, self._kernel, dilation=self._dilation, stride=self._stride)

    def patches(self, x: Tensor) -> Tensor:
        """See AffineLayer."""
        unfolded = self._unfold(self._padded(x))
        return unfolded.view(len(unfolded), self.groups, self.d_in, -1).permute(1, 0, 3, 2)

    def gradients(self, g: Tensor) -> Tensor:
        """See AffineLayer."""
        g = g if g.dim() == (3 if self._flat else 4) else g.unsqueeze(0)
        return g.reshape(len(g), self.groups, self.d_out, -1).permute(1, 0, 3, 2)

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


class ConvTransposeLayer(AffineLayer):
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
        self._lead: list[int] = []  # padding before, by axis; negative: cropped
        self._trail: list[int] = []
        for axis in range(2):
            padding, extra = module.padding[axis], module.output_padding[axis]
            assert isinstance(padding, int)
            reach = self._dilation[axis] * (self._kernel[axis] - 1)
            self._lead.append(reach - padding)
            self._trail.append(reach - padding + extra)

    def _patches(self, x: Tensor) -> Tensor:
        """``[batch, channels, taps, positions]``, taps in the order of the weight's."""
        x = x if x.dim() == 4 else x.unsqueeze(0)
        batch, channels, height, width = x.shape
        stretched = x.new_zeros(batch, channels, (height - 1) * self._stride[0] + 1, (width - 1) * self._stride[1] + 1)
        stretched[:, :, :: self._stride[0], :: self._stride[1]] = x
        padded = F.pad(stretched, (self._lead[1], self._trail[1], self._lead[0], self._trail[0]))
        unfolded = F.unfold(padded, self._kernel, dilation=self._dilation)
        return unfolded.view(batch, channels, self._taps, -1).flip(2)

    def grid(self, g: Tensor) -> tuple[int, int]:
        """See AffineLayer."""
        return g.shape[-2], g.shape[-1]

    def patches(self, x: Tensor) -> Tensor:
        """See AffineLayer."""
        unfolded = self._patches(x)
        return unfolded.reshape(len(unfolded), self.groups, self.d_in, -1).permute(1, 0, 3, 2)

    def gradients(self, g: Tensor) -> Tensor:
        """See AffineLayer."""
        g = g if g.dim() == 4 else g.unsqueeze(0)
        return g.reshape(len(g), self.groups, self.d_out, -1).permute(1, 0, 3, 2)

    def input_square_sums(self, x: Tensor) -> tuple[Tensor, int]:
        """See AffineLayer."""
        x = x if x.dim() == 4 else x.unsqueeze(0)
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


class ElementwiseLayer(Layer, ABC):
    """A layer whose curvature is kept as the exact diagonal of its Fisher block."""

    @abstractmethod
    def square_sums(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """For each parameter, its squared per-example gradient summed over examples (the parameter's shape)."""


class NormLayer(ElementwiseLayer):
    """BatchNorm, GroupNorm, LayerNorm, RMSNorm: ``y = weight * x_hat + bias``.

    ``x_hat`` is recomputed from the input on the steps that need it; it cannot be had from the output, which later
    in-place operations may overwrite and a zero weight erases.
    """

    def __init__(self, name: str, module: nn.Module, normalize: Callable[[Any, Tensor], Tensor], by_channel: bool):
        super().__init__(name, module)
        self._normalize = normalize
        self._by_channel = by_channel
        self.separable = not isinstance(module, nn.modules.batchnorm._BatchNorm)

    def square_sums(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """See ElementwiseLayer. Dimensions that are neither the first nor the parameter's are shared."""
        own = self.parameters[0].dim()
        shared = range(2, g.dim()) if self._by_channel else range(1, g.dim() - own)

        def per_example(values: Tensor) -> Tensor:
            return values.sum(list(shared)) if len(shared) else values

        terms = [per_example(self._normalize(self.module, x) * g)]
        if self.has_bias:
            terms.append(per_example(g))
        return [term.square().sum(0) for term in terms]


class EmbeddingLayer(ElementwiseLayer):
    """``nn.Embedding``: a row's gradient in one example is the sum over its occurrences there."""

    def square_sums(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """See ElementwiseLayer."""
        module = self.module
        assert isinstance(module, nn.Embedding)
        batch, rows = len(x) if x.dim() else 1, module.num_embeddings
        tokens = x.reshape(batch, -1).long()
        keys = tokens + rows * torch.arange(batch, device=x.device).unsqueeze(1)
        pairs, where = keys.flatten().unique(return_inverse=True)
        flat = g.reshape(-1, module.embedding_dim)
        summed = flat.new_zeros(len(pairs), module.embedding_dim).index_add_(0, where, flat)
        squares = flat.new_zeros(rows, module.embedding_dim).index_add_(0, pairs % rows, summed.square())
        if module.padding_idx is not None:  # the padding row receives no gradient
            squares[module.padding_idx] = 0
        return [squares]


def _batch_norm(module: Any, x: Tensor) -> Tensor:
    if module.training or module.running_mean is None:
        return F.batch_norm(x, None, None, training=True, eps=module.eps)
    return F.batch_norm(x, module.running_mean, module.running_var, training=False, eps=module.eps)


def adapt(name: str, module: nn.Module) -> Layer | None:
    """The adapter of a module, or None where it has no parameters of its own or its type is not supported."""
    if isinstance(module, nn.Linear):
        return LinearLayer(name, module)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return ConvLayer(name, module)
    if isinstance(module, nn.ConvTranspose2d):
        return ConvTransposeLayer(name, module)
    if isinstance(module, nn.Embedding):
        plain = not (module.sparse or module.scale_grad_by_freq)
        return EmbeddingLayer(name, module) if plain else None
    if getattr(module, "weight", None) is None:
        return None  # norms without affine parameters, and everything that is no layer
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        return NormLayer(name, module, _batch_norm, by_channel=True)
    if isinstance(module, nn.GroupNorm):
        return NormLayer(name, module, lambda m, x: F.group_norm(x, m.num_groups, eps=m.eps), by_channel=True)
    if isinstance(module, nn.LayerNorm):
        return NormLayer(name, module, lambda m, x: F.layer_norm(x, m.normalized_shape, eps=m.eps), by_channel=False)
    if isinstance(module, nn.RMSNorm):
        return NormLayer(name, module, lambda m, x: F.rms_norm(x, m.normalized_shape, eps=m.eps), by_channel=False)
    return None
