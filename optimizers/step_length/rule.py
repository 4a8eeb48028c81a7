"""Rules for the length of steps whose direction is any optimizer's.

A rule looks at the step that an optimizer has taken, its momentum included: at how the parameters changed. That change
is made longer or shorter as a whole, in each layer or of all parameters together. Decoupled weight decay is part of
it: what an optimizer does apart from its direction cannot be told from it. As the change is read off from the weights,
it is as exact as these are rounded, which in half precision is not much.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base import known_rate, real, unwrap
from ..checks import check_choice
from ..wrapper import Wrapper, wrappers
from .units import Units


def own(optimizer: Optimizer) -> Optimizer:
    """The optimizer's own rule: the optimizer as it is.

    Args:
        optimizer: any.
    """
    return optimizer


class StepLength(Wrapper):
    """Base of the rules: the optimizer's step times a factor for each layer.

    A step of zero stays one. A step that is not finite, or too large for its norm to be, leaves weights that are not
    finite. Nothing here waits for an accelerator, unless rates are tensors on it.

    Args:
        optimizer: any.
        per: layer: each module's own parameters together (each tensor alone where it belongs to no known module);
            all: all parameters together.
        model: which modules there are; None: the optimizer's own ``model``, if it has one.

    Raises:
        TypeError: ``optimizer`` is no optimizer.
        ValueError: for a value out of its range, an optimizer whose rate is 0, or an average inside, which has to go
            around.
    """

    _transient = frozenset({"_factors", "_units"})

    def __init__(self, optimizer: Optimizer, per: Literal["layer", "all"], model: nn.Module | None) -> None:
        check_choice("per", per, ("layer", "all"))
        self.per = per
        if {"ema", "schedule_free"} & set(wrappers(optimizer)):
            raise ValueError(f"{type(self).__name__} must be inside an average: EMA({type(self).__name__}(...), ...).")
        model = getattr(optimizer, "model", None) if model is None else model
        self._modules: dict[Tensor, str] = {}
        if isinstance(model, nn.Module):
            for name, module in unwrap(model).named_modules():
                for p in module.parameters(recurse=False):
                    self._modules.setdefault(p, name)
        self._factors: Tensor | None = None
        self._units: Units | None = None
        super().__init__(optimizer)
        self._references = _references(optimizer)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._factors, self._units = None, None
        super().__setstate__(state)

    def _settings(self) -> dict[str, Any]:
        return {"lr": dict(self._references)}

    def _restore(self, entries: dict[Tensor, dict[str, Any]], settings: Mapping[str, Any]) -> None:
        self._references = dict(settings.get("lr", self._references))

    def _schedule(self, group: Mapping[str, Any]) -> float | Tensor:
        """A group's rate relative to the optimizer's at first: what schedules and groups make of it."""
        lr = known_rate(group)
        return lr / self._references.setdefault(_kind(group), float(lr) or 1.0)

    def _apart(self, p: Tensor) -> bool:
        """Whether a parameter is a unit of its own within its layer."""
        return False

    def _arranged(self, params: list[Tensor]) -> Units:
        """The units of these parameters."""
        if self._units is None or not self._units.are_of(params):
            together: dict[Any, int] = {}
            places = []
            for p in params:
                alone = p not in self._modules or self._apart(p)
                key = None if self.per == "all" else id(p) if alone else self._modules[p]
                places.append(together.setdefault(key, len(together)))
            self._units = Units(list(params), torch.tensor(places, device=params[0].device), len(together))
        return self._units

    def _advance(self) -> None:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            self.inner.step()
            return
        units, tensors = self._arranged(params), real(params)
        before = [t.clone() for t in tensors]
        wanted = self._wanted(units, tensors, before)
        self.inner.step()
        steps = list(torch._foreach_sub(tensors, before))
        lengths = units.norms(steps)
        factors = self._bounded(wanted / lengths)
        # A step of zero stays one; of a norm that overflows nothing is known.
        factors = torch.where((lengths == 0) & wanted.isfinite(), 1.0, factors)
        factors = torch.where(lengths.isinf(), torch.nan, factors)
        torch._foreach_mul_(steps, units.spread(factors))
        torch._foreach_copy_(tensors, before)
        torch._foreach_add_(tensors, steps)
        self._finish(units, lengths)
        self._factors = torch.where(lengths == 0, torch.nan, factors)

    def _wanted(self, units: Units, tensors: list[Tensor], before: list[Tensor]) -> Tensor:
        """The lengths that steps are to have, by unit.

        Args:
            units: of the parameters that have gradients.
            tensors: these as real ones; to be left as they are, and so are gradients.
            before: copies of them.
        """
        raise NotImplementedError

    def _bounded(self, factors: Tensor) -> Tensor:
        return factors

    def _finish(self, units: Units, lengths: Tensor) -> None:
        """After the step. ``lengths``: of the optimizer's, by unit."""

    def diagnostics(self) -> dict[str, float]:
        """The optimizer's, and the smallest, median and largest factor of the last step, of units that moved."""
        values = super().diagnostics()
        if self._factors is not None:
            factors = self._factors[~self._factors.isnan()].sort().values
            if len(factors):
                found = {"min": factors[0], "median": factors[(len(factors) - 1) // 2], "max": factors[-1]}
                values |= {f"step_length/{self.entry}_{name}": float(value) for name, value in found.items()}
        return values


def _kind(group: Mapping[str, Any]) -> str:
    """Groups whose rates are rates of the same thing: Muon's are of two methods."""
    return str(group.get("use_muon", "all"))


def _references(optimizer: Optimizer) -> dict[str, float]:
    """The rates at which a schedule's factor is 1: the optimizer's default where groups have it, or the first group's.

    By kind of group.

    Raises:
        ValueError: no rate is above 0.
    """
    found: dict[str, list[float]] = {}
    for group in optimizer.param_groups:
        found.setdefault(_kind(group), []).append(float(known_rate(group)))
    default = optimizer.defaults.get("lr")
    default = float(default) if isinstance(default, (int, float, Tensor)) else None
    chosen = {}
    for kind, rates in found.items():
        if positive := [lr for lr in ([default] if default in rates else rates) if lr is not None and lr > 0]:
            chosen[kind] = positive[0]
    if not chosen:
        raise ValueError("the optimizer's lr must be above 0: lengths follow it relative to its start.")
    return chosen
