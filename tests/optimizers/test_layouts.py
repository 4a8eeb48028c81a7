"""A resumed optimizer has its matrices laid out as the one that was saved: products round by their layout."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import optimizers
from optimizers import Categorical
from optimizers.natural_gradient import NaturalGradient

NAMES = ("KFAC", "EKFAC", "KPSVD", "Deflation", "KFACCorrected", "Lanczos", "TwoLevelKFAC")
METHODS = [*((name, "factored") for name in NAMES), ("KFAC", "tikhonov"), ("TwoLevelKFAC", "tikhonov")]


def layouts(optimizer: NaturalGradient) -> list[dict[str, tuple[torch.Size, tuple[int, ...]]]]:
    return [{key: (t.shape, t.stride()) for key, t in stack.cache.items()} for stack in optimizer._stacks]


@pytest.mark.parametrize(("name", "mode"), METHODS)
def test_what_is_loaded_is_laid_out_as_it_was(name: str, mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
    x, y = torch.randn(20, 6), torch.randint(3, (20,))
    options = {"damping_mode": mode} if name in ("KFAC", "TwoLevelKFAC") else {}

    def made(of: nn.Module) -> NaturalGradient:
        return getattr(optimizers, name)(of, lr=0.1, likelihood=Categorical(), **options)

    def step(of: nn.Module, optimizer: NaturalGradient) -> Tensor:
        optimizer.zero_grad()
        outputs = of(x)
        loss = nn.functional.cross_entropy(outputs, y)
        optimizer.backward(loss, outputs)
        optimizer.step()
        return loss.detach()

    optimizer = made(model)
    for _ in range(2):
        step(model, optimizer)
    twin = copy.deepcopy(model)
    other = made(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    found = layouts(optimizer)
    assert found and layouts(other) == found
    assert any(len(stack.blocks) > 1 for stack in other._stacks), "some are side by side"
    for _ in range(3):
        torch.manual_seed(5)
        one = step(model, optimizer)
        torch.manual_seed(5)
        assert torch.equal(step(twin, other), one)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
