"""torch's compiler is not waited for before a run has begun: importing it takes almost as long as torch itself."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


def imported() -> bool:
    """Whether this process has torch's compiler."""
    return "torch._dynamo" in sys.modules


@functools.lru_cache(maxsize=1)
def leave_out() -> None:
    """Let optimizers be made without torch's compiler, until somebody imports it.

    Methods of `torch.optim.Optimizer` tell the compiler to look away, and import it for that at their first call, which
    is when one is made: 0.7 s, also before a refused value is told of. Where nobody has imported it there is nobody to
    tell. Later it is imported all the same, by the first step of one of torch's own or the first recorded layer.
    """
    for name, method in inspect.getmembers(Optimizer, inspect.isfunction):
        if method.__code__.co_filename == torch._compile.__file__:
            setattr(Optimizer, name, _late(method))


def _late(told: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch._disable_dynamo` has made of a function; the function itself where there is no compiler."""
    function = inspect.unwrap(told)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return told(*args, **kwargs) if imported() else function(*args, **kwargs)

    return call
