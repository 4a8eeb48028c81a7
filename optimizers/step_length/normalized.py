"""Steps of a fixed length relative to the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..base import real
from ..checks import check_range
from .rule import StepLength
from .units import Units, norms


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
        for p, norm in zip(new, norms(real(new)) if new else (), strict=True):
            self._own[p] = {"step": 0} | ({"norm": norm} if self._apart(p) else {})

    def _wanted(self, units: Units, tensors: list[Tensor], before: list[Tensor]) -> Tensor:
        self._begin(units.params)
        schedule = {p: self._schedule(group) for group in self.param_groups for p in group["params"]}
        scales = [schedule[p] for p in units.params]
        if not any(isinstance(s, Tensor) for s in scales) and len(set(scales)) == 1:
            return self.ratio * scales[0] * torch.maximum(units.norms(before), self.floor * units.roots())
        scaled = [b * s for b, s in zip(before, scales, strict=True)]
        return self.ratio * torch.maximum(units.norms(scaled), self.floor * units.roots(scales))

    def _bounded(self, factors: Tensor) -> Tensor:
        return factors if self.cap is None else factors.clamp(max=self.cap)

    def _finish(self, units: Units, lengths: Tensor) -> None:
        held = [i for i, p in enumerate(units.params) if "norm" in self._own[p]]
        for p in units.params:
            self._own[p]["step"] += 1
        if held:
            tensors = real(units.params[i] for i in held)
            first = [self._own[units.params[i]]["norm"] for i in held]
            now = norms(tensors)
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
