"""What the whole model was called with, and the model run once more on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .hooks import Hook

#: Positional and keyword arguments of one forward pass of the model.
Call = tuple[tuple[Any, ...], dict[str, Any]]


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
        self._handle = root.register_forward_pre_hook(Hook(self._enter), with_kwargs=True)

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
