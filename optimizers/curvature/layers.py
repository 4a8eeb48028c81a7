"""One adapter a layer type: what flows through the layer, brought to one shape, and its parameters, to one matrix.

What reaches an adapter has the examples in its leading dimension: ``x [examples, ...]`` and ``g [examples, ...]``, a
pair for each time that a pass came through the layer (see ``Flow``; the recorder finds the examples).

An *affine* layer computes ``y_t = W a_t + b`` at every shared position t (token, pixel, or the only one), so its
curvature factorizes over inputs ``a`` and output gradients ``g``:

- ``inputs(x)``: ``a`` as ``[groups, batch, shared, d_in (+ 1)]``; the last entry is 1 where the layer has a bias;
- ``gradients(g)``: ``[groups, batch, shared, d_out]``;
- ``to_matrix`` / ``from_matrix``: parameters as ``[groups, d_out, d_in (+ 1)]``, row-major, bias last.

``groups`` is 1 but for grouped convolutions, whose Fisher is approximated as block-diagonal over groups.

An *elementwise* layer (norms, Embedding) multiplies or looks up: the exact diagonal of its Fisher is as cheap as a
factor, so that is what it offers: ``square_sums(calls)``.

Every layer's output is linear in its parameters. So what an example's gradient ``V_i`` does to a direction is what the
layer itself does with the direction in place of its parameters: ``<V_i, D> = sum_t g_it . (D a_it)``. On that rest the
products with the gradients of all examples, none of which is formed:

- ``kept(x, g)``: what to keep of a pass, ``[examples, ...]`` each;
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
        keys: names of its weight and of its bias, which may be None.

    Attributes:
        parameters: weight, then bias where the layer has one, as they are now: what they are replaced by later
            (pruning, a parametrization) is not the layer's.
        keys: their names.
    """

    def __init__(self, name: str, module: nn.Module, keys: tuple[str, str] = ("weight", "bias")) -> None:
        self.name = name
        self.module = module
        self.keys = tuple(key for key in keys if getattr(module, key, None) is not None)
        self.parameters: list[nn.Parameter] = [getattr(module, key) for key in self.keys]
        self.has_bias = len(self.keys) == 2

    # -- rows ----------------------------------------------------------------------------------------------------------

    def leading(self, x: Tensor, g: Tensor) -> int:
        """How many leading dimensions of the output are rows: any of them may be the examples'."""
        raise NotImplementedError

    def prepared(self, x: Tensor) -> Tensor:
        """The input as the adapter takes it: what depends on more than a row is worked out before any is moved."""
        return x

    def arranged(self, x: Tensor, g: Tensor, axis: int, parts: tuple[int, int, int]) -> list[tuple[Tensor, Tensor]]:
        """Calls ``(x, g)`` with the examples in front.

        Args:
            x: input, as ``prepared``.
            g: output gradient.
            axis: which leading dimension the examples are in.
            parts: what it is made of: (rows before, examples, rows after), of which one of the outer two is 1.
        """
        return [(_fronted(x, axis, parts), _fronted(g, axis, parts))]

    # -- gradients of single examples ----------------------------------------------------------------------------------

    def kept(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """What a pass leaves: input and output gradient, ``[examples, ...]``; of norms the rows themselves."""
        return x, g

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

    def total(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """``sum_i V_i``, in tensors shaped like the parameters."""
        kept_x, kept_g = self.kept(x, g)
        return self.combine(kept_x, kept_g, torch.ones(len(g), dtype=g.dtype, device=g.device))

    def gram(self, x: Tensor, g: Tensor) -> Tensor:
        """``<V_i, V_j>`` for all pairs, in float64."""
        raise NotImplementedError


def _fronted(tensor: Tensor, axis: int, parts: tuple[int, int, int]) -> Tensor:
    """``[..., before * examples * after, ...]`` as ``[examples, ...]``."""
    if parts[0] == parts[2] == 1:
        return tensor.movedim(axis, 0)
    return tensor.unflatten(axis, parts).movedim(axis + 1, 0)


class ImageRows:
    """For layers whose rows are whole images, in one dimension: further ones go into calls of their own."""

    def arranged(self, x: Tensor, g: Tensor, axis: int, parts: tuple[int, int, int]) -> list[tuple[Tensor, Tensor]]:
        """See Layer."""
        before, examples, after = parts
        if before == after == 1:
            return [(x, g)]
        split = [t.view(before, examples, after, *t.shape[1:]).movedim(1, 0).flatten(1, 2).unbind(1) for t in (x, g)]
        return list(zip(*split, strict=True))


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


class ElementwiseLayer(Layer, ABC):
    """A layer whose curvature is kept as the exact diagonal of its Fisher block."""

    @abstractmethod
    def square_sums(self, calls: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """For each parameter, its squared per-example gradient summed over examples (the parameter's shape)."""


class NormLayer(ElementwiseLayer):
    """BatchNorm, GroupNorm, LayerNorm, RMSNorm: ``y = weight * x_hat + bias``. The input, prepared, is ``x_hat``.

    It is recomputed from the input on the steps that need it; it cannot be had from the output, which later in-place
    operations may overwrite and a zero weight erases.
    """

    def __init__(self, name: str, module: nn.Module, normalize: Callable[[Any, Tensor], Tensor], by_channel: bool):
        super().__init__(name, module)
        self._normalize = normalize
        self._by_channel = by_channel

    def leading(self, x: Tensor, g: Tensor) -> int:
        """See Layer."""
        return 1 if self._by_channel else g.dim() - self.parameters[0].dim()

    def prepared(self, x: Tensor) -> Tensor:
        """See Layer."""
        return self._normalize(self.module, x)

    def arranged(self, x: Tensor, g: Tensor, axis: int, parts: tuple[int, int, int]) -> list[tuple[Tensor, Tensor]]:
        """See Layer."""
        return (ImageRows if self._by_channel else Layer).arranged(self, x, g, axis, parts)  # type: ignore[arg-type]

    def square_sums(self, calls: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """See ElementwiseLayer."""
        terms = [self._terms(x, g) for x, g in calls]
        return [sum(parts[1:], start=parts[0]).square().sum(0) for parts in zip(*terms, strict=True)]

    def kept(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """See Layer. The rows themselves, which are short."""
        return (self.rows(x, g),)

    def total(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """See Layer."""
        return [term.sum(0) for term in self._terms(x, g)]

    def rows(self, x: Tensor, g: Tensor) -> Tensor:
        """See Layer."""
        return torch.cat([term.flatten(1) for term in self._terms(x, g)], dim=1)

    def _terms(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """Each parameter's gradient by example. Dimensions not the first nor the parameter's are shared."""
        own = self.parameters[0].dim()
        shared = range(2, g.dim()) if self._by_channel else range(1, g.dim() - own)

        def per_example(values: Tensor) -> Tensor:
            return values.sum(list(shared)) if len(shared) else values

        terms = [per_example(x * g)]
        return [*terms, per_example(g)] if self.has_bias else terms


class EmbeddingLayer(ElementwiseLayer):
    """``nn.Embedding``: a row's gradient in one example is the sum over its occurrences there."""

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


#: What is said of a layer whose weights another tensor, or another module, has taken the place of.
COMPUTED = "its weight is computed from other tensors (parametrized, pruned or swapped)"


def adapt(name: str, module: nn.Module) -> Layer | str | None:
    """The adapter of a module; a reason why it has none; or None for what is no layer or has no parameters.

    Raises:
        ValueError: if the layer is lazy and has no weights yet.
    """
    own = dict(module.named_parameters(recurse=False))
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in own.values()):
        raise ValueError(
            f"layer {name!r} is lazy and has no weights yet: run a batch through the model, then build the optimizer"
        )
    layer = _adapter(name, module)
    if layer is None or not layer.keys:
        return None
    if "weight" in layer.keys and "weight" not in own:
        return COMPUTED if own or hasattr(module, "parametrizations") else None
    if any(key not in own for key in layer.keys):
        return COMPUTED
    if extra := [key for key in own if key not in layer.keys]:
        return f"layer with extra parameters ({', '.join(extra)})"  # weight_norm, adapters, ...
    if any(p.is_complex() for p in layer.parameters):
        return "complex weights"
    return layer


def _adapter(name: str, module: nn.Module) -> Layer | None:
    """The adapter for a module's type, whatever its parameters are.

    A subclass may compute something else. What is recorded is what goes through the operations that its weights are
    used in, and where that is not all, the recorder's check finds out.
    """
    if isinstance(module, nn.Linear):
        return LinearLayer(name, module)
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        plain = module.bias_k is None and module.bias_v is None
        return LinearLayer(name, module, ("in_proj_weight", "in_proj_bias")) if plain else None
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return ConvLayer(name, module)
    if isinstance(module, nn.ConvTranspose2d):
        return ConvTransposeLayer(name, module)
    if isinstance(module, nn.Embedding):
        plain = not (module.sparse or module.scale_grad_by_freq)
        return EmbeddingLayer(name, module) if plain else None
    if getattr(module, "weight", None) is None:
        return None  # norms without affine parameters, and everything that is no layer
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)):
        return NormLayer(name, module, _batch_norm, by_channel=True)
    if isinstance(module, nn.GroupNorm):
        return NormLayer(name, module, lambda m, x: F.group_norm(x, m.num_groups, eps=m.eps), by_channel=True)
    if isinstance(module, nn.LayerNorm):
        return NormLayer(name, module, lambda m, x: F.layer_norm(x, m.normalized_shape, eps=m.eps), by_channel=False)
    if isinstance(module, nn.RMSNorm):
        return NormLayer(name, module, lambda m, x: F.rms_norm(x, m.normalized_shape, eps=m.eps), by_channel=False)
    return None


class Flow:
    """What one backward pass leaves of a layer: its calls, the examples in front.

    An example's gradient is the sum over the calls and over the positions within each: so calls are further positions.

    Attributes:
        layer: the adapter.
        calls: ``(x, g)`` a time that the pass came through: prepared input, gradient by the output.
        when: which pass it is: examples shown up to the end of its batch, and its index among those over the batch.
    """

    def __init__(self, layer: Layer, calls: Sequence[tuple[Tensor, Tensor]], when: tuple[int, int] = (0, 0)) -> None:
        self.layer, self.calls, self.when = layer, list(calls), when

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return len(self.calls[0][1])

    def scaled(self, factor: float) -> Flow:
        """With all gradients times a factor."""
        return self if factor == 1.0 else Flow(self.layer, [(x, g * factor) for x, g in self.calls], self.when)

    def inputs(self) -> Tensor:
        """Of an affine layer, ``a`` as ``[groups, examples, shared, columns]``."""
        return _joined([self._affine.inputs(x) for x, _ in self.calls])

    def gradients(self) -> Tensor:
        """Of an affine layer, ``g`` as ``[groups, examples, shared, d_out]``."""
        return _joined([self._affine.gradients(g) for _, g in self.calls])

    def input_square_sums(self) -> tuple[Tensor, int]:
        """See AffineLayer."""
        sums, counts = zip(*(self._affine.input_square_sums(x) for x, _ in self.calls), strict=True)
        return sum(sums[1:], start=sums[0]), sum(counts)

    def gradient_square_sums(self) -> Tensor:
        """See AffineLayer."""
        sums = [self._affine.gradient_square_sums(g) for _, g in self.calls]
        return sum(sums[1:], start=sums[0])

    def square_sums(self) -> list[Tensor]:
        """Of an elementwise layer; see there."""
        assert isinstance(self.layer, ElementwiseLayer)
        return self.layer.square_sums(self.calls)

    def grid(self) -> tuple[int, int] | None:
        """The grid that the positions lie on; None: there are several."""
        return self._affine.grid(self.calls[0][1]) if len(self.calls) == 1 else None

    def rows(self) -> Tensor:
        """Each example's gradient, one a row, in the order of the matrix or of the parameters."""
        rows = [
            self.layer.rows(x, g) if isinstance(self.layer, NormLayer) else self.layer.rows(*self.layer.kept(x, g))
            for x, g in self.calls
        ]
        return sum(rows[1:], start=rows[0])

    @property
    def _affine(self) -> AffineLayer:
        assert isinstance(self.layer, AffineLayer)
        return self.layer


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
