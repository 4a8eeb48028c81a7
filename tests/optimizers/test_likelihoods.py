"""Likelihoods against autograd: the square root is the Hessian's, samples have the model's moments."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from optimizers import KFAC, AdaFisher, AdaHessian, Bernoulli, Categorical, CurvatureOptimizer, Gaussian, Likelihood
from optimizers.likelihoods import LearnedGaussian

CASES = [Categorical(), Bernoulli(), Gaussian(), Gaussian(sigma=0.3), LearnedGaussian(sigma=0.6).double()]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("likelihood", CASES, ids=lambda c: type(c).__name__)
def test_hessian_sqrt_is_the_hessian_of_the_nll(likelihood: Likelihood) -> None:
    outputs = torch.randn(1, 5)
    targets = likelihood.sample(outputs, torch.Generator().manual_seed(0))
    hessian = torch.autograd.functional.hessian(lambda o: likelihood.nll(o, targets), outputs).view(5, 5)
    root = likelihood.hessian_sqrt(outputs)[0]
    torch.testing.assert_close(root @ root.T, hessian, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("likelihood", CASES, ids=lambda c: type(c).__name__)
def test_sampled_gradients_have_the_fisher_as_covariance(likelihood: Likelihood) -> None:
    outputs = torch.randn(1, 3).expand(40_000, 3).clone().requires_grad_()
    targets = likelihood.sample(outputs, torch.Generator().manual_seed(0))
    (g,) = torch.autograd.grad(likelihood.nll(outputs, targets) * len(outputs), outputs)
    root = likelihood.hessian_sqrt(outputs[:1])[0]
    fisher = root @ root.T
    torch.testing.assert_close(g.T @ g / len(g), fisher, rtol=0, atol=0.03 * float(fisher.abs().max()))
    assert float(g.mean(0).abs().max()) < 0.03 * float(fisher.abs().max().sqrt())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("likelihood", CASES, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("shape", [(7, 5), (7, 2, 5)], ids=str)
def test_score_is_the_gradient_of_the_nll(likelihood: Likelihood, shape: tuple[int, ...]) -> None:
    outputs = torch.randn(*shape, requires_grad=True)
    targets = likelihood.sample(outputs)
    (g,) = torch.autograd.grad(likelihood.nll(outputs, targets) * outputs[..., 0].numel(), outputs)
    torch.testing.assert_close(likelihood.score(outputs, targets), g)


@pytest.mark.parametrize("likelihood", CASES, ids=lambda c: type(c).__name__)
def test_draws_do_not_depend_on_how_the_batch_is_cut(likelihood: Likelihood) -> None:
    """Micro-batches one after another, and ranks side by side, draw what one batch would."""
    outputs = torch.randn(12, 33)
    whole = likelihood.sample(outputs, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(whole, torch.cat([likelihood.sample(part, generator) for part in outputs.split([2, 7, 3])]))
    ranks = [
        likelihood.sample(part, torch.Generator().manual_seed(3), rank=rank, world_size=3)
        for rank, part in enumerate(outputs.chunk(3))
    ]
    assert torch.equal(whole, torch.cat(ranks))


def test_categorical_takes_sequences_and_ignores_padding() -> None:
    outputs, targets = torch.randn(2, 3, 5), torch.tensor([[1, 2, -100], [0, 4, 3]])
    kept = targets.flatten() != -100
    expected = -outputs.flatten(0, 1).log_softmax(-1)[kept, targets.flatten()[kept]].mean()
    torch.testing.assert_close(Categorical().nll(outputs, targets), expected)
    assert Categorical().sample(outputs).shape == (2, 3)


@pytest.mark.usefixtures("float64")
def test_the_learned_gaussian_is_the_normal_density() -> None:
    """Up to its constant, and with the gradient of sigma's logarithm: features (1 - mean squared error / sigma²)."""
    likelihood = LearnedGaussian(sigma=0.7)
    outputs, targets = torch.randn(6, 2, 3, requires_grad=True), torch.randn(6, 2, 3)
    density = torch.distributions.Normal(outputs, likelihood.log_sigma.exp()).log_prob(targets).sum(-1)
    nll = likelihood.nll(outputs, targets)
    torch.testing.assert_close(nll, -density.mean() - 3 * math.log(math.sqrt(2 * math.pi)))
    (g,) = torch.autograd.grad(nll, likelihood.log_sigma)
    torch.testing.assert_close(g, 3 * (1 - (outputs - targets).detach().square().mean() / 0.7**2))
    assert [name for name, _ in likelihood.named_parameters()] == ["log_sigma"]


@pytest.mark.parametrize(
    "build",
    [
        lambda model, groups, likelihood: torch.optim.SGD(groups, lr=0.02),
        lambda model, groups, likelihood: torch.optim.Adam(groups, lr=0.02),
        lambda model, groups, likelihood: AdaFisher(model, groups, lr=5e-5),
        lambda model, groups, likelihood: AdaHessian(groups, lr=0.02),
        lambda model, groups, likelihood: KFAC(model, groups, lr=0.02, fallback_lr=0.02, likelihood=likelihood),
    ],
    ids=["sgd", "adam", "adafisher", "adahessian", "kfac"],
)
def test_any_optimizer_learns_sigma(build: Callable[..., torch.optim.Optimizer]) -> None:
    model, likelihood = nn.Sequential(nn.Linear(3, 2)), LearnedGaussian(sigma=1.5)
    groups = [{"params": list(model.parameters())}, {"params": list(likelihood.parameters()), "lr": 0.02}]
    optimizer = build(model, groups, likelihood)
    x = torch.randn(128, 3)
    targets = x[:, :2] + 0.3 * torch.randn(128, 2)
    for _ in range(300):
        optimizer.zero_grad()
        outputs = model(x)
        loss = likelihood.nll(outputs, targets)
        if isinstance(optimizer, CurvatureOptimizer):
            optimizer.backward(loss, outputs)
        else:
            loss.backward()
        optimizer.step()
    assert float(likelihood.sigma) == pytest.approx(0.3, rel=0.15)


def test_bad_arguments_are_sentences() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1.0"):
        Categorical(label_smoothing=1.0)
    with pytest.raises(ValueError, match="sigma must be a positive number, got 0"):
        Gaussian(sigma=0)
    with pytest.raises(ValueError, match="sigma must be a positive number, got nan"):
        LearnedGaussian(sigma=float("nan"))
