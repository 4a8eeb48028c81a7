"""Steps as long as those of another optimizer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks import check_range
from ..packaged import torch_optim
from .rule import StepLength
from .units import Units


class Graft(StepLength):
    """Steps in an optimizer's direction that are as long as those of another one: AdaGraft.

    The other is one of torch's, with a state of its own. It sees the same gradients, and its step is taken back after
    its length is known. Its rate is ``lr`` times what schedules and groups make of the optimizer's (see StepLength);
    ``weight_decay`` and ``maximize`` of each group hold for it too, unless ``options`` has them.

    Source: Agarwal et al., "Disentangling Adaptive Gradient Methods from Learning Rates", 2020 (arXiv 2002.11803).

    Args:
        optimizer: gives the direction.
        to: whose length: adam, adamw, sgd, or another class of torch.optim by its name.
        lr: its learning rate.
        options: what else the class takes, by name.
        per: see StepLength.
        model: see StepLength.

    Raises:
        ValueError: for a value out of its range, or what the class refuses; see StepLength for more.
    """

    entry = "graft"

    def __init__(
        self,
        optimizer: Optimizer,
        to: str = "adam",
        lr: float = 1e-3,
        options: dict[str, Any] | None = None,
        per: Literal["layer", "all"] = "layer",
        model: nn.Module | None = None,
    ) -> None:
        check_range("lr", lr, 0)
        self.to, self.lr, self.options = to, lr, dict(options or {})
        super().__init__(optimizer, per, model)
        groups = [{"params": list(group["params"])} for group in self.param_groups]
        self.shadow = _built(to, groups, lr, self.options)
        self._agree()
        self._places = self._where()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch.optim.Optimizer."""
        super().add_param_group(param_group)
        self.shadow.add_param_group({"params": list(self.param_groups[-1]["params"])})
        self._agree()

    def _agree(self) -> None:
        """Give the other optimizer's groups what they have from this one's."""
        for group, mine in zip(self.param_groups, self.shadow.param_groups, strict=True):
            mine["lr"] = self.lr * float(self._schedule(group))
            for name in ("weight_decay", "maximize"):
                value = group.get(name, getattr(self.inner, name, None))  # packages have it in either place
                if value is not None and name in mine and name not in self.options:
                    mine[name] = value

    def _where(self) -> list[tuple[torch.dtype, torch.device]]:
        return [(p.dtype, p.device) for group in self.param_groups for p in group["params"]]

    def _begin(self, params: list[Tensor]) -> None:
        self._agree()
        self.shadow.step()

    def _wanted(self, units: Units, tensors: list[Tensor], before: list[Tensor]) -> Tensor:
        self._agree()
        if (places := self._where()) != self._places:  # torch brings a state that it loads where parameters are
            self._places = places
            self.shadow.load_state_dict(self.shadow.state_dict())
        self.shadow.step()
        wanted = units.norms(list(torch._foreach_sub(tensors, before)))
        torch._foreach_copy_(tensors, before)
        return wanted

    def _entries(self) -> Mapping[Tensor, dict[str, Any]]:
        return self.shadow.state

    def _restore(self, entries: dict[Tensor, dict[str, Any]], settings: Mapping[str, Any]) -> None:
        super()._restore(entries, settings)
        state = self.shadow.state_dict()
        numbers = {p: i for p, i in _numbered(self.shadow, state["param_groups"])}
        state["state"] = {numbers[p]: copy.deepcopy(own) for p, own in entries.items()}
        self.shadow.load_state_dict(state)


def _built(to: str, groups: list[dict[str, Any]], lr: float, options: dict[str, Any]) -> Optimizer:
    """The optimizer whose steps are measured."""
    known = {name.lower(): name for name in torch_optim.classes()}
    try:
        target = torch_optim.choose(known.get(to.lower(), to))
    except ValueError as error:
        raise ValueError(str(error).replace("name", "to", 1)) from error
    accepted = [name for name in inspect.signature(target).parameters if name not in ("params", "lr")]
    for name in options:
        if name not in accepted:
            raise ValueError(f"options: {to} has no option {name!r}; it has {', '.join(accepted)}")
    try:
        return target(groups, lr=lr, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"options of {to} are refused: {error}") from error


def _numbered(optimizer: Optimizer, saved: list[dict[str, Any]]) -> list[tuple[Tensor, int]]:
    """Parameters with their numbers in a state's groups."""
    pairs = zip(optimizer.param_groups, saved, strict=True)
    return [pair for own_group, other in pairs for pair in zip(own_group["params"], other["params"], strict=True)]
