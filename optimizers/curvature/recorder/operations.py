"""The mode that sees the operations in which layers' weights are used, whoever calls them."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..layers import OPERATIONS
from .hooks import quiet

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


class Notes(Protocol):
    """Who takes note of what the mode sees."""

    def made(self, result: Any) -> None:
        """Take note of the tensors that an operation has made, or that keep their gradient."""

    def folded(self, shape: torch.Size) -> AbstractContextManager[None]:
        """Within it, matrices with a row for each of ``shape`` are recorded in that shape: nobody else can tell."""

    def operation(self, function: Any, given: dict[str, Any], output: Any) -> None:
        """Take note of an operation with a weight."""


class Watch(TorchFunctionMode):
    """While active, shows a recorder the operations that watched weights are used in."""

    def __init__(self, recorder: Notes) -> None:
        super().__init__()
        self._owner = weakref.ref(recorder)
        self._recorder: Notes | None = None

    def __enter__(self) -> Watch:
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
            return func(args[0], quiet(args[1] if len(args) > 1 else kwargs["hook"]))
        result = func(*args, **kwargs)
        self._recorder.made(args[0] if func is Tensor.retain_grad else result)
        if (names := OPERATIONS.get(func)) is not None:
            given = dict(zip(names, args, strict=False)) | kwargs
            self._recorder.operation(func, given, result)
        return result
