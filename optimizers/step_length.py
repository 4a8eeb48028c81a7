"""Rules for the length of steps whose direction is any optimizer's.

A rule looks at the step that an optimizer has taken, its momentum included: at how the parameters changed. That change
is made longer or shorter as a whole, in each layer or of all parameters together. Decoupled weight decay is part of
it: what an optimizer does apart from its direction cannot be told from it. As the change is read off from the weights,
it is as exact as these are rounded, which in half precision is not much.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .base import known_rate, real, unwrap
from .checks import check_choice, check_range
from .packaged import torch_optim
from .wrapper import Wrapper, wrappers


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
        self._units: _Units | None = None
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

    def _arranged(self, params: list[Tensor]) -> _Units:
        """The units of these parameters."""
        if self._units is None or not self._units.are_of(params):
            together: dict[Any, int] = {}
            places = []
            for p in params:
                alone = p not in self._modules or self._apart(p)
                key = None if self.per == "all" else id(p) if alone else self._modules[p]
                places.append(together.setdefault(key, len(together)))
            self._units = _Units(list(params), torch.tensor(places, device=params[0].device), len(together))
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

    def _wanted(self, units: _Units, tensors: list[Tensor], before: list[Tensor]) -> Tensor:
        """The lengths that steps are to have, by unit.

        Args:
            units: of the parameters that have gradients.
            tensors: these as real ones; to be left as they are, and so are gradients.
            before: copies of them.
        """
        raise NotImplementedError

    def _bounded(self, factors: Tensor) -> Tensor:
        return factors

    def _finish(self, units: _Units, lengths: Tensor) -> None:
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

    def _wanted(self, units: _Units, tensors: list[Tensor], before: list[Tensor]) -> Tensor:
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


class Normalized(StepLength):
    """Steps of a fixed length relative to the weights: ``|step| = ratio · s · max(|W|, floor √n)`` in each layer.

    s is what schedules and groups make of the optimizer's rate (see StepLength), n the number of the layer's
    parameters. A direction that is almost nothing is not blown up without limit: no step becomes more than ``cap``
    times longer.

    With ``hold``, parameters of two dimensions and more keep the norm that they had at first: each is a unit of its
    own, and is brought back to that norm after its step, so that what is learned is its direction. One that starts at
    zero grows as without.

    Args:
        optimizer: gives the direction.
        ratio: length of a step over the norm of the weights.
        floor: smallest root mean square that weights are taken to have, so that layers which start at zero move.
        cap: largest factor that a step is made longer by; None: any.
        hold: keep the norms of matrices.
        per: see StepLength.
        model: see StepLength.

    Raises:
        ValueError: for a value out of its range; see StepLength for more.
    """

    entry = "normalized"

    def __init__(
        self,
        optimizer: Optimizer,
        ratio: float = 2e-2,
        floor: float = 1e-3,
        cap: float | None = 1e3,
        hold: bool = False,
        per: Literal["layer", "all"] = "layer",
        model: nn.Module | None = None,
    ) -> None:
        check_range("ratio", ratio, 0)
        check_range("floor", floor, 0)
        if cap is not None:
            check_range("cap", cap, 0, open_low=True)
        self.ratio, self.floor, self.cap, self.hold = ratio, floor, cap, hold
        self._own: dict[Tensor, dict[str, Any]] = {}
        super().__init__(optimizer, per, model)

    def _apart(self, p: Tensor) -> bool:
        return self.hold and p.dim() > 1

    def _begin(self, params: list[Tensor]) -> None:
        new = [p for p in params if p not in self._own]
        for p, norm in zip(new, _norms(real(new)) if new else (), strict=True):
            self._own[p] = {"step": 0} | ({"norm": norm} if self._apart(p) else {})

    def _wanted(self, units: _Units, tensors: list[Tensor], before: list[Tensor]) -> Tensor:
        self._begin(units.params)
        schedule = {p: self._schedule(group) for group in self.param_groups for p in group["params"]}
        scales = [schedule[p] for p in units.params]
        if not any(isinstance(s, Tensor) for s in scales) and len(set(scales)) == 1:
            return self.ratio * scales[0] * torch.maximum(units.norms(before), self.floor * units.roots())
        scaled = [b * s for b, s in zip(before, scales, strict=True)]
        return self.ratio * torch.maximum(units.norms(scaled), self.floor * units.roots(scales))

    def _bounded(self, factors: Tensor) -> Tensor:
        return factors if self.cap is None else factors.clamp(max=self.cap)

    def _finish(self, units: _Units, lengths: Tensor) -> None:
        held = [i for i, p in enumerate(units.params) if "norm" in self._own[p]]
        for p in units.params:
            self._own[p]["step"] += 1
        if held:
            tensors = real(units.params[i] for i in held)
            first = [self._own[units.params[i]]["norm"] for i in held]
            now = _norms(tensors)
            moved = [units.spread(lengths)[i] for i in held]
            for t, norm, new, length in zip(tensors, first, now, moved, strict=True):
                still = (norm == 0) | (length == 0)
                t.mul_(torch.where(still, 1.0, norm.to(new) / new))

    def _check_entries(self, entries: Mapping[Tensor, dict[str, Any]]) -> None:
        for p, own in entries.items():
            if ("norm" in own) != self._apart(p):
                raise ValueError(f"the state was saved with hold={not self.hold}, and here hold is {self.hold}.")

    def _entries(self) -> Mapping[Tensor, dict[str, Any]]:
        return self._own

    def _restore(self, entries: dict[Tensor, dict[str, Any]], settings: Mapping[str, Any]) -> None:
        super()._restore(entries, settings)
        self._own = {
            p: {k: v.to(p.device, copy=True) if isinstance(v, Tensor) else v for k, v in own.items()}
            for p, own in entries.items()
        }


class _Units:
    """Which parameters have a length together.

    Args:
        params: in their order.
        places: the unit of each, int64 ``[len(params)]``.
        count: of units.
    """

    def __init__(self, params: list[Tensor], places: Tensor, count: int) -> None:
        self.params, self.count = params, count
        self._places, self._where = places, [(p.device, p.dtype) for p in params]
        self._roots: Tensor | None = None

    def are_of(self, params: list[Tensor]) -> bool:
        """Whether these are the same parameters, and where they were."""
        same = len(params) == len(self.params) and all(p is q for p, q in zip(params, self.params, strict=True))
        return same and self._where == [(p.device, p.dtype) for p in params]

    def norms(self, tensors: list[Tensor]) -> Tensor:
        """Norms of the units of tensors as many as there are parameters, ``[count]``."""
        squares = _norms(tensors).to(self._places.device).square()
        return squares.new_zeros(self.count).index_add(0, self._places, squares).sqrt()

    def roots(self, scales: Sequence[float | Tensor] | None = None) -> Tensor:
        """Square roots of the numbers of parameters, each parameter's as often as its scale says, ``[count]``."""
        if scales is None and self._roots is not None:
            return self._roots
        dtype = torch.float64 if any(dtype == torch.float64 for _, dtype in self._where) else torch.float32
        sizes = torch.tensor([float(p.numel()) for p in self.params], dtype=dtype)
        if scales is not None:
            sizes = sizes * torch.tensor([float(s) for s in scales], dtype=dtype).square()
        sizes = sizes.to(self._places.device, non_blocking=True)
        found = sizes.new_zeros(self.count).index_add(0, self._places, sizes).sqrt()
        if scales is None:
            self._roots = found
        return found

    def spread(self, values: Tensor) -> list[Tensor]:
        """Values of units, for each parameter, where it is."""
        each = values[self._places].unbind()
        return [value.to(p.device) for value, p in zip(each, self.params, strict=True)]


def _norms(tensors: list[Tensor]) -> Tensor:
    """Norms of tensors, ``[len(tensors)]``, in float32 at least."""
    if not tensors:
        return torch.zeros(0)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    found = torch._foreach_norm(tensors, 2, dtype=dtype)
    return torch.stack([n.to(tensors[0].device) for n in found])


def _numbered(optimizer: Optimizer, saved: list[dict[str, Any]]) -> list[tuple[Tensor, int]]:
    """Parameters with their numbers in a state's groups."""
    pairs = zip(optimizer.param_groups, saved, strict=True)
    return [pair for own_group, other in pairs for pair in zip(own_group["params"], other["params"], strict=True)]


def _kind(group: Mapping[str, Any]) -> str:
    """Groups whose rates are rates of the same thing: Muon's are of two methods."""
    return str(group.get("use_muon", "all"))


def _references(optimizer: Optimizer) -> dict[str, float]:
    """The rates at which a schedule's factor is 1: the optimizer's default where groups have it, or the first group's.

    By kind of group.
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
