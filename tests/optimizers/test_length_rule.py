"""Rules for the length of natural gradients: one interface, given to any method."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers import EKFAC, KFAC, KPSVD, Categorical, ExactNaturalGradient
from optimizers.curvature.layers import Layer
from optimizers.natural_gradient import LengthRule, Moves, NaturalGradient


class Relative(LengthRule):
    """Steps whose length over that of the layer's weights is always the same: a trust ratio."""

    ratio = 0.01

    def prepare(self, moves: Moves) -> None:
        self.moves = {p: moves.step_of(p) for p in moves.directions}

    def factor(self, layer: Layer, group: dict[str, Any]) -> Tensor | None:
        own = [p for p in layer.parameters if p in self.moves]
        norms = [torch.cat([t.flatten() for t in some]).norm() for some in (own, [self.moves[p] for p in own])]
        return self.ratio * norms[0] / norms[1]


def ruled(method: type[NaturalGradient], rule: type[LengthRule]) -> type[NaturalGradient]:
    class Ruled(method):  # type: ignore[valid-type, misc]
        def length_rule(self, *options: Any) -> LengthRule:
            return rule()

    return Ruled


def trained(optimizer: NaturalGradient, model: nn.Module, steps: int = 4) -> list[list[Tensor]]:
    """Weights before the first step and after each."""
    found = [[p.detach().clone() for p in model.parameters()]]
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        outputs = model(torch.randn(9, 5, generator=generator))
        optimizer.backward(F.cross_entropy(outputs, torch.randint(3, (9,), generator=generator)), outputs)
        optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    return found


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


@pytest.mark.parametrize("method", [KFAC, EKFAC, KPSVD, ExactNaturalGradient])
def test_a_rule_of_ones_own_in_any_method(method: type[NaturalGradient]) -> None:
    model = net()
    seen = trained(ruled(method, Relative)(model, likelihood=Categorical(), lr=1.0), model)
    for before, after in itertools.pairwise(seen):
        for layer in (slice(0, 2), slice(2, 4)):
            start, end = (torch.cat([t.flatten() for t in some[layer]]) for some in (before, after))
            assert float((end - start).norm() / start.norm()) == pytest.approx(Relative.ratio, rel=1e-4)


@pytest.mark.parametrize("method", [KFAC, ExactNaturalGradient])
def test_without_a_rule_steps_are_those_without_a_clip(method: type[NaturalGradient]) -> None:
    model, other = net(), net()
    free = trained(ruled(method, LengthRule)(model, likelihood=Categorical(), lr=1e-3), model)
    plain = trained(method(other, likelihood=Categorical(), lr=1e-3, kl_clip=None), other)
    assert all(torch.equal(a, b) for one, two in zip(free, plain, strict=True) for a, b in zip(one, two, strict=True))
