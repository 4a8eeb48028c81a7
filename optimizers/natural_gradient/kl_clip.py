"""The KL clip: steps no longer than a radius in the metric of the Fisher matrix."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..base import rate
from ..checks import check_choice, check_range
from ..curvature.layers import Layer
from .fisher import Once
from .lengths import LengthRule
from .moves import Moves
from .stacks import inner

KLOf = Literal["step", "direction", "measured"]
KLUnit = Literal["root", "variable", "observation"]

#: By ``kl_unit`` the power of the number of variables in an observation that kappa is multiplied by.
KL_POWERS: dict[KLUnit, float] = {"root": 0.5, "variable": 1.0, "observation": 0.0}


class KLClip(LengthRule):
    """``nu = min(1, sqrt(kappa / length))`` for the layers of one ``kl_clip``, which is kappa but for its unit.

    Args:
        kl_of: what kappa bounds, see NaturalGradient.
        kl_unit: what kappa is of, see NaturalGradient.
        kl_warmup: steps over which the radius grows, see NaturalGradient.
        independent: whether an observation may hold several variables.
        say: how a user is told, once.

    Attributes:
        scales: nu by ``kl_clip``, as of the last step.
        squares: ``mᵀ (F + damping) m`` of each group's layers, m their momentum, as of the last step; [] if not known.
    """

    def __init__(self, kl_of: KLOf, kl_unit: KLUnit, kl_warmup: int, independent: bool, say: Once) -> None:
        check_choice("kl_of", kl_of, ("step", "direction", "measured"))
        check_choice("kl_unit", kl_unit, tuple(KL_POWERS))
        check_range("kl_warmup", kl_warmup, 0)
        self.kl_of, self.kl_unit, self.kl_warmup = kl_of, kl_unit, kl_warmup
        self.independent, self.say = independent, say
        self.scales: dict[float, Tensor] = {}
        self.squares: list[Tensor] = []

    @property
    def of_direction(self) -> bool:
        """See LengthRule."""
        return self.kl_of == "direction"

    @property
    def is_measured(self) -> bool:
        """See LengthRule."""
        return self.kl_of == "measured"

    def prepare(self, moves: Moves) -> None:
        """See LengthRule. Nu from the squared lengths of what the groups' layers are about to do."""
        if all(group["kl_clip"] is None for group in moves.groups):
            self.scales, self.squares = {}, []
            return
        whole = self.of_direction or not moves.must_multiply()
        squares = self._lengths(moves) if whole else moves.squared(moves.steps())
        self.scales = {}
        for clip in _clips(moves):
            own = [rate(g) ** 2 * q for g, q in zip(moves.groups, squares, strict=True) if g["kl_clip"] == clip]
            total = torch.stack([t.to(own[0].dtype) for t in own]).sum()
            self.scales[clip] = _below_one((self.kappa(clip, moves.optimizer.steps) / total).sqrt())
        self.squares = []
        if not self.of_direction and whole:  # else what stood still has a past that x did not hold
            one = squares[0].new_ones(())
            scales = [self.scales.get(group["kl_clip"], one) for group in moves.groups]
            self.squares = [q.clamp(min=0) * nu**2 for q, nu in zip(squares, scales, strict=True)]

    def prepare_known(self, moves: Moves, length: Tensor | None) -> list[Tensor]:
        """See LengthRule."""
        self.scales = {}
        if length is not None:
            for clip in _clips(moves):
                self.scales[clip] = _below_one((self.kappa(clip, moves.optimizer.steps) / length).sqrt()).float()
        return list(self.scales.values())

    def kappa(self, kl_clip: float, steps: int) -> float:
        """What bounds twice the KL divergence of an observation in a step, units and warm-up included.

        Args:
            kl_clip: as it was given.
            steps: taken before this one.
        """
        share = min(1.0, (steps + 1) / self.kl_warmup) if self.kl_warmup else 1.0
        power = KL_POWERS[self.kl_unit]
        if power and not self.variables and self.independent:
            self.say("kl_clip is of whole observations until outputs are given: call backward(loss, outputs)")
        return kl_clip * share**2 * max(self.variables, 1) ** power

    def radius(self, group: dict[str, Any], steps: int) -> float | None:
        """See LengthRule."""
        return None if group["kl_clip"] is None else self.kappa(group["kl_clip"], steps)

    def _lengths(self, moves: Moves) -> list[Tensor]:
        """``xᵀ (F + damping) x`` of each group's layers, which move as a whole, x being what ``kl_of`` says: no lr."""
        products = moves.by_group([inner(v, g) for v, g in zip(moves.solved, moves.gradients, strict=True)])
        if self.of_direction:
            return products
        momenta = moves.stacked(moves.momentum_of)
        if moves.has_moved() or len(self.squares) != len(products):
            self.squares = moves.squared(momenta)
        crossed = moves.by_group([inner(m, g) for m, g in zip(momenta, moves.gradients, strict=True)])
        betas = [group["momentum"] for group in moves.groups]
        return [
            beta**2 * past + 2 * beta * both + new
            for beta, past, both, new in zip(betas, self.squares, crossed, products, strict=True)
        ]

    def factor(self, layer: Layer, group: dict[str, Any]) -> Tensor | None:
        """See LengthRule."""
        return self.scales.get(group["kl_clip"])

    def smallest(self) -> float:
        """See LengthRule."""
        return min((float(scale) for scale in self.scales.values()), default=1.0)

    def length(self, moves: Moves, steps: dict[Tensor, Tensor]) -> Tensor:
        """See LengthRule. What is remembered serves where it is of the whole step."""
        if not self._knows_length(moves):
            return super().length(moves, steps)
        squares = [q * rate(g) ** 2 for g, q in zip(moves.groups, self.squares, strict=True)]
        return torch.stack([q.reshape(()) for q in squares]).sum()

    def _knows_length(self, moves: Moves) -> bool:
        """Whether what is remembered is of the whole of the last step."""
        if moves.optimizer.between_layers and len(moves.groups) > 1:  # blocks between groups have two rates
            return False
        return len(self.squares) == len(moves.groups) and not moves.decays_apart()

    def shortened(self, share: Tensor) -> None:
        """See LengthRule."""
        self.squares = [q * share**2 for q in self.squares]

    def memory(self, groups: int) -> Tensor:
        """See LengthRule: the squares."""
        return torch.stack(self.squares) if len(self.squares) == groups else super().memory(groups)

    def restore(self, memory: Tensor) -> None:
        """See LengthRule."""
        self.squares = list(memory) if bool((memory >= 0).all()) else []


def _clips(moves: Moves) -> set[float]:
    return {group["kl_clip"] for group in moves.groups} - {None}


def _below_one(scale: Tensor) -> Tensor:
    """A factor that shortens; NaN, of a negative sum, becomes 1."""
    return torch.where(scale < 1, scale, torch.ones_like(scale))
