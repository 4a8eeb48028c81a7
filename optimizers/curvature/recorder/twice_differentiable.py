"""Forward passes that will be differentiated twice, on kernels that can be."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..second_order import SecondOrder
from .hooks import Hook, awake, note, quieten

log = logging.getLogger(__name__)


class _Noting(SecondOrder):
    """Takes note of what it sees made."""

    def __init__(self, made: list[weakref.ref[Tensor]]) -> None:
        super().__init__()
        self._made = made

    @torch._disable_dynamo
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept one call of a torch function."""
        result = super().__torch_function__(func, types, args, kwargs)
        note(self._made, result)
        return result


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
        self._made: list[weakref.ref[Tensor]] = []
        self._entered: list[tuple[ExitStack, SecondOrder | None]] = []
        quieten(root)
        self._handles = [
            # Another's mode, entered later, sees operations before this one takes their place; of two of this kind the
            # last that was made enters first and leaves last, and restores what it found.
            root.register_forward_pre_hook(Hook(self._enter), prepend=True),
            root.register_forward_hook(Hook(self._exit), always_call=True),
        ]

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        stack, mode = ExitStack(), None
        if torch.is_grad_enabled() and self._due():
            quieten(module)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            mode = stack.enter_context(_Noting(self._made))
            mode.owner = self  # which lives until it has left again
        self._entered.append((stack, mode))

    def _exit(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stack, mode = self._entered.pop()
        stack.close()
        if mode is not None and mode.attention and not self._told:
            self._told = True
            log.info("attention runs on the plain (math) kernel where second derivatives are due: fused ones have none")

    def note(self, outputs: Tensor) -> None:
        """Take note of what was made of what the model returned."""
        note(self._made, outputs)

    def awake(self) -> list[Tensor]:
        """Of what due passes have made since ``reset``, the tensors that would tell of another backward pass."""
        return awake(self._made)

    def reset(self) -> None:
        """Forget what was made: a step is over."""
        self._made.clear()

    def close(self) -> None:
        """Remove the hooks. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
