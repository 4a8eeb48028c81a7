"""FishLeg against dense matrices: Q, its gradients, the products with the Fisher matrix, whole steps, and the limit."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers.fishleg import FishLeg, LearnedDiagonal, LearnedInverse, LearnedKronecker
from optimizers.likelihoods import Bernoulli, Categorical, Gaussian, LearnedGaussian, Likelihood
from tests import dense
from tests.optimizers.problems import PROBLEMS, EmbeddingModel, conv_net, images, mlp, tokens

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear_without_bias": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "linear_shared": (lambda: nn.Linear(4, 3), (5, 2, 4)),
    "conv": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (5, 2, 6, 6)),
    "conv_grouped": (lambda: nn.Conv2d(4, 6, 2, groups=2), (5, 4, 4, 4)),
    "conv_without_bias": (lambda: nn.Conv2d(2, 3, 2, bias=False), (5, 2, 4, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (5, 2, 7)),
    "conv_transpose": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), (5, 2, 3, 3)),
    "batchnorm": (lambda: nn.BatchNorm2d(3), (5, 3, 4, 4)),
    "layernorm": (lambda: nn.LayerNorm(4), (5, 2, 4)),
    "embedding": (lambda: nn.Embedding(4, 3), (5, 2)),
}


def layer_and_input(name: str) -> tuple[nn.Module, Tensor]:
    factory, shape = LAYERS[name]
    layer = factory()
    return layer, torch.randint(0, 4, shape) if name == "embedding" else torch.randn(shape)


def shaken(optimizer: FishLeg) -> None:
    """Factors as they may be after long learning: nothing symmetric, nothing diagonal."""
    for block in optimizer.blocks.values():
        for tensor in block.factors.values():
            tensor.add_(torch.randn_like(tensor), alpha=0.3)
        block.refresh()


def as_rows(layer: nn.Module, tensors: list[Tensor]) -> Tensor:
    """Tensors shaped like (weight, bias) in the order of the dense matrices."""
    flat = dense.flatten(tensors)
    affine = isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d))
    return flat[dense.as_matrix_order(layer)] if affine else flat


def train(optimizer: FishLeg, model: nn.Module, batch: tuple[Tensor, Tensor], likelihood: Likelihood) -> None:
    optimizer.zero_grad()
    outputs = model(batch[0])
    optimizer.backward(likelihood.nll(outputs, batch[1]), outputs)
    optimizer.step()


def vector_of(optimizer: FishLeg) -> dict[Tensor, Tensor]:
    """A random direction over all covered parameters."""
    return {p: torch.randn_like(p) for block in optimizer.blocks.values() for p in block.layer.parameters}


def fisher_product(optimizer: FishLeg, v: dict[Tensor, Tensor], inputs: list[Tensor], seed: int) -> Tensor:
    """The optimizer's ``F v``, flattened, at the targets that a seed draws."""
    with torch.no_grad():  # as in step()
        found, count = optimizer._multiply(v, [((x,), {}) for x in inputs], seed)
    assert float(count) == sum(x[..., 0].numel() if x.dim() < 4 else len(x) for x in inputs)
    return dense.flatten(found)


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_multiplies_the_gradient_by_the_dense_inverse(name: str) -> None:
    layer, x = layer_and_input(name)
    model = nn.Sequential(layer, nn.Flatten())
    optimizer = FishLeg(model, lr=1.0, momentum=0.0, weight_decay=0.0, max_update=None, likelihood=Gaussian())
    shaken(optimizer)
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer.backward(model(x).square().sum())
    gradients = [p.grad.clone() for p in layer.parameters()]
    optimizer.step()
    moved = as_rows(layer, [b - p.detach() for b, p in zip(before, layer.parameters(), strict=True)])
    inverse = dense.learned_inverse(optimizer.blocks["0"].factors)
    torch.testing.assert_close(moved, inverse @ as_rows(layer, gradients), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(optimizer.inverse_matrices()["0"], inverse, rtol=1e-10, atol=1e-10)
    assert float(torch.linalg.eigvalsh(inverse).min()) > 0
    assert optimizer.curvature_matrices() == {}, "an inverse is no curvature"


def test_a_vocabulary_is_wider_than_the_widest_factor_unless_asked_for() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6144, 16), nn.Linear(16, 9000))
        inner, head = FishLeg(model, likelihood=Gaussian()).blocks.values()
    assert set(inner.factors) == {"L", "R", "A"} and set(head.factors) == {"L", "A"}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["linear", "conv_grouped", "batchnorm"])
@pytest.mark.parametrize("limit", [None, 3, 1])
def test_gradients_of_the_factors_are_those_of_autograd(name: str, limit: int | None) -> None:
    layer, _ = layer_and_input(name)
    optimizer = FishLeg(nn.Sequential(layer), max_factor_dim=limit, likelihood=Gaussian())
    shaken(optimizer)
    (block,) = optimizer.blocks.values()
    kinds = {"linear": {None: "LRA", 3: "RA", 1: "A"}, "conv_grouped": {None: "LRA", 3: "RA", 1: "A"}}
    assert set(block.factors) == set(kinds.get(name, {}).get(limit, "D"))
    factors = {key: t.clone().requires_grad_() for key, t in block.factors.items()}
    u, d = (torch.randn_like(block.factors["D"] if name == "batchnorm" else block.factors["A"]) for _ in range(2))
    product = d.flatten() @ dense.learned_inverse(factors) @ u.flatten()
    expected = dict(zip(factors, torch.autograd.grad(product, list(factors.values())), strict=True))
    v, gradients = block.vjp(u)
    found = gradients(d)
    torch.testing.assert_close(v, block.apply(u), rtol=1e-12, atol=1e-12)
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-10, atol=1e-10, msg=key)


@pytest.mark.usefixtures("float64")
def test_wide_layers_are_filled_up_and_the_filling_stays_out() -> None:
    """70 columns are kept as 72; what is learned is that of the 70."""
    layer, damping = nn.Linear(69, 2), 0.4
    model, x = nn.Sequential(layer), torch.randn(5, 69)
    optimizer = FishLeg(
        model, lr=0.01, damping=damping, warmup_steps=1, aux_every=1, aux_lr=0.01, likelihood=Gaussian()
    )
    for _ in range(4):
        train(optimizer, model, (x, torch.zeros(5, 2)), Gaussian())
    factors = optimizer.blocks["0"].factors
    assert factors["A"].shape == (1, 2, 72) and optimizer.updates == 2
    assert torch.equal(factors["L"][:, 70:], torch.eye(72)[None, 70:]) and not factors["A"][..., 70:].any()
    assert torch.equal(factors["L"][:, :, 70:], torch.eye(72)[None, :, 70:])
    cut = {"L": factors["L"][:, :70, :70], "R": factors["R"], "A": factors["A"][..., :70]}
    torch.testing.assert_close(optimizer.inverse_matrices()["0"], dense.learned_inverse(cut), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(cut["L"], torch.eye(70))


@pytest.mark.usefixtures("float64")
def test_the_first_steps_are_those_of_sgd() -> None:
    """Q is init_scale I until the first auxiliary update; damping sets it where init_scale does not."""
    for options, rate in (({"damping": 0.25}, 4.0), ({"damping": 0.25, "init_scale": 3.0}, 3.0)):
        torch.manual_seed(0)
        models, batch = [conv_net(), conv_net()], images()
        models[1].load_state_dict(models[0].state_dict())
        optimizer = FishLeg(
            models[0], lr=0.01, momentum=0.0, max_update=None, weight_decay=0.0, aux_every=3, likelihood=Categorical(),
            **options,
        )  # fmt: skip
        sgd = torch.optim.SGD(models[1].parameters(), lr=0.01 * rate)
        for step in range(4):
            train(optimizer, models[0], batch, Categorical())
            sgd.zero_grad()
            Categorical().nll(models[1](batch[0]), batch[1]).backward()
            sgd.step()
            same = torch.allclose(
                dense.flatten(list(models[0].parameters())), dense.flatten(list(models[1].parameters())), rtol=1e-10
            )
            assert same == (step < 3)
            assert optimizer.updates == max(0, step - 2)


# -- products with the Fisher matrix -----------------------------------------------------------------------------------


def smooth_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 2, 3, stride=2), nn.GroupNorm(1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3), nn.Tanh(),
        nn.Linear(3, 4),
    )  # fmt: skip


CASES = [Categorical(), Bernoulli(), Gaussian(sigma=0.6)]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("likelihood", CASES, ids=lambda c: type(c).__name__)
def test_the_antithetic_product_is_that_of_the_hessian_at_sampled_targets(likelihood: Likelihood) -> None:
    model, (inputs, _) = smooth_net(), images()
    optimizer = FishLeg(model, likelihood=likelihood)
    v = vector_of(optimizer)
    params = list(v)
    found = fisher_product(optimizer, v, [inputs], seed=3)
    targets = likelihood.sample(model(inputs), torch.Generator().manual_seed(3))
    hessian = dense.hessian(likelihood.nll(model(inputs), targets), params)
    expected = hessian @ dense.flatten(list(v.values()))
    assert float((found - expected).norm()) < 1e-5 * float(expected.norm())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("likelihood", CASES, ids=lambda c: type(c).__name__)
def test_the_rank_one_product_is_that_of_the_mean_gradient(likelihood: Likelihood) -> None:
    model, (inputs, _) = smooth_net(), images()
    optimizer = FishLeg(model, product="rank_one", likelihood=likelihood)
    v = vector_of(optimizer)
    found = fisher_product(optimizer, v, [inputs], seed=3)
    targets = likelihood.sample(model(inputs), torch.Generator().manual_seed(3))
    grads = dense.per_example_gradients(model, likelihood.nll, inputs, targets, list(v))
    mean = grads.mean(0)
    expected = len(inputs) * mean * (mean @ dense.flatten(list(v.values())))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("product", ["antithetic", "rank_one"])
@pytest.mark.parametrize("likelihood", CASES, ids=lambda c: type(c).__name__)
def test_products_average_to_the_dense_fisher(product: str, likelihood: Likelihood) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))
    inputs = torch.randn(4, 3)
    optimizer = FishLeg(model, product=product, likelihood=likelihood)
    v = vector_of(optimizer)
    params = list(v)
    fisher = dense.gauss_newton(model, likelihood.nll, inputs, likelihood.sample(model(inputs)), params)
    expected = fisher @ dense.flatten(list(v.values()))
    draws = torch.stack([fisher_product(optimizer, v, [inputs], seed) for seed in range(600)])
    deviation = (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5 + 1e-9)
    assert float(deviation.abs().max()) < 4.5, "standard errors"
    assert float((draws.mean(0) - expected).norm()) < 0.25 * float(expected.norm())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("product", ["antithetic", "rank_one"])
def test_micro_batches_and_sequences_weigh_observations(product: str) -> None:
    """Two calls of unlike size are one call of the joint batch; a sequence's positions are observations each."""
    likelihood = Categorical()
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)), torch.randn(6, 2, 3)
    optimizer = FishLeg(model, product=product, likelihood=likelihood)
    v = vector_of(optimizer)
    whole, parts = (fisher_product(optimizer, v, inputs, seed=1) for inputs in ([x], [x[:2], x[2:]]))
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-9)
    if product == "antithetic":
        targets = likelihood.sample(model(x), torch.Generator().manual_seed(1))
        hessian = dense.hessian(likelihood.nll(model(x), targets), list(v))
        torch.testing.assert_close(whole, hessian @ dense.flatten(list(v.values())), rtol=1e-5, atol=1e-7)


WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.3], dtype=torch.float64)
PADDED = torch.tensor([[0, 1, -100, 2], [3, -100, -100, -100], [2, 2, 0, -100]])

#: id: model of linear outputs, inputs, targets, likelihood, loss as users write it.
WRITTEN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Tensor, Likelihood, Callable[..., Tensor]]] = {
    "one_number": (
        lambda: nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), (6, 5), torch.arange(6.0), Gaussian(0.5**0.5), F.mse_loss
    ),
    "mean_of_features": (
        lambda: nn.Linear(5, 3), (2, 5), torch.ones(2, 3), Gaussian(0.5**0.5, reduction="mean"), F.mse_loss
    ),
    "sum": (
        lambda: nn.Linear(5, 3), (2, 5), torch.ones(2, 3), Gaussian(0.5**0.5, reduction="sum"),
        lambda o, t: F.mse_loss(o, t, reduction="sum"),
    ),
    "pos_weight": (
        lambda: nn.Linear(5, 3), (2, 5), torch.eye(3)[:2], Bernoulli(2.0, reduction="mean"),
        lambda o, t: F.binary_cross_entropy_with_logits(o, t.to(o), pos_weight=torch.tensor(2.0)),
    ),
    "rows_ignored": (lambda: nn.Linear(5, 4), (12, 5), PADDED.flatten(), Categorical(), F.cross_entropy),
    "padding": (
        lambda: nn.Linear(5, 4), (3, 4, 5), PADDED, Categorical(),
        lambda o, t: F.cross_entropy(o.view(-1, 4), t.view(-1)),
    ),
    "shifted": (
        lambda: nn.Linear(5, 4), (3, 4, 5), PADDED, Categorical(),
        lambda o, t: F.cross_entropy(o[:, :-1].reshape(-1, 4), t[:, 1:].flatten()),
    ),
    "image": (
        lambda: nn.Conv2d(2, 4, 1), (3, 2, 2, 2), PADDED.view(3, 2, 2), Categorical(weight=WEIGHT),
        lambda o, t: F.cross_entropy(o, t, weight=WEIGHT),
    ),
    "channels_of_a_signal": (
        lambda: nn.Conv1d(2, 4, 1), (3, 2, 4), PADDED, Categorical(dim=1), F.cross_entropy
    ),
    "smooth": (
        lambda: nn.Linear(5, 4), (12, 5), PADDED.flatten(), Categorical(0.2, weight=WEIGHT),
        lambda o, t: F.cross_entropy(o, t, weight=WEIGHT, label_smoothing=0.2),
    ),
    "class_ignored": (
        lambda: nn.Linear(5, 4), (12, 5), PADDED.flatten().clamp(min=0), Categorical(ignore_index=0),
        lambda o, t: F.cross_entropy(o, t, ignore_index=0),
    ),
}  # fmt: skip


def written(case: str, **options: Any) -> tuple[FishLeg, dict[Tensor, Tensor], Tensor, list[Any]]:
    """After a backward pass: the optimizer, a direction v, the Hessian of the loss times v, the passes."""
    make, shape, targets, likelihood, loss = WRITTEN[case]
    model = make()
    optimizer = FishLeg(model, likelihood=likelihood, **options)
    optimizer.renew()
    targets = targets.double() if targets.is_floating_point() else targets
    outputs = model(torch.randn(shape))
    v = vector_of(optimizer)
    expected = dense.hessian(loss(outputs, targets), list(v)) @ dense.flatten(list(v.values()))
    optimizer.backward(loss(outputs, targets), outputs)
    return optimizer, v, expected, list(optimizer._inputs.calls)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", WRITTEN)
def test_the_fisher_matrix_is_the_gauss_newton_matrix_of_the_loss_as_it_is_written(case: str) -> None:
    """Of outputs that are linear in the parameters it is the Hessian at any targets: one draw gives it."""
    optimizer, v, expected, calls = written(case)
    with torch.no_grad():
        found, _ = optimizer._multiply(v, calls, 1)
    torch.testing.assert_close(dense.flatten(found), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", ["image", "pos_weight", "mean_of_features", "shifted"])
def test_products_of_rank_one_average_to_it(case: str) -> None:
    optimizer, v, expected, calls = written(case, product="rank_one")
    with torch.no_grad():
        draws = torch.stack([dense.flatten(optimizer._multiply(v, calls, seed)[0]) for seed in range(1500)])
    deviation = (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5 + 1e-9)
    assert float(deviation.abs().max()) < 4.5, "standard errors"
    assert float((draws.mean(0) - expected).norm()) < 0.25 * float(expected.norm())


@pytest.mark.usefixtures("float64")
def test_the_targets_of_a_loader_say_what_counts() -> None:
    model, x, targets = nn.Linear(5, 4), torch.randn(12, 5), PADDED.flatten()
    likelihood = Categorical(weight=WEIGHT)
    optimizer = FishLeg(model, aux_every=1, lr=0.0, aux_loader=[(x, targets)], likelihood=likelihood)
    only = FishLeg(model, aux_every=1, lr=0.0, likelihood=likelihood)
    for each in (optimizer, only):
        each.renew()
        outputs = model(x)
        each.backward(likelihood.nll(outputs, targets), outputs)
        each.step()
        each.zero_grad()
    assert optimizer.updates == only.updates == 1
    assert optimizer.diagnostics()["fishleg/residual"] == only.diagnostics()["fishleg/residual"]


def test_weights_that_need_targets_say_so() -> None:
    model, x, targets = nn.Linear(5, 4), torch.randn(12, 5), PADDED.flatten()
    optimizer = FishLeg(model, aux_every=1, likelihood=Categorical(weight=WEIGHT))
    optimizer.renew()
    Categorical(weight=WEIGHT).nll(model(x), targets).backward()
    with pytest.raises(ValueError, match="targets must be given"):
        optimizer.step()
    signal, targets = nn.Conv1d(2, 4, 1), torch.zeros(3, 4, dtype=torch.long)
    optimizer = FishLeg(signal, likelihood=Categorical())
    optimizer.renew()
    outputs = signal(torch.randn(3, 2, 4))
    with pytest.raises(ValueError, match=r"the loss has its classes in dimension 1 .* use Categorical\(dim=1\)"):
        optimizer.backward(F.cross_entropy(outputs, targets), outputs)


@pytest.mark.parametrize("product", ["antithetic", "rank_one"])
def test_an_auxiliary_update_leaves_no_trace(product: str) -> None:
    """Weights, BatchNorm's statistics, gradients and the random state are what they were, bit for bit."""
    model = nn.Sequential(conv_net(), nn.Dropout(0.5), nn.Linear(4, 4))
    inputs, targets = images()
    optimizer = FishLeg(model, lr=0.0, product=product, aux_every=1, likelihood=Categorical())
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(F.cross_entropy(model(inputs), targets))
        state = {key: value.clone() for key, value in model.state_dict().items()}
        gradients = [p.grad.clone() for p in model.parameters()]
        random = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert optimizer.updates == 1
    assert not any(torch.equal(b.factors[k], torch.zeros(())) for b in optimizer.blocks.values() for k in b.factors)


@pytest.mark.usefixtures("float64")
def test_dropout_has_the_same_masks_in_all_passes() -> None:
    likelihood = Categorical()
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 4))
    optimizer = FishLeg(model, likelihood=likelihood)
    v, x = vector_of(optimizer), torch.randn(6, 5)
    found = fisher_product(optimizer, v, [x], seed=2)
    with torch.random.fork_rng():
        outputs = model(x)  # the masks that come next
    targets = likelihood.sample(outputs, torch.Generator().manual_seed(2))
    expected = dense.hessian(likelihood.nll(outputs, targets), list(v)) @ dense.flatten(list(v.values()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_weights_come_back_from_an_evaluation_that_fails() -> None:
    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(3, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 4:  # training, sampling, ahead, and then
                raise RuntimeError("out of memory")
            return self.layer(x)

    model = Fragile()
    optimizer = FishLeg(model, aux_every=1, likelihood=Gaussian())
    optimizer.renew()
    before = model.layer.weight.detach().clone()
    loss = model(torch.randn(4, 3)).square().mean()
    optimizer.backward(loss)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert torch.equal(model.layer.weight, before) and not optimizer._inputs.paused


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("u", ["gradient", "gaussian"])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_steps_by_hand(u: str, preconditioned: bool) -> None:
    """Four steps with two updates each from the second on: dense matrices, torch's Adam, a Hessian by autograd."""
    lr, beta, decay, damping, aux_lr = 0.1, 0.8, 0.05, 0.3, 0.02
    likelihood = Categorical()
    model, batch = smooth_net(), images()
    layers = {"0": model[0], "1": model[1], "4": model[4], "6": model[6]}
    optimizer = FishLeg(
        model, lr=lr, momentum=beta, weight_decay=decay, damping=damping, aux_lr=aux_lr, aux_every=1, aux_steps=2,
        u=u, precondition_aux=preconditioned, likelihood=likelihood, seed=5, max_update=None,
    )  # fmt: skip
    shaken(optimizer)
    factors = {
        name: {key: t.clone().requires_grad_() for key, t in block.factors.items()}
        for name, block in optimizer.blocks.items()
    }
    adam = torch.optim.Adam([t for f in factors.values() for t in f.values()], lr=aux_lr)
    params = list(model.parameters())
    shadow = smooth_net()
    shadow.load_state_dict(model.state_dict())
    order = torch.cat(  # from parameters one after the other to the dense matrices' order
        [
            sum(p.numel() for n, p in shadow.named_parameters() if int(n[0]) < int(name))
            + as_rows(
                layer, [torch.arange(p.numel()) + o for p, o in zip(layer.parameters(), starts(layer), strict=True)]
            )
            for name, layer in layers.items()
        ]
    )
    moment = torch.zeros(len(order))
    for step in range(4):
        names, mine = list(factors), list(shadow.parameters())
        loss = likelihood.nll(shadow(batch[0]), batch[1])
        gradient = dense.flatten(list(torch.autograd.grad(loss, mine)))[order]
        for index in range(2 if step else 0):
            seed = (5 * 1_000_003 + step) * 4096 + 2 * index
            probe = gradient
            if u == "gaussian":
                generator = torch.Generator().manual_seed(seed + 1)
                probe = dense.flatten([torch.randn(p.shape, generator=generator) for p in mine])[order]
            probe = probe / probe.norm()
            targets = likelihood.sample(shadow(batch[0]), torch.Generator().manual_seed(seed))
            hessian = dense.hessian(likelihood.nll(shadow(batch[0]), targets), mine)[order][:, order]
            inverse = torch.block_diag(*(dense.learned_inverse(factors[n]) for n in names))
            v = inverse @ probe
            residual = (hessian @ v + damping * v - probe).detach()
            adam.zero_grad()
            ((inverse.detach() @ residual if preconditioned else residual) @ v).backward()
            adam.step()
            auxiliary = (0.5 * v @ (hessian @ v + damping * v) - probe @ v).detach()
        with torch.no_grad():
            inverse = torch.block_diag(*(dense.learned_inverse(factors[n]) for n in names))
            moment = beta * moment + (1 - beta) * inverse @ gradient
            flat = dense.flatten(mine)
            flat[order] -= lr * (moment + decay * flat[order])
            for p, part in zip(mine, flat.split([p.numel() for p in mine]), strict=True):
                p.copy_(part.view_as(p))
        train(optimizer, model, batch, likelihood)
        torch.testing.assert_close(dense.flatten(params), dense.flatten(mine), rtol=1e-6, atol=1e-7)
    assert optimizer.updates == 6
    assert optimizer.diagnostics()["fishleg/aux_loss"] == pytest.approx(float(auxiliary), rel=1e-5)
    assert optimizer.diagnostics()["fishleg/residual"] == pytest.approx(float(residual.norm()), rel=1e-5)


def starts(layer: nn.Module) -> list[int]:
    """Where each of a layer's parameters begins when they are flattened one after the other."""
    sizes = [p.numel() for p in layer.parameters()]
    return [sum(sizes[:i]) for i in range(len(sizes))]


@pytest.mark.usefixtures("float64")
def test_the_gradient_is_that_of_the_auxiliary_loss() -> None:
    """Holding F v fixed in <F v + damping v - u, Q u> gives the whole gradient, as F is symmetric."""
    layer = nn.Linear(3, 2)
    optimizer = FishLeg(nn.Sequential(layer), likelihood=Gaussian())
    shaken(optimizer)
    (block,) = optimizer.blocks.values()
    root, u, damping = torch.randn(8, 8), torch.randn(8), torch.rand(8)
    fisher = root @ root.T
    factors = {key: t.clone().requires_grad_() for key, t in block.factors.items()}
    expected = torch.autograd.grad(dense.auxiliary_loss(factors, fisher, damping, u), list(factors.values()))
    product, gradients = block.vjp(u.view(1, 2, 4))
    v = product.flatten()
    found = gradients((fisher @ v + damping * v - u).view(1, 2, 4))
    for key, gradient in zip(factors, expected, strict=True):
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_inverse_is_learned(preconditioned: bool) -> None:
    """A linear model with Gaussian outputs: F = E[a aᵀ] (x) I / sigma² whatever the weights, and Q goes to
    (F + damping)^-1, from one minibatch's products with white noise."""
    damping, likelihood = 0.3, Gaussian(sigma=0.7)
    inputs = torch.randn(30, 3) @ torch.tensor([[1.0, 0.4, 0.0], [0.0, 0.5, 0.3], [0.0, 0.0, 0.8]])
    layer = nn.Linear(3, 2)
    model = nn.Sequential(layer)
    fisher = dense.gauss_newton(model, likelihood.nll, inputs, torch.zeros(30, 2), list(model.parameters()))
    order = dense.as_matrix_order(layer)
    wanted = torch.linalg.inv(fisher[order][:, order] + damping * torch.eye(8))
    optimizer = FishLeg(
        model, lr=0.0, damping=damping, u="gaussian", precondition_aux=preconditioned, aux_every=1,
        aux_betas=(0.9, 0.99), init_scale=0.2, likelihood=likelihood,
    )  # fmt: skip
    errors = []
    for step in range(401):
        optimizer.aux_lr = 0.02 * (1 - step / 401)
        train(optimizer, model, (inputs, torch.zeros(30, 2)), likelihood)
        if step in (0, 400):
            errors.append(float((optimizer.inverse_matrices()["0"] - wanted).norm() / wanted.norm()))
    assert errors[0] > 0.5 and errors[1] < 1e-3
    assert optimizer.diagnostics()["fishleg/residual"] < 1e-2


@pytest.mark.usefixtures("float64")
def test_warm_up_sets_the_inverse_from_squared_gradients() -> None:
    damping, batch = 0.2, images()
    model = mlp()
    optimizer = FishLeg(
        model, lr=0.0, damping=damping, warmup_steps=3, aux_every=2, likelihood=Categorical(), init_scale=1.0
    )
    squares = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(3):
        inputs, targets = batch[0].roll(step, 0) * (step + 1), batch[1]
        for s, g in zip(
            squares, torch.autograd.grad(F.cross_entropy(model(inputs), targets), list(model.parameters())), strict=True
        ):
            s += g**2 / 3
        if step == 2:
            assert torch.equal(optimizer.inverse_matrices()["3"], torch.eye(28)), "not yet"
        train(optimizer, model, (inputs, targets), Categorical())
    for name, layer, mine in (("1", model[1], squares[:2]), ("3", model[3], squares[2:])):
        expected = torch.diag(1 / (as_rows(layer, mine) + damping))
        torch.testing.assert_close(optimizer.inverse_matrices()[name], expected, rtol=1e-10, atol=1e-12)
    updates = []
    for _ in range(4):
        train(optimizer, model, batch, Categorical())
        updates.append(optimizer.updates)
    assert updates == [0, 0, 1, 1], "the first auxiliary update comes an interval after the warm-up"


def test_several_updates_a_step_and_intervals() -> None:
    model, batch = mlp(), images()
    optimizer = FishLeg(model, aux_every=2, aux_steps=3, likelihood=Categorical())
    seen = []
    for _ in range(5):
        train(optimizer, model, batch, Categorical())
        seen.append(optimizer.updates)
    assert seen == [0, 0, 3, 3, 6]
    optimizer.aux_every = 1  # as a schedule does
    train(optimizer, model, batch, Categorical())
    assert optimizer.updates == 9


def test_a_loader_of_its_own_is_cycled() -> None:
    batches = [(torch.full((2, 3, 8, 8), float(i)), torch.zeros(2)) for i in range(3)]
    seen: list[float] = []
    model = mlp()
    optimizer = FishLeg(model, aux_every=1, aux_steps=2, aux_loader=batches, likelihood=Categorical())
    model[0].register_forward_pre_hook(lambda module, args: seen.append(float(args[0].flatten()[0])))
    for _ in range(3):
        train(optimizer, model, images(), Categorical())
    values = [value for value in seen if value in (0.0, 1.0, 2.0)]
    assert values == [0.0] * 3 + [1.0] * 3 + [2.0] * 3 + [0.0] * 3, "sampling, ahead and behind on each batch"
    optimizer = FishLeg(mlp(), aux_every=1, aux_loader=[], likelihood=Categorical())
    optimizer.renew()
    with pytest.raises(ValueError, match="aux_loader must yield batches"):
        train(optimizer, optimizer.model, images(), Categorical())


def test_keyword_inputs_and_any_root() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.shift = nn.Linear(3, 4), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
            return scale * self.body(x * mask) + self.shift

    model = Root()
    optimizer = FishLeg(model, aux_every=1, likelihood=Gaussian())
    for _ in range(2):
        optimizer.zero_grad()
        outputs = model(torch.randn(5, 3), scale=2.0, mask=torch.ones(3))
        optimizer.backward(Gaussian().nll(outputs, torch.zeros(5, 4)))
        optimizer.step()
    assert optimizer.updates == 1
    assert "shift" in str(optimizer.coverage()) and "fallback: free parameter" in str(optimizer.coverage())
    assert float(model.shift.detach().abs().max()) > 0


# -- parts of a model, groups ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_frozen_entries_are_no_part_of_the_problem() -> None:
    """With the bias frozen, Q is learned as the inverse of the weight's own block; the bias is not perturbed."""
    damping, likelihood = 0.3, Gaussian()
    inputs, layer = torch.randn(30, 2) + 1, nn.Linear(2, 1)
    layer.bias.requires_grad_(False)
    model = nn.Sequential(layer)
    optimizer = FishLeg(
        model, lr=0.0, damping=damping, u="gaussian", precondition_aux=False, aux_every=1, aux_betas=(0.9, 0.99),
        init_scale=0.2, likelihood=likelihood,
    )  # fmt: skip
    for step in range(300):
        optimizer.aux_lr = 0.02 * (1 - step / 300)
        train(optimizer, model, (inputs, torch.zeros(30, 1)), likelihood)
    wanted = torch.linalg.inv(inputs.T @ inputs / 30 + damping * torch.eye(2))
    torch.testing.assert_close(optimizer.inverse_matrices()["0"][:2, :2], wanted, rtol=1e-3, atol=1e-3)


def test_groups_have_their_own_damping() -> None:
    model = mlp()
    groups = [{"params": list(model[1].parameters())}, {"params": list(model[3].parameters()), "damping": 0.5}]
    optimizer = FishLeg(model, groups, damping=0.25, likelihood=Categorical())
    diagonals = {name: q.diagonal() for name, q in optimizer.inverse_matrices().items()}
    torch.testing.assert_close(diagonals["1"], torch.full_like(diagonals["1"], 4.0))
    torch.testing.assert_close(diagonals["3"], torch.full_like(diagonals["3"], 2.0))


def test_tied_parameters_fall_back_and_still_move() -> None:
    model, batch = EmbeddingModel(tied=True), tokens()
    optimizer = FishLeg(model, lr=0.01, momentum=0.0, weight_decay=0.0, fallback_lr=0.003, likelihood=Categorical())
    assert list(optimizer.blocks) == ["linear"]
    assert "tied to" in str(optimizer.coverage())
    before = model.embedding.weight.detach().clone()
    train(optimizer, model, batch, Categorical())
    step = (model.embedding.weight.detach() - before).abs()
    torch.testing.assert_close(step[step > 0].median(), torch.tensor(0.003), rtol=1e-3, atol=0)


# -- trouble -----------------------------------------------------------------------------------------------------------


def test_a_step_that_saw_no_pass_says_so() -> None:
    model, (inputs, targets) = mlp(), images()
    optimizer = FishLeg(model, aux_every=1, likelihood=Categorical())
    optimizer.renew()
    model.eval()
    optimizer.backward(F.cross_entropy(model(inputs), targets))
    with pytest.warns(UserWarning, match=r"no forward pass .* call model.train\(\)"):
        optimizer.step()
    assert optimizer.updates == 0


def test_what_is_not_finite_is_not_learned_from() -> None:
    model, (inputs, targets) = mlp(), images()
    optimizer = FishLeg(model, lr=0.0, aux_every=1, aux_loader=[inputs * float("nan")], likelihood=Categorical())
    optimizer.renew()
    before = optimizer.inverse_matrices()
    train(optimizer, model, (inputs, targets), Categorical())
    assert optimizer.updates == 0 and optimizer.diagnostics()["curvature/rejected"] == 1
    assert all(torch.equal(q, before[name]) for name, q in optimizer.inverse_matrices().items())


def test_a_model_must_return_one_tensor() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), x

    model = Pair()
    optimizer = FishLeg(model, likelihood=Categorical())
    optimizer.renew()
    optimizer.backward(model(torch.randn(2, 3))[0].sum())
    with pytest.raises(ValueError, match=r"model must return its outputs as one tensor .*, got tuple"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": -1.0}, r"lr must be in \[0, inf\)"),
        ({"damping": 0.0}, r"damping must be in \(0, inf\)"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"aux_betas": (0.9, 1.0)}, r"aux_betas\[1\] must be in \[0, 1\)"),
        ({"aux_steps": 0}, "aux_steps must be in"),
        ({"aux_every": 0}, "aux_every must be in"),
        ({"u": "white"}, "u must be one of gradient, gaussian, got 'white'"),
        ({"product": "exact"}, "product must be one of antithetic, rank_one, got 'exact'"),
        ({"init_scale": 0.0}, "init_scale must be in"),
        ({"likelihood": None}, "likelihood must be given"),
    ],
)
def test_bad_options_are_sentences(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FishLeg(mlp(), **{"likelihood": Categorical()} | options)


def test_half_precision_weights_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="use product='rank_one'"):
        FishLeg(mlp().bfloat16(), likelihood=Categorical())


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", ["antithetic", "rank_one"])
def test_resuming_in_a_warm_up_and_after_it_is_bit_for_bit(product: str) -> None:
    batch = images()
    for stop in (2, 7):
        model = conv_net()
        options = {
            "product": product, "warmup_steps": 3, "aux_every": 2, "aux_steps": 2, "u": "gaussian",
            "likelihood": Categorical(), "seed": 3,
        }  # fmt: skip
        optimizer = FishLeg(model, **options)
        for _ in range(stop):
            train(optimizer, model, batch, Categorical())
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        resumed = conv_net()  # the plain model: FishLeg has left nothing in it
        resumed.load_state_dict(saved["model"], strict=True)
        second = FishLeg(resumed, **options)
        second.load_state_dict(saved["optimizer"])
        assert second.diagnostics() == optimizer.diagnostics()
        assert ("fishleg/residual" in second.diagnostics()) == (stop > 2), "what the last update found goes along"
        for _ in range(6):
            train(optimizer, model, batch, Categorical())
            train(second, resumed, batch, Categorical())
        for (key, value), other in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(value, other), key
        assert optimizer.updates == second.updates > 0


def test_the_state_of_another_method_is_refused() -> None:
    from optimizers import KFAC, AdaFisher

    model, batch = mlp(), images()
    optimizer = FishLeg(model, aux_every=1, likelihood=Categorical())
    for other in (KFAC(mlp(), likelihood=Categorical()), AdaFisher(mlp())):
        train(other, other.model, batch, Categorical())
        with pytest.raises(ValueError, match="belong: another method saved it"):
            optimizer.load_state_dict(other.state_dict())
        with pytest.raises(ValueError, match="belong: another method saved it"):
            other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("problem", ["conv", "vit", "tied", "frozen"])
def test_coverage_counts_the_bytes_that_are_kept(problem: str) -> None:
    optimizer = FishLeg(PROBLEMS[problem][0](), likelihood=Categorical())
    blocks: list[LearnedInverse] = list(optimizer.blocks.values())
    held = 0
    for block in blocks:
        tensors = [*block.factors.values(), *block.first.values(), *block.second.values()]
        if isinstance(block, LearnedKronecker):
            tensors += block._grams.values()
        else:
            assert isinstance(block, LearnedDiagonal)
        held += sum(t.numel() * t.element_size() for t in tensors)
    assert optimizer.coverage().bytes == held


def test_the_learned_sigma_moves_with_fishleg() -> None:
    """In a group of its own it takes the fallback's steps, towards the errors' own standard deviation."""
    torch.manual_seed(1)
    model, likelihood = nn.Sequential(nn.Linear(3, 2)), LearnedGaussian(sigma=2.0)
    optimizer = FishLeg(
        model,
        [{"params": list(model.parameters())}, {"params": list(likelihood.parameters()), "weight_decay": 0.0}],
        lr=0.05, fallback_lr=0.05, aux_every=3, likelihood=likelihood,
    )  # fmt: skip
    x = torch.randn(256, 3)
    batch = (x, x[:, :2] + 0.3 * torch.randn(256, 2))
    for _ in range(150):
        train(optimizer, model, batch, likelihood)
    assert float(likelihood.sigma) == pytest.approx(0.3, rel=0.1)
    assert optimizer.updates > 40


@pytest.mark.usefixtures("float64")
def test_natural_gradients_are_no_longer_than_their_limit() -> None:
    """Tensor by tensor, before they are averaged; the fallback's have a length of their own."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(8, 5), torch.randint(3, (8,))
    moves = []
    for limit in (None, 1e-3):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        optimizer = FishLeg(
            model, lr=0.1, momentum=0.0, weight_decay=0.0, max_update=limit, skip="2", likelihood=Categorical()
        )
        before = [p.detach().clone() for p in model.parameters()]
        outputs = model(inputs)
        optimizer.backward(F.cross_entropy(outputs, targets), outputs)
        optimizer.step()
        moves.append([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    free, held = moves
    for index, (whole, short) in enumerate(zip(free, held, strict=True)):
        length = float(whole.square().mean().sqrt()) / 0.1
        assert length > 1e-3
        torch.testing.assert_close(short, whole * (1e-3 / length if index < 2 else 1.0))
    with pytest.raises(ValueError, match="max_update must be in"):
        FishLeg(model, max_update=0.0, likelihood=Categorical())
