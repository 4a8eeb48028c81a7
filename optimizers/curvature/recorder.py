"""The only file that touches hooks: what flows through a layer, shown to an observer on the steps that need it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from optimizers.curvature.layers import Layer
from optimizers.curvature.second_order import SecondOrder

Observer = Callable[[Layer, Tensor, Tensor], None]


@dataclass
class _Call:
    """One forward pass of the root module."""

    examples: int | None = None
    counted: bool = False  # whether a backward pass through it has been seen


class _Hook:
    """A hook that neither keeps its recorder alive nor follows a deep copy of the model."""

    def __init__(self, method: Callable[..., Any] | None, *context: Any) -> None:
        self._method = weakref.WeakMethod(method) if method is not None else None
        self._context = context

    def __call__(self, *args: Any) -> None:
        method = self._method() if self._method is not None else None
        if method is not None:
            method(*self._context, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return _Hook, (None,)  # a pickled model does not take its optimizer along


class Recorder:
    """Shows an observer the input and the output gradient of every layer as backward passes through it.

    Forward hooks put a *tensor hook* on the output, so in-place activations behind a layer change nothing, and nothing
    is kept beyond the graph itself. A pass is recorded when the root module is in training mode, gradients are
    enabled and ``due()`` is true: evaluation, ``no_grad`` and the steps in between cost one Python call a layer.

    Use it as a context manager, or call ``close()``: either removes every hook.

    Args:
        root: the whole model. Its first tensor argument's leading dimension is the number of examples of a pass.
        layers: the layers to watch.
        due: asked at each forward pass.
        observe: called as ``observe(layer, x, g)`` in the backward pass, without gradients.
    """

    def __init__(self, root: nn.Module, layers: Sequence[Layer], due: Callable[[], bool], observe: Observer) -> None:
        self._root = root
        self._due = due
        self._observe = observe
        self._call = _Call()
        self.examples = 0
        self._handles = [root.register_forward_pre_hook(_Hook(self._enter))]
        self._handles += [layer.module.register_forward_hook(_Hook(self._leave, layer)) for layer in layers]

    def reset(self) -> None:
        """Forget how many examples were counted: a new step begins."""
        self.examples = 0
        self._call = _Call()

    def close(self) -> None:
        """Remove every hook. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _recording(self) -> bool:
        return torch.is_grad_enabled() and self._root.training and self._due()

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._recording():
            tensor = next((a for a in args if isinstance(a, Tensor) and a.dim()), None)
            self._call = _Call(None if tensor is None else len(tensor))

    def _leave(self, layer: Layer, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._recording() or not isinstance(output, Tensor) or not output.requires_grad or not args:
            return
        if not any(p.requires_grad for p in layer.parameters):
            return
        x, call = args[0].detach(), self._call
        output.register_hook(lambda g: self._backward(layer, call, x, g))

    @torch.no_grad()
    def _backward(self, layer: Layer, call: _Call, x: Tensor, g: Tensor) -> None:
        if not call.counted:
            call.counted = True
            # A part of the model called on its own has no root pass: its first layer to report tells the batch.
            self.examples += call.examples if call.examples is not None else len(g)
        self._observe(layer, x, g.detach())


class TwiceDifferentiable:
    """Lets the forward passes that are due run on kernels with (cheap) second derivatives; see ``SecondOrder``.

    Attention runs on the plain kernel meanwhile: the fused ones cannot be differentiated twice.

    Args:
        root: the whole model.
        due: asked at each forward pass with gradients.
    """

    def __init__(self, root: nn.Module, due: Callable[[], bool]) -> None:
        self._due = due
        self._entered: list[ExitStack] = []
        self._handles = [
            root.register_forward_pre_hook(_Hook(self._enter)),
            root.register_forward_hook(_Hook(self._exit), always_call=True),
        ]

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        stack = ExitStack()
        if torch.is_grad_enabled() and self._due():
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(SecondOrder())
        self._entered.append(stack)

    def _exit(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._entered.pop().close()

    def close(self) -> None:
        """Remove the hooks. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
