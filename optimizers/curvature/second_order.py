"""Layers with cheap second derivatives, for passes that will be differentiated twice.

PyTorch differentiates a convolution's backward pass through convolutions of unusual shape (images as kernels), and
batch normalisation's through some twenty elementwise passes. The same derivatives follow from a few calls of the
ordinary forward and backward kernels. A linear layer's take the same six products as PyTorch's, and fewer passes over
what they yield. ``SecondOrder`` puts these functions in the place of ``F.linear``, ``F.conv2d`` and ``F.batch_norm``
while a forward pass runs; nothing about the model changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Settings = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups


class _Linear(torch.autograd.Function):
    """``y = x wᵀ + b`` for rows x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.linear(x, w, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        given = (g, x, w, list(ctx.needs_input_grad))
        return _LinearBackward.apply(*given) if torch.is_grad_enabled() else _linear_backward(*given)


def _linear_backward(g: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
    return g @ w if mask[0] else None, g.mT @ x if mask[1] else None, g.sum(0) if mask[2] else None


class _LinearBackward(torch.autograd.Function):
    """``(g, x, w) -> (gx, gw, gb)``: bilinear in each pair."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)
        return _linear_backward(g, x, w, mask)

    @staticmethod
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> Any:
        g, x, w = ctx.saved_tensors
        need_g, need_x, need_w = ctx.needs_input_grad[:3]
        to_g = None
        if need_g:
            if vw is not None:
                to_g = F.linear(x, vw, vb)
            if vx is not None:
                to_g = F.linear(vx, w, vb) if to_g is None else to_g.addmm_(vx, w.mT)
            if to_g is None and vb is not None:
                to_g = vb.expand_as(g)
        to_x = g @ vw if need_x and vw is not None else None
        to_w = g.mT @ vx if need_w and vx is not None else None
        return to_g, to_x, to_w, None


def _conv_backward(g: Tensor, x: Tensor, w: Tensor, settings: Settings, mask: list[bool]) -> list[Tensor]:
    stride, padding, dilation, groups = settings
    sizes = [w.shape[0]] if mask[2] else None
    return torch.ops.aten.convolution_backward(g, x, w, sizes, stride, padding, dilation, False, [0, 0], groups, mask)


class _Conv2d(torch.autograd.Function):
    """``y = x * w + b``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, settings: Settings) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.settings = settings
        stride, padding, dilation, groups = settings
        return torch.ops.aten.convolution(x, w, b, stride, padding, dilation, False, [0, 0], groups)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        given = (g, x, w, ctx.settings, list(ctx.needs_input_grad[:3]))
        return (*(_Conv2dBackward.apply(*given) if torch.is_grad_enabled() else _conv_backward(*given)), None)


class _Conv2dBackward(torch.autograd.Function):
    """``(g, x, w) -> (gx, gw, gb)``: bilinear in each pair, so its own backward is made of the same kernels."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, settings: Settings, mask: list[bool]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(g, x, w)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return tuple(_conv_backward(g, x, w, settings, mask))

    @staticmethod
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> Any:
        g, x, w = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        need_g, need_x, need_w = ctx.needs_input_grad[:3]
        to_g = to_x = to_w = None

        def forward(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return torch.ops.aten.convolution(x, w, b, stride, padding, dilation, False, [0, 0], groups)

        if need_g:
            if vw is not None:
                to_g = forward(x, vw, vb)
            if vx is not None:
                through = forward(vx, w, vb if vw is None else None)
                to_g = through if to_g is None else to_g.add_(through)
            if vx is None and vw is None and vb is not None:
                to_g = vb.view(1, -1, 1, 1).expand_as(g)
        if need_x and vw is not None:
            to_x = _conv_backward(g, x, vw, ctx.settings, [True, False, False])[0]
        if need_w and vx is not None:
            to_w = _conv_backward(g, vx, w, ctx.settings, [False, True, False])[1]
        return to_g, to_x, to_w, None, None


class _BatchNorm(torch.autograd.Function):
    """``y = weight * x_hat + bias`` with the batch's own statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Any, var: Any, momentum: float, eps: float
    ) -> Tensor:
        y, center, scale = torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
        ctx.save_for_backward(x, weight, center, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        given = (g, *ctx.saved_tensors, ctx.eps)
        found = _BatchNormBackward.apply(*given) if torch.is_grad_enabled() else _norm_backward(*given)
        return (*found, None, None, None, None)


def _norm_backward(g: Tensor, x: Tensor, weight: Tensor, center: Tensor, scale: Tensor, eps: float) -> Any:
    mask = [True, True, True]
    return torch.ops.aten.native_batch_norm_backward(g, x, weight, None, None, center, scale, True, eps, mask)


class _BatchNormBackward(torch.autograd.Function):
    """``(g, x, weight) -> (gx, g_weight, g_bias)``.

    With ``s = 1/std``, ``P(y) = s (y - mean(y) - x_hat mean(y x_hat))``: ``gx = weight P(g)``,
    ``g_weight = sum(g x_hat)``, ``g_bias = sum(g)``. The derivative of ``v gx + u_w g_weight + u_b g_bias``, summed,
    by ``g`` is ``weight P(v) + u_w x_hat + u_b``; by ``weight``, ``sum(v P(g))``; and by ``x``, since that of
    ``sum(y x_hat)`` is ``P(y)`` and that of ``s`` is ``-s^2 x_hat / n``, a combination of g, v, x_hat and 1 with one
    coefficient a channel each.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, center: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        gx, gw, gb = _norm_backward(g, x, weight, center, scale, eps)
        ctx.save_for_backward(g, x, weight, center, scale, gw, gb)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return gx, gw, gb

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, u_w: Tensor | None, u_b: Tensor | None) -> Any:
        g, x, weight, s_mean, s, gw, gb = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        channel = (1, -1, *[1] * (x.dim() - 2))
        others = [d for d in range(x.dim()) if d != 1]
        zero = torch.zeros_like(weight)
        u_w = zero if u_w is None else u_w
        u_b = zero if u_b is None else u_b
        g_mean, g_corr = gb / n, gw / n  # mean(g), mean(g x_hat)
        if v is None:
            to_g, v_mean, v_corr, vg, to_weight = None, zero, zero, zero, None
        else:
            to_g, v_sum, vb_sum = _norm_backward(v, x, weight, s_mean, s, ctx.eps)
            v_corr, v_mean = v_sum / n, vb_sum / n
            vg = (v * g).sum(others) / n - v_mean * g_mean - v_corr * g_corr  # sum(v P(g)) = n s vg
            to_weight = n * s * vg
        by_x_hat = s * u_w  # coefficient of x, x_hat = s (x - s_mean)
        offset = (u_b - by_x_hat * s_mean).view(channel)
        to_g = (
            torch.addcmul(offset, x, by_x_hat.view(channel))
            if to_g is None
            else to_g.addcmul_(x, by_x_hat.view(channel)).add_(offset)
        )
        # by x: (u_w - a v_corr) P(g) - a g_corr P(v) - a s x_hat vg, with a = weight s and P's own s taken in
        a = weight * s
        on_g = s * (u_w - a * v_corr)
        on_v = -s * a * g_corr
        on_hat = -(on_g * g_corr + on_v * v_corr) - a * s * vg
        constant = -(on_g * g_mean + on_v * v_mean) - on_hat * s * s_mean
        to_x = torch.addcmul(constant.view(channel), g, on_g.view(channel))
        to_x.addcmul_(x, (on_hat * s).view(channel))
        if v is not None:
            to_x.addcmul_(v, on_v.view(channel))
        return to_g, to_x, to_weight, None, None, None


class NoSecondDerivatives(ValueError):
    """What was called has none where it was called."""


class SecondOrder(TorchFunctionMode):
    """While active, ``F.linear``, ``F.conv2d`` and ``F.batch_norm`` (in training mode) have cheap second derivatives.

    ``F.hardsigmoid``, which has none in torch, has one at all.

    Calls that the functions here do not cover (autocast, string paddings, batch norm without weights or on running
    statistics, linear layers and batch norm in a checkpoint, devices other than the CPU, where they were measured) go
    their usual way.

    Attributes:
        attention: whether a call of an attention that may be fused has passed.
    """

    attention = False
    owner: Any = None

    @torch._disable_dynamo
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept one call of a torch function."""
        kwargs = kwargs or {}
        name = _REPLACED.get(func)
        return func(*args, **kwargs) if name is None else getattr(self, name)(func, *args, **kwargs)

    def _attention(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.attention = True
        return func(*args, **kwargs)

    def _hard(self, func: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _saves_elsewhere():
            raise NoSecondDerivatives(
                f"{func.__name__} has no second derivatives in torch.utils.checkpoint: compute it outside of one"
            )
        gate = (input + 3).clamp(0, 6) / 6  # torch has no second derivative of the one, so neither is fused
        return gate if func is F.hardsigmoid else input * gate

    def _linear(self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        given = (input, weight) if bias is None else (input, weight, bias)
        # A checkpoint's second pass, in which this mode is not active, must save the tensors that its first one did.
        if input.dim() < 2 or weight.dim() != 2 or _usual(*given) or _saves_elsewhere():
            return F.linear(input, weight, bias)
        if input.dim() == 2:
            return _Linear.apply(input, weight, bias)
        return _Linear.apply(input.flatten(0, -2), weight, bias).view(*input.shape[:-1], -1)

    def _conv2d(
        self,
        func: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if _usual(input, weight) or input.dim() != 4 or isinstance(padding, str):
            return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        pair = [[v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation)]
        return _Conv2d.apply(input, weight, bias, (*pair, groups))

    def _batch_norm(
        self,
        func: Any,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        usual = _usual(input, weight) if weight is not None else True
        if not training or bias is None or usual or input.numel() == input.shape[1] or _saves_elsewhere():
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps)


#: The method of ``SecondOrder`` that takes a function's place.
_REPLACED = {
    F.linear: "_linear",
    F.conv2d: "_conv2d",
    torch.conv2d: "_conv2d",
    F.batch_norm: "_batch_norm",
    F.hardsigmoid: "_hard",
    F.hardswish: "_hard",
    F.scaled_dot_product_attention: "_attention",
    F.multi_head_attention_forward: "_attention",
}


def _usual(x: Tensor, *others: Tensor) -> bool:
    """Whether a call goes its usual way."""
    if torch._C._are_functorch_transforms_active():  # which take no function of this form
        return True
    if not x.is_cpu or x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return True
    return any(t.dtype != x.dtype for t in others)


def _saves_elsewhere() -> bool:
    """Whether hooks take what is saved for the backward pass, as a checkpoint's do."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
