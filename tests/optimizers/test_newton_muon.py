"""Newton-Muon against its definition, with dense factors and a singular value decomposition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers import NewtonMuon
from optimizers.newton_muon import polar


def svd_polar(matrix: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ torch.diag((s > 1e-10).to(s)) @ v  # gradients of logits add up to nought: nothing moves along it


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5)])
def test_polar_is_that_of_the_svd(shape: tuple[int, int], float64: None) -> None:
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(4, *shape), full_matrices=False)
    s = torch.logspace(0, -2.5, s.shape[-1]).expand_as(s)
    given = u * s.unsqueeze(-2) @ v
    torch.testing.assert_close(polar(given), u @ v, rtol=0, atol=1e-6)
    few = torch.linalg.svdvals(polar(given, 5))
    assert float((few - 1).abs().max()) < 0.15
    torch.testing.assert_close(polar(1e3 * given), polar(given), rtol=0, atol=1e-9)
    assert not polar(torch.zeros(1, *shape)).any()


@pytest.mark.parametrize("unit", ["layer", "absolute"])
def test_steps_are_those_of_the_definition(unit: str, float64: None) -> None:
    """M and A of two steps, the bias the column of an input of one; decay apart; a norm by Adam's rule."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    lr, momentum, damping, decay, keep = 0.1, 0.9, 0.05, 0.02, 0.5
    optimizer = NewtonMuon(
        model, lr=lr, momentum=momentum, damping=damping, damping_unit=unit, weight_decay=decay, decay=keep,
        update_every=1, refresh_every=1, polar_steps=8,
    )  # fmt: skip
    layers = [model[0], model[2]]
    buffers, factors = [0.0, 0.0], [0.0, 0.0]
    for k in range(2):
        x, y = torch.randn(20, 6), torch.randint(3, (20,))
        expected = []
        seen = [x, model[:2](x).detach()]
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(x), y))
        for i, layer in enumerate(layers):
            a = torch.cat([seen[i], torch.ones(20, 1)], 1)
            share = min(1 - 1 / (k + 1), keep)
            factors[i] = share * factors[i] + (1 - share) * a.T @ a / 20
            buffers[i] = momentum * buffers[i] + torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            scale = damping * (factors[i].trace() / len(factors[i]) if unit == "layer" else 1)
            step = svd_polar(buffers[i] @ torch.linalg.inv(factors[i] + scale * torch.eye(len(factors[i]))))
            old = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
            expected.append((1 - lr * decay) * old - lr * 0.2 * max(step.shape) ** 0.5 * step)
        optimizer.step()
        for layer, value in zip(layers, expected, strict=True):
            found = torch.cat([layer.weight, layer.bias[:, None]], 1)
            torch.testing.assert_close(found, value, rtol=0, atol=1e-6)


def test_what_it_has_no_use_for_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"lr must be a number, got 'auto'"):
        NewtonMuon(model, lr="auto")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="kl_clip"):
        NewtonMuon(model, kl_clip=1e-3)
