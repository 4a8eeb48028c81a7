"""Hooks that die with their owner, and silence while backward passes of our own are under way."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

#: Backward passes of our own under way, over all recorders: what they send is nobody's gradient.
_aside = 0


def aside() -> bool:
    """Whether a backward pass of our own is under way."""
    return _aside > 0


def note(made: list[weakref.ref[Tensor]], result: Any) -> None:
    """Take note of what an operation has made of a graph: somebody may ask it for its gradient.

    Args:
        made: where.
        result: tensors, or what else the operation returns.
    """
    if isinstance(result, Tensor):
        if result.requires_grad and not result.is_leaf:
            made.append(weakref.ref(result))
    elif isinstance(result, (tuple, list)):
        for part in result:
            note(made, part)


def awake(made: Iterable[weakref.ref[Tensor]]) -> list[Tensor]:
    """The tensors that would tell somebody of a backward pass: with hooks, or with ``retain_grad``.

    Args:
        made: tensors of a graph; those that nobody has any more have nobody to tell.
    """
    alive = {id(t): t for ref in made if (t := ref()) is not None}
    return [t for t in alive.values() if t._backward_hooks or t.retains_grad]


@contextmanager
def set_aside(tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """Within it are backward passes of our own: hooks are silent.

    Args:
        tensors: of the graph: their hooks are not called, and they keep the gradient they had.
    """
    global _aside
    kept = [(t, t.grad) for t in tensors if t.retains_grad]
    hooked = [(hooks, dict(hooks)) for t in tensors if (hooks := t._backward_hooks)]
    for tensor, _ in kept:
        tensor.grad = None
    for hooks, _ in hooked:
        hooks.clear()
    _aside += 1
    try:
        yield
    finally:
        _aside -= 1
        for tensor, grad in kept:
            tensor.grad = grad
        for hooks, before in hooked:
            hooks.update(before)


class Hook:
    """A hook that neither keeps its recorder alive nor follows a deep copy of the model."""

    def __init__(self, method: Callable[..., Any] | None, *context: Any) -> None:
        self._method = weakref.WeakMethod(method) if method is not None else None
        self._context = context

    @torch._disable_dynamo
    def __call__(self, *args: Any) -> None:
        """Call the method, if its owner is alive."""
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None)

    def __reduce__(self) -> tuple[type[Hook], tuple[None]]:
        return Hook, (None,)  # a pickled model does not take its optimizer along


def remove_dead_hooks(model: nn.Module) -> None:
    """Remove what a deep copy took along of another model's hooks, and what optimizers that are gone have left.

    Args:
        model: its modules are all looked at.
    """
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(hook, Hook) and hook.dead]:
                del hooks[key]
                for flags in (
                    module._forward_hooks_with_kwargs,
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    flags.pop(key, None)


def hooked(
    modules: Iterable[nn.Module], before: Callable[..., None], after: Callable[..., None]
) -> list[RemovableHandle]:
    """Call methods before and after the forward passes of modules, also where these fail."""
    handles = []
    for module in modules:
        handles += [
            module.register_forward_pre_hook(Hook(before), with_kwargs=True),
            module.register_forward_hook(Hook(after), with_kwargs=True, always_call=True),
        ]
    return handles


def quiet(hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """A tensor hook of the model's own that backward passes of ours do not wake."""
    return lambda gradient: None if _aside else hook(gradient)


class _QuietModuleHook:
    """A module's backward hook of the model's own, likewise. It follows copies of the model."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, *args: Any) -> Any:
        return None if _aside else self.hook(*args)


class _QuietHooks(OrderedDict[int, Callable[..., Any]]):
    """Backward hooks of a module, quiet from the start."""

    def __setitem__(self, key: int, hook: Callable[..., Any]) -> None:
        super().__setitem__(key, hook if isinstance(hook, _QuietModuleHook) else _QuietModuleHook(hook))

    def __reduce__(self) -> tuple[type[OrderedDict[int, Callable[..., Any]]], tuple[list[tuple[int, Any]]]]:
        return OrderedDict, (list(self.items()),)  # a copy of the model, or a file of it, has no need of this class


def quieten(model: nn.Module) -> None:
    """Put quiet ones in the place of modules' backward hooks; their handles remove them all the same.

    The model's own are looked up before any hook of a forward pass runs: what will be registered is quiet at once.
    """
    for name in ("_backward_hooks", "_backward_pre_hooks"):
        if not model.__dict__[name]:  # else handles know it
            model.__dict__[name] = _QuietHooks()
    for module in model.modules():
        for hooks in (module._backward_hooks, module._backward_pre_hooks):
            for key, hook in hooks.items():
                if not isinstance(hook, _QuietModuleHook):
                    hooks[key] = _QuietModuleHook(hook)
