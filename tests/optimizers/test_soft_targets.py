"""Targets that are probabilities, as mixed images have them: what curvature is of the loss that they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizers import KFAC, ExactNaturalGradient, FishLeg
from optimizers.likelihoods import Categorical
from tests import dense


def problem() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A net, inputs, and two kinds of targets: classes, and mixtures of two of them."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    hard = torch.tensor([0, 2, 1, 1, 0])
    one_hot = torch.nn.functional.one_hot(hard, 3).to(torch.get_default_dtype())
    return model, torch.randn(5, 3), hard, one_hot * 0.7 + one_hot.roll(1, 0) * 0.3


def seen(method: Callable[..., Any], model: nn.Module, inputs: Tensor, targets: Tensor, **options: Any) -> Any:
    likelihood = Categorical(label_smoothing=0.1)
    optimizer = method(model, lr=0.0, momentum=0.0, kl_clip=None, likelihood=likelihood, batch_fraction=1.0, **options)
    outputs = model(inputs)
    optimizer.backward(likelihood.nll(outputs, targets), outputs)
    optimizer.step()
    return optimizer


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_against_dense_references(fisher: str) -> None:
    """The exact Fisher is the Gauss-Newton matrix of the mixed loss, the empirical one has its examples' gradients."""
    model, inputs, _, soft = problem()
    loss, params = Categorical(label_smoothing=0.1).nll, list(model.parameters())
    reference = dense.gauss_newton if fisher == "exact" else dense.empirical_fisher
    whole = reference(model, loss, inputs, soft, params)
    found = seen(ExactNaturalGradient, model, inputs, soft, fisher=fisher).curvature_matrices()
    for name, start, layer in (("0", 0, model[0]), ("2", 16, model[2])):
        order = start + dense.as_matrix_order(layer)
        torch.testing.assert_close(found[name], whole[order][:, order], rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("fisher", ["exact", "sampled"])
def test_a_fisher_of_the_model_does_not_look_at_targets(fisher: str) -> None:
    model, inputs, hard, soft = problem()
    of_classes, of_mixtures = (seen(KFAC, model, inputs, targets, fisher=fisher) for targets in (hard, soft))
    pairs = zip(of_classes.curvature_matrices().values(), of_mixtures.curvature_matrices().values(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{"damping": "auto"}, {"kl_of": "measured"}, {"lr": "auto"}], ids=str)
def test_what_asks_for_targets_takes_mixtures(options: dict[str, Any]) -> None:
    model, inputs, _, soft = problem()
    optimizer = KFAC(model, likelihood=Categorical(), **options)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = optimizer.likelihood.nll(outputs, soft)
        optimizer.backward(loss, outputs, **({"targets": soft} if optimizer.needs_targets else {}))
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_a_learned_inverse_takes_mixtures() -> None:
    model, inputs, _, soft = problem()
    optimizer = FishLeg(model, likelihood=Categorical())
    outputs = model(inputs)
    optimizer.backward(optimizer.likelihood.nll(outputs, soft), outputs)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
