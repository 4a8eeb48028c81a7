"""What the whole model was called with, and the model run once more on it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .hooks import hooked

#: Positional and keyword arguments of one forward pass of the model.
Call = tuple[tuple[Any, ...], dict[str, Any]]


#: What a call has returned, leaf by leaf: tensors that are still there.
Leaves = list["weakref.ref[Tensor] | None"]


class UnderWay(NamedTuple):
    """Calls that are kept, what each depends on, and what it returned."""

    calls: list[Call]
    conditions: list[_Conditions]
    returned: list[Leaves]


def _leaves(result: Any) -> list[Any]:
    """What there is in what a model returns: in containers, and in objects with attributes."""
    found: list[Any] = []
    for leaf in tree_leaves(result):
        found += [leaf] if isinstance(leaf, Tensor) or not hasattr(leaf, "__dict__") else vars(leaf).values()
    return found


class RootInputs:
    """Keeps what the whole model was called with, in training mode, with gradients, in the steps that are due.

    Models may return their outputs among other things: ``locate`` finds out where.

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
        self._returned: list[Leaves] = []
        self._inside = False  # whether a call that is kept is under way
        self._place: int | None = None  # of the outputs in what is returned
        self._told = 0  # calls when a backward pass was last told of
        self._waiting = 0  # calls from before gradients were cleared, which have a backward pass next or never
        self._handles = hooked([root], self._enter, self._leave)

    @torch._disable_dynamo
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and module.training and not self.paused and self._due():
            del self.calls[: self._waiting], self._conditions[: self._waiting], self._returned[: self._waiting]
            self._waiting = 0
            self._inside = True
            self._returned.append([])
            self._conditions.append(_Conditions.of(self.device))
            self.calls.append(tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs)))

    @torch._disable_dynamo
    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if self._inside and self._returned and not self.paused:
            self._returned[-1] = [weakref.ref(x) if isinstance(x, Tensor) else None for x in _leaves(result)]
        self._inside = False

    def locate(self, outputs: Any, gone: int) -> None:
        """Before a backward pass: find the outputs in what the model has returned, for ``outputs_in``.

        Where one call has returned them, others may have backward passes of their own, or none.

        Args:
            outputs: that a loss was computed from; where they are not found, their place is that of before.
            gone: how many calls have had their backward pass.
        """
        self._waiting = 0
        found = [
            (index, place)
            for index in range(len(self.calls) - 1, gone - 1, -1)
            for place, leaf in enumerate(self._returned[index])
            if isinstance(outputs, Tensor) and leaf is not None and leaf() is outputs
        ]
        if found:
            index, self._place = found[0]
            for kept in (self.calls, self._conditions, self._returned):
                kept.insert(gone, kept.pop(index))  # type: ignore[arg-type]
        self._told = gone + 1 if found else len(self.calls)

    def gone_through(self) -> list[Call]:
        """The calls, without those since the last backward pass that was told of, if any was: they are another's."""
        if self._told:
            for kept in (self.calls, self._conditions, self._returned):
                del kept[self._told :]
        return self.calls

    def outputs_in(self, result: Any) -> Tensor:
        """The outputs in what the model has returned.

        Args:
            result: the outputs themselves, or more than them.

        Raises:
            ValueError: it is not known which of it they are.
        """
        if isinstance(result, Tensor):
            return result
        leaves = _leaves(result)
        if self._place is None or self._place >= len(leaves) or not isinstance(leaves[self._place], Tensor):
            raise ValueError(
                "model must return its outputs as one tensor (or give backward, or before_backward, that among what it "
                f"returns, such as result.logits, itself), got {type(result).__name__}: wrap it in a module that does."
            )
        return leaves[self._place]

    def under_way(self, gone: int) -> UnderWay:
        """The calls but the first ones.

        Args:
            gone: how many of them were gone through.
        """
        return UnderWay(self.calls[gone:], self._conditions[gone:], self._returned[gone:])

    def go_on(self, under_way: UnderWay) -> None:
        """After a reset: keep calls of before, until there is another."""
        self._waiting = len(under_way.calls)
        self.calls += under_way.calls
        self._conditions += under_way.conditions
        self._returned += under_way.returned

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
        self._returned.clear()
        self._waiting = self._told = 0

    def again(self, index: int, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """The outputs of a call now, under the random state and the autocast that it was made with.

        Args:
            index: of the call.
            parameters: by name, in place of the model's own.
        """
        args, kwargs = self.calls[index]
        with self.aside(), torch.no_grad(), self._conditions[index].restored(self.device):
            if parameters is None:
                return self.outputs_in(self._root(*args, **kwargs))
            return self.outputs_in(torch.func.functional_call(self._root, parameters, args, kwargs))

    def close(self) -> None:
        """Remove the hooks. Idempotent."""
        for handle in self._handles:
            handle.remove()


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
