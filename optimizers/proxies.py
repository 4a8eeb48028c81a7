"""What packages put in an optimizer's place: an object of a class of theirs and of the optimizer's, without its state.

``LightningOptimizer`` is one. A method of the optimizer's that is called on it would run on a self that has none of the
optimizer's attributes and keeps what is written to it: so such a class hands both on to the optimizer itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


def hand_on(cls: type) -> None:
    """Let a class that stands in for an optimizer, if it is one, hand on its methods and what is set.

    Args:
        cls: a new class derived from an optimizer's. A stand-in has another base before that, with a property
            ``optimizer``, which is the one it stands in for.
    """
    first = cls.__bases__[0]
    if issubclass(first, Optimizer) or not isinstance(getattr(first, "optimizer", None), property):
        return
    theirs = set(dir(first))
    for name in dir(cls):
        if not name.startswith("_") and name not in theirs and callable(getattr(cls, name)):
            setattr(cls, name, _handing_on(name))
    cls.__setattr__ = _set  # type: ignore[assignment, method-assign]


def _handing_on(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.optimizer, name)(*args, **kwargs)

    method.__name__ = name
    return method


def _set(self: Any, name: str, value: Any) -> None:
    """Set what is the stand-in's own there, and else what the optimizer has on the optimizer."""
    if name in self.__dict__ or not hasattr(self.optimizer, name):
        object.__setattr__(self, name, value)
    else:
        setattr(self.optimizer, name, value)
