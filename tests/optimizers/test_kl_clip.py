"""The KL clip of natural gradients: the quadratic model of the step taken, the measured divergence, the radius."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers import EKFAC, KFAC, Bernoulli, Categorical, ExactNaturalGradient, Gaussian, TwoLevelKFAC
from optimizers.likelihoods import Likelihood
from optimizers.natural_gradient import NaturalGradient
from tests import dense
from tests.optimizers.test_natural_gradient import METHODS, damped_dense
from tests.optimizers.test_two_level import layers_of

DAMPING = 0.05
KAPPA = 1e-4


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def batch(step: int, n: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(n, 5, generator=generator, dtype=torch.get_default_dtype())
    return inputs, torch.randint(3, (n,), generator=generator)


def taken(model: nn.Module, optimizer: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    """One step on a batch; what it changed, all parameters in one vector."""
    before = dense.flatten([p.detach().clone() for p in model.parameters()])
    optimizer.zero_grad()
    outputs = model(data[0])
    optimizer.backward(F.cross_entropy(outputs, data[1]), outputs)
    optimizer.step()
    return dense.flatten([p.detach() for p in model.parameters()]) - before


def block_length(model: nn.Module, optimizer: Any, move: Tensor) -> float:
    """``xᵀ (F + damping) x`` with the dense blocks of the approximation."""
    total = 0.0
    for name, where in layers_of(optimizer, model):
        block = torch.block_diag(*damped_dense(optimizer, name, DAMPING))
        total += float(move[where] @ block @ move[where])
    return total


SETTINGS: dict[str, Any] = {
    "plain": {},
    "coupled decay": {"weight_decay": 0.3},
    "decoupled decay": {"weight_decay": 0.03, "decoupled_decay": True},
    "no momentum": {"momentum": 0.0},
    "growing": {"kl_warmup": 6},
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_each_step_is_as_long_as_kappa_by_the_dense_blocks(method: str, setting: str) -> None:
    """Momentum included, and across refreshes of F, at which the past is measured anew."""
    options = {"momentum": 0.9, "fisher": "empirical", "batch_fraction": 1.0, "update_every": 4, "refresh_every": 4}
    options |= {"lr": 0.5, "damping": DAMPING, "kl_clip": KAPPA, "early_updates": False} | SETTINGS[setting]
    model = net()
    optimizer = METHODS[method](model, likelihood=Categorical(), **options)
    lengths = []
    for index in range(11):
        before = dense.flatten([p.detach().clone() for p in model.parameters()])
        move = taken(model, optimizer, batch(index))
        if setting == "decoupled decay":  # which is no part of the step that is held
            move = move + 0.5 * 0.03 * before
        assert optimizer.diagnostics()["curvature/floored"] == 0
        lengths.append(block_length(model, optimizer, move))
    radius = [min(1.0, (k + 1) / 6) if setting == "growing" else 1.0 for k in range(11)]
    assert lengths == pytest.approx([KAPPA * r**2 for r in radius], rel=1e-7)


@pytest.mark.usefixtures("float64")
def test_a_free_step_is_the_sum_of_past_directions() -> None:
    """Where kappa is far away, nothing is scaled, and the lengths that are carried along are still those of F."""
    free, held = net(), net()
    options: dict[str, Any] = {"lr": 0.05, "damping": DAMPING, "fisher": "empirical", "update_every": 3}
    options |= {"refresh_every": 3, "early_updates": False}
    first = KFAC(free, kl_clip=None, **options)
    second = KFAC(held, kl_clip=1e6, **options)
    for index in range(8):
        torch.testing.assert_close(taken(free, first, batch(index)), taken(held, second, batch(index)))
        momentum = dense.flatten([second.state[p]["momentum_buffer"] for p in held.parameters()])
        assert float(second._length.squares[0]) == pytest.approx(block_length(held, second, momentum), rel=1e-8)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", ["frozen bias", "bias in a group of its own", "no decay on biases"])
def test_layers_that_do_not_move_as_a_whole(case: str) -> None:
    model = net()
    weights = [p for n, p in model.named_parameters() if "weight" in n]
    biases = [p for n, p in model.named_parameters() if "bias" in n]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": biases}]
    if case == "frozen bias":
        for p in biases:
            p.requires_grad_(False)
    elif case == "bias in a group of its own":
        groups[1] |= {"momentum": 0.5, "lr": 0.2}
    else:
        groups[0] |= {"weight_decay": 0.3}
    optimizer = KFAC(
        model, groups, lr=0.5, damping=DAMPING, fisher="empirical", kl_clip=KAPPA, update_every=3, refresh_every=3
    )
    for index in range(7):
        assert block_length(model, optimizer, taken(model, optimizer, batch(index))) == pytest.approx(KAPPA, rel=1e-7)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", [KFAC, TwoLevelKFAC])
def test_a_layer_without_gradients_stands_still_and_its_past_counts_again_later(method: Any) -> None:
    model = net()
    optimizer = method(
        model, lr=0.5, damping=DAMPING, fisher="empirical", kl_clip=KAPPA, update_every=20, refresh_every=20,
        batch_fraction=1.0, early_updates=False,
    )  # fmt: skip
    nll = lambda o, t: F.cross_entropy(o, t, reduction="sum")  # noqa: E731
    fisher = dense.empirical_fisher(model, nll, *batch(0), list(model.parameters()))
    for index in range(6):
        before = dense.flatten([p.detach().clone() for p in model.parameters()])
        optimizer.zero_grad()
        inputs, targets = batch(index)
        outputs = model(inputs)
        optimizer.backward(F.cross_entropy(outputs, targets), outputs)
        if index == 2:
            for p in model[2].parameters():
                p.grad = None
        optimizer.step()
        move = dense.flatten([p.detach() for p in model.parameters()]) - before
        if method is KFAC:
            length = block_length(model, optimizer, move)
        else:
            length = float(move @ fisher @ move + DAMPING * move @ move)
        assert length == pytest.approx(KAPPA, rel=1e-7)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("blocks", ["full", "layer"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_exact_fisher_matrix_measures_its_steps(blocks: str, decay: float) -> None:
    model = net()
    params = list(model.parameters())
    optimizer = ExactNaturalGradient(
        model, lr=0.5, momentum=0.9, damping=DAMPING, fisher="empirical", kl_clip=KAPPA, blocks=blocks, update_every=2,
        weight_decay=decay,
    )  # fmt: skip
    nll = lambda o, t: F.cross_entropy(o, t, reduction="sum")  # noqa: E731
    fisher = torch.zeros(0)
    for index in range(7):
        if index % 2 == 0:
            fisher = dense.empirical_fisher(model, nll, *batch(index), params)
            if blocks == "layer":
                keep = torch.block_diag(*[torch.ones(n, n) for n in (24, 20, 15)])
                fisher = fisher * keep
        move = taken(model, optimizer, batch(index))
        length = float(move @ fisher @ move + DAMPING * move @ move)
        assert length == pytest.approx(KAPPA, rel=1e-7)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("coarse", ["nicolaides", "residual", "spectral"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_projection_is_measured_by_the_samples(coarse: Any, decay: float) -> None:
    model = net()
    optimizer = TwoLevelKFAC(
        model, lr=0.5, momentum=0.9, damping=DAMPING, fisher="empirical", kl_clip=KAPPA, coarse=coarse,
        batch_fraction=1.0, update_every=2, refresh_every=4, early_updates=False, weight_decay=decay,
    )  # fmt: skip
    nll = lambda o, t: F.cross_entropy(o, t, reduction="sum")  # noqa: E731
    fisher = torch.zeros(0)
    for index in range(9):
        if index % 2 == 0:
            fisher = dense.empirical_fisher(model, nll, *batch(index), list(model.parameters()))
        move = taken(model, optimizer, batch(index))
        assert float(move @ fisher @ move + DAMPING * move @ move) == pytest.approx(KAPPA, rel=1e-7)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", METHODS)
def test_damping_in_units_of_a_layers_mean_eigenvalue(method: str) -> None:
    model = net()
    options: dict[str, Any] = {"lr": 1.0, "momentum": 0.0, "kl_clip": None, "fisher": "empirical"}
    optimizer = METHODS[method](model, damping=0.2, damping_unit="layer", batch_fraction=1.0, **options)
    move = taken(model, optimizer, batch(0))
    gradient = dense.flatten([p.grad for p in model.parameters()])
    for name, where in layers_of(optimizer, model):
        whole = optimizer.curvature_matrices()[name]
        damping = 0.2 * float(torch.linalg.eigvalsh(whole).mean())
        block = torch.block_diag(*damped_dense(optimizer, name, damping))
        torch.testing.assert_close(-move[where], torch.linalg.solve(block, gradient[where]))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("blocks", ["full", "layer"])
def test_the_exact_fisher_matrix_in_units_of_its_layers(blocks: str) -> None:
    model = net()
    nll = lambda o, t: F.cross_entropy(o, t, reduction="sum")  # noqa: E731
    fisher = dense.empirical_fisher(model, nll, *batch(0), list(model.parameters()))
    spans = [slice(0, 24), slice(24, 44), slice(44, 59)]
    shifts = torch.cat([torch.full((s.stop - s.start,), 0.2 * float(fisher[s, s].diag().mean())) for s in spans])
    if blocks == "layer":
        fisher = torch.block_diag(*[fisher[s, s] for s in spans])
    optimizer = ExactNaturalGradient(
        model, lr=1.0, momentum=0.0, damping=0.2, damping_unit="layer", fisher="empirical", kl_clip=None, blocks=blocks
    )
    move = taken(model, optimizer, batch(0))
    gradient = dense.flatten([p.grad for p in model.parameters()])
    torch.testing.assert_close(-move, torch.linalg.solve(fisher + torch.diag(shifts), gradient))


# -- the measured divergence -------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    """What makes a second forward pass differ from the first: noise and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(4 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.norm(self.conv(x))).flatten(1)))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 8), nn.Parameter(torch.zeros(6, 8))
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x) + self.place
        return self.head(hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0])


def problem(kind: str, index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index % 7)
    if kind == "tokens":
        x = torch.randint(11, (16, 6), generator=generator)
        return x, x.roll(1, 1)
    x = torch.randn(32, 1, 8, 8, generator=generator)
    if kind == "pixels":
        return x, (x > 0).float().flatten(1)
    return x, x.flatten(1)[:, :10].argmax(1)


MEASURED: dict[str, Any] = {
    "conv": (Dropping, Categorical()),
    "tokens": (Tokens, Categorical()),
    "pixels": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 64)), Bernoulli()),
}


@pytest.mark.parametrize("kind", MEASURED)
def test_measured_steps_stay_within_kappa(kind: str) -> None:
    """200 real steps at momentum 0.9, by another forward pass that is made here, under the same noise."""
    torch.manual_seed(0)
    make, likelihood = MEASURED[kind]
    model = make()
    share = likelihood.variables(model(problem(kind, 0)[0])) ** 0.5
    optimizer = KFAC(model, likelihood=likelihood, kl_of="measured", kl_clip=1e-2 / share, momentum=0.9, lr=0.3)
    worst = longest = 0.0
    losses = []
    for index in range(200):
        inputs, targets = problem(kind, index)
        noise = torch.get_rng_state()
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = likelihood.nll(outputs, targets)
        optimizer.backward(loss, outputs)
        now = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), now), "the second pass drew from the global generator"
        with torch.no_grad():
            twin = copy.deepcopy(model)  # whose running statistics move instead
            torch.set_rng_state(noise)
            divergence = likelihood.divergence(outputs.detach(), twin(inputs)).mean()
            torch.set_rng_state(now)
        worst, longest = max(worst, float(divergence)), max(longest, optimizer.diagnostics()["curvature/kl_scale"])
        losses.append(loss.item())
    assert worst <= 1.5 * 1e-2
    assert worst > 0.3e-2, "steps that use what they may"
    assert sum(losses[-7:]) < 0.9 * sum(losses[:7])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (KFAC, {}),
        (KFAC, {"fisher": "empirical"}),
        (EKFAC, {"kl_of": "direction"}),
        (KFAC, {"kl_of": "measured"}),
        (KFAC, {"lr": "auto", "momentum": "auto"}),
        (ExactNaturalGradient, {}),
        (TwoLevelKFAC, {"coarse": "residual"}),
    ],
    ids=["step", "empirical", "direction", "measured", "auto", "exact", "two-level"],
)
def test_kappa_is_of_what_is_predicted(method: Any, options: dict[str, Any]) -> None:
    """An image has as many as pixels, unless the loss averages over them; a label is one."""
    make, _ = MEASURED["pixels"]
    cases = [
        (Bernoulli(), ("variable", 1e-6), ("observation", 64e-6), ("root", 8e-6)),
        (Gaussian(reduction="sum"), ("variable", 1e-6), ("observation", 64e-6)),
        (Bernoulli(reduction="mean"), ("variable", 1e-6), ("root", 1e-6), ("observation", 1e-6)),
        (Categorical(), ("variable", 1e-5), ("root", 1e-5), ("observation", 1e-5)),
    ]
    for likelihood, *units in cases:
        ends = []
        for unit, clip in units:
            torch.manual_seed(0)
            model = make()
            optimizer = method(model, likelihood=likelihood, kl_unit=unit, kl_clip=clip, **options)
            for index in range(3):
                inputs, targets = problem("pixels", index)
                inputs, targets = inputs.double(), targets.double()
                if isinstance(likelihood, Categorical):
                    targets = targets.argmax(1)
                optimizer.zero_grad()
                outputs = model(inputs)
                optimizer.backward(likelihood.nll(outputs, targets), outputs)
                optimizer.step()
                assert optimizer.diagnostics()["curvature/kl_scale"] < 1
            ends.append(dense.flatten([p.detach() for p in model.parameters()]))
        for end in ends[1:]:
            torch.testing.assert_close(end, ends[0], rtol=1e-9, atol=1e-12)


def test_who_never_shows_outputs_is_told_what_kappa_is_of() -> None:
    model = nn.Linear(5, 3)
    optimizer = KFAC(model, fisher="empirical", likelihood=Gaussian())
    inputs, _ = batch(0)
    Gaussian().nll(model(inputs), torch.zeros(9, 3)).backward()
    with pytest.warns(UserWarning, match="kl_clip is of whole observations until outputs are given"):
        optimizer.step()


def test_what_is_measured_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = Dropping()
    optimizer = KFAC(model, likelihood=Categorical(), kl_of="measured", kl_clip=1e-3)
    inputs, targets = problem("conv", 0)
    outputs = model(inputs)
    optimizer.backward(F.cross_entropy(outputs, targets), outputs)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    optimizer.step()
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert not optimizer._replay.inputs.calls and not optimizer._replay.shown
    assert 0 < optimizer.diagnostics()["curvature/kl_scale"] < 1


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "options",
    [
        {"kl_of": "measured", "kl_clip": 1e-4, "lr": 0.5, "update_every": 2},
        {"kl_clip": None, "lr": "auto", "momentum": "auto"},
    ],
    ids=["measured", "auto"],
)
def test_micro_batches_are_one_batch(options: dict[str, Any]) -> None:
    """To whatever looks at the model's outputs again: what it finds of them is their mean."""
    results = []
    for parts in (1, 3):
        model = net()
        optimizer = KFAC(model, likelihood=Categorical(), fisher="exact", **options)
        for index in range(4):
            inputs, targets = batch(index)
            optimizer.zero_grad()
            for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
                outputs = model(x)
                optimizer.backward(F.cross_entropy(outputs, y) / parts, outputs)
            optimizer.step()
        results.append(dense.flatten([p.detach() for p in model.parameters()]))
    torch.testing.assert_close(*results)


def test_what_cannot_be_measured_is_said() -> None:
    model = net()
    with pytest.raises(ValueError, match="likelihood must be given for kl_of='measured'"):
        KFAC(model, fisher="empirical", kl_of="measured")
    optimizer = KFAC(model, likelihood=Categorical(), kl_of="measured")
    inputs, targets = batch(0)
    for step in range(2):
        outputs = model(inputs)
        model(inputs)  # a pass that nobody differentiates is nobody's matter
        if step:
            outputs = torch.cat([outputs, model(inputs)])  # which call gave which part of them?
        optimizer.backward(F.cross_entropy(outputs, targets.repeat(1 + step)), outputs)
        if step:
            with pytest.raises(RuntimeError, match="saw 3 forward passes for 1 backward"):
                optimizer.step()
        else:
            optimizer.step()
    for bad, sentence in (
        ({"kl_of": "steps"}, "kl_of must be one of"),
        ({"kl_warmup": -1}, "kl_warmup must be"),
        ({"damping_unit": "mean"}, "damping_unit must be one of"),
    ):
        with pytest.raises(ValueError, match=sentence):
            KFAC(model, likelihood=Categorical(), **bad)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "likelihood",
    [Categorical(), Bernoulli(), Gaussian(sigma=0.7), Gaussian(0.5**0.5, reduction="mean")],
    ids=["categorical", "bernoulli", "gaussian", "mean gaussian"],
)
def test_divergences_are_those_of_the_distributions(likelihood: Likelihood) -> None:
    before, after = torch.randn(6, 4), torch.randn(6, 4)
    kinds = torch.distributions
    make: Any = {
        Categorical: lambda o: kinds.Categorical(logits=o),
        Bernoulli: lambda o: kinds.Independent(kinds.Bernoulli(logits=o), 1),
        Gaussian: lambda o: kinds.Independent(kinds.Normal(o, likelihood.sigma), 1),  # type: ignore[attr-defined]
    }[type(likelihood)]
    expected = kinds.kl_divergence(make(before), make(after))
    torch.testing.assert_close(likelihood.divergence(before, after), expected)
    # The default, which is of second order, agrees nearby.
    near = before + 1e-5 * after
    quadratic = Likelihood.divergence(likelihood, before, near)
    torch.testing.assert_close(quadratic, likelihood.divergence(before, near), rtol=1e-3, atol=1e-14)


def test_direction_is_the_published_clip() -> None:
    """Each new direction is scaled, and the sum of them is not."""
    model = net()
    optimizer = KFAC(model, likelihood=Categorical(), kl_of="direction", kl_clip=1e-4, lr=0.5, momentum=0.5)
    sums = torch.zeros(59)
    for index in range(4):
        move = taken(model, optimizer, batch(index))
        (nu,) = optimizer._length.scales.values()
        direction = -move / 0.5 - 0.5 * sums
        sums = -move / 0.5
        gradient = dense.flatten([p.grad for p in model.parameters()])
        assert float(0.25 * nu * direction @ gradient) == pytest.approx(1e-4, rel=1e-3)


def test_the_methods_all_know_the_options() -> None:
    for method in [*METHODS.values(), ExactNaturalGradient, TwoLevelKFAC]:
        assert issubclass(method, NaturalGradient)
        optimizer = method(net(), likelihood=Categorical(), kl_of="measured", kl_warmup=3, damping_unit="layer")
        optimizer.close()


@pytest.mark.usefixtures("float64")
def test_eigenbases_of_low_rank_measure_as_they_solve() -> None:
    """``xᵀ (F + damping) x`` with ``(F + damping) x = g`` where x is the solution for g."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3))
    inputs, targets = torch.randn(16, 40), torch.randint(3, (16,))
    optimizer = EKFAC(model, fisher="empirical", kl_clip=None, rank=5, lr=0.1)
    outputs = model(inputs)
    optimizer.backward(F.cross_entropy(outputs, targets), outputs)
    optimizer.step()
    for stack in optimizer._stacks:
        block = stack.blocks[0]
        gradient = torch.randn(1, block.dims["G"], block.dims["A"])
        x = block.solve(stack.cache, gradient)
        dampings = optimizer._dampings(stack.blocks)
        found = block.squared(stack.factors(), stack.cache, dampings, x)
        torch.testing.assert_close(found, (x * gradient).sum().view(1))
