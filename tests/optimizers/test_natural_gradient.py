"""The Kronecker methods against dense matrices: factors, solves, the KL clip, and what the engine does when."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers import (
    EKFAC,
    KFAC,
    KPSVD,
    AdaFisher,
    Bernoulli,
    Categorical,
    Deflation,
    Gaussian,
    KFACCorrected,
    Lanczos,
    Likelihood,
)
from optimizers.curvature.kronecker import factored as kronecker
from optimizers.natural_gradient import NaturalGradient
from tests import dense
from tests.optimizers.problems import PROBLEMS, Shape, conv_net, images, mlp

METHODS: dict[str, type[NaturalGradient]] = {
    "kfac": KFAC,
    "ekfac": EKFAC,
    "kpsvd": KPSVD,
    "deflation": Deflation,
    "kfac_corrected": KFACCorrected,
    "lanczos": Lanczos,
}

# One layer each, with the shape of its input.
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 3), (4,)),
    "linear without bias": (nn.Linear(4, 3, bias=False), (4,)),
    "linear on tokens": (nn.Linear(3, 3), (4, 3)),
    "conv": (nn.Conv2d(2, 2, 2), (2, 3, 4)),
    "strided": (nn.Conv2d(1, 3, 3, stride=2, padding=1), (1, 5, 4)),
    "grouped": (nn.Conv2d(4, 4, 2, groups=2), (4, 3, 3)),
    "dilated": (nn.Conv2d(2, 2, 2, dilation=2, bias=False), (2, 4, 4)),
    "conv1d": (nn.Conv1d(2, 3, 3, padding=1), (2, 5)),
    "transposed": (nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1), (2, 2, 3)),
    "transposed grouped": (
        nn.ConvTranspose2d(4, 2, (2, 3), stride=(1, 2), padding=(0, 1), output_padding=(0, 1), groups=2),
        (4, 2, 2),
    ),
    "transposed dilated": (nn.ConvTranspose2d(1, 2, 2, dilation=2, padding=1, bias=False), (1, 3, 3)),
}


def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def around(name: str, batch: int = 7) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A small net with the layer inside, the layer, and a batch."""
    template, shape = LAYERS[name]
    layer = copy.deepcopy(template).to(torch.get_default_dtype())
    layer.reset_parameters()  # from the test's own random state
    inputs, targets = torch.randn(batch, *shape), torch.randint(0, 3, (batch,))
    flat = layer(inputs).flatten(1).shape[1]
    return nn.Sequential(nn.Tanh(), layer, nn.Tanh(), nn.Flatten(), nn.Linear(flat, 3)), layer, inputs, targets


def observed(method: type[NaturalGradient], model: nn.Module, inputs: Tensor, targets: Tensor, **options: Any) -> Any:
    """An optimizer that has seen one batch and moved nothing."""
    settings = {"lr": 0.0, "momentum": 0.0, "fisher": "empirical", "kl_clip": None, "batch_fraction": 1.0}
    loss = options.pop("loss", criterion)
    optimizer = method(model, **settings | options)
    outputs = model(inputs)
    optimizer.backward(loss(outputs, targets), outputs)
    optimizer.step()
    return optimizer


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# -- factors ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", LAYERS)
def test_dense_blocks_agree_with_autograd(name: str) -> None:
    """The loops of the oracle itself, transposed convolutions included, against per-example gradients."""
    model, layer, inputs, targets = around(name)
    fishers, _ = dense.layer_blocks(model, layer, criterion, inputs, targets)
    whole = dense.empirical_fisher(model, criterion, inputs, targets, list(layer.parameters()))
    order = dense.as_matrix_order(layer)
    whole = whole[order][:, order]
    start = 0
    for block in fishers:
        stop = start + len(block)
        torch.testing.assert_close(whole[start:stop, start:stop], block, rtol=1e-10, atol=1e-14)
        start = stop
    assert start == len(whole)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", LAYERS)
def test_kfac_factors_are_their_definition(name: str, sharing: str) -> None:
    model, layer, inputs, targets = around(name)
    optimizer = observed(KFAC, model, inputs, targets, sharing=sharing)
    a, g = dense.kronecker_factors(model, layer, criterion, inputs, targets, sharing)
    expected = torch.block_diag(*(torch.kron(gg, aa) for aa, gg in zip(a, g, strict=True)))
    torch.testing.assert_close(optimizer.curvature_matrices()["1"], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("solver", ["gram", "power", "lanczos"])
@pytest.mark.parametrize("name", LAYERS)
def test_svd_methods_are_the_dense_optimum(name: str, solver: str) -> None:
    model, layer, inputs, targets = around(name)
    _, rearranged = dense.layer_blocks(model, layer, criterion, inputs, targets)
    a, g = dense.kronecker_factors(model, layer, criterion, inputs, targets)
    for method, rank in ((KPSVD, 1), (Deflation, 2), (Lanczos, 2)):
        found = observed(method, model, inputs, targets, solver=solver).curvature_matrices()["1"]
        expected = torch.block_diag(*(dense.nearest_kronecker_sum(z, rank) for z in rearranged))
        assert relative(found, expected) < 1e-6, method.__name__
    corrected = []
    for z, aa, gg in zip(rearranged, a, g, strict=True):
        rest = z - torch.outer(aa.flatten(), gg.flatten())
        corrected.append(torch.kron(gg, aa) + dense.nearest_kronecker_sum(rest, 1))
    found = observed(KFACCorrected, model, inputs, targets, solver=solver).curvature_matrices()["1"]
    assert relative(found, torch.block_diag(*corrected)) < 1e-6


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", LAYERS)
def test_errors_are_ordered(name: str) -> None:
    """In Frobenius norm: two terms beat one, one beats K-FAC's, K-FAC corrected and EKFAC beat K-FAC."""
    model, layer, inputs, targets = around(name)
    fishers, _ = dense.layer_blocks(model, layer, criterion, inputs, targets)
    fisher = torch.block_diag(*fishers)
    errors = {
        key: float((observed(method, model, inputs, targets).curvature_matrices()["1"] - fisher).norm())
        for key, method in METHODS.items()
    }
    slack = 1e-9 * float(fisher.norm())
    assert errors["deflation"] <= errors["kpsvd"] + slack
    assert errors["kpsvd"] <= errors["kfac"] + slack
    assert errors["kfac_corrected"] <= errors["kfac"] + slack
    assert errors["deflation"] <= errors["kfac_corrected"] + slack
    assert errors["ekfac"] <= errors["kfac"] + slack
    assert abs(errors["lanczos"] - errors["deflation"]) <= 1e-6 * float(fisher.norm())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["linear", "conv", "grouped"])
def test_ekfac_moments_are_those_of_the_rotated_gradient(name: str) -> None:
    """The diagonal is the Fisher block's own in K-FAC's eigenbasis."""
    model, layer, inputs, targets = around(name)
    fishers, _ = dense.layer_blocks(model, layer, criterion, inputs, targets)
    factors = observed(EKFAC, model, inputs, targets).blocks["1"].factors
    for group, fisher in enumerate(fishers):
        basis = torch.kron(factors["U_G"][group], factors["U_A"][group])
        torch.testing.assert_close(factors["S"][group].flatten(), (basis.T @ fisher @ basis).diagonal())


@pytest.mark.usefixtures("float64")
def test_a_radius_leaves_distant_pixels_out() -> None:
    model, layer, inputs, targets = around("conv")  # a grid of 2 x 3 output pixels
    xs, gs = dense.layer_flow(model, layer, criterion, inputs, targets)
    z = torch.zeros(81, 4)
    for x, g in zip(xs, gs, strict=True):
        (a_t,), (g_t,) = dense.positions(layer, x, g)
        for s, t in itertools.product(range(6), range(6)):
            if abs(s // 3 - t // 3) <= 1 and abs(s % 3 - t % 3) <= 1:
                z += torch.outer(torch.outer(a_t[s], a_t[t]).flatten(), torch.outer(g_t[s], g_t[t]).flatten()) / len(xs)
    for solver in ("gram", "power"):
        found = observed(Deflation, model, inputs, targets, radius=1, solver=solver).curvature_matrices()["1"]
        assert relative(found, dense.nearest_kronecker_sum(z, 2)) < 1e-6


# -- the Fisher ------------------------------------------------------------------------------------------------------


def deep_linear(bias: bool, reduce: bool) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(3, 4, bias=bias), nn.Linear(4, 3, bias=bias), nn.Linear(3, 2, bias=bias)]
    if reduce:  # over the tokens
        layers.append(Mean())
    return nn.Sequential(*layers)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sharing", ["expand", "reduce", "none"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kfac_is_the_exact_fisher_of_deep_linear_nets(bias: bool, sharing: str, reduction: str) -> None:
    """With a Gaussian likelihood G is the same for every example (Bernacchia et al. 2018; Eschenhagen et al. 2023)."""
    likelihood = Gaussian()
    model = deep_linear(bias, sharing == "reduce")
    inputs = torch.randn(6, 3) if sharing == "none" else torch.randn(6, 5, 3)
    targets = torch.randn_like(model(inputs))
    observations = targets[..., 0].numel()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return likelihood.nll(outputs, targets) * (1 if reduction == "mean" else observations)

    setting = "reduce" if sharing == "reduce" else "expand"
    optimizer = observed(
        KFAC, model, inputs, targets, loss=loss, fisher="exact", likelihood=likelihood, sharing=setting,
        loss_reduction=reduction,
    )  # fmt: skip
    fisher = dense.gauss_newton(model, likelihood.nll, inputs, targets, list(model.parameters()))
    start = 0
    for name, layer in model.named_children():
        size = sum(p.numel() for p in layer.parameters())
        if size:
            order = start + dense.as_matrix_order(layer)
            found = optimizer.curvature_matrices()[name]
            torch.testing.assert_close(found, fisher[order][:, order], rtol=1e-9, atol=1e-12)
        start += size


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(0.5)], ids=lambda c: type(c).__name__)
def test_the_exact_fisher_is_the_gauss_newton_matrix(likelihood: Likelihood) -> None:
    """With one input and one output unit a layer, Kronecker products are exact: nothing but the Fisher is tested."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False))
    inputs = torch.randn(1, 3)
    targets = likelihood.sample(model(inputs))
    optimizer = observed(Deflation, model, inputs, targets, loss=likelihood.nll, fisher="exact", likelihood=likelihood)
    fisher = dense.gauss_newton(model, likelihood.nll, inputs, targets, list(model.parameters()))
    found = optimizer.curvature_matrices()
    torch.testing.assert_close(found["0"], fisher[:12, :12], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found["2"], fisher[12:, 12:], rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("tokens", [False, True])
def test_the_sampled_fisher_converges_to_the_exact_one(likelihood: Likelihood, tokens: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    inputs = torch.randn(4, 2, 3) if tokens else torch.randn(4, 3)
    targets = likelihood.sample(model(inputs))
    exact = observed(KFAC, model, inputs, targets, loss=likelihood.nll, fisher="exact", likelihood=likelihood)
    errors = []
    for repeats in (20, 2000):
        many = inputs.repeat(repeats, *(1 for _ in inputs.shape[1:]))
        y = likelihood.sample(model(many))
        sampled = observed(KFAC, model, many, y, loss=likelihood.nll, fisher="sampled", likelihood=likelihood)
        pairs = zip(sampled.curvature_matrices().values(), exact.curvature_matrices().values(), strict=True)
        errors.append(max(relative(s, e) for s, e in pairs))
    assert errors[1] < 0.06
    assert errors[1] < errors[0] / 4  # ten times would be the law of large numbers


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_share_of_the_batch_is_the_statistics_of_those_examples(method: type[NaturalGradient]) -> None:
    model, _, inputs, targets = around("conv", batch=8)
    part = observed(method, model, inputs, targets, batch_fraction=0.5)

    def share(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    whole = observed(method, copy.deepcopy(model), inputs[::2], targets[::2], loss=share)
    torch.testing.assert_close(part.curvature_matrices()["1"], whole.curvature_matrices()["1"], rtol=1e-8, atol=1e-12)


# -- solves ----------------------------------------------------------------------------------------------------------


def damped_dense(optimizer: Any, name: str, damping: float, pi: bool = True) -> list[Tensor]:
    """The damped approximation as the documentation has it, assembled by group from the factors."""
    block = optimizer.blocks[name]
    f = block.factors
    if isinstance(optimizer, EKFAC) or block.options.damping_mode == "tikhonov":
        dim = optimizer.curvature_matrices()[name].shape[0] // len(f["A"])
        whole = optimizer.curvature_matrices()[name] + damping * torch.eye(dim * len(f["A"]))
        return [whole[i * dim : (i + 1) * dim, i * dim : (i + 1) * dim] for i in range(len(f["A"]))]
    blocks = []
    for i, (a, g) in enumerate(zip(f["A"], f["G"], strict=True)):
        split = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt() if pi else 1.0
        a_d = a + split * damping**0.5 * torch.eye(len(a))
        g_d = g + damping**0.5 / split * torch.eye(len(g))
        second = torch.kron(f["D"][i], f["C"][i]) if "C" in f else 0.0
        blocks.append(torch.kron(g_d, a_d) + second)
    return blocks


CASES = [(name, {}) for name in METHODS] + [
    ("kfac", {"damping_mode": "tikhonov"}),
    ("kpsvd", {"damping_mode": "tikhonov"}),
    ("kfac", {"pi": False}),
    ("deflation", {"pi": False}),
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
@pytest.mark.parametrize("name", ["linear", "conv", "grouped", "transposed grouped"])
def test_a_step_is_the_dense_solve(name: str, method: str, options: dict[str, Any]) -> None:
    model, layer, inputs, targets = around(name)
    damping = 0.1
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = observed(METHODS[method], model, inputs, targets, lr=1.0, damping=damping, **options)
    assert optimizer.diagnostics()["curvature/floored"] == 0
    gradient = dense.flatten([p.grad for p in layer.parameters()])
    step = dense.flatten([b - p.detach() for p, b in zip(layer.parameters(), before, strict=True)])
    order = dense.as_matrix_order(layer)
    blocks = torch.block_diag(*damped_dense(optimizer, "1", damping, options.get("pi", True)))
    expected = torch.linalg.solve(blocks, gradient[order])
    assert relative(step[order], expected) < 1e-8


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["kfac", "kpsvd"])
@pytest.mark.parametrize("name", ["linear", "grouped", "transposed grouped"])
def test_wide_factors_are_solved_with_their_cholesky_factors(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kronecker, "WIDE", 1)
    test_a_step_is_the_dense_solve(name, method, {})
    model, _, inputs, targets = around(name)
    optimizer = observed(METHODS[method], model, inputs, targets)
    assert {key for stack in optimizer._stacks for key in stack.cache} == {"L_A", "L_G"}


@pytest.mark.usefixtures("float64")
def test_the_floor_of_a_two_term_inverse() -> None:
    """``1 + t s`` is floored with its sign kept; the count says how often."""
    model, _, inputs, targets = around("linear")
    optimizer = observed(Deflation, model, inputs, targets, damping=1e-6)
    block = optimizer.blocks["1"]
    f = block.factors
    f["D"] *= 50  # far beyond what a Fisher matrix could have: the sum is indefinite
    cache = block.invert(f, torch.tensor([1e-6]), counts := type(optimizer._counts)())
    shares = block._shares(f, torch.tensor([1e-6]))
    a, g = f["A"][0] + shares["A"] * torch.eye(5), f["G"][0] + shares["G"] * torch.eye(3)
    root = torch.linalg.cholesky(torch.kron(g, a))
    pencil = torch.linalg.solve(root, torch.linalg.solve(root, torch.kron(f["D"][0], f["C"][0])).T)
    values, vectors = torch.linalg.eigh((pencil + pencil.T) / 2)
    floored = (1 + values).clamp(min=block.options.floor)
    assert int(counts.floored) == int((1 + values < block.options.floor).sum()) > 0
    matrix = torch.randn(1, 3, 5)
    basis = torch.linalg.solve(root.T, vectors)
    expected = basis @ ((basis.T @ matrix.flatten()) / floored)
    assert relative(block.solve(cache, matrix).flatten(), expected) < 1e-7


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["linear", "conv", "grouped", "transposed dilated"])
@pytest.mark.parametrize("method", [Deflation, KFACCorrected])
@pytest.mark.parametrize("wide", [1, 4096])
def test_a_truncated_second_term_keeps_its_largest_eigenvalues(
    method: type[NaturalGradient], name: str, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a few refreshes from the last basis, the step is the dense solve with the truncated second term."""
    monkeypatch.setattr(kronecker, "WIDE", wide)
    model, layer, inputs, targets = around(name)
    rank, damping = 1 if name == "transposed dilated" else 2, 0.1
    settings = {"lr": 0.0, "momentum": 0.0, "fisher": "empirical", "kl_clip": None, "batch_fraction": 1.0, "decay": 0.0}
    optimizer = method(model, damping=damping, rank=rank, update_every=1, refresh_every=1, **settings)
    block = optimizer.blocks["1"]
    assert block._truncated
    for _ in range(400 if name == "grouped" else 100):  # where eigenvalues lie close to each other it takes more
        train(optimizer, model, (inputs, targets), 1)
    f = block.factors
    shares = block._shares(f, torch.full((len(f["A"]),), damping))
    blocks = []
    for i in range(len(f["A"])):
        first, second = [], []
        for one, two in (("G", "D"), ("A", "C")):
            a = f[one][i] + shares[one][i] * torch.eye(len(f[one][i]))
            root = torch.linalg.cholesky(a)
            whitened = torch.linalg.solve(root, torch.linalg.solve(root, f[two][i]).T).T
            u, s, vh = torch.linalg.svd(whitened)  # of a symmetric or antisymmetric matrix: eigenvalues up to sign
            kept = min(rank + rank % 2 if torch.equal(f["C"][i], -f["C"][i].T) else rank, len(s))
            first.append(a)
            second.append(root @ (u[:, :kept] * s[:kept]) @ vh[:kept] @ root.T)
        blocks.append(torch.kron(*first) + torch.kron(*second))
    optimizer.param_groups[0]["lr"] = 1.0
    before = [p.detach().clone() for p in layer.parameters()]
    train(optimizer, model, (inputs, targets), 1)
    step = dense.flatten([b - p.detach() for p, b in zip(layer.parameters(), before, strict=True)])
    order = dense.as_matrix_order(layer)
    gradient = dense.flatten([p.grad for p in layer.parameters()])[order]
    expected = torch.linalg.solve(torch.block_diag(*blocks), gradient)
    assert optimizer.diagnostics()["curvature/floored"] == 0
    assert relative(step[order], expected) < 1e-6


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_kl_clip_bounds_the_dense_quadratic_form(method: type[NaturalGradient], momentum: float) -> None:
    """After one step, theta has moved by nu lr v with nu² lr² vᵀ (F + damping) v = kl_clip, all layers together."""
    model, _, inputs, targets = around("linear")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    lr, kappa, damping = 0.5, 1e-4, 0.05
    optimizer = observed(method, model, inputs, targets, lr=lr, kl_clip=kappa, damping=damping, momentum=momentum)
    total = 0.0
    undamped = 0.0
    for name in ("1", "4"):
        layer = model.get_submodule(name)
        moved = dense.flatten([before[f"{name}.{key}"] - p.detach() for key, p in layer.named_parameters()])
        moved = moved[dense.as_matrix_order(layer)]
        (block,) = damped_dense(optimizer, name, damping)
        total += float(moved @ block @ moved)
        undamped += float(moved @ optimizer.curvature_matrices()[name] @ moved)
    assert total == pytest.approx(kappa, rel=1e-8)
    assert undamped < kappa
    assert 0 < optimizer.diagnostics()["curvature/kl_scale"] < 1


def test_a_diagonal_beyond_the_largest_factor() -> None:
    model, _, inputs, targets = around("conv")  # columns 9, d_out 2
    full = observed(KFAC, model, inputs, targets).blocks["1"].factors
    for method in METHODS.values():
        optimizer = observed(method, copy.deepcopy(model), inputs, targets, max_factor_dim=5, lr=0.1)
        factors = optimizer.blocks["1"].factors
        assert factors["A"].shape == (1, 9) and factors["G"].shape == (1, 2, 2), method.__name__
        torch.testing.assert_close(factors["A"], full["A"].diagonal(dim1=-2, dim2=-1))
    for method in (KFAC, EKFAC):
        for sharing in ("expand", "reduce"):
            optimizer = observed(method, copy.deepcopy(model), inputs, targets, max_factor_dim=1, sharing=sharing)
            whole = observed(KFAC, copy.deepcopy(model), inputs, targets, sharing=sharing).blocks["1"].factors
            for key in ("A", "G"):
                diagonal = whole[key].diagonal(dim1=-2, dim2=-1)
                torch.testing.assert_close(optimizer.blocks["1"].factors[key], diagonal)


@pytest.mark.parametrize("method", ["kfac", "deflation"])
def test_solving_in_bfloat16_is_close(method: str) -> None:
    directions = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model, layer, inputs, targets = around("linear")
        before = dense.flatten([p.detach().clone() for p in layer.parameters()])
        observed(METHODS[method], model, inputs, targets, lr=0.1, damping=0.1, solve_dtype=dtype)
        directions.append(before - dense.flatten([p.detach() for p in layer.parameters()]))
    assert 0 < relative(directions[1], directions[0]) < 0.03


# -- averages and refreshes --------------------------------------------------------------------------------------------


def train(
    optimizer: Any, model: nn.Module, batch: tuple[Tensor, Tensor], steps: int, vary: bool = False
) -> list[float]:
    losses = []
    for step in range(steps):
        inputs, targets = batch
        if vary:
            inputs = inputs + 0.1 * torch.sin(inputs * (1 + step))
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = F.cross_entropy(outputs, targets)
        optimizer.backward(loss, outputs)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_averages_start_warm(method: type[NaturalGradient]) -> None:
    """The first update replaces, the second makes a mean of two, until 1 - decay is the weight of the new."""
    model, layer, _, _ = around("linear")
    weights_before = copy.deepcopy(model.state_dict())
    optimizer = method(
        model, lr=0.0, fisher="empirical", decay=0.6, update_every=1, refresh_every=1, batch_fraction=1.0
    )
    mean: Tensor | None = None
    factors: list[Tensor] = []
    for k in range(1, 5):
        inputs, targets = torch.randn(7, 4), torch.randint(0, 3, (7,))
        train(optimizer, model, (inputs, targets), 1)
        fishers, _ = dense.layer_blocks(model, layer, criterion, inputs, targets)
        keep = min(1 - 1 / k, 0.6)
        mean = fishers[0] if mean is None else keep * mean + (1 - keep) * fishers[0]
        new = dense.kronecker_factors(model, layer, criterion, inputs, targets)
        factors = [keep * old + (1 - keep) * f for old, f in zip(factors or new, new, strict=True)]
    if method in (KFAC, EKFAC, KFACCorrected):  # whose factors are averaged one by one
        for key, expected in zip(("A", "G"), factors, strict=True):
            torch.testing.assert_close(optimizer.blocks["1"].factors[key], expected, rtol=1e-10, atol=1e-14)
    assert all(torch.equal(v, weights_before[n]) for n, v in model.state_dict().items())
    found = optimizer.curvature_matrices()["1"]
    # An average of approximations is no approximation of the average, but not far from one.
    assert relative(found, mean) < 0.75


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", [KFAC, KPSVD, Deflation, KFACCorrected])
def test_an_average_of_two_is_the_one_by_hand(method: type[NaturalGradient]) -> None:
    """K-FAC averages factors; the others the products themselves, brought back to their rank by a dense SVD."""
    model, _, _, _ = around("linear")
    optimizer = method(model, lr=0.0, fisher="empirical", update_every=1, batch_fraction=1.0)
    products, factors = [], []
    for _ in range(2):
        batch = torch.randn(7, 4), torch.randint(0, 3, (7,))
        train(optimizer, model, batch, 1)
        single = observed(method, copy.deepcopy(model), *batch)
        products.append(single.curvature_matrices()["1"])
        factors.append({k: v[0] for k, v in single.blocks["1"].factors.items()})
    first = torch.kron(*((factors[0][k] + factors[1][k]) / 2 for k in ("G", "A")))
    if method is KFAC:
        expected = first
    else:
        target = (products[0] + products[1]) / 2 - (first if method is KFACCorrected else 0.0)
        z = target.view(3, 5, 3, 5).permute(1, 3, 0, 2).reshape(25, 9)
        expected = dense.nearest_kronecker_sum(z, 2 if method is Deflation else 1)
        expected = expected + first if method is KFACCorrected else expected
    assert relative(optimizer.curvature_matrices()["1"], expected) < 1e-6


@pytest.mark.usefixtures("float64")
def test_ekfac_keeps_its_moments_when_the_basis_turns() -> None:
    """The moments move to the new basis as the diagonal of the old approximation there."""
    model, _, inputs, targets = around("linear")
    optimizer = observed(EKFAC, model, inputs, targets)
    block = optimizer.blocks["1"]
    old = block.to_dense()
    block.factors["A"] += torch.diag(torch.linspace(0, 1, 5))
    block.rebase(optimizer._counts)
    basis = torch.kron(block.factors["U_G"][0], block.factors["U_A"][0])
    torch.testing.assert_close(block.factors["S"].flatten(), (basis.T @ old @ basis).diagonal())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(("update_every", "refresh_every"), [(10, 20), (7, 7), (1, 50)])
def test_curvature_really_refreshes(method: type[NaturalGradient], update_every: int, refresh_every: int) -> None:
    model, batch = mlp(), images()
    optimizer = method(
        model, likelihood=Categorical(), lr=1e-3, update_every=update_every, refresh_every=refresh_every,
        early_updates=False,
    )  # fmt: skip
    block = optimizer.blocks["3"]
    factors, inverses = [], []
    for _ in range(200):
        train(optimizer, model, batch, 1)
        factors.append(block.factors["A"].sum().item())
        (stack,) = [stack for stack in optimizer._stacks if block in stack.blocks]
        inverses.append(next(iter(stack.cache.values())).double().sum().item())
    assert optimizer.updates == -(-200 // update_every) == len(list(itertools.groupby(factors)))
    assert optimizer.refreshes == -(-200 // refresh_every)
    if method is not EKFAC:  # whose first inverse factor is a basis that may come out the same
        assert len(list(itertools.groupby(inverses))) == optimizer.refreshes


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_early_updates_come_at_doubling_intervals(method: type[NaturalGradient]) -> None:
    model, batch = mlp(), images()
    optimizer = method(model, likelihood=Categorical(), lr=1e-3, update_every=5, refresh_every=10, early_updates=True)
    updates, refreshes = [], []
    for step in range(40):
        before = optimizer.updates, optimizer.refreshes
        train(optimizer, model, batch, 1)
        updates += [step] * (optimizer.updates - before[0])
        refreshes += [step] * (optimizer.refreshes - before[1])
    assert updates == [0, 1, 3, 7, *range(12, 40, 5)]
    assert refreshes == [0, 1, 3, 7, 15, 25, 35]


@pytest.mark.parametrize("option", ["update_every", "refresh_every"])
def test_intervals_change_the_trajectory(option: str) -> None:
    losses = []
    for interval in (1, 5):
        torch.manual_seed(0)
        model, batch = mlp(), images()
        optimizer = KFAC(
            model,
            likelihood=Categorical(),
            early_updates=False,
            **{"update_every": 1, "refresh_every": 1} | {option: interval},
        )
        losses.append(train(optimizer, model, batch, 8, vary=True))
    assert losses[0][:2] == losses[1][:2] and losses[0][3:] != losses[1][3:]


# -- what the engine promises ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("case", ["zero", "dead", "batch of one", "constant"])
def test_degenerate_statistics(method: type[NaturalGradient], case: str) -> None:
    """Zero inputs, a dead ReLU layer, a batch of one and exact rank deficiency at almost no damping."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    inputs, targets = images(1 if case == "batch of one" else 6)
    if case == "zero":
        inputs = torch.zeros_like(inputs)
    elif case == "constant":
        inputs = torch.ones_like(inputs)
    elif case == "dead":
        nn.init.constant_(model[1].bias, -100.0)
    optimizer = method(
        model, likelihood=Categorical(), lr=0.01, damping=1e-12, update_every=1, refresh_every=1, batch_fraction=1.0
    )
    losses = train(optimizer, model, (inputs, targets), 20)
    assert all(torch.tensor(losses).isfinite())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert optimizer.diagnostics()["curvature/fallbacks"] >= 0


def test_an_indefinite_factor_is_repaired_and_counted() -> None:
    model, batch = mlp(), images()
    optimizer = KFAC(model, likelihood=Categorical(), damping=1e-12, update_every=100, refresh_every=1)
    train(optimizer, model, batch, 1)
    before = optimizer.diagnostics()["curvature/fallbacks"]
    optimizer.blocks["3"].factors["A"] -= 0.5 * torch.eye(7)
    losses = train(optimizer, model, batch, 3)
    assert optimizer.diagnostics()["curvature/fallbacks"] > before
    assert all(torch.tensor(losses).isfinite())


def test_an_inverse_that_is_not_finite_leaves_the_last_good_one_in_use() -> None:
    model, batch = mlp(), images()
    optimizer = KFAC(model, likelihood=Categorical(), update_every=100, refresh_every=1)
    train(optimizer, model, batch, 1)
    good = {b.layer.name: {k: v.clone() for k, v in part.items()} for s in optimizer._stacks for b, part in s.members()}
    optimizer.blocks["3"].factors["A"].fill_(float("nan"))
    before = copy.deepcopy(model.state_dict())
    train(optimizer, model, batch, 1)
    now = {b.layer.name: part for s in optimizer._stacks for b, part in s.members()}
    assert all(torch.equal(now["3"][k], good["3"][k]) for k in good["3"])
    assert optimizer.diagnostics()["curvature/fallbacks"] >= 1
    assert all(bool(v.isfinite().all()) and not torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_plain_backward_is_refused_where_targets_are_sampled(method: type[NaturalGradient]) -> None:
    model, batch = mlp(), images()
    optimizer = method(model, likelihood=Categorical())
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer.backward\(loss, outputs\) in place of loss.backward\(\)"):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"outputs must be given to backward\(loss, outputs\) for fisher='sampled'"):
        optimizer.backward(F.cross_entropy(model(batch[0]), batch[1]))
    empirical = method(mlp(), fisher="empirical")
    assert empirical.model is not None
    F.cross_entropy(empirical.model(batch[0]), batch[1]).backward()
    empirical.step()


def test_the_sampled_pass_leaves_gradients_and_batch_norm_alone() -> None:
    """``.grad`` is that of ``loss.backward()``, and running statistics see the batch once."""
    model, (inputs, targets) = conv_net(), images()
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(inputs), targets).backward()
    optimizer = KFAC(model, likelihood=Categorical())
    outputs = model(inputs)
    optimizer.backward(F.cross_entropy(outputs, targets), outputs)
    assert all(block.observed for block in optimizer.blocks.values())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert torch.equal(p.grad, q.grad)
    assert all(torch.equal(v, dict(twin.named_buffers())[n]) for n, v in model.named_buffers())


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_nothing_of_a_batch_outlives_the_step(method: type[NaturalGradient], fisher: str) -> None:
    model = mlp()
    optimizer = method(model, likelihood=Categorical(), fisher=fisher, update_every=2)
    gc.collect()
    for step in range(8):
        inputs, targets = images()
        outputs = model(inputs)
        loss = F.cross_entropy(outputs, targets)
        optimizer.zero_grad()
        optimizer.backward(loss, outputs)
        optimizer.step()
        watched = [weakref.ref(t) for t in (inputs, outputs, loss)]
        if step == 3:  # two updates: the second one is the first to average
            settled = len({id(t) for t in gc.get_objects() if isinstance(t, Tensor)})
        del inputs, targets, outputs, loss
        assert [w() for w in watched] == [None, None, None], step
    assert len({id(t) for t in gc.get_objects() if isinstance(t, Tensor)}) <= settled


@pytest.mark.parametrize(
    ("method", "problem"),
    [(method, problem) for method in METHODS.values() for problem in ("conv", "vit", "embedding")] + [(KFAC, "resnet")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_coverage_bytes_are_what_is_allocated(method: type[NaturalGradient], problem: str) -> None:
    model, batch = PROBLEMS[problem][0](), PROBLEMS[problem][1]()
    optimizer = method(model, likelihood=Categorical(), lr=1e-4, max_factor_dim=600 if problem == "resnet" else None)
    announced = optimizer.coverage().bytes
    train(optimizer, model, batch, 2)
    storages = {}
    for tensor in [t for b in optimizer.blocks.values() for t in b.factors.values()] + [
        t for stack in optimizer._stacks for t in stack.cache.values()
    ]:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert announced == pytest.approx(sum(storages.values()), rel=0.1)


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.__name__)
def test_a_vocabulary_is_wider_than_the_widest_factor_unless_asked_for(method: type[NaturalGradient]) -> None:
    """One square factor of 33,278 words would be 4.4 GB; those of published nets (Swin-L's 6145) stay whole."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6144, 256), nn.Linear(256, 33_278))
    inner, head = method(model, likelihood=Categorical()).blocks.values()
    assert inner.shapes()["A"] == (1, 6145, 6145) and inner.shapes()["G"] == (1, 256, 256)
    assert head.shapes()["A"] == (1, 257, 257) and head.shapes()["G"] == (1, 33_278)
    whole = method(model, likelihood=Categorical(), max_factor_dim=None).blocks["1"]
    assert whole.shapes()["G"] == (1, 33_278, 33_278)


def test_skipped_layers_train_by_the_fallback() -> None:
    model, batch = mlp(), images()
    optimizer = KFAC(model, likelihood=Categorical(), skip=r"^1$", lr=0.5, fallback_lr=1e-3, momentum=0.0)
    assert list(optimizer.blocks) == ["3"]
    assert "fallback: skipped" in str(optimizer.coverage())
    before = model[1].weight.detach().clone()
    train(optimizer, model, batch, 1)
    torch.testing.assert_close((model[1].weight - before).abs(), torch.full_like(before, 1e-3), rtol=1e-2, atol=1e-6)


def viewed(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """What nn.Linear does with tokens in some versions of torch: its output is a view."""
    bias = torch.zeros(layer.out_features, dtype=inputs.dtype) if layer.bias is None else layer.bias
    return torch.addmm(bias, inputs.flatten(0, -2), layer.weight.T).view(*inputs.shape[:-1], -1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", [AdaFisher, KFAC])
def test_an_activation_in_place_behind_tokens_changes_nothing(
    method: Any, bias: bool, view: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if view:
        monkeypatch.setattr(nn.Linear, "forward", viewed)
    inputs, targets = torch.randn(5, 3, 4), torch.randint(2, (5,))
    found = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3, bias), nn.ReLU(inplace), nn.Flatten(), nn.Linear(9, 2))
        optimizer = method(model, lr=0.0, **({} if method is AdaFisher else {"likelihood": Categorical()}))
        outputs = model(inputs)
        optimizer.backward(F.cross_entropy(outputs, targets), outputs)
        optimizer.step()
        assert not [row for row in optimizer.coverage().rows if "fallback" in row[1]]
        found.append(optimizer.curvature_matrices())
    torch.testing.assert_close(*found)


def test_transposed_convolutions_of_every_kind_are_covered_and_train() -> None:
    model = nn.Sequential(
        Shape(3, 8, 8), nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2, output_padding=1), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(256, 4),
    )  # fmt: skip
    for method in METHODS.values():
        net = copy.deepcopy(model)
        optimizer = method(net, likelihood=Categorical(), lr=0.05, update_every=2, refresh_every=2)
        assert optimizer.coverage().fraction == 1.0
        losses = train(optimizer, net, images(12), 10)
        assert losses[-1] < losses[0], method.__name__


BAD: list[tuple[type[NaturalGradient], dict[str, Any], str]] = [
    (KFAC, {"lr": -1.0}, r"lr must be in \[0, inf\), got -1.0"),
    (KFAC, {"damping": 0.0}, r"damping must be in \(0, inf\), got 0.0"),
    (KFAC, {"kl_clip": 0.0}, r"kl_clip must be in \(0, inf\), got 0.0"),
    (KFAC, {"fisher": "true"}, "fisher must be one of sampled, empirical, exact, got 'true'"),
    (KFAC, {"likelihood": None}, "likelihood must be given for fisher='sampled'"),
    (KFAC, {"batch_fraction": 0.0}, r"batch_fraction must be in \(0, 1\], got 0.0"),
    (KFAC, {"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
    (KFAC, {"refresh_every": 0}, r"refresh_every must be in \[1, inf\), got 0"),
    (KFAC, {"damping_mode": "both"}, "damping_mode must be one of factored, tikhonov, got 'both'"),
    (KFAC, {"sharing": "all"}, "sharing must be one of expand, reduce, got 'all'"),
    (KFAC, {"solve_dtype": "int8"}, "solve_dtype must be one of float32, bfloat16, got 'int8'"),
    (KFAC, {"max_factor_dim": 0}, r"max_factor_dim must be in \[1, inf\), got 0"),
    (KFAC, {"skip": "("}, r"skip must be a regular expression, got '\('"),
    (KPSVD, {"solver": "qr"}, "solver must be one of gram, power, lanczos, got 'qr'"),
    (KPSVD, {"radius": -1}, r"radius must be in \[0, inf\), got -1"),
    (Deflation, {"damping_mode": "tikhonov"}, "damping_mode must be 'factored' for a sum of two products"),
]


@pytest.mark.parametrize(("method", "options", "sentence"), BAD, ids=lambda value: str(value)[:40])
def test_bad_arguments_are_sentences(method: type[NaturalGradient], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        method(mlp(), **{"likelihood": Categorical()} | options)
