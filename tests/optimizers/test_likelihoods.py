"""Likelihoods against autograd: the square root is the Hessian's, samples have the model's moments."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers import KFAC, AdaFisher, AdaHessian, Bernoulli, Categorical, CurvatureOptimizer, Gaussian, Likelihood
from optimizers.likelihoods import LearnedGaussian
from tests import dense

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
        lambda model, groups, likelihood: AdaFisher(model, groups, lr=5e-5, ema="reference", max_update=None),
        lambda model, groups, likelihood: AdaHessian(groups, lr=0.02, max_update=None),
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


# -- the loss that is stated, and its curvature -----------------------------------------------------------------------

Loss = Callable[[Tensor, Tensor], Tensor]


def indices(*shape: int, ignored: int | None = None) -> Tensor:
    """Classes 0 to 3; with ``ignored`` about a third of them, the first among these."""
    targets = torch.randint(0, 4, shape)
    if ignored is not None:
        left_out = torch.rand(shape) < 0.3
        left_out.view(-1)[:2] = torch.tensor([True, False])
        targets = targets.masked_fill(left_out, ignored)
    return targets


def probabilities(*shape: int, dim: int = -1) -> Tensor:
    return torch.randn(shape).softmax(dim)


def entropy(dim: int = 1, **options: Any) -> Loss:
    """torch's cross-entropy with the classes in dimension ``dim`` (torch's own is 1)."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.movedim(dim, 1) if tensor.dim() > 1 else tensor

    return lambda o, t: F.cross_entropy(moved(o), moved(t) if t.is_floating_point() else t, **options)


def batchmean(loss: Callable[..., Tensor], factor: float = 1.0, **options: Any) -> Loss:
    return lambda o, t: factor * loss(o, t, reduction="sum", **options) / (o[..., 0].numel() if o.dim() > 1 else len(o))


WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.3], dtype=torch.float64)
POSITIVE = torch.tensor([0.5, 3.0, 1.5], dtype=torch.float64)

#: id: likelihood, shape of the outputs, targets, torch's loss.
STATED: dict[str, tuple[Likelihood, tuple[int, ...], Callable[[], Tensor], Loss]] = {}
for _reduction in ("mean", "sum"):
    for _weight in (None, WEIGHT):
        for _smoothing in (0.0, 0.2):
            _options: dict[str, Any] = {"weight": _weight, "label_smoothing": _smoothing, "reduction": _reduction}
            _id = f"{_reduction}-{'plain' if _weight is None else 'weight'}-{_smoothing}"
            _stated = Categorical(**_options)
            for _name, _shape, _at in (
                ("rows", (5, 4), 1),
                ("positions", (2, 3, 4), 2),
                ("channels", (2, 4, 3), 1),
                ("image", (2, 4, 3, 2), 1),
                ("image_last", (2, 3, 2, 4), 3),
                ("volume", (2, 4, 1, 3, 2), 1),
            ):
                _leading = (*_shape[:_at], *_shape[_at + 1 :])
                STATED[f"{_name}-{_id}"] = (_stated, _shape, lambda s=_leading: indices(*s), entropy(_at, **_options))
                STATED[f"{_name}-ignored-{_id}"] = (
                    _stated, _shape, lambda s=_leading: indices(*s, ignored=-100), entropy(_at, **_options)
                )  # fmt: skip
            STATED[f"class_ignored-{_id}"] = (
                Categorical(ignore_index=2, **_options), (7, 4), lambda: indices(7, ignored=2),
                entropy(ignore_index=2, **_options),
            )  # fmt: skip
            STATED[f"named-{_id}"] = (
                Categorical(dim=1, **_options), (3, 4, 4), lambda: indices(3, 4, ignored=-100), entropy(**_options)
            )  # fmt: skip
            STATED[f"named_last-{_id}"] = (
                Categorical(dim=-1, **_options), (2, 4, 4, 4), lambda: indices(2, 4, 4), entropy(3, **_options)
            )  # fmt: skip
            STATED[f"unbatched-{_id}"] = (_stated, (4,), lambda: indices(), entropy(0, **_options))
            for _name, _likelihood, _shape, _at in (
                ("rows", _stated, (5, 4), 1),
                ("positions", _stated, (2, 3, 4), 2),
                ("channels", Categorical(dim=1, **_options), (2, 4, 3), 1),
                ("image", _stated, (2, 4, 3, 2), 1),
                ("unbatched", _stated, (4,), 0),
            ):
                STATED[f"{_name}-soft-{_id}"] = (
                    _likelihood, _shape, lambda s=_shape, d=_at: probabilities(*s, dim=d), entropy(_at, **_options)
                )  # fmt: skip
for _shape in ((5,), (5, 1), (4, 3), (2, 2, 3), (2, 2, 2, 3)):
    for _name, _maker in (("mean", None), ("sum", None), ("batchmean", batchmean)):
        _bits = partial(F.binary_cross_entropy_with_logits, reduction=_name)
        _bits_pos = partial(F.binary_cross_entropy_with_logits, reduction=_name, pos_weight=POSITIVE)
        _squares = partial(F.mse_loss, reduction=_name)
        _scaled: Loss = lambda o, t, f=_squares: f(o, t) / (2 * 0.7**2)  # noqa: E731
        if _maker is not None:
            _bits = batchmean(F.binary_cross_entropy_with_logits)
            _bits_pos = batchmean(F.binary_cross_entropy_with_logits, pos_weight=POSITIVE)
            _squares, _scaled = batchmean(F.mse_loss), batchmean(F.mse_loss, 1 / (2 * 0.7**2))
        _end = f"{'x'.join(map(str, _shape))}-{_name}"
        _real = lambda s=_shape: torch.randn(s)  # noqa: E731
        STATED[f"bernoulli-{_end}"] = (Bernoulli(reduction=_name), _shape, lambda s=_shape: torch.rand(s), _bits)
        STATED[f"squares-{_end}"] = (Gaussian(0.5**0.5, reduction=_name), _shape, _real, _squares)
        STATED[f"gaussian-{_end}"] = (Gaussian(0.7, reduction=_name), _shape, _real, _scaled)
        if _shape[-1] == 3:
            STATED[f"positive-{_end}"] = (
                Bernoulli(POSITIVE, reduction=_name), _shape, lambda s=_shape: torch.rand(s), _bits_pos
            )  # fmt: skip
        elif _name == "mean":
            STATED[f"positive-{_end}"] = (
                Bernoulli(2.5, reduction="mean"), _shape, lambda s=_shape: torch.rand(s),
                partial(F.binary_cross_entropy_with_logits, pos_weight=torch.tensor(2.5)),
            )  # fmt: skip


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", STATED)
def test_the_loss_is_torchs_and_its_curvature_that_of_weighted_observations(case: str) -> None:
    """Of outputs that are linear in the parameters: their GGN is the Hessian."""
    likelihood, shape, make, loss = STATED[case]
    targets = make()
    parameters = torch.randn(3, requires_grad=True)
    slopes = torch.randn(*shape, 3)
    outputs = slopes @ parameters
    torch.testing.assert_close(likelihood.nll(outputs, targets), loss(outputs, targets), rtol=1e-12, atol=1e-12)
    expected = dense.hessian(loss(outputs, targets), [parameters])

    seen, weights = likelihood.observations(outputs, targets), likelihood.weights(outputs, targets)
    assert weights.shape == seen.shape[:-1] and not weights.requires_grad
    assert seen.data_ptr() == outputs.data_ptr(), "a view"
    jacobian = torch.stack([torch.autograd.grad(o, parameters, retain_graph=True)[0] for o in seen.flatten()])
    root = likelihood.hessian_sqrt(seen)
    rows = torch.einsum("...fr,...fp->...rp", root, jacobian.view(*seen.shape, 3))
    found = torch.einsum("n,nrp,nrq->pq", weights.flatten(), *2 * [rows.reshape(weights.numel(), -1, 3)])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

    counted = likelihood.counted(outputs, targets)
    if counted is not None:
        assert counted.dtype == torch.bool and counted.shape == weights.shape
        assert not weights[~counted].any() and (weights[counted] > 0).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "likelihood", [Categorical(), Categorical(ignore_index=1), Bernoulli(), Bernoulli(2.0), Gaussian(0.7)],
    ids=["categorical", "class_ignored", "bernoulli", "pos_weight", "gaussian"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(3,), (1, 3), (1, 2, 3)], ids=str)
def test_drawn_scores_have_the_root_as_second_moment(likelihood: Likelihood, shape: tuple[int, ...]) -> None:
    """Of many draws, in the form of the observations; an ignored class is drawn like any other."""
    seen = likelihood.observations(torch.randn(shape))
    root = likelihood.hessian_sqrt(seen)
    many = seen.expand(40_000 if len(seen) == 1 else len(seen), *seen.shape[1:])
    if len(seen) > 1:
        many = seen.repeat(40_000, *[1] * (seen.dim() - 1))
    scores = likelihood.score(many, likelihood.sample(many, torch.Generator().manual_seed(0)))
    found = torch.einsum("k...f,k...g->k...fg", scores, scores).view(-1, *root.shape[:-1], seen.shape[-1]).mean(0)
    torch.testing.assert_close(found, root @ root.mT, rtol=0, atol=0.03 * float((root @ root.mT).abs().max()))


@pytest.mark.usefixtures("float64")
def test_scores_of_all_classes_add_up_to_the_hessian() -> None:
    outputs = torch.randn(6, 4)
    likelihood, p = Categorical(ignore_index=0, weight=WEIGHT, label_smoothing=0.1), outputs.softmax(-1)
    scores = torch.stack([likelihood.score(outputs, torch.full((6,), c)) for c in range(4)])
    root = likelihood.hessian_sqrt(outputs)
    torch.testing.assert_close(torch.einsum("nc,cnf,cng->nfg", p, scores, scores), root @ root.mT)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.usefixtures("float64")
def test_the_learned_gaussian_reduces_alike(reduction: Any) -> None:
    likelihood = LearnedGaussian(0.7, reduction=reduction)
    outputs, targets = torch.randn(6, 3), torch.randn(6, 3)
    density = torch.distributions.Normal(outputs, likelihood.log_sigma.exp()).log_prob(targets)
    each = -(density + math.log(math.sqrt(2 * math.pi))).sum(-1)
    torch.testing.assert_close(likelihood.nll(outputs, targets), likelihood.weights(outputs, targets) @ each)


def test_without_targets_all_weigh_the_same() -> None:
    assert torch.equal(Categorical().weights(torch.randn(2, 3, 5)), torch.full((2, 3), 1 / 6))
    assert torch.equal(Categorical(reduction="sum").weights(torch.randn(5)), torch.ones(1))
    assert torch.equal(Categorical().weights(torch.randn(2, 5, 3, 1)), torch.full((2, 3, 1), 1 / 6))
    assert torch.equal(Gaussian(reduction="mean").weights(torch.randn(4, 5)), torch.full((4,), 1 / 20))
    assert torch.equal(Gaussian().weights(torch.randn(4)), torch.full((4,), 1 / 4))


def test_nothing_counts_and_nothing_is_there() -> None:
    """As torch: the mean of nothing is not a number; no weight is."""
    outputs, targets = torch.randn(3, 4), torch.full((3,), -100)
    assert Categorical().nll(outputs, targets).isnan()
    assert torch.equal(Categorical().weights(outputs, targets), torch.zeros(3))
    for likelihood in (Categorical(), Bernoulli(), Gaussian(reduction="mean")):
        assert likelihood.weights(outputs[:0]).shape == (0,)
        assert likelihood.observations(outputs[:0]).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    outputs = (8 * torch.randn(300, 40)).to(dtype)
    classes = torch.randint(0, 40, (300,))
    weight = torch.rand(40) + 0.1
    for likelihood, targets in (
        (Categorical(weight=weight, label_smoothing=0.1), classes),
        (Categorical(weight=weight), torch.rand(300, 40)),
        (Bernoulli(weight), torch.rand(300, 40)),
        (Bernoulli(reduction="sum"), torch.randint(0, 2, (300, 40)).bool()),
        (Gaussian(reduction="sum"), torch.randn(300, 40, dtype=dtype)),
    ):
        expected = likelihood.nll(outputs.float(), targets)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                nll, weights = likelihood.nll(outputs, targets), likelihood.weights(outputs, targets)
            assert nll.dtype == weights.dtype == torch.float32
            torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)


def test_integer_and_boolean_bits_are_taken() -> None:
    outputs = torch.randn(5, 2)
    bits = torch.randint(0, 2, (5, 2))
    expected = Bernoulli().nll(outputs, bits.float())
    assert torch.equal(Bernoulli().nll(outputs, bits), expected)
    assert torch.equal(Bernoulli().nll(outputs, bits.bool()), expected)
    assert torch.equal(Categorical().nll(outputs, bits[:, 0].int()), Categorical().nll(outputs, bits[:, 0]))


Z, LONG = torch.zeros, torch.long


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Gaussian().nll(Z(8, 1), Z(8)), r"must have the outputs' shape \[8, 1\] for Gaussian, got \[8\]"),
        (lambda: Gaussian().nll(Z(8), Z(8, 1)), r"must have the outputs' shape \[8\] for Gaussian, got \[8, 1\]"),
        (lambda: Bernoulli().nll(Z(8, 1), Z(8)), "targets must have the outputs' shape"),
        (lambda: Bernoulli().weights(Z(8, 1), Z(8)), "targets must have the outputs' shape"),
        (lambda: Gaussian().counted(Z(8, 1), Z(8)), "targets must have the outputs' shape"),
        (lambda: LearnedGaussian().nll(Z(8, 1), Z(8)), "targets must have the outputs' shape"),
        (lambda: Gaussian().nll(Z(2), 1.0), "got float"),
        (lambda: Gaussian().nll(Z(()), Z(())), "got a single number"),
        (lambda: Categorical().observations(Z(())), "got a single number"),
        (lambda: Bernoulli().observations(Z(3, dtype=LONG)), "outputs must be floating point numbers"),
        (lambda: Categorical().nll(Z(8, 3), Z(7, dtype=LONG)), r"\[7\] do not fit outputs \[8, 3\].*dim=\.\.\."),
        (lambda: Categorical().nll(Z(3, 8), Z(8, dtype=LONG)), r"targets \[8\] do not fit outputs \[3, 8\]"),
        (lambda: Categorical().counted(Z(2, 3, 4), Z(3, 4, dtype=LONG)), "do not fit outputs"),
        (lambda: Categorical(dim=1).nll(Z(2, 3, 4), Z(2, 3, dtype=LONG)), "do not fit outputs .* with dim=1"),
        (lambda: Categorical(dim=0).nll(Z(2, 3), Z(3, dtype=LONG)), "dim must be a dimension of the outputs"),
        (lambda: Categorical(dim=4).observations(Z(2, 3)), "dim must be a dimension of the outputs"),
        (lambda: Categorical().nll(Z(8, 3), Z(8)), r"convert class indices with targets.long\(\)"),
        (lambda: Categorical().nll(Z(8, 3), Z(8, 3, dtype=torch.bool)), "targets must be class indices"),
        (lambda: Categorical().nll(Z(8, 3), [1] * 8), "targets must be a tensor"),
        (lambda: Categorical(ignore_index=1).nll(Z(8, 3), Z(8, 3)), "ignore_index=1 has no meaning"),
        (lambda: Categorical(weight=[1, 2]).nll(Z(8, 3), Z(8, dtype=LONG)), "one entry for each of the 3 classes"),
        (lambda: Categorical(weight=[1, 2, 3]).weights(Z(8, 3)), "targets must be given"),
        (lambda: Bernoulli(2.0).weights(Z(8, 3)), "targets must be given"),
        (lambda: Bernoulli(torch.ones(2)).nll(Z(8, 3), Z(8, 3)), r"broadcast to the outputs \[8, 3\]"),
        (lambda: Bernoulli(torch.ones(1, 3)).nll(Z(3), Z(3)), r"broadcast to the outputs \[3\]"),
        (lambda: Categorical(weight=[1, -2]), "weight must be numbers that are not negative"),
        (lambda: Categorical(weight=torch.ones(2, 2)), "weight must be one number a class"),
        (lambda: Bernoulli(0.0), "pos_weight must be positive numbers"),
        (lambda: Gaussian(reduction="none"), "reduction must be one of batchmean, mean, sum"),  # type: ignore[arg-type]
        (lambda: LearnedGaussian(reduction="none"), "reduction must be one of"),  # type: ignore[arg-type]
        (lambda: Categorical(reduction="batchmean"), "reduction must be one of mean, sum"),  # type: ignore[arg-type]
        (lambda: Categorical(dim=1.5), "dim must be an integer"),  # type: ignore[arg-type]
        (lambda: Categorical(ignore_index=None), "ignore_index must be an integer"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_what_does_not_fit_is_a_sentence(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("outputs", [(torch.zeros(2, 3),), {"logits": torch.zeros(2, 3)}, None], ids=type)
@pytest.mark.parametrize("likelihood", CASES, ids=lambda c: type(c).__name__)
def test_outputs_must_be_one_tensor(likelihood: Likelihood, outputs: Any) -> None:
    for call in (likelihood.nll, likelihood.observations, likelihood.counted, likelihood.weights):
        with pytest.raises(TypeError, match=r"must be one tensor \[batch, ..., features\], such as outputs.logits or"):
            call(outputs, torch.zeros(2, 3))
