"""One adapter a layer type: what flows through the layer, brought to one shape, and its parameters, to one matrix.

An *affine* layer computes ``y_t = W a_t + b`` at every shared position t (token, pixel, or the only one), so its
curvature factorizes over inputs ``a`` and output gradients ``g``:

- ``inputs(x)``: ``a`` as ``[groups, batch, shared, d_in (+ 1)]``; the last entry is 1 where the layer has a bias;
- ``gradients(g)``: ``[groups, batch, shared, d_out]``;
- ``to_matrix`` / ``from_matrix``: parameters as ``[groups, d_out, d_in (+ 1)]``, row-major, bias last.

``groups`` is 1 but for grouped convolutions, whose Fisher is block-diagonal over groups.

An *elementwise* layer (norms, Embedding) multiplies or looks up: the exact diagonal of its Fisher is as cheap as a
factor, so that is what it offers: ``square_sums(x, g)``.

Every layer's output is linear in its parameters. So what an example's gradient ``V_i`` does to a direction is what the
layer itself does with the direction in place of its parameters: ``<V_i, D> = sum_t g_it . (D a_it)``. On that rest the
products with the gradients of all examples, none of which is formed:

- ``flow(x, g, examples)``: what to keep of a pass, ``[examples, ...]`` each;
- ``dots``, ``combine``, ``gram``: ``<V_i, D>``, ``sum_i w_i V_i`` and ``<V_i, V_j>`` of what was kept;
- ``rows``: the ``V_i`` themselves, flat, in the order of the matrix (affine layers) or of the parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Numbers that a temporary matrix of per-example gradients or of pairs of positions may hold.
ROOM = 2**24


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

    # -- gradients of single examples ----------------------------------------------------------------------------------

    def flow(self, x: Tensor, g: Tensor, examples: int) -> tuple[Tensor, ...]:
        """What a pass leaves: input and output gradient, ``[examples, ...]``; of norms the rows themselves.

        Raises:
            ValueError: if the pass cannot be told apart by examples.
        """
        self._check_examples(g, len(g) == examples, examples)
        return x, g

    def _check_examples(self, g: Tensor, known: bool, examples: int) -> None:
        if not known:
            raise ValueError(
                f"skip must match layer {self.name!r}: it sees {len(g)} rows of a batch of {examples} examples, so its "
                "gradient cannot be told apart by examples."
            )

    def respond(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The layer's output with other tensors in place of its parameters."""
        raise NotImplementedError

    def rows(self, x: Tensor, g: Tensor) -> Tensor:
        """``V_i``, one a row."""
        raise NotImplementedError

    def dots(self, x: Tensor, g: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """``<V_i, D>`` for every example i, with D in tensors shaped like the parameters."""
        return (self.respond(x, tensors).flatten(1) * g.flatten(1)).sum(1)

    def combine(self, x: Tensor, g: Tensor, weights: Tensor) -> list[Tensor]:
        """``sum_i w_i V_i``, in tensors shaped like the parameters: a weight gradient."""
        with torch.enable_grad():
            leaves = [torch.zeros(p.shape, dtype=g.dtype, device=g.device, requires_grad=True) for p in self.parameters]
            response = self.respond(x, leaves)
        weighted = g * weights.view(-1, *(1,) * (g.dim() - 1))
        return list(torch.autograd.grad(response, leaves, weighted.view_as(response)))

    def gram(self, x: Tensor, g: Tensor) -> Tensor:
        """``<V_i, V_j>`` for all pairs, in float64."""
        raise NotImplementedError


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

    def rows(self, x: Tensor, g: Tensor) -> Tensor:
        """See Layer."""
        return (self.gradients(g).mT @ self.inputs(x)).transpose(0, 1).flatten(1)

    def gram(self, x: Tensor, g: Tensor) -> Tensor:
        """See Layer. Without shared positions ``(A Aᵀ) * (G Gᵀ)``; else by whichever takes fewer operations."""
        examples, shared = len(g), self.gradients(g[:1]).shape[2]
        if shared == 1:
            a, b = self.inputs(x).squeeze(2).double(), self.gradients(g).squeeze(2).double()
            return ((a @ a.mT) * (b @ b.mT)).sum(0)
        entries = self.columns * self.d_out
        formed = (shared + examples) * entries < examples * shared**2 * (self.columns + self.d_out)
        return self._gram_of_rows(x, g) if formed else self._gram_of_pairs(x, g)

    def _gram_of_rows(self, x: Tensor, g: Tensor) -> Tensor:
        """By forming V, some rows of the parameter matrix at a time, from some examples' inputs at a time."""
        examples, shared = len(g), self.gradients(g[:1]).shape[2]
        width = max(1, ROOM // (examples * self.groups * self.columns))
        some = max(1, ROOM // (shared * self.groups * (self.columns + self.d_out)))
        total = torch.zeros(examples, examples, dtype=torch.float64, device=g.device)
        for start in range(0, self.d_out, width):
            parts = [
                (self.gradients(some_g)[..., start : start + width].mT @ self.inputs(some_x)).transpose(0, 1).flatten(1)
                for some_x, some_g in zip(x.split(some), g.split(some), strict=True)
            ]
            v = torch.cat(parts).double()
            total.addmm_(v, v.mT)
        return total

    def _gram_of_pairs(self, x: Tensor, g: Tensor) -> Tensor:
        """``sum over t, t' of (a_it . a_jt') (g_it . g_jt')``, some examples i at a time."""
        return _paired(self.inputs(x).double(), self.gradients(g).double(), lambda a, b: a @ b.mT)

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

    def flow(self, x: Tensor, g: Tensor, examples: int) -> tuple[Tensor, ...]:
        """See Layer. Rows may be finer than examples (windows in the batch dimension), an example's together."""
        self._check_examples(g, g.dim() > 1 and len(g) % examples == 0, examples)
        return x.reshape(examples, -1, self.d_in), g.reshape(examples, -1, self.d_out)

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
        self._extra = tuple(module.output_padding)
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
        """See ElementwiseLayer."""
        return [term.square().sum(0) for term in self._terms(x, g)]

    def flow(self, x: Tensor, g: Tensor, examples: int) -> tuple[Tensor, ...]:
        """See Layer. The rows themselves, which are short; leading rows may be finer than examples."""
        self._check_examples(g, len(g) % examples == 0, examples)
        return (self.rows(x, g).unflatten(0, (examples, -1)).sum(1),)

    def rows(self, x: Tensor, g: Tensor) -> Tensor:
        """See Layer."""
        return torch.cat([term.flatten(1) for term in self._terms(x, g)], dim=1)

    def _terms(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """Each parameter's gradient by example. Dimensions not the first nor the parameter's are shared."""
        own = self.parameters[0].dim()
        shared = range(2, g.dim()) if self._by_channel else range(1, g.dim() - own)

        def per_example(values: Tensor) -> Tensor:
            return values.sum(list(shared)) if len(shared) else values

        terms = [per_example(self._normalize(self.module, x) * g)]
        return [*terms, per_example(g)] if self.has_bias else terms


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

    def flow(self, x: Tensor, g: Tensor, examples: int) -> tuple[Tensor, ...]:
        """See Layer. As an affine layer whose inputs have a single 1, at the token's place."""
        module = self.module
        assert isinstance(module, nn.Embedding)
        self._check_examples(g, len(x) == examples, examples)
        x, g = x.reshape(examples, -1).int(), g.reshape(examples, -1, module.embedding_dim)
        return x, (g if module.padding_idx is None else g * (x != module.padding_idx).unsqueeze(-1))

    def respond(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """See Layer."""
        return F.embedding(x, tensors[0])

    def rows(self, x: Tensor, g: Tensor) -> Tensor:
        """See Layer."""
        result = g.new_zeros(len(x), *self.parameters[0].shape)
        return result.scatter_add_(1, x.long().unsqueeze(-1).expand_as(g), g).flatten(1)

    def gram(self, x: Tensor, g: Tensor) -> Tensor:
        """See Layer. Positions of different tokens have nothing in common."""
        return _paired(x.view(1, *x.shape, 1), g.unsqueeze(0).double(), lambda a, b: (a == b.mT).double())


def _paired(a: Tensor, g: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``sum over t, t' of product(a_it, a_jt') (g_it . g_jt')`` for all pairs of examples, of ``[groups, m, t, .]``."""
    groups, examples, shared, _ = g.shape
    some = max(1, ROOM // (groups * examples * shared**2))
    all_a, all_g = a.flatten(1, 2), g.flatten(1, 2)
    parts = []
    for some_a, some_g in zip(a.split(some, 1), g.split(some, 1), strict=True):
        pairs = product(some_a.flatten(1, 2), all_a) * (some_g.flatten(1, 2) @ all_g.mT)
        parts.append(pairs.view(groups, -1, shared, examples, shared).sum((0, 2, 4)))
    return torch.cat(parts)


def _batch_norm(module: Any, x: Tensor) -> Tensor:
    if module.training or module.running_mean is None:
        return F.batch_norm(x, None, None, training=True, eps=module.eps)
    return F.batch_norm(x, module.running_mean, module.running_var, training=False, eps=module.eps)


def layer_kinds(module: nn.Module) -> list[Any]:
    """The layers of torch.nn that a module is or derives from; of a container or a module of one's own, none."""
    bases = ("torch.nn.modules.module", "torch.nn.modules.container")
    return [k for k in type(module).__mro__ if k.__module__.startswith("torch.nn.") and k.__module__ not in bases]


def adapt(name: str, module: nn.Module) -> Layer | None:
    """The adapter of a module, or None where it has no parameters of its own or its type is not supported."""
    kinds = layer_kinds(module)
    if kinds and type(module).forward is not kinds[0].forward:
        return None  # a subclass that computes something else
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
