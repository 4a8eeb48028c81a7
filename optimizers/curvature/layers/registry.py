"""Which adapter a module has. Adapters register themselves here, those of this package and anybody's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from .layer import Layer

#: Makes a module's adapter of its name in the model and itself; None: this one cannot be adapted.
Adapter = Callable[[str, Any], Layer | None]
AdapterT = TypeVar("AdapterT", bound=Callable[..., Layer | None])

#: By class, or by the full name of one in a package that is not imported here.
_ADAPTERS: dict[type[nn.Module] | str, Adapter] = {}

#: Where the operations that layers are made of have their input and their weight.
OPERATIONS: dict[Any, tuple[str, ...]] = {}

#: What is said of a layer whose weights another tensor, or another module, has taken the place of.
COMPUTED = "its weight is computed from other tensors (parametrized, pruned or swapped)"


def adapts(
    *kinds: type[nn.Module] | str, operations: Mapping[Any, tuple[str, ...]] | None = None
) -> Callable[[AdapterT], AdapterT]:
    """Register an adapter: a decorator of a ``Layer`` class, or of a function ``(name, module)`` that returns one.

    Args:
        kinds: modules that it is for, with all that derives from them and has no nearer adapter; classes, or full names
            (``"package.file.Class"``) of those that are not to be imported. A further adapter of the same kind takes
            the place of the first.
        operations: torch's functions that the weights of these modules are used in, and the names of their positional
            arguments up to ``weight``, ``input`` among them. They are then recorded whoever calls them; of a module
            whose operations are not known, its own input and output are.
    """

    def register(adapter: AdapterT) -> AdapterT:
        _ADAPTERS.update(dict.fromkeys(kinds, adapter))
        OPERATIONS.update(operations or {})
        return adapter

    return register


def layer_kinds(module: nn.Module) -> list[Any]:
    """The layers of torch.nn that a module is or derives from; of a container or a module of one's own, none."""
    bases = ("torch.nn.modules.module", "torch.nn.modules.container")
    return [k for k in type(module).__mro__ if k.__module__.startswith("torch.nn.") and k.__module__ not in bases]


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
    for kind in type(module).__mro__:
        known = kind if kind in _ADAPTERS else f"{kind.__module__}.{kind.__qualname__}"
        if known in _ADAPTERS:
            return _ADAPTERS[known](name, module)
    return None
