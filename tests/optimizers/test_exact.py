"""The exact natural gradient against dense solves: samples, their Gram matrices, directions, state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers import Bernoulli, Categorical, ExactNaturalGradient, Gaussian, Likelihood
from optimizers.curvature.layers import adapt
from optimizers.curvature.layers import affine as layers
from tests import dense
from tests.optimizers.problems import PROBLEMS, EmbeddingModel, Shape, images, mlp, tokens
from tests.optimizers.test_natural_gradient import LAYERS, around, criterion, relative, train


class Recurrent(nn.Module):
    """Calls one layer three times: its gradient is the sum over the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros_like(x)
        for _ in range(3):
            hidden = torch.tanh(self.norm(self.cell(hidden) + x))
        return self.head(hidden)


class Flattened(nn.Module):
    """Tokens of all examples in the batch dimension, as windows of images are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.linear(x.flatten(0, 1)))).unflatten(0, (len(x), -1)).mean(1))


class Padded(EmbeddingModel):
    """The padding token has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 6, padding_idx=4)


def mixed() -> nn.Module:
    """A layer of every kind without statistics over the batch."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.GroupNorm(2, 4), nn.Tanh(),
        nn.Conv2d(4, 4, 2, groups=2, bias=False),
        nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2), nn.Tanh(), Shape(2, 16), nn.Conv1d(2, 3, 3, padding="same"),
        nn.LayerNorm(16), nn.Linear(16, 2), nn.RMSNorm(2), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


Net = tuple[Callable[[], nn.Module], Callable[[], Tensor]]

NETS: dict[str, Net] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), lambda: torch.randn(6, 4)),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(18, 3)),
        lambda: torch.randn(6, 2, 6, 6),
    ),
    "mixed": (mixed, lambda: torch.randn(6, 2, 5, 5)),
    "tokens": (EmbeddingModel, lambda: tokens(6)[0]),
    "padding": (Padded, lambda: tokens(6)[0]),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)),
        lambda: torch.randn(5, 4, 4),
    ),
    "recurrent": (Recurrent, lambda: torch.randn(6, 4)),
    "flattened": (Flattened, lambda: torch.randn(6, 3, 4)),
}


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    model, inputs = NETS[name][0](), NETS[name][1]()
    classes = model(inputs)[..., 0]
    return model, inputs, torch.randint(0, 3, classes.shape)


def nll(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def parameters_of(model: nn.Module, optimizer: Any) -> list[list[Tensor]]:
    """The parameters by layer, in the order of the model's."""
    return [list(model.get_submodule(name).parameters(recurse=False)) for name in optimizer.blocks]


def moved(model: nn.Module, before: list[Tensor]) -> Tensor:
    return dense.flatten([b - p.detach() for p, b in zip(model.parameters(), before, strict=True)])


def step(
    method: Any, model: nn.Module, inputs: Tensor, targets: Tensor, loss: Any = nll, **options: Any
) -> tuple[Any, Tensor, Tensor]:
    """One step of size 1: the optimizer, the direction, and the gradient that it was made of."""
    settings = {"lr": 1.0, "momentum": 0.0, "kl_clip": None, "batch_fraction": 1.0, "likelihood": Categorical()}
    optimizer = method(model, **settings | options)
    before = [p.detach().clone() for p in model.parameters()]
    outputs = model(inputs)
    optimizer.backward(loss(outputs, targets), outputs)
    optimizer.step()
    return optimizer, moved(model, before), dense.flatten([p.grad for p in model.parameters()])


def within_layers(fisher: Tensor, groups: list[list[Tensor]]) -> Tensor:
    """The diagonal blocks alone."""
    sizes = [sum(p.numel() for p in group) for group in groups]
    marks = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return fisher * (marks.unsqueeze(0) == marks.unsqueeze(1))


def dense_fisher(
    model: nn.Module, inputs: Tensor, targets: Tensor, fisher: str, likelihood: Likelihood, seed: int = 0
) -> Tensor:
    """Of the data's, all, or the very targets that a first step draws."""
    params = list(model.parameters())
    if fisher == "exact":
        return dense.gauss_newton(model, likelihood.nll, inputs, targets, params)
    if fisher == "empirical":
        return dense.empirical_fisher(model, likelihood.nll, inputs, targets, params)
    drawn = likelihood.sample(model(inputs), torch.Generator().manual_seed(seed * 1_000_003))
    # Positions of an example add up to one gradient, whose square is the mean over observations in expectation.
    share = (drawn.numel() / len(drawn)) ** 0.5 if isinstance(likelihood, Categorical) else 1.0
    rows = dense.per_example_gradients(model, likelihood.nll, inputs, drawn, params) * share
    return rows.T @ rows / len(rows)


# -- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("room", [2**24, 40], ids=["at once", "in parts"])
@pytest.mark.parametrize("name", LAYERS)
def test_products_with_the_gradients_of_examples(name: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner products, combinations and Gram matrices, either way, of gradients formed one example at a time."""
    monkeypatch.setattr(layers, "ROOM", room)
    model, module, inputs, targets = around(name)
    parameters = list(module.parameters())
    rows = dense.per_example_gradients(model, criterion, inputs, targets, parameters)
    optimizer, _, _ = step(ExactNaturalGradient, model, inputs, targets, criterion, fisher="empirical", lr=0.0)
    samples = optimizer.samples["1"]
    direction, weights = [torch.randn_like(p) for p in parameters], torch.randn(len(inputs))
    root = len(inputs) ** 0.5
    torch.testing.assert_close(samples.dots(direction) * root, rows @ dense.flatten(direction))
    torch.testing.assert_close(dense.flatten(samples.combine(weights)) * root, weights @ rows)
    torch.testing.assert_close(samples.gram() * len(inputs), rows @ rows.T)
    layer, x, g = samples.layer, samples.factors["x"], samples.factors["g"]
    for gram in (layer._gram_of_rows(x, g), layer._gram_of_pairs(x, g)):
        torch.testing.assert_close(gram * len(inputs), rows @ rows.T)
    order = dense.as_matrix_order(module)
    whole = rows.T @ rows / len(rows)
    torch.testing.assert_close(optimizer.curvature_matrices()["1"], whole[order][:, order])
    a, g_factor = dense.kronecker_factors(model, module, criterion, inputs, targets)
    for found, factor in zip(samples.norms(), (a, g_factor), strict=True):
        torch.testing.assert_close(found, torch.linalg.eigvalsh(factor)[:, -1])


# -- directions --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("fisher", ["sampled", "empirical", "exact"])
@pytest.mark.parametrize("blocks", ["full", "layer"])
@pytest.mark.parametrize("name", NETS)
def test_a_step_is_the_dense_solve(name: str, blocks: str, fisher: str) -> None:
    model, inputs, targets = problem(name)
    reference = dense_fisher(model, inputs, targets, fisher, Categorical())
    for damping in (1e-3, 1.0):
        twin = copy.deepcopy(model)
        optimizer, direction, gradient = step(
            ExactNaturalGradient, twin, inputs, targets, fisher=fisher, blocks=blocks, damping=damping
        )
        assert optimizer.coverage().fraction == 1.0
        matrix = reference if blocks == "full" else within_layers(reference, parameters_of(twin, optimizer))
        assert relative(direction, dense.damped_solve(matrix, gradient, damping)) < 1e-8


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(0.5)], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_other_likelihoods(likelihood: Likelihood, fisher: str) -> None:
    model, inputs, _ = problem("cnn")
    targets = likelihood.sample(model(inputs))
    reference = dense_fisher(model, inputs, targets, fisher, likelihood)
    _, direction, gradient = step(
        ExactNaturalGradient, model, inputs, targets, likelihood.nll, fisher=fisher, likelihood=likelihood, damping=0.1
    )
    assert relative(direction, dense.damped_solve(reference, gradient, 0.1)) < 1e-8


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("blocks", ["full", "layer"])
def test_every_layer_has_its_own_damping(blocks: str) -> None:
    """From groups, and from the layer's own factors under the heuristic."""
    model, inputs, targets = problem("cnn")
    params = list(model.parameters())
    reference = dense.empirical_fisher(model, nll, inputs, targets, params)
    groups = [{"params": params[:2], "damping": 0.3}, {"params": params[2:], "damping": 0.02}]
    lambdas = []
    for position in (0, 2, 4):
        a, g = dense.kronecker_factors(model, model[position], criterion, inputs, targets)
        base = 0.3 if position == 0 else 0.02
        most = torch.linalg.eigvalsh(a).max() + torch.linalg.eigvalsh(g).max()
        lambdas.append((base, float(base * most + base**2)))
    sizes = [sum(p.numel() for p in params[i : i + 2]) for i in (0, 2, 4)]
    for mode, column in (("standard", 0), ("heuristic", 1)):
        twin = copy.deepcopy(model)
        own = list(twin.parameters())
        split = [{**groups[0], "params": own[:2]}, {**groups[1], "params": own[2:]}]
        optimizer, direction, gradient = step(
            ExactNaturalGradient, twin, inputs, targets, params=split, fisher="empirical", blocks=blocks,
            damping_mode=mode,
        )  # fmt: skip
        matrix = reference if blocks == "full" else within_layers(reference, parameters_of(twin, optimizer))
        damping = torch.cat([torch.full((n,), v[column]) for n, v in zip(sizes, lambdas, strict=True)])
        assert relative(direction, dense.damped_solve(matrix, gradient, damping)) < 1e-8, mode


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("name", ["mixed", "flattened", "tokens"])
def test_a_share_of_the_batch(name: str, fisher: str) -> None:
    """F of every other example, the gradient of all of them."""
    model, inputs, targets = problem(name)
    outputs = model(inputs)
    if fisher == "sampled":
        targets = Categorical().sample(outputs, torch.Generator().manual_seed(0))
    reference = dense.empirical_fisher(model, nll, inputs[::2], targets[::2], list(model.parameters()))
    _, direction, gradient = step(
        ExactNaturalGradient, model, inputs, targets, fisher=fisher, batch_fraction=0.5, damping=0.1
    )
    assert relative(direction, dense.damped_solve(reference, gradient, 0.1)) < 1e-8


@pytest.mark.usefixtures("float64")
def test_a_layer_that_some_micro_batches_leave_out() -> None:
    """Rows of all layers stay those of the same examples: what was not reached has zeros."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.extra, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(x))
            return self.head(hidden if float(x[0, 0]) > 0 else torch.tanh(self.extra(hidden)))

    model = Sometimes()
    inputs, targets = torch.randn(6, 4), torch.randint(0, 3, (6,))
    inputs[:, 0] = inputs[:, 0].abs() * torch.tensor([1.0, 1, -1, -1, 1, 1])  # passes of two examples
    rows = [
        dense.per_example_gradients(model, criterion, x, y, list(model.parameters()))
        for x, y in zip(inputs.chunk(3), targets.chunk(3), strict=True)
    ]
    fisher = torch.cat(rows).T @ torch.cat(rows) / 6
    optimizer = ExactNaturalGradient(model, lr=1.0, momentum=0.0, kl_clip=None, fisher="empirical", damping=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for x, y in zip(inputs.chunk(3), targets.chunk(3), strict=True):
        outputs = model(x)
        optimizer.backward(F.cross_entropy(outputs, y) / 3, outputs)
    optimizer.step()
    gradient = dense.flatten([p.grad for p in model.parameters()])
    assert relative(moved(model, before), dense.damped_solve(fisher, gradient, 0.1)) < 1e-8


# -- the engine's promises ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_the_kl_clip_bounds_the_exact_quadratic_form() -> None:
    model, inputs, targets = problem("cnn")
    damped = dense.empirical_fisher(model, nll, inputs, targets, list(model.parameters()))
    damped = damped + 0.05 * torch.eye(len(damped))
    _, step_taken, _ = step(
        ExactNaturalGradient, model, inputs, targets, fisher="empirical", lr=0.5, kl_clip=1e-4, damping=0.05
    )
    assert float(step_taken @ damped @ step_taken) == pytest.approx(1e-4, rel=1e-8)


def test_samples_and_decomposition_last_until_the_next_update() -> None:
    model, batch = mlp(), images()
    optimizer = ExactNaturalGradient(model, lr=0.01, likelihood=Categorical(), update_every=3)
    seen = []
    for index in range(7):
        train(optimizer, model, (batch[0] + index, batch[1]), 1)
        seen.append((float(optimizer.samples["1"].factors["x"].sum()), float(optimizer._root.sum())))
    assert len(set(seen)) == 3 and seen[0] == seen[2] and seen[3] == seen[5]
    assert optimizer.updates == optimizer.refreshes == 3


def test_statistics_that_are_not_finite_leave_all_samples_alone() -> None:
    """Rows belong together: one layer alone must not keep its last ones."""
    model, (inputs, targets) = mlp(), images()
    optimizer = ExactNaturalGradient(model, lr=0.01, likelihood=Categorical())
    train(optimizer, model, (inputs, targets), 1)
    before = {name: copy.deepcopy(s.factors) for name, s in optimizer.samples.items()}
    bad = inputs.clone()
    bad[0, 0, 0, 0] = float("inf")
    outputs = model(bad)
    optimizer.backward(F.cross_entropy(outputs, targets), outputs)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.rejected > 0
    assert all(torch.equal(s.factors[k], t) for n, s in optimizer.samples.items() for k, t in before[n].items())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("case", ["zero", "constant", "batch of one"])
@pytest.mark.parametrize("blocks", ["full", "layer"])
def test_degenerate_statistics(case: str, blocks: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4))
    inputs, targets = images(1 if case == "batch of one" else 6)
    inputs = {"zero": torch.zeros_like(inputs), "constant": torch.ones_like(inputs)}.get(case, inputs)
    optimizer = ExactNaturalGradient(model, likelihood=Categorical(), lr=0.01, damping=1e-9, blocks=blocks)
    assert all(torch.tensor(train(optimizer, model, (inputs, targets), 20)).isfinite())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("problem_name", ["conv", "vit", "embedding"])
def test_coverage_bytes_are_what_is_allocated(problem_name: str) -> None:
    """Known once a batch has been seen: samples outlive the step."""
    model, batch = PROBLEMS[problem_name][0](), PROBLEMS[problem_name][1]()
    optimizer = ExactNaturalGradient(model, likelihood=Categorical(), lr=1e-4)
    assert optimizer.coverage().bytes == 0
    train(optimizer, model, batch, 2)
    held = [t for s in optimizer.samples.values() for t in s.factors.values()] + [optimizer._root]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    assert optimizer.coverage().bytes == pytest.approx(sum(storages.values()), rel=0.1)


def test_samples_do_not_hold_on_to_the_batch() -> None:
    model, (inputs, targets) = mlp(), images()
    optimizer = ExactNaturalGradient(model, likelihood=Categorical(), update_every=2)
    train(optimizer, model, (inputs, targets), 1)
    before = optimizer.samples["1"].factors["x"].clone()
    inputs.zero_()  # a loader that fills its buffers again
    assert torch.equal(optimizer.samples["1"].factors["x"], before) and bool(before.any())


def test_a_layer_whose_rows_are_no_examples_is_left_to_the_fallback_with_a_sentence() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.head = nn.Embedding(5, 3), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.flatten(1)[:, :5, None] * self.position(torch.arange(5))).mean(1)

    model = Positions()
    optimizer = ExactNaturalGradient(model, likelihood=Categorical(), lr=0.01)
    with pytest.warns(UserWarning, match=r"no curvature for 1 of 2 layers, .*\(position: no dimension of its rows"):
        losses = train(optimizer, model, images(), 10)
    assert [row[0] for row in optimizer.coverage().rows if "fallback" in row[1]] == ["position"]
    assert losses[-1] < losses[0]


def test_arguments() -> None:
    for options, sentence in (
        ({"damping_mode": "both"}, "damping_mode must be one of standard, heuristic, got 'both'"),
        ({"blocks": "half"}, "blocks must be one of full, layer, got 'half'"),
        ({"damping": 0.0}, r"damping must be in \(0, inf\), got 0.0"),
        ({"likelihood": None}, "likelihood must be given for fisher='sampled'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ExactNaturalGradient(mlp(), **{"likelihood": Categorical()} | options)


def test_embedding_and_norm_gram_matrices_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = adapt("embedding", nn.Embedding(5, 3))
    assert layer is not None
    x, g = torch.randint(0, 5, (7, 4), dtype=torch.int32), torch.randn(7, 4, 3)
    rows = layer.rows(x, g).double()
    monkeypatch.setattr(layers, "ROOM", 300)
    torch.testing.assert_close(layer.gram(x, g), rows @ rows.T, rtol=1e-5, atol=1e-6)
