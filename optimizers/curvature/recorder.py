"""The only file that touches hooks: what flows through a layer, shown to an observer on the steps that need it."""

from __future__ import annotations

import json
import logging
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from . import probe
from .approximations import statistics_dtype
from .layers import OPERATIONS, Flow, Layer
from .probe import Layout
from .second_order import SecondOrder

log = logging.getLogger(__name__)

Observer = Callable[[Flow], None]
#: Positional and keyword arguments of one forward pass of the model.
Call = tuple[tuple[Any, ...], dict[str, Any]]

#: Attention of torch.nn, with its operations in sight: the function looks for a mode like ours first, and hands the
#: whole call over if there is one. This copy of it does not look.
_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.__dict__, "has_torch_function": lambda tensors: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
    F.multi_head_attention_forward.__closure__,
)
_attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__

NOT_SEEN = "its forward pass ran without gradients: inside a reentrant checkpoint (give it use_reentrant=False), say"
BEHIND = "its gradient comes through a reentrant checkpoint (give it use_reentrant=False)"
NOT_CALLED = "no operation with its weight was seen: it was not called, or its weight is used in another way"
TWICE = (
    "two backward passes came through one forward pass of the model: call optimizer.backward(loss, retain_graph=True) "
    "for all but the last"
)

#: How often a layer that no gradient has come through is looked at pass by pass, before the pauses double.
PATIENCE = 6

#: Backward passes of our own under way, over all recorders: what they send is nobody's gradient.
_aside = 0


@contextmanager
def set_aside(retained: Iterable[weakref.ref[Tensor]] = ()) -> Iterator[None]:
    """Within it are backward passes of our own: hooks are silent.

    Args:
        retained: tensors with ``retain_grad``, which keep the gradient they had.
    """
    global _aside
    tensors = [t for ref in retained if (t := ref()) is not None]
    saved = [t.grad for t in tensors]
    for tensor in tensors:
        tensor.grad = None
    _aside += 1
    try:
        yield
    finally:
        _aside -= 1
        for tensor, grad in zip(tensors, saved, strict=True):
            tensor.grad = grad


@dataclass
class _Root:
    """Where seeds are sent from: the place of a tensor in the graph, and what is known of it."""

    edge: GradientEdge
    like: Tensor
    leading: int

    @classmethod
    def of(cls, tensor: Tensor, leading: int) -> _Root:
        return cls(get_gradient_edge(tensor), tensor.detach(), leading)


@dataclass(eq=False)
class _Record:
    """A layer's input and the place of its output in the graph, which later in-place operations do not move."""

    layer: Layer
    x: Tensor
    shape: torch.Size  # of the output
    edge: GradientEdge
    rows: tuple[int, int] | None  # of the weight, where a slice of it was used
    g: Tensor | None = None
    prepared: Tensor | None = None

    def gradient(self, g: Tensor) -> Tensor:
        """A gradient by the output, in its shape; of a slice, among zeros for the other rows."""
        g = g.detach().reshape(self.shape)
        if self.rows is None:
            return g
        whole = g.new_zeros(*g.shape[:-1], len(self.layer.parameters[0]))
        whole[..., self.rows[0] : self.rows[1]] = g
        return whole

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's statistics."""
        return statistics_dtype(self.layer.parameters[0])

    def input(self) -> Tensor:
        """The input as the adapter takes it."""
        if self.prepared is None:
            self.prepared = self.layer.prepared(self.x.to(self.dtype) if self.x.is_floating_point() else self.x)
        return self.prepared


@dataclass(eq=False)
class _Pass:
    """What forward passes have left that one backward pass goes through."""

    sizes: list[int] = field(default_factory=list)  # of the leading dimensions of what the model was given
    outputs: list[_Root] = field(default_factory=list)  # what the model returned
    records: dict[Layer, list[_Record]] = field(default_factory=dict)
    unseen: dict[Layer, int] = field(default_factory=dict)  # calls without gradients
    retained: list[weakref.ref[Tensor]] = field(default_factory=list)
    shown: set[Layer] = field(default_factory=set)
    examples: int | None = None
    counted: Tensor | None = None  # which of them count, bool [examples]; None: all
    chosen: Tensor | None = None  # which are shown
    serial: int = 0  # its number, once it is counted
    started: bool = False  # a gradient has arrived
    keep: bool = False  # another backward pass will come

    def merge(self, other: _Pass) -> None:
        self.outputs += other.outputs
        self.retained += other.retained
        for layer, records in other.records.items():
            self.records.setdefault(layer, []).extend(records)
        for layer, count in other.unseen.items():
            self.unseen[layer] = self.unseen.get(layer, 0) + count


@dataclass
class _Look:
    """What a probe's passes show of a layer.

    Attributes:
        energies: squared output gradients by leading dimension, by call and pass; None where none came.
        totals: what the rows of the first pass add up to, in tensors shaped like the parameters.
        size: of the summands, to tell rounding by.
        coarse: the dtype that the sums are as precise as.
        wrong: rows have other shapes than the layer's.
    """

    energies: list[list[Tensor | None]]
    totals: list[Tensor] = field(default_factory=list)
    size: float = 0.0
    coarse: torch.dtype = torch.float64
    wrong: bool = False

    def take(self, records: Sequence[_Record], found: Sequence[Tensor | None], first: bool) -> None:
        """Take in the output gradients of a pass; they are not kept."""
        for record, g, energies in zip(records, found, self.energies, strict=True):
            if g is None:
                energies.append(None)
                continue
            self.coarse = max(self.coarse, g.dtype, record.layer.parameters[0].dtype, key=_tolerance)
            g = record.gradient(g)
            energies.append(probe.energy(g, record.layer.leading(record.x, g)))
            if not first:
                continue
            x, g = record.input(), g.to(record.dtype)
            if not record.layer.leading(record.x, g):
                x, g = x.unsqueeze(0), g.unsqueeze(0)
            try:
                totals = record.layer.total(x, g)
            except (RuntimeError, IndexError):  # its weight was used in another way
                self.wrong = True
                continue
            self.totals = [a + b for a, b in zip(self.totals, totals, strict=True)] if self.totals else totals
            self.size = (self.size**2 + float(x.double().square().sum() * g.double().square().sum())) ** 0.5

    def sized(self, layouts: Sequence[Layout], sizes: Tensor) -> bool:
        """Whether rows are as many times those of the two halves as their examples were in a third pass.

        Args:
            layouts: one a call.
            sizes: of the examples.
        """
        for layout, (one, other, last) in zip(layouts, self.energies, strict=True):
            like = next((energy for energy in (one, other, last) if energy is not None), None)
            if like is None:
                continue
            none = torch.zeros_like(like)
            halves = (none if one is None else one) + (none if other is None else other)  # which have no row in common
            right = halves * _by_example(sizes.square(), layout, halves.shape[layout.axis], len(sizes), halves)
            if probe.distance([none if last is None else last], [right]) > 2 * _tolerance(self.coarse):
                return False
        return True

    def reproduces(self, layer: Layer, by_weight: dict[Tensor, Tensor | None]) -> bool:
        """Whether the rows add up to what autograd gives the parameters, but for rounding."""
        if self.wrong or not self.totals:
            return not self.wrong
        pairs = [
            (total, torch.zeros_like(total) if (right := by_weight[p]) is None else right)
            for p, total in zip(layer.parameters, self.totals, strict=True)
            if p in by_weight
        ]
        if not pairs:
            return True
        if probe.distance([a for a, _ in pairs], [b for _, b in pairs]) <= _tolerance(self.coarse):
            return True
        off = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs) ** 0.5
        return off <= 100 * torch.finfo(self.coarse).eps * self.size  # it cancels out: what is left is rounding


def _tolerance(dtype: torch.dtype) -> float:
    return probe.TOLERANCE.get(dtype, 1e-1)


@dataclass
class _Verdict:
    """How a layer's rows are read, or why they are not.

    Attributes:
        layouts: one a call; a single one serves for any number of calls.
        reason: why there is none.
        signature: of the calls that it was found on.
        tries: how often the layer was looked at.
        rest: passes until it is looked at again, where nothing was found out.
    """

    layouts: list[Layout]
    reason: str | None
    signature: tuple[int, ...]
    tries: int = 1
    rest: int = 0

    def of(self, calls: int) -> list[Layout]:
        """The layouts of so many calls; of another number if they are not alike."""
        return self.layouts * calls if len(self.layouts) == 1 else self.layouts


class _Arrival:
    """A tensor hook on what a layer made, or on what the model returned. It keeps neither pass nor recorder alive."""

    def __init__(self, recorder: Recorder, now: _Pass, record: _Record | None = None) -> None:
        self._recorder, self._pass = weakref.ref(recorder), weakref.ref(now)
        self._record = None if record is None else weakref.ref(record)
        self._layer = None if record is None else record.layer

    def __call__(self, gradient: Tensor) -> None:
        recorder, now = self._recorder(), self._pass()
        if _aside or recorder is None or now is None:
            return
        record = None if self._record is None else self._record()
        if self._layer is not None and record is None:  # shown and let go of: in a backward pass before this one
            recorder.refused[self._layer.name] = TWICE
        else:
            recorder.arrived(now, record, gradient)


class _Hook:
    """A hook that neither keeps its recorder alive nor follows a deep copy of the model."""

    def __init__(self, method: Callable[..., Any] | None, *context: Any) -> None:
        self._method = weakref.WeakMethod(method) if method is not None else None
        self._context = context

    @torch._disable_dynamo
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


class _Watch(TorchFunctionMode):
    """While active, shows a recorder the operations that watched weights are used in."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._owner = weakref.ref(recorder)
        self._recorder: Recorder | None = None

    def __enter__(self) -> _Watch:
        """While active, the recorder lives, whoever has let go of it: it has to leave again."""
        self._recorder = self._owner()
        return super().__enter__()

    def release(self) -> None:
        """The pass is over."""
        self._recorder = None

    @torch._disable_dynamo
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept one call of a torch function."""
        kwargs = kwargs or {}
        if self._recorder is None:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            query = args[0] if args else kwargs["query"]
            with self, self._recorder.folded(query.shape[:-1]):
                return _attention(*args, **kwargs)
        if func is Tensor.register_hook:
            return func(args[0], _quiet(args[1] if len(args) > 1 else kwargs["hook"]))
        result = func(*args, **kwargs)
        if func is Tensor.retain_grad:
            self._recorder.retained(args[0])
        elif (names := OPERATIONS.get(func)) is not None:
            given = dict(zip(names, args, strict=False)) | kwargs
            self._recorder.operation(func, given, result)
        return result


def _quiet(hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """A tensor hook of the model's own that backward passes of ours do not wake."""
    return lambda gradient: None if _aside else hook(gradient)


class _QuietModuleHook:
    """A module's backward hook of the model's own, likewise. It follows copies of the model."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, *args: Any) -> Any:
        return None if _aside else self.hook(*args)


def _quieten(model: nn.Module) -> None:
    """Put quiet ones in the place of modules' backward hooks; their handles remove them all the same."""
    for module in model.modules():
        for hooks in (module._backward_hooks, module._backward_pre_hooks):
            for key, hook in hooks.items():
                if not isinstance(hook, _QuietModuleHook):
                    hooks[key] = _QuietModuleHook(hook)


class Recorder:
    """Shows an observer the input and the output gradient of every layer, by example, as backward passes through it.

    While the root module runs, a mode watches the *operations* in which the layers' weights are used, whoever calls
    them, and puts a tensor hook on what they make: so in-place activations behind them change nothing, and nothing is
    kept beyond the graph itself. A layer that is called by itself, without the root, opens the mode on its own. A pass
    is recorded when the root is in training mode, gradients are enabled and ``due()`` is true: evaluation, ``no_grad``
    and the steps in between cost two Python calls a layer.

    The first pass that shows a layer is probed (see ``probe``): which rows belong to which example, and whether they
    reproduce the gradient of the weight. What fails is not shown; ``refused`` says why.

    With ``deferred`` nothing is shown during ``loss.backward()``. Instead ``differentiate`` sends gradients of one's
    own choice through the recorded pass, as often as one likes and before its graph is freed; parameters are not
    reached, so no weight gradient is formed and neither ``.grad`` nor DDP's reducer sees it.

    Use it as a context manager, or call ``close()``: either removes every hook.

    Args:
        root: the whole model.
        layers: the layers to watch.
        due: asked at each forward pass.
        observe: called with the ``Flow`` of a layer in a backward pass, without gradients.
        deferred: wait for ``differentiate``.
        fraction: share of the examples to show, spread evenly over a batch, the first one always among them.

    Attributes:
        examples: how many examples were in the passes since the last ``reset``.
        observed: how many of them were shown.
        seen: whether a backward pass with examples came through since then.
        refused: why layers are not shown in this step, by name.
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
        self._layers = list(layers)
        self._fraction = fraction
        self._deferred = deferred
        self._due = due
        self._observe = observe
        self._open: list[_Pass] = []
        self._serial = 0
        self._unseen: set[Layer] = set()  # layers of this step's passes that ran without gradients
        self._door: tuple[nn.Module, ExitStack] | None = None  # the module that opened the mode
        self._depth = 0  # how often it is under way
        self._weights: dict[int, Layer] = {}
        self._by_module = {layer.module: layer for layer in layers}
        self._calls: list[int] = []  # how often layers under way had been seen when they were entered
        self._folded: torch.Size | None = None
        self._probing = False
        self._verdicts: dict[Layer, _Verdict] = {}
        self._reading: tuple[Layout, int] | None = None  # of the outputs, as last found
        self.examples = self.observed = 0
        self.seen = False
        self.refused: dict[str, str] = {}
        self._lenient = any(isinstance(m, nn.SyncBatchNorm) for m in root.modules())
        self._watch = _Watch(self)
        self._handles = _hooked([root], self._enter, self._leave)
        # Layers open the mode themselves as long as nobody has called the root.
        self._doors = self._layer_doors()

    def _layer_doors(self) -> list[RemovableHandle]:
        return _hooked([module for module in self._by_module if module is not self._root], self._enter, self._leave)

    # -- passes --------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget what was counted and recorded: a new step begins."""
        self.examples = self.observed = 0
        self.seen = False
        self.refused.clear()
        self._unseen.clear()
        self._open.clear()

    def close(self) -> None:
        """Remove every hook. Idempotent."""
        for handle in [*self._handles, *self._doors]:
            handle.remove()
        self._handles.clear()
        self._doors.clear()
        self._open.clear()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def _pass(self) -> _Pass:
        """The pass that operations are recorded in."""
        if not self._open or (self._open[-1].started and not self._recomputing()):
            self._begin(_Pass())
        return self._open[-1]

    def _begin(self, now: _Pass) -> None:
        """Record in another pass from here on. Those that a backward pass has been through are done with."""
        if not self._deferred:
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
        if not (torch.is_grad_enabled() and self._root.training and self._due()) or _aside:
            return
        recomputing = self._recomputing()
        if recomputing and (self._deferred or not self._open or not self._open[-1].unseen):
            return
        _quieten(self._root)
        if whole and not recomputing:
            if self._open and not self._open[-1].records and not self._open[-1].unseen:
                self._open.pop()
            sizes = [len(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
            self._begin(_Pass(sizes))
        self._weights = {}
        for layer in self._layers:
            tensor = layer.module._parameters.get(layer.keys[0])  # functional_call may have put another one there
            if tensor is not None:
                self._weights[id(tensor)] = layer
        stack = ExitStack()
        stack.enter_context(self._watch)
        if whole:
            inner = _hooked([m for m in self._by_module if m is not module], self._enter_layer, self._leave_layer)
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
        if whole and not self._deferred and not self._recomputing() and self._open:
            now = self._open[-1]
            if now.unseen and not self._doors:  # a checkpoint may call the layers once more, in the backward pass
                self._doors = self._layer_doors()
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.dim() and tensor.is_floating_point():
                    now.outputs.append(_Root.of(tensor, max(1, tensor.dim() - 1)))
                    tensor.register_hook(_Arrival(self, now))

    def retained(self, tensor: Tensor) -> None:
        """Take note of a tensor that keeps its gradient."""
        self._pass.retained.append(weakref.ref(tensor))

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
        record = _Record(layer, x, shape, get_gradient_edge(made), rows)
        now.records.setdefault(layer, []).append(record)
        if not self._deferred:
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
            if not _aside or not self._probing or inputs[0] is None or outputs[0] is None:
                return None
            wide = x.float() if x.dtype != torch.float64 else x
            by_channel = wide.var(others, unbiased=False).add(1e-5).rsqrt()
            by_channel = by_channel if scale is None else by_channel * scale.to(by_channel)
            return (outputs[0] * by_channel.view(channel).to(outputs[0].dtype), *inputs[1:])

        node.register_hook(hold)

    # -- whose gradient is whose ---------------------------------------------------------------------------------------

    def settle(self, outputs: Tensor, keep: bool = False) -> Tensor:
        """Before the backward pass: find the examples of what was recorded since the last one.

        Args:
            outputs: of the model, ``[batch, ..., features]`` (or ``[batch]``), with their graph, which is kept.
            keep: another backward pass will go through the same graph.

        Returns:
            The outputs, ``[examples, ...]``: a view.
        """
        if not self._open:
            return outputs
        gone_through = [before for before in self._open if before.started]
        now, *others = [one for one in self._open if not one.started] or [gone_through.pop()]
        for other in others:
            now.merge(other)
        self._open = [*gone_through, now]
        now.keep = keep
        self._find_examples(now, [_Root.of(outputs, max(1, outputs.dim() - 1))])
        return self.arrange(outputs)

    def arrange(self, tensor: Tensor) -> Tensor:
        """A tensor that is like the outputs in its leading dimension, with the examples there: a view."""
        layout, examples = cast("tuple[Layout, int]", self._reading)
        parts = layout.parts(len(tensor), examples)
        if parts is None or parts[0] == parts[2] == 1:
            return tensor
        return tensor.unflatten(0, parts).movedim(1, 0).flatten(1, 2)

    def expect(self, more: bool) -> None:
        """Say whether another backward pass will go through the same graph."""
        for now in self._open:
            now.keep = more

    def _find_examples(self, now: _Pass, roots: list[_Root]) -> None:
        """Set how many examples a pass has, and probe layers that nothing is known of."""
        readings = _readings(now.sizes, len(roots[0].like))
        before = self._reading[0] if self._reading else None
        self._reading = next((r for r in readings if r[0] == before), readings[0])
        if (asked := self._unknown(now, self._reading[1])) and self._reading[1]:
            self._probe(now, asked, roots, readings)
        now.examples = self._reading[1]
        self.seen |= now.examples > 0
        for verdict in self._verdicts.values():
            verdict.rest = max(0, verdict.rest - 1)

    def _unknown(self, now: _Pass, examples: int) -> list[Layer]:
        """Layers of a pass whose rows have to be looked at (again)."""
        found = []
        for layer, records in now.records.items():
            verdict = self._verdicts.get(layer)
            if verdict is None:
                found.append(layer)
            elif verdict.reason is None:
                if not self._fits(verdict, records, examples) or self._by_chance(verdict, records, examples, now.sizes):
                    found.append(layer)
            elif verdict.rest == 0 and (verdict.reason == probe.DEAD or verdict.signature != _signature(records)):
                found.append(layer)
        return found

    def _by_chance(
        self, verdict: _Verdict, records: Sequence[_Record], examples: int, given: Sequence[int]
    ) -> bool:
        """Whether a layout may be that of outputs chosen among the rows: in line by chance, and not another time.

        Where the model itself folds rows, the batch is as long as what it was given, and the rows are not.
        """
        return any(
            layout.split in ("slow", "fast") and (examples not in given or _sizes(record)[layout.axis] in given)
            for layout, record in zip(verdict.of(len(records)), records, strict=True)
        )

    def _fits(self, verdict: _Verdict, records: Sequence[_Record], examples: int) -> bool:
        layouts = verdict.of(len(records))
        if len(layouts) != len(records):
            return False
        for layout, record in zip(layouts, records, strict=True):
            sizes = _sizes(record)
            if layout.split == "one" or not sizes:
                if examples != 1:
                    return False
            elif layout.axis >= len(sizes) or layout.parts(sizes[layout.axis], examples) is None:
                return False
        return True

    def _probe(
        self, now: _Pass, asked: list[Layer], roots: list[_Root], readings: list[tuple[Layout, int]]
    ) -> None:
        """Send seeds of some examples alone, for the likeliest reading first, until the layers' rows make sense."""
        records = {layer: now.records[layer] for layer in asked}
        behind = self._behind(now, roots)
        for layer in [layer for layer in asked if any(record.edge.node in behind for record in records[layer])]:
            self._judge(layer, records.pop(layer), [], BEHIND)
        flat = [record for found in records.values() for record in found]
        usual = [r for r in readings if all(_possible(record, r[1]) for record in flat)]
        ordered = usual + [r for r in readings if r not in usual]
        best: tuple[int, tuple[Layout, int], dict[Layer, tuple[list[Layout], str | None]]] | None = None
        for reading in ordered[:2] if records else []:
            judged = self._look(now, records, roots, *reading, hurry=len(ordered) > 1)
            wrong = _wrong(judged)
            if best is None or wrong < best[0]:
                best = (wrong, reading, judged)
            if wrong == 0:
                break
        if best is not None:
            wrong, self._reading, judged = best
            if wrong and len(ordered) > 1:  # the look was a short one
                judged = self._look(now, records, roots, *self._reading)
            for layer, (layouts, reason) in judged.items():
                self._judge(layer, records[layer], layouts, reason)

    def _judge(self, layer: Layer, records: Sequence[_Record], layouts: list[Layout], reason: str | None) -> None:
        before = self._verdicts.get(layer)
        tries = 1 if before is None else before.tries + 1
        if len(set(layouts)) == 1:
            layouts = layouts[:1]
        # A weight that starts at zero lets gradients through after a step.
        patience = PATIENCE if reason == probe.DEAD else 1
        rest = 0 if reason is None else 2 ** min(max(0, tries - patience), 6)
        self._verdicts[layer] = _Verdict(layouts, reason, _signature(records), tries, rest)

    def _look(
        self,
        now: _Pass,
        records: dict[Layer, list[_Record]],
        roots: list[_Root],
        layout: Layout,
        examples: int,
        hurry: bool = False,
    ) -> dict[Layer, tuple[list[Layout], str | None]]:
        """What passes with seeds of one half of the examples, and of the other, show of each layer.

        In a hurry the first one will do, if it shows that the outputs are read in the wrong way.
        """
        generator = torch.Generator().manual_seed(0)
        first = torch.zeros(examples, dtype=torch.bool)
        first[torch.randperm(examples, generator=generator)[: max(1, examples // 2)]] = True
        parts = [first, ~first] if examples > 1 else [first]
        edges = [record.edge for found in records.values() for record in found]
        weights = [p for layer in records for p in layer.parameters if p.requires_grad]
        seen = {layer: _Look([[] for _ in found]) for layer, found in records.items()}
        sent: list[list[Tensor]] = []
        by_weight: dict[Tensor, Tensor | None] = {}
        with_seeds = [root for root in roots if _seed(root, layout, first, torch.Generator()) is not None]
        if not with_seeds:
            return {layer: ([], probe.UNFIT) for layer in records}
        for part in parts:
            seeds = [cast("Tensor", _seed(root, layout, part, generator)) for root in with_seeds]
            found = self._sent(now, with_seeds, seeds, edges if sent else [*edges, *weights])
            if not sent:
                by_weight = dict(zip(weights, found[len(edges) :], strict=True))
            self._take(seen, records, found, first=not sent)
            del found
            sent.append(seeds)
            result = {
                layer: self._read(layer, records[layer], look, parts, examples, by_weight)
                for layer, look in seen.items()
            }
            if hurry and _wrong(result):
                return result
        folded = [layer for layer, (found, _) in result.items() if any(one.split in ("slow", "fast") for one in found)]
        if len(parts) > 1 and folded and not self._lenient:
            # Chosen rows may be in line by chance, as far as halves tell. A size for each example tells more.
            sizes = 1 + torch.randperm(examples, generator=generator) / examples
            seeds = [
                (one + other) * _by_example(sizes, layout, one.shape[layout.axis], examples, one)
                for one, other in zip(*sent, strict=True)
            ]
            self._take(seen, records, self._sent(now, with_seeds, seeds, edges), first=False)
            for layer in folded:
                if not seen[layer].sized(result[layer][0], sizes):
                    result[layer] = [], probe.MIXED
        return result

    def _sent(
        self, now: _Pass, roots: Sequence[_Root], seeds: Sequence[Tensor], wanted: Sequence[Any]
    ) -> Sequence[Tensor | None]:
        """Gradients of a backward pass of a probe."""
        self._probing = True
        try:
            with set_aside(now.retained):
                return torch.autograd.grad(
                    [root.edge for root in roots],
                    cast("list[Tensor]", wanted),
                    list(seeds),
                    retain_graph=True,
                    allow_unused=True,
                )
        finally:
            self._probing = False

    @staticmethod
    @torch.no_grad()
    def _take(
        seen: dict[Layer, _Look], records: dict[Layer, list[_Record]], found: Sequence[Tensor | None], first: bool
    ) -> None:
        gradients = iter(found)
        for layer, mine in records.items():
            seen[layer].take(mine, [next(gradients) for _ in mine], first)

    @torch.no_grad()
    def _read(
        self,
        layer: Layer,
        records: Sequence[_Record],
        look: _Look,
        parts: Sequence[Tensor],
        examples: int,
        by_weight: dict[Tensor, Tensor | None],
    ) -> tuple[list[Layout], str | None]:
        """A layer's layouts, a call each, or the reason why there are none."""
        layouts: list[Layout] = []
        for energies in look.energies:
            like = next((energy for energy in energies if energy is not None), None)
            if like is None:
                continue
            full = [torch.zeros_like(like) if energy is None else energy for energy in energies]
            read = probe.judged(full, parts[: len(full)], examples, self._lenient)
            if read == probe.DEAD:
                continue
            if isinstance(read, str):
                return [], read
            layouts.append(read)
        if not layouts:
            missed = any((g := by_weight.get(p)) is not None and bool(g.any()) for p in layer.parameters)
            return [], (probe.AROUND if missed else probe.DEAD)
        if len(layouts) < len(records):  # calls without a gradient are read like the others, if these are alike
            layouts = layouts[:1] * len(records) if len(set(layouts)) == 1 else []
        if not layouts:
            return [], probe.DEAD
        return ([], probe.AROUND) if not look.reproduces(layer, by_weight) else (layouts, None)

    def _call(self, record: _Record, g: Tensor, layout: Layout, examples: int) -> list[tuple[Tensor, Tensor]] | None:
        return probe.arranged(record.layer, record.input(), g.to(record.dtype), layout, examples)

    def _behind(self, now: _Pass, roots: list[_Root]) -> set[Node]:
        """Nodes that a gradient reaches through a reentrant checkpoint, on one way at least."""
        if all(layer in now.records for layer in now.unseen):
            return set()
        nodes = _ancestors([root.edge.node for root in roots])
        barriers = [node for node in nodes if isinstance(node, BackwardCFunction)]
        return _ancestors([n for node in barriers for n, _ in node.next_functions if n is not None])

    def _layouts(self, layer: Layer, records: Sequence[_Record]) -> list[Layout] | None:
        """How the calls of a layer are read; None where they are not."""
        verdict = self._verdicts.get(layer)
        if verdict is None or verdict.reason is not None:
            return None
        return verdict.of(len(records))

    def state(self) -> str:
        """What has been found out of the layers, as text: a run that goes on need not find it out again."""
        reading = None if self._reading is None else [self._reading[0].axis, self._reading[0].split]
        layers = {
            layer.name: [
                [[layout.axis, layout.split] for layout in verdict.layouts],
                verdict.reason,
                verdict.signature,
                verdict.tries,
                verdict.rest,
            ]
            for layer, verdict in self._verdicts.items()
        }
        return json.dumps({"reading": reading, "layers": layers})

    def restore(self, state: str) -> None:
        """Take over what ``state`` returned."""
        saved = json.loads(state)
        self._reading = None if saved["reading"] is None else (Layout(*saved["reading"]), 0)
        found = {layer.name: layer for layer in self._layers}
        self._verdicts = {
            found[name]: _Verdict([Layout(*layout) for layout in layouts], reason, tuple(signature), tries, rest)
            for name, (layouts, reason, signature, tries, rest) in saved["layers"].items()
            if name in found
        }

    def reasons(self) -> dict[str, str]:
        """Layers of this step whose rows are not shown, by name, and why: refused, or never seen."""
        found = dict(self.refused)
        for layer in self._layers:
            if not any(p.requires_grad for p in layer.parameters):
                continue
            verdict = self._verdicts.get(layer)
            if verdict is not None and verdict.reason is not None:
                found[layer.name] = verdict.reason
        return found

    @property
    def silent(self) -> bool:
        """Whether no gradient has come yet through some layer that is called."""
        return any(verdict.reason == probe.DEAD for verdict in self._verdicts.values())

    # -- showing -------------------------------------------------------------------------------------------------------

    def choose(self, examples: int) -> Tensor | None:
        """Indices of the examples of a batch that are shown, int64; None: all."""
        if self._fraction >= 1:
            return None
        marks = (torch.arange(examples + 1, dtype=torch.float64) * self._fraction).ceil()
        return marks.diff().nonzero().flatten()

    def counts(self, counted: Tensor) -> None:
        """Tell which examples of the pass under way count, bool ``[examples]``: the others' gradients are zero."""
        if self._open:
            self._open[-1].counted = counted.cpu()

    def _count(self, now: _Pass) -> None:
        if now.serial:
            return
        self._serial += 1
        now.serial = self._serial
        examples = cast("int", now.examples)
        now.chosen = self.choose(examples)
        marks = torch.ones(examples, dtype=torch.bool) if now.counted is None else now.counted
        self.examples += int(marks.sum())
        self.observed += int(marks.sum() if now.chosen is None else marks[now.chosen].sum())

    def arrived(self, now: _Pass, record: _Record | None, gradient: Tensor) -> None:
        """A gradient has come to what a layer made, or to what the model returned (None)."""
        if now.examples is None:
            here = [] if record is None else [_Root(record.edge, gradient, max(1, gradient.dim() - 1))]
            if not (now.outputs or here):
                return
            try:
                self._find_examples(now, now.outputs or here)
            except RuntimeError as error:  # a part of the graph behind another output may be gone already
                if "second time" not in str(error) or not here:
                    raise
                self._find_examples(now, here)
        now.started = True
        now.outputs.clear()
        if record is None:
            return
        layer = record.layer
        if layer in now.unseen and layer not in self._verdicts:  # a checkpoint computes it anew: a graph of its own
            recomputed = [other for other in now.records if other in now.unseen and other not in self._verdicts]
            root = _Root(record.edge, gradient, max(1, gradient.dim() - 1))
            self._probe(now, recomputed, [root], [(Layout(0, "whole"), cast("int", now.examples))])
        if layer in now.shown:
            self.refused[layer.name] = TWICE
            return
        with torch.no_grad():
            g = record.gradient(gradient)
            record.g = g if record.g is None else record.g + g
        if not (now.keep or layer in now.unseen) and all(r.g is not None for r in now.records[layer]):
            self._show(now, layer)

    def finish(self) -> None:
        """Show what has not been: calls whose outputs were not used, or passes that others were to follow."""
        if not self._deferred:
            for now in self._open:
                self._finish(now)

    def _finish(self, now: _Pass) -> None:
        for layer in list(now.records):
            if any(record.g is not None for record in now.records[layer]):
                self._show(now, layer)

    @torch.no_grad()
    def _show(self, now: _Pass, layer: Layer, index: int = 0) -> None:
        """Show one layer's records, which have their gradients; those without have zero ones."""
        records = now.records[layer] if self._deferred else now.records.pop(layer)
        now.shown.add(layer)
        layouts = self._layouts(layer, records)
        if layouts is None:
            return
        self._count(now)
        if not now.examples:
            return
        calls: list[tuple[Tensor, Tensor]] = []
        for record, layout in zip(records, layouts, strict=True):
            if record.g is not None:
                calls += self._call(record, record.g, layout, now.examples) or []
        if now.chosen is not None:
            calls = [(x[now.chosen.to(x.device)], g[now.chosen.to(g.device)]) for x, g in calls]
        if calls:
            self._observe(Flow(layer, calls, (now.serial, index)))

    @property
    def waiting(self) -> bool:
        """Whether a pass was recorded that ``differentiate`` has not been through."""
        return self._deferred and any(now.records or now.unseen for now in self._open)

    @property
    def recording(self) -> bool:
        """Whether a pass was recorded whose layers are shown as its backward pass goes through."""
        return not self._deferred and any(now.records or now.unseen for now in self._open)

    def ran_unseen(self, layer: Layer) -> bool:
        """Whether a layer ran without gradients in this step."""
        return layer in self._unseen

    def differentiate(self, outputs: Tensor, gradients: Iterable[Tensor]) -> None:
        """Show the observer what flows back from ``outputs`` in the pass that was settled, and forget it.

        Args:
            outputs: what ``settle`` returned, with its graph, which is kept.
            gradients: by ``outputs``, in their shape, zero for examples that are not chosen; a backward pass each.
        """
        now = self._open[0]
        behind = self._behind(now, [_Root.of(outputs, 1)])
        shown = [
            layer
            for layer, records in now.records.items()
            if self._layouts(layer, records) is not None and not any(r.edge.node in behind for r in records)
        ]
        for layer in now.records.keys() - set(shown):
            if (verdict := self._verdicts.get(layer)) is not None and verdict.reason is None:
                self.refused[layer.name] = BEHIND
        flat = [record for layer in shown for record in now.records[layer]]
        self._count(now)
        for index, gradient in enumerate(gradients if flat else ()):
            with set_aside(now.retained):
                found = torch.autograd.grad(
                    outputs,
                    [record.edge for record in flat],
                    gradient.to(outputs.dtype),
                    retain_graph=True,
                    allow_unused=True,
                )
            for record, g in zip(flat, found, strict=True):
                record.g = None if g is None else record.gradient(g)
            for layer in shown:
                self._show(now, layer, index)
        if not now.keep:
            self._open.clear()
        else:
            now.examples, now.serial = None, 0


def _hooked(
    modules: Iterable[nn.Module], before: Callable[..., None], after: Callable[..., None]
) -> list[RemovableHandle]:
    """Call methods before and after the forward passes of modules, also where these fail."""
    handles = []
    for module in modules:
        handles += [
            module.register_forward_pre_hook(_Hook(before), with_kwargs=True),
            module.register_forward_hook(_Hook(after), with_kwargs=True, always_call=True),
        ]
    return handles


def _readings(sizes: Sequence[int], rows: int) -> list[tuple[Layout, int]]:
    """How the examples may lie in the outputs' leading dimension, the likeliest first, and how many there are.

    Args:
        sizes: of the leading dimensions of what the model was given: outputs that are flattened have a multiple of one.
        rows: of the outputs.
    """
    found = [(Layout(0, "whole"), rows)]
    size = next((size for size in sizes if 0 < size < rows and rows % size == 0), None)
    if size is not None and rows not in sizes:
        found += [(Layout(0, "slow"), size), (Layout(0, "fast"), size)]
    return found


def _possible(record: _Record, examples: int) -> bool:
    """Whether a record's rows can be told apart by so many examples, as far as sizes tell."""
    return bool(probe.candidates(_sizes(record), examples))


def _sizes(record: _Record) -> tuple[int, ...]:
    """Sizes of a record's leading dimensions."""
    like = torch.empty(record.shape, device="meta")
    return tuple(record.shape[: record.layer.leading(record.x, like)])


def _signature(records: Sequence[_Record]) -> tuple[int, ...]:
    return tuple(len(_sizes(record)) for record in records)


def _seed(root: _Root, layout: Layout, part: Tensor, generator: torch.Generator) -> Tensor | None:
    """Random gradients by a root for some of the examples, zero for the others; None if it does not have them."""
    like = root.like
    if like.dim() <= layout.axis or layout.parts(like.shape[layout.axis], len(part)) is None:
        return None
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    mask = part[layout.labels(like.shape[layout.axis], len(part))]
    noise = noise * mask.view([-1 if axis == layout.axis else 1 for axis in range(like.dim())])
    return noise.to(like.device, like.dtype)


def _wrong(judged: dict[Layer, tuple[list[Layout], str | None]]) -> int:
    """How many layers' rows make no sense."""
    return sum(reason not in (None, probe.DEAD) for _, reason in judged.values())


def _by_example(values: Tensor, layout: Layout, size: int, examples: int, like: Tensor) -> Tensor:
    """A value for each example, along its rows of a tensor."""
    by_row = values[layout.labels(size, examples)].to(like)
    return by_row.view([-1 if axis == layout.axis else 1 for axis in range(like.dim())])


def _slice(weight: Tensor, base: Tensor) -> tuple[int, int] | None:
    """Which rows of a matrix a view of it is; None if it is none of some."""
    if weight.dim() != 2 or base.dim() != 2 or weight.stride() != base.stride() or weight.shape[1] != base.shape[1]:
        return None
    start = int((weight.storage_offset() - base.storage_offset()) // base.stride(0))
    return start, start + len(weight)


def _ancestors(nodes: Iterable[Node]) -> set[Node]:
    """The nodes, and all that a backward pass from them reaches."""
    found, stack = set(nodes), list(nodes)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node not in found:
                found.add(node)
                stack.append(node)
    return found


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
            mode.owner = self  # which lives until it has left again
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
        device: of the model.
        paused: while true nothing is kept.
    """

    def __init__(self, root: nn.Module, due: Callable[[], bool]) -> None:
        self._root, self._due = root, due
        self.calls: list[Call] = []
        self.paused = False
        self.device = next((p.device for p in root.parameters()), torch.device("cpu"))
        self._conditions: list[_Conditions] = []
        self._handle = root.register_forward_pre_hook(_Hook(self._enter), with_kwargs=True)

    @torch._disable_dynamo
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and module.training and not self.paused and self._due():
            self._conditions.append(_Conditions.of(self.device))
            self.calls.append(tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs)))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within it, the model can be called again without a trace in its buffers, in ``calls`` or in random states."""
        buffers = list(self._root.buffers())
        saved = [buffer.clone() for buffer in buffers]
        devices = {p.device for p in self._root.parameters()}
        before, self.paused = self.paused, True
        try:
            with torch.random.fork_rng([d for d in devices if d.type == "cuda"]):
                yield
        finally:
            self.paused = before
            with torch.no_grad():
                for buffer, value in zip(buffers, saved, strict=True):
                    buffer.copy_(value)

    def reset(self) -> None:
        """Forget what was kept: a new step begins."""
        self.calls.clear()
        self._conditions.clear()

    def again(self, index: int, parameters: dict[str, Tensor] | None = None) -> Any:
        """What the model returns for a call now, under the random state and the autocast that it was made with.

        Args:
            index: of the call.
            parameters: by name, in place of the model's own.
        """
        args, kwargs = self.calls[index]
        with self.aside(), torch.no_grad(), self._conditions[index].restored(self.device):
            if parameters is None:
                return self._root(*args, **kwargs)
            return torch.func.functional_call(self._root, parameters, args, kwargs)

    def close(self) -> None:
        """Remove the hook. Idempotent."""
        self._handle.remove()


@dataclass(frozen=True)
class _Conditions:
    """What a forward pass depends on beside parameters, buffers and arguments."""

    random: Tensor
    random_of_device: Tensor | None
    autocast: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, device: torch.device) -> _Conditions:
        """Those of now."""
        own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        kind = device.type
        return cls(torch.get_rng_state(), own, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    @contextmanager
    def restored(self, device: torch.device) -> Iterator[None]:
        """Within it they are as they were; random states stay changed."""
        torch.set_rng_state(self.random)
        if self.random_of_device is not None:
            torch.cuda.set_rng_state(self.random_of_device, device)
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.autocast):
            yield
