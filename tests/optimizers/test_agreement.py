"""A loss that is not the likelihood's is told of, in one sentence, at the first update; its own never is."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimizers import KFAC, Bernoulli, Categorical, ExactNaturalGradient, FishLeg, Gaussian, Likelihood
from optimizers.natural_gradient import NaturalGradient
from optimizers.natural_gradient.agreement import Agreement

INPUTS = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(16) % 3
VALUES = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
BITS = (VALUES > 0).float()

Loss = Callable[[Tensor], Tensor]
Method = NaturalGradient | FishLeg


def train(
    likelihood: Likelihood,
    loss: Loss,
    last: type[nn.Module] = nn.Identity,
    method: type[Method] = KFAC,
    parts: int = 1,
    dtype: torch.dtype = torch.float32,
    **told: Any,
) -> list[str]:
    """What is said in three steps of ``parts`` micro-batches each."""
    torch.manual_seed(0)
    end = last(-1) if last in (nn.Softmax, nn.LogSoftmax) else last()
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), end).to(dtype)
    interval = {"aux_every": 1, "warmup_steps": 0} if method is FishLeg else {"update_every": 1}
    optimizer = method(model, likelihood=likelihood, **interval)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(parts):
                outputs = model(INPUTS.to(dtype))
                optimizer.backward(loss(outputs), outputs, **told)
            optimizer.step()
    return [str(one.message) for one in said]


RIGHT: dict[str, tuple[Likelihood, Loss]] = {
    "cross_entropy": (Categorical(), lambda o: F.cross_entropy(o, CLASSES)),
    "own nll": (Categorical(), lambda o: Categorical().nll(o, CLASSES)),
    "smoothed a little": (Categorical(), lambda o: F.cross_entropy(o, CLASSES, label_smoothing=0.1)),
    "smoothed": (Categorical(label_smoothing=0.5), lambda o: F.cross_entropy(o, CLASSES, label_smoothing=0.5)),
    "summed": (Categorical(reduction="sum"), lambda o: F.cross_entropy(o, CLASSES, reduction="sum")),
    "mixed labels": (
        Categorical(), lambda o: 0.5 * F.cross_entropy(o, CLASSES) + 0.5 * F.cross_entropy(o, CLASSES.flip(0))
    ),
    "padded": (Categorical(), lambda o: F.cross_entropy(o, CLASSES.where(CLASSES > 0, -100))),
    "z-loss": (Categorical(), lambda o: F.cross_entropy(o, CLASSES) + 1e-3 * o.logsumexp(-1).square().mean()),
    "gaussian": (Gaussian(), lambda o: 0.5 * F.mse_loss(o, VALUES, reduction="sum") / 16),
    "mse": (Gaussian(0.5**0.5, reduction="mean"), lambda o: F.mse_loss(o, VALUES)),
    "bernoulli": (Bernoulli(reduction="mean"), lambda o: F.binary_cross_entropy_with_logits(o, BITS)),
    "none that torch knows": (Gaussian(), lambda o: (o - VALUES).abs().mean()),
}  # fmt: skip
WRONG: dict[str, tuple[Likelihood, Loss, str]] = {
    "summed": (Categorical(), lambda o: F.cross_entropy(o, CLASSES, reduction="sum"), "16 times the nll"),
    "a half": (Categorical(), lambda o: 0.5 * F.cross_entropy(o, CLASSES), "0.5 times the nll .* 2 times too short"),
    "a temperature": (Categorical(), lambda o: F.cross_entropy(o / 4, CLASSES), "times the nll of .* too short"),
    "other labels": (Categorical(), lambda o: F.cross_entropy(o[:, :2], CLASSES % 2), "is not the nll of Categorical"),
    "bits": (Categorical(), lambda o: F.binary_cross_entropy_with_logits(o, BITS), "their softmax does not feel"),
    "squares": (Categorical(), lambda o: F.mse_loss(o, VALUES), "their softmax does not feel"),
    "sigma": (Gaussian(2.0), lambda o: 0.5 * F.mse_loss(o, VALUES, reduction="sum") / 16, "4 times the nll"),
    "features": (Gaussian(), lambda o: F.mse_loss(o, VALUES), "averages over 3 features"),
    "weighed": (Categorical(), lambda o: F.cross_entropy(o, CLASSES, torch.arange(1.0, 4)), "weighs classes"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_of_the_likelihoods_own_loss_nothing_is_said(name: str) -> None:
    likelihood, loss = RIGHT[name]
    assert train(likelihood, loss) == []


@pytest.mark.parametrize("name", WRONG)
def test_another_loss_is_told_of_once(name: str) -> None:
    likelihood, loss, words = WRONG[name]
    (said,) = train(likelihood, loss)
    assert re.search(words, said)


def test_probabilities_are_no_logits_and_their_logarithms_are() -> None:
    (said,) = train(Categorical(), lambda p: F.nll_loss(p.log(), CLASSES), last=nn.Softmax)
    assert "Give logits as outputs" in said
    for dtype in (torch.float32, torch.bfloat16):
        assert train(Categorical(), lambda o: F.nll_loss(o, CLASSES), last=nn.LogSoftmax, dtype=dtype) == []
    (said,) = train(Bernoulli(), lambda p: F.binary_cross_entropy(p, BITS, reduction="sum") / 16, last=nn.Sigmoid)
    assert "takes the outputs for probabilities" in said
    by_hand = train(Bernoulli(reduction="mean"), lambda o: F.binary_cross_entropy(o.sigmoid(), BITS))
    assert by_hand == [], "which is what the loss with logits is"


def test_micro_batches_count_together() -> None:
    assert train(Categorical(), lambda o: F.cross_entropy(o, CLASSES) / 4, parts=4) == []
    (said,) = train(Categorical(), lambda o: F.cross_entropy(o, CLASSES), parts=4)
    assert "4 times the nll of Categorical" in said


def test_a_scalers_factor_is_told_or_told_of() -> None:
    def scaled(outputs: Tensor) -> Tensor:
        return 1024 * F.cross_entropy(outputs, CLASSES)

    assert train(Categorical(), scaled, scale=1024.0) == []
    (said,) = train(Categorical(), scaled)
    assert "1.02e+03 times" in said and "scale=" in said


def test_what_does_not_count_is_left_out_on_both_sides() -> None:
    mask = CLASSES > 0
    assert train(Gaussian(), lambda o: Gaussian().nll(o[mask], VALUES[mask]), mask=mask, targets=VALUES) == []


def test_targets_that_are_given_serve_a_loss_that_torch_does_not_know() -> None:
    (said,) = train(Gaussian(), lambda o: 3 * Gaussian().nll(o, VALUES), targets=VALUES)
    assert "3 times the nll of Gaussian" in said


@pytest.mark.parametrize("method", [ExactNaturalGradient, FishLeg])
def test_every_method_with_a_likelihood_tells(method: type[Method]) -> None:
    (said,) = train(Categorical(), WRONG["summed"][1], method=method)
    assert "16 times the nll" in said


def test_a_batch_without_a_gradient_decides_nothing() -> None:
    agreement = Agreement(Gaussian())
    outputs = torch.zeros(4, 2, requires_grad=True)

    def step(targets: Tensor) -> None:
        agreement.reset()
        agreement.see(F.mse_loss(outputs, targets, reduction="sum"), outputs, targets, targets, None, 1.0)
        agreement.conclude()

    step(outputs.detach())  # all of it right, by chance
    with pytest.warns(UserWarning, match="the loss is 8 times"):
        step(torch.ones(4, 2))
    assert agreement.settled


@pytest.mark.parametrize("method", [KFAC, ExactNaturalGradient])
def test_logarithms_of_probabilities_have_the_curvature_of_their_logits(method: type[NaturalGradient]) -> None:
    def curvature(last: nn.Module, loss: Loss) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), last).double()
        optimizer = method(model, likelihood=Categorical(), fisher="exact")
        outputs = model(INPUTS.double())
        optimizer.backward(loss(outputs), outputs)
        optimizer.step()
        return optimizer.curvature_matrices()

    logits = curvature(nn.Identity(), lambda o: F.cross_entropy(o, CLASSES))
    logarithms = curvature(nn.LogSoftmax(-1), lambda o: F.nll_loss(o, CLASSES))
    assert logits.keys() == logarithms.keys()
    for name, matrix in logits.items():
        torch.testing.assert_close(logarithms[name], matrix)
