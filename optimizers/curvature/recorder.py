"""The only file that touches hooks: what flows through a layer, shown to an observer on the steps that need it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from optimizers.curvature.layers import Layer
from optimizers.curvature.second_order import SecondOrder

log = logging.getLogger(__name__)

Observer = Callable[[Layer, Tensor, Tensor], None]
#: Positional and keyword arguments of one forward pass of the model.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class _Call:
    """One forward pass of the root module."""

    examples: int | None = None
    counted: bool = False  # whether a backward pass through it has been seen


@dataclass
class _Flow:
    """A layer's input and the place of its output in the graph, which later in-place operations do not move."""

    layer: Layer
    x: Tensor
    shape: torch.Size  # of the output
    edge: GradientEdge


class _Hook:
    """A hook that neither keeps its recorder alive nor follows a deep copy of the model."""

    def __init__(self, method: Callable[..., Any] | None, *context: Any) -> None:
        self._method = weakref.WeakMethod(method) if method is not None else None
        self._context = context

    def __call__(self, *args: Any) -> None:
        method = self._method() if self._method is not None else None
        if method is not None and not torch.jit.is_tracing():  # a trace is no training, and hooks are none of it
            method(*self._context, *args)

    @property
    def __name__(self) -> str:
        """What torch.jit.script asks a hook for before it compiles it.

        Raises:
            AttributeError: for a hook that optimizers need, which TorchScript cannot compile.
        """
        raise AttributeError(
            "torch.jit.script cannot compile the hooks that an optimizer has on this model: call optimizer.close() "
            "first, or trace the model with torch.jit.trace."
        )

    @property
    def dead(self) -> bool:
        """Whether calling it does nothing, now and for ever."""
        return self._method is None or self._method() is None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return _Hook, (None,)  # a pickled model does not take its optimizer along


def remove_dead_hooks(model: nn.Module) -> None:
    """Remove what a deep copy took along of another model's hooks, and what optimizers that are gone have left.

    Args:
        model: its modules are all looked at.
    """
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(hook, _Hook) and hook.dead]:
                del hooks[key]
                for flags in (
                    module._forward_hooks_with_kwargs,
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    flags.pop(key, None)


def _made(output: Tensor) -> Tensor:
    """What a layer computed, of which its output may be a view: an operation in place cuts a view out of the graph.

    ``nn.Linear`` on ``[batch, tokens, dim]`` returns a view in some versions of torch, a convolution of an image
    without a batch in all of them.
    """
    base = output._base
    if base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous():
        return base
    return output


class Recorder:
    """Shows an observer the input and the output gradient of every layer as backward passes through it.

    Forward hooks put a *tensor hook* on what a layer made, so in-place activations behind it change nothing, and
    nothing is kept beyond the graph itself. A pass is recorded when the root module is in training mode, gradients are
    enabled and ``due()`` is true: evaluation, ``no_grad`` and the steps in between cost one Python call a layer.

    With ``deferred`` nothing is shown during ``loss.backward()``. Instead ``differentiate`` sends gradients of one's
    own choice through the recorded pass, as often as one likes and before its graph is freed; parameters are not
    reached, so no weight gradient is formed and neither ``.grad`` nor DDP's reducer sees it.

    Use it as a context manager, or call ``close()``: either removes every hook.

    Args:
        root: the whole model. Its first tensor argument's leading dimension is the number of examples of a pass.
        layers: the layers to watch.
        due: asked at each forward pass.
        observe: called as ``observe(layer, x, g)`` in the backward pass, without gradients.
        deferred: wait for ``differentiate``.
        fraction: share of the examples to show, spread evenly over a batch, the first one always among them.

    Attributes:
        examples: how many examples were in the passes since the last ``reset``.
        observed: how many of them were shown.
    """

    def __init__(
        self,
        root: nn.Module,
        layers: Sequence[Layer],
        due: Callable[[], bool],
        observe: Observer,
        deferred: bool = False,
        fraction: float = 1.0,
    ) -> None:
        self._root = root
        self._fraction = fraction
        self._deferred = deferred
        self._flows: list[_Flow] = []
        self._due = due
        self._observe = observe
        self._call = _Call()
        self.examples = self.observed = 0
        self._handles = [root.register_forward_pre_hook(_Hook(self._enter))]
        self._handles += [layer.module.register_forward_hook(_Hook(self._leave, layer)) for layer in layers]

    def reset(self) -> None:
        """Forget what was counted and recorded: a new step begins."""
        self.examples = self.observed = 0
        self._call = _Call()
        self._flows.clear()

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
        made, shape = _made(output), output.shape
        if self._deferred:
            self._flows.append(_Flow(layer, x, shape, get_gradient_edge(made)))
            return
        made.register_hook(lambda g: self._backward(layer, call, x, g.reshape(shape)))

    @torch.no_grad()
    def _backward(self, layer: Layer, call: _Call, x: Tensor, g: Tensor) -> None:
        # A part of the model called on its own has no root pass: its first layer to report tells the batch.
        examples = call.examples if call.examples is not None else len(g)
        chosen = self.choose(examples, g.device)
        if not call.counted:
            call.counted = True
            self._count(examples, chosen)
        self._show(layer, x, g.detach(), chosen, examples)

    def choose(self, examples: int, device: torch.device) -> Tensor | None:
        """Indices of the examples of a batch that are shown, int64; None: all."""
        if self._fraction >= 1:
            return None
        marks = (torch.arange(examples + 1, dtype=torch.float64) * self._fraction).ceil()
        return marks.diff().nonzero().flatten().to(device)

    def _count(self, examples: int, chosen: Tensor | None) -> None:
        self.examples += examples
        self.observed += examples if chosen is None else len(chosen)

    def _show(self, layer: Layer, x: Tensor, g: Tensor, chosen: Tensor | None, examples: int) -> None:
        if chosen is None:
            self._observe(layer, x, g)
        elif layer.separable and len(x) == len(g) == examples:
            self._observe(layer, x[chosen], g[chosen])
        elif len(g) == examples:  # rows cannot be left out of x, so the others' gradients are
            self._observe(layer, x, torch.zeros_like(g).index_copy_(0, chosen, g[chosen]))
        else:  # rows are not examples: all of them, at the weight of the share (when deferred, the others are zero)
            self._observe(layer, x, g if self._deferred else g * (len(chosen) / examples) ** 0.5)

    @property
    def waiting(self) -> bool:
        """Whether a pass was recorded that ``differentiate`` has not been through."""
        return bool(self._flows)

    def differentiate(self, outputs: Tensor, gradients: Iterable[Tensor], chosen: Tensor | None) -> None:
        """Show the observer what flows back from ``outputs`` in the passes recorded so far, and forget them.

        Args:
            outputs: of the model, ``[batch, ...]``, with their graph, which is kept.
            gradients: by the chosen rows of ``outputs``, in their shape; a backward pass each.
            chosen: what ``choose`` returned.
        """
        flows, self._flows = self._flows, []
        edges = [flow.edge for flow in flows]
        self._count(len(outputs), chosen)
        for gradient in gradients:
            if chosen is not None:
                gradient = torch.zeros_like(outputs).index_copy_(0, chosen, gradient.to(outputs.dtype))
            found = torch.autograd.grad(
                outputs, edges, gradient.to(outputs.dtype), retain_graph=True, allow_unused=True
            )
            with torch.no_grad():
                for flow, g in zip(flows, found, strict=True):
                    if g is not None:
                        self._show(flow.layer, flow.x, g.reshape(flow.shape), chosen, len(outputs))


class TwiceDifferentiable:
    """Lets the forward passes that are due run on kernels with (cheap) second derivatives; see ``SecondOrder``.

    Attention runs on the plain kernel meanwhile: the fused ones cannot be differentiated twice.

    Args:
        root: the whole model.
        due: asked at each forward pass with gradients.
    """

    def __init__(self, root: nn.Module, due: Callable[[], bool]) -> None:
        self._due = due
        self._told = False
        self._entered: list[tuple[ExitStack, SecondOrder | None]] = []
        self._handles = [
            root.register_forward_pre_hook(_Hook(self._enter)),
            root.register_forward_hook(_Hook(self._exit), always_call=True),
        ]

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        stack, mode = ExitStack(), None
        if torch.is_grad_enabled() and self._due():
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            mode = stack.enter_context(SecondOrder())
        self._entered.append((stack, mode))

    def _exit(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stack, mode = self._entered.pop()
        stack.close()
        if mode is not None and mode.attention and not self._told:
            self._told = True
            log.info("attention runs on the plain (math) kernel where second derivatives are due: fused ones have none")

    def close(self) -> None:
        """Remove the hooks. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class RootInputs:
    """Keeps what the whole model was called with, in training mode, with gradients, in the steps that are due.

    Args:
        root: the whole model.
        due: asked at each forward pass.

    Attributes:
        calls: the arguments of the passes since the last ``reset``, detached.
        paused: while true nothing is kept.
    """

    def __init__(self, root: nn.Module, due: Callable[[], bool]) -> None:
        self._due = due
        self.calls: list[Call] = []
        self.paused = False
        self._handle = root.register_forward_pre_hook(_Hook(self._enter), with_kwargs=True)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and module.training and not self.paused and self._due():
            self.calls.append(tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs)))

    def reset(self) -> None:
        """Forget what was kept: a new step begins."""
        self.calls.clear()

    def close(self) -> None:
        """Remove the hook. Idempotent."""
        self._handle.remove()
