"""Groups of parameters: what may differ between them, what cannot, and torch's flags."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ..checks import check_range, refuse_sharded
from ..proxies import hand_on
from .model import unwrap

Params = Iterable[Tensor] | Iterable[dict[str, Any]]

#: Flags of torch's optimizers that ask for nothing here.
UNUSED_FLAGS = ("foreach", "capturable", "fused", "differentiable")


class OfGroups:
    """An attribute whose value groups may differ in: reading gives the default, setting sets it in all groups."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Optimizer, owner: type | None = None) -> Any:
        return self if optimizer is None else optimizer.defaults[self._name]

    def __set__(self, optimizer: Optimizer, value: Any) -> None:
        optimizer.defaults[self._name] = value
        for group in optimizer.param_groups:
            group[self._name] = value


class GroupedOptimizer(Optimizer):
    """An optimizer whose groups are complete and checked, of a model's parameters or of others.

    Args:
        model: the whole module, or None. Wrappers are looked through.
        params: parameters or groups to train; default all of the model's.
        defaults: hyper-parameters of a group.
        flags: see CurvatureOptimizer.

    Raises:
        ValueError: for a flag that asks for what there is not, or nothing to train.
        TypeError: for an argument that is none.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hand_on(cls)

    def __init__(
        self, model: nn.Module | None, params: Params | None, defaults: dict[str, Any], flags: Mapping[str, Any]
    ) -> None:
        defaults = defaults | self._checked_flags(flags)
        self.model = None if model is None else unwrap(model)
        self._owners: dict[Tensor, int] = {}  # which group a parameter is in; made when asked for
        if params is None:
            if self.model is None:
                raise ValueError("params must be given where there is no model")
            params = self.model.parameters()
        super().__init__(params, defaults)

    def _checked_flags(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        """What groups get of torch's flags."""
        for name, value in flags.items():
            if name not in ("maximize", *UNUSED_FLAGS):
                raise TypeError(f"{type(self).__name__}.__init__() got an unexpected keyword argument {name!r}")
            if name != "maximize" and value not in (None, False):
                raise ValueError(
                    f"{name} must be false or left out, got {value!r}: it chooses among implementations of torch's "
                    f"own optimizers, and {type(self).__name__} has one."
                )
        return {"maximize": bool(flags.get("maximize", False))}

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a value out of its range, or a group's own for what is the whole optimizer's."""
        self._checked_flags({name: group[name] for name in UNUSED_FLAGS if name in group})
        if group.get("max_update") is not None:
            check_range("max_update", group["max_update"], 0, open_low=True)
        for name in inspect.signature(type(self).__init__).parameters:
            if name in group and name not in self.defaults and name not in ("params", "model"):
                mine = getattr(self, name, getattr(getattr(self, "options", None), name, None))
                if mine is not group[name] and mine != group[name]:
                    raise ValueError(
                        f"{name} is the whole optimizer's and cannot differ between groups: got {group[name]!r} for a "
                        f"group where {type(self).__name__} has {mine!r}."
                    )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch.optim.Optimizer. What is the whole optimizer's, such as ``update_every``, cannot differ.

        Raises:
            TypeError: parameters are sharded over processes.
        """
        if "loss_reduction" in self.__dict__ and self.__dict__.get("param_groups"):  # else _attach checks them all
            self._check_group(param_group)
        super().add_param_group(param_group)
        refuse_sharded(type(self).__name__, self.param_groups[-1]["params"])
        self._complete(self.param_groups[-1])

    def _complete(self, group: dict[str, Any]) -> None:
        """Fill in what a group lacks: a state of an earlier version may not have it."""
        for name, value in self.defaults.items():
            if name != "differentiable":  # which torch has put there
                group.setdefault(name, value)

    def _group_of(self, p: Tensor) -> dict[str, Any] | None:
        """The group that a parameter is in."""
        if not self._owners:
            self._owners = {p: index for index, group in enumerate(self.param_groups) for p in group["params"]}
        return self.param_groups[self._owners[p]] if p in self._owners else None
