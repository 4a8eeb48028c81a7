"""Layers that no gradient comes through in the first steps: when they are looked at again, and what is said."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optimizers import KFAC, AdaFisher, Categorical, CurvatureOptimizer, ExactNaturalGradient, TwoLevelKFAC

given = {"lr": 0.01, "update_every": 10, "likelihood": Categorical()}
kfac = partial(KFAC, **given, early_updates=False)


class _Silent(nn.Module):
    """A branch behind a weight that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.scale = nn.Linear(6, 5), nn.Linear(5, 5), nn.Parameter(torch.zeros(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).tanh()
        return self.head(x + self.scale * self.branch(x).tanh())


def _train(net: nn.Module, optimizer: CurvatureOptimizer, steps: int) -> list[bool]:
    """Train on noise; whether each step was one to gather curvature."""
    due = []
    for _ in range(steps):
        x, y = torch.randn(8, 6), torch.randint(3, (8,))
        optimizer.zero_grad()
        due.append(optimizer._due())
        outputs = net(x)
        loss = F.cross_entropy(outputs, y)
        optimizer.backward(loss, outputs)
        optimizer.step()
    return due


@pytest.mark.parametrize(
    "make",
    [
        kfac, partial(AdaFisher, lr=0.01, update_every=10), partial(TwoLevelKFAC, **given, early_updates=False),
        partial(ExactNaturalGradient, **given),
    ],
)  # fmt: skip
def test_a_branch_that_starts_at_zero_has_curvature_after_a_step(make: Callable[..., CurvatureOptimizer]) -> None:
    net = _Silent()
    optimizer = make(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no news, in the first steps
        assert _train(net, optimizer, 1) == [True]
        assert not optimizer.blocks["branch"].factors and optimizer.blocks["head"].factors
        assert "no gradient" in str(optimizer.coverage())
        due = _train(net, optimizer, 11)
    assert optimizer.blocks["branch"].factors
    assert due == [True] + [False] * 9 + [True]  # once more out of turn, and then an interval later


def test_what_stays_silent_is_looked_at_ever_more_rarely_and_named() -> None:
    net = _Silent()
    net.scale.requires_grad_(False)
    optimizer = kfac(net)
    with pytest.warns(UserWarning, match="branch: no gradient has come through it yet"):
        due = _train(net, optimizer, 30)
    assert [i for i, it in enumerate(due) if it] == [0, 1, 3, 7, 15, 25]


def test_the_step_out_of_turn_survives_a_checkpoint() -> None:
    net = _Silent()
    optimizer = kfac(net)
    _train(net, optimizer, 1)
    copied = copy.deepcopy(net)
    other = kfac(copied)
    other.load_state_dict(optimizer.state_dict())
    assert optimizer._due() and other._due()
    _train(copied, other, 1)
    assert other.blocks["branch"].factors and not other._due()
