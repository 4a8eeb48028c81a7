"""When the mode is on and what it sees: forward passes of the model, or of a layer called by itself, recorded."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..layers import Layer
from .hooks import aside, hooked, note, quieten
from .operations import Watch
from .passes import Pass, Record, Root
from .reasons import TWICE


class Watcher(ABC):
    """Records what goes through the operations in which the layers' weights are used, pass by pass.

    While the root module runs, a mode watches the *operations* in which the layers' weights are used, whoever calls
    them, and puts a tensor hook on what they make: so in-place activations behind them change nothing, and nothing is
    kept beyond the graph itself. A layer that is called by itself, without the root, opens the mode on its own. A pass
    is recorded when the root is in training mode, gradients are enabled and ``due()`` is true: evaluation, ``no_grad``
    and the steps in between cost two Python calls a layer.

    Args:
        root: the whole model.
        layers: the layers to watch.
        due: asked at each forward pass.
        deferred: put no hooks on what the operations make.

    Attributes:
        refused: why layers are not shown in this step, by name.
        told: whether backward passes are told of before, so that all others are somebody else's.
        passed_over: whether there was one of those in this step.
    """

    told = passed_over = False

    def __init__(self, root: nn.Module, layers: Sequence[Layer], due: Callable[[], bool], deferred: bool) -> None:
        self._root = root
        self._layers = list(layers)
        self.deferred = deferred
        self._due = due
        self._open: list[Pass] = []
        self._unseen: set[Layer] = set()  # layers of this step's passes that ran without gradients
        self._door: tuple[nn.Module, ExitStack] | None = None  # the module that opened the mode
        self._depth = 0  # how often it is under way
        self._weights: dict[int, Layer] = {}
        self._by_module = {layer.module: layer for layer in layers}
        self._calls: list[int] = []  # how often layers under way had been seen when they were entered
        self._folded: torch.Size | None = None
        self.refused: dict[str, str] = {}
        self._watch = Watch(self)
        self._handles = hooked([root], self._enter, self._leave)
        quieten(root)
        # Layers open the mode themselves as long as nobody has called the root.
        self._doors = self._layer_doors()

    @abstractmethod
    def arrived(self, now: Pass, record: Record | None, gradient: Tensor) -> None:
        """A gradient has come to what a layer made, or to what the model returned (None)."""

    @abstractmethod
    def _finish(self, now: Pass) -> None:
        """A backward pass has been through this pass: it is done with."""

    @property
    @abstractmethod
    def _probing(self) -> bool:
        """Whether backward passes of a probe are under way."""

    def _layer_doors(self) -> list[RemovableHandle]:
        return hooked([module for module in self._by_module if module is not self._root], self._enter, self._leave)

    # -- passes --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Remove every hook. Idempotent."""
        for handle in [*self._handles, *self._doors]:
            handle.remove()
        self._handles.clear()
        self._doors.clear()
        self._open.clear()

    @property
    def _pass(self) -> Pass:
        """The pass that operations are recorded in."""
        if not self._open or (self._open[-1].started and not self._recomputing()):
            self._begin(Pass())
        return self._open[-1]

    def _begin(self, now: Pass) -> None:
        """Record in another pass from here on. Those that a backward pass has been through are done with."""
        if not self.deferred:
            for before in [p for p in self._open if p.started and not p.keep]:
                self._finish(before)
                self._open.remove(before)
        self._open.append(now)

    @staticmethod
    def _recomputing() -> bool:
        """Whether this is called from within a backward pass: a checkpoint's forward pass, once more."""
        return torch._C._current_graph_task_id() != -1

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._door is not None:
            self._depth += module is self._door[0]
            self._enter_layer(module, args)
            return
        whole = module is self._root
        if whole and self._doors and not self._recomputing():
            for handle in self._doors:
                handle.remove()
            self._doors.clear()
        if not (torch.is_grad_enabled() and self._root.training and self._due()) or aside():
            return
        recomputing = self._recomputing()
        if recomputing and (self.deferred or not self._open or not self._open[-1].unseen):
            return
        quieten(self._root)
        if whole and not recomputing:
            self._open = [before for before in self._open if before.started or not before.waiting]
            if self._open and not self._open[-1].records and not self._open[-1].unseen:
                self._open.pop()
            sizes = [len(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
            self._begin(Pass(sizes))
        self._weights = {}
        for layer in self._layers:
            tensor = layer.module._parameters.get(layer.keys[0])  # functional_call may have put another one there
            if tensor is not None:
                self._weights[id(tensor)] = layer
        stack = ExitStack()
        stack.enter_context(self._watch)
        if whole:
            inner = hooked([m for m in self._by_module if m is not module], self._enter_layer, self._leave_layer)
            for handle in inner:
                stack.callback(handle.remove)
        self._door, self._depth = (module, stack), 1
        self._enter_layer(module, args)

    def _enter_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if (layer := self._by_module.get(module)) is not None:
            self._calls.append(self._count_calls(layer))

    def _leave_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        layer = self._by_module.get(module)
        if layer is not None and self._calls and self._calls.pop() == self._count_calls(layer):
            # A subclass that computes in another way: its own input and output have to do.
            self._record(layer, args[0] if args else kwargs.get("input"), output, None)

    def _count_calls(self, layer: Layer) -> int:
        return len(self._pass.records.get(layer, ())) + self._pass.unseen.get(layer, 0)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._door is None:
            return
        self._leave_layer(module, args, kwargs, output)
        if module is not self._door[0]:
            return
        whole = module is self._root
        self._depth -= 1
        if self._depth:
            return
        self._door[1].close()
        self._door = None
        self._watch.release()
        self._calls.clear()
        self._weights = {}
        if whole:
            self.made(tree_leaves(output))
        if whole and not self.deferred and not self._recomputing() and self._open:
            now = self._open[-1]
            if now.unseen and not self._doors:  # a checkpoint may call the layers once more, in the backward pass
                self._doors = self._layer_doors()
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.dim() and tensor.is_floating_point():
                    now.outputs.append(Root.of(tensor, max(1, tensor.dim() - 1)))
                    tensor.register_hook(_Arrival(self, now))

    def made(self, result: Any) -> None:
        """Take note of the tensors that an operation has made."""
        note(self._pass.made, result)

    @contextmanager
    def folded(self, shape: torch.Size) -> Iterator[None]:
        """Within it, matrices with a row for each of ``shape`` are recorded in that shape: nobody else can tell."""
        before, self._folded = self._folded, shape if len(shape) > 1 else None
        try:
            yield
        finally:
            self._folded = before

    def operation(self, function: Any, given: dict[str, Any], output: Any) -> None:
        """Take note of an operation with a weight."""
        weight, x = given.get("weight"), given.get("input")
        if function in (F.batch_norm, torch.batch_norm) and given.get("training") and isinstance(output, Tensor):
            self._hold_statistics(cast("Tensor", x), weight, output)
        if not isinstance(weight, Tensor):
            return
        layer, rows = self._weights.get(id(weight)), None
        if layer is None and function is F.linear and (base := weight._base) is not None:
            layer, rows = self._weights.get(id(base)), _slice(weight, base)
            layer = layer if rows is not None else None
        if layer is not None:
            self._record(layer, x, output, rows)

    def _record(self, layer: Layer, x: Any, output: Any, rows: tuple[int, int] | None) -> None:
        if not isinstance(x, Tensor) or not any(p.requires_grad for p in layer.parameters):
            return
        now = self._pass
        if not torch.is_grad_enabled():
            now.unseen[layer] = now.unseen.get(layer, 0) + 1
            self._unseen.add(layer)
            return
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        made, shape, x = _made(output), output.shape, x.detach()
        if self._folded is not None and x.dim() == 2 and len(x) == self._folded.numel():
            x, shape = x.unflatten(0, self._folded), torch.Size([*self._folded, *shape[1:]])
        record = Record(layer, x, shape, get_gradient_edge(made), rows)
        now.records.setdefault(layer, []).append(record)
        if not self.deferred:
            made.register_hook(_Arrival(self, now, record))

    def _hold_statistics(self, x: Tensor, weight: Tensor | None, output: Tensor) -> None:
        """In a probe, batch statistics are constants: else they would mix the examples."""
        node, x = output.grad_fn, x.detach()
        if node is None or not x.is_floating_point():
            return
        others = [d for d in range(x.dim()) if d != 1]
        channel = [1, -1, *[1] * (x.dim() - 2)]
        scale = None if weight is None else weight.detach()

        def hold(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not aside() or not self._probing or inputs[0] is None or outputs[0] is None:
                return None
            wide = x.float() if x.dtype != torch.float64 else x
            by_channel = wide.var(others, unbiased=False).add(1e-5).rsqrt()
            by_channel = by_channel if scale is None else by_channel * scale.to(by_channel)
            return (outputs[0] * by_channel.view(channel).to(outputs[0].dtype), *inputs[1:])

        node.register_hook(hold)

    def ran_unseen(self, layer: Layer) -> bool:
        """Whether a layer ran without gradients in this step."""
        return layer in self._unseen


class _Arrival:
    """A tensor hook on what a layer made, or on what the model returned. It keeps neither pass nor recorder alive."""

    def __init__(self, recorder: Watcher, now: Pass, record: Record | None = None) -> None:
        self._recorder, self._pass = weakref.ref(recorder), weakref.ref(now)
        self._record = None if record is None else weakref.ref(record)
        self._layer = None if record is None else record.layer

    def __call__(self, gradient: Tensor) -> None:
        recorder, now = self._recorder(), self._pass()
        if aside() or recorder is None or now is None:
            return
        # It is for a part of the loss, a penalty on gradients, say; or, where the loop tells of its own, for another.
        if not now.announced and (torch.is_grad_enabled() or recorder.told):
            recorder.passed_over = True
            return
        record = None if self._record is None else self._record()
        if self._layer is not None and record is None:  # shown and let go of: in a backward pass before this one
            recorder.refused[self._layer.name] = TWICE
        else:
            recorder.arrived(now, record, gradient)


def _made(output: Tensor) -> Tensor:
    """What a layer computed, of which its output may be a view: an operation in place cuts a view out of the graph.

    ``nn.Linear`` on ``[batch, tokens, dim]`` returns a view in some versions of torch, a convolution of an image
    without a batch in all of them.
    """
    base = output._base
    if base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous():
        return base
    return output


def _slice(weight: Tensor, base: Tensor) -> tuple[int, int] | None:
    """Which rows of a matrix a view of it is; None if it is none of some."""
    if weight.dim() != 2 or base.dim() != 2 or weight.stride() != base.stride() or weight.shape[1] != base.shape[1]:
        return None
    start = int((weight.storage_offset() - base.storage_offset()) // base.stride(0))
    return start, start + len(weight)
