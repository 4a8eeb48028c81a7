"""AdaFisher against dense diagonals and against its own formulas worked out by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers import AdaFisher, AdaFisherW
from optimizers.curvature.layers import AffineLayer, adapt
from tests import dense
from tests.optimizers.problems import PROBLEMS, conv_net, images, mlp, tokens

CONVS = {
    "plain": nn.Conv2d(3, 4, 3),
    "padded": nn.Conv2d(3, 4, (3, 2), padding=(2, 1), stride=(2, 1)),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False),
    "depthwise dilated": nn.Conv2d(4, 4, 3, groups=4, dilation=2, padding=2),
    "same": nn.Conv2d(3, 2, (2, 3), padding="same", dilation=(1, 2)),
    "reflect": nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"),
    "circular": nn.Conv2d(3, 2, 3, padding=2, padding_mode="circular", stride=2),
    "1d": nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2),
    "1d grouped": nn.Conv1d(4, 6, 3, groups=2, padding=1),
    "1d replicate": nn.Conv1d(3, 4, 3, padding=2, padding_mode="replicate"),
    "linear on tokens": nn.Linear(5, 4),
}


def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def factors_of(model: nn.Module, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> AdaFisher:
    """An AdaFisher that has seen one batch, unnormalised: its factors are the batch's."""
    optimizer = AdaFisher(model, lr=0.0, ema="average", normalize="none", loss_reduction=reduction)
    optimizer.backward(F.cross_entropy(model(inputs), targets, reduction=reduction))
    optimizer.step()
    return optimizer


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_factors_are_the_dense_diagonals(name: str, reduction: str) -> None:
    layer = CONVS[name].double()
    if isinstance(layer, nn.Linear):
        shape = (6, layer.in_features)
    else:
        shape = (layer.in_channels, 9) if isinstance(layer, nn.Conv1d) else (layer.in_channels, 6, 7)
    inputs, targets = torch.randn(5, *shape), torch.randint(0, 3, (5,))
    flat = layer(inputs).flatten(1).shape[1]
    model = nn.Sequential(nn.Tanh(), layer, nn.Tanh(), nn.Flatten(), nn.Linear(flat, 3))
    optimizer = factors_of(model, inputs, targets, reduction)
    a, g = dense.kronecker_factors(model, layer, criterion, inputs, targets)
    torch.testing.assert_close(optimizer.blocks["1"].factors["H"], a.diagonal(dim1=-2, dim2=-1), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(optimizer.blocks["1"].factors["S"], g.diagonal(dim1=-2, dim2=-1), rtol=1e-10, atol=1e-14)
    # and as a block: the Kronecker product of the diagonals, row-major over [d_out, d_in + 1], group after group
    block = torch.cat([torch.kron(gg.diagonal(), aa.diagonal()) for aa, gg in zip(a, g, strict=True)])
    torch.testing.assert_close(optimizer.curvature_matrices()["1"], torch.diag(block), rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", CONVS)
def test_adapters_cut_out_what_plain_loops_do(name: str) -> None:
    """``inputs`` and ``gradients`` of a layer, position by position, and ``sum_t g aᵀ`` as its parameters' gradient."""
    layer = CONVS[name].double()
    adapter = adapt(name, layer)
    assert isinstance(adapter, AffineLayer)
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (6, layer.in_features)
    else:
        shape = (layer.in_channels, 9) if isinstance(layer, nn.Conv1d) else (layer.in_channels, 6, 7)
    x = torch.randn(3, *shape)
    y = layer(x)
    g = torch.randn_like(y)
    seen = x  # by the operation, which other padding than with zeros comes before
    if (mode := getattr(layer, "padding_mode", "zeros")) != "zeros":
        seen = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)  # type: ignore[union-attr]
    a_all, g_all = adapter.inputs(seen), adapter.gradients(g)  # [groups, batch, shared, width]
    for example in range(3):
        a, v = dense.positions(layer, x[example], g[example])
        torch.testing.assert_close(a_all[:, example], torch.stack([torch.stack(group) for group in a]))
        torch.testing.assert_close(g_all[:, example], torch.stack([torch.stack(group) for group in v]))
    gradients = torch.autograd.grad(y, adapter.parameters, g)
    matrix = torch.einsum("nbto,nbti->noi", g_all, a_all)
    torch.testing.assert_close(adapter.to_matrix(*gradients, *[None] * (2 - len(gradients))), matrix)
    for mine, expected in zip(adapter.from_matrix(matrix), gradients, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm([4, 3, 3]),
        nn.LayerNorm(3),
        nn.LayerNorm(3, bias=False),
        nn.RMSNorm(3),
    ],
    ids=str,
)
def test_norm_curvature_is_the_exact_fisher_diagonal(norm: nn.Module) -> None:
    norm = norm.double()
    for p in norm.parameters():
        nn.init.normal_(p)
    inputs, targets = torch.randn(5, 4, 3, 3) * 2 + 1, torch.randint(0, 3, (5,))
    tail = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)).double()
    model = nn.Sequential(norm, tail)
    optimizer = factors_of(model, inputs, targets)
    if isinstance(norm, nn.BatchNorm2d):  # batches of one would have other statistics: give the oracle the batch's
        mean, var = inputs.mean((0, 2, 3)), inputs.var((0, 2, 3), correction=0)
        norm.running_mean, norm.running_var = mean, var
        model.eval()
    gradients = dense.per_example_gradients(model, criterion, inputs, targets, list(norm.parameters()))
    expected = gradients.square().mean(0)
    torch.testing.assert_close(optimizer.blocks["0"].factors["D"], expected, rtol=1e-8, atol=1e-14)


@pytest.mark.usefixtures("float64")
def test_embedding_curvature_is_the_exact_fisher_diagonal() -> None:
    model = PROBLEMS["embedding"][0]()
    inputs, targets = tokens()
    optimizer = factors_of(model, inputs, targets)
    gradients = dense.per_example_gradients(model, criterion, inputs, targets, [model.embedding.weight])
    torch.testing.assert_close(
        optimizer.blocks["embedding"].factors["D"], gradients.square().mean(0), rtol=1e-10, atol=1e-14
    )


@pytest.mark.usefixtures("float64")
def test_padding_row_of_an_embedding_has_no_curvature() -> None:
    model = nn.Sequential(nn.Embedding(6, 3, padding_idx=1), nn.Flatten(), nn.Linear(9, 6))
    inputs, targets = tokens()
    optimizer = factors_of(model, inputs, targets)
    gradients = dense.per_example_gradients(model, criterion, inputs, targets, [model[0].weight])
    torch.testing.assert_close(optimizer.blocks["0"].factors["D"], gradients.square().mean(0), rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("decoupled", [False, True])
def test_reference_recursion_by_hand(decoupled: bool) -> None:
    """Two updates of one Linear layer, every number worked out from the published recursion."""
    lr, beta, damping, gamma, decay = 0.01, 0.9, 1e-3, 0.8, 0.1
    model = nn.Linear(3, 2).double()
    cls = AdaFisherW if decoupled else AdaFisher
    options = {"lr": lr, "momentum": beta, "damping": damping, "decay": gamma, "weight_decay": decay}
    optimizer = cls(model, update_every=2, ema="reference", max_update=None, **options)
    inputs, targets = torch.randn(5, 3), torch.randint(0, 2, (5,))

    theta = torch.cat([model.weight, model.bias.unsqueeze(1)], dim=1).detach().clone()  # [d_out, d_in + 1]
    a = torch.cat([inputs, torch.ones(5, 1)], dim=1)
    h = torch.ones(3 + 1)
    s = torch.ones(2)
    m = torch.zeros_like(theta)

    def normalised(v: Tensor) -> Tensor:
        return (v - v.min()) / (v.max() - v.min() + 1e-6)

    for t in range(1, 5):
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()  # plain backward serves too
        optimizer.step()

        logits = a @ theta.T
        residual = logits.softmax(-1) - F.one_hot(targets, 2)  # gradient of the per-example loss by the logits
        gradient = residual.T @ a / 5
        if t in (1, 3):  # T_cov = 2: curvature on the first and the third step
            h = 0.1 * gamma * h + 0.01 * gamma * normalised((a**2).mean(0))
            s = 0.1 * gamma * s + 0.01 * gamma * normalised((residual**2).mean(0))
        fisher = torch.outer(s, h) + damping
        if not decoupled:
            gradient = gradient + decay * theta
        m = beta * m + (1 - beta) * gradient
        step = m / (1 - beta**t) / fisher
        theta = theta - lr * (step + decay * theta if decoupled else step)
        mine = torch.cat([model.weight, model.bias.unsqueeze(1)], dim=1)
        torch.testing.assert_close(mine, theta, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_average_is_the_papers_equation_3_with_a_warm_start() -> None:
    model = mlp()
    optimizer = AdaFisher(model, lr=0.0, ema="average", normalize="none", decay=0.7, update_every=1)
    expected = None
    for seed in range(3):
        inputs = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        targets = torch.arange(6) % 4
        optimizer.zero_grad()
        optimizer.backward(criterion(model(inputs), targets))
        optimizer.step()
        a, _ = dense.kronecker_factors(model, model[1], criterion, inputs, targets)
        new = a.diagonal(dim1=-2, dim2=-1)
        expected = new if expected is None else 0.7 * expected + 0.3 * new
    torch.testing.assert_close(optimizer.blocks["1"].factors["H"], expected, rtol=1e-10, atol=1e-14)


def test_curvature_refreshes_every_t_cov_steps_and_damping_schedules_take_effect_at_once() -> None:
    model = mlp()
    optimizer = AdaFisher(model, update_every=3)
    inputs, targets = images()
    seen = []
    for step in range(7):
        optimizer.zero_grad()
        optimizer.backward(criterion(model(inputs), targets))
        if step == 1:
            optimizer.param_groups[0]["damping"] = 0.5
        optimizer.step()
        seen.append(optimizer.blocks["1"].factors["S"])
        fisher = optimizer._fisher[model[1].weight][1]
        assert (float(fisher.min()) >= 0.5) == (step >= 1)
    assert [a is b for a, b in itertools.pairwise(seen)] == [True, True, False, True, True, False]


def test_relative_damping_scales_with_the_layers_curvature() -> None:
    model = mlp()
    optimizer = AdaFisher(model, damping=0.1, damping_mode="relative", ema="average", normalize="none")
    inputs, targets = images()
    optimizer.backward(criterion(model(inputs), targets))
    optimizer.step()
    curvature = optimizer.curvature_matrices()["1"].diagonal()
    fisher = torch.cat([optimizer._fisher[model[1].weight][1], optimizer._fisher[model[1].bias][1].unsqueeze(1)], dim=1)
    torch.testing.assert_close(fisher.flatten(), curvature + 0.1 * curvature.mean())


def test_evaluation_and_forward_without_backward_leave_curvature_alone() -> None:
    model = conv_net()
    optimizer = AdaFisher(model)
    inputs, targets = images()
    model(inputs)  # in training mode, but nothing is backpropagated
    model.eval()
    criterion(model(inputs), targets).backward()  # a saliency map, say
    with torch.no_grad():
        model(inputs)
    assert not any(block.observed for block in optimizer.blocks.values())
    with pytest.warns(UserWarning, match="curvature was not updated: call model.train"):
        optimizer.step()


def test_a_scaled_loss_gives_the_same_curvature() -> None:
    """What a GradScaler multiplies in must not reach the factors."""
    inputs, targets = images()
    found = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model = mlp()
        optimizer = AdaFisher(model, lr=0.0, ema="average", normalize="none")
        optimizer.backward(criterion(model(inputs), targets) * scale, scale=scale)
        optimizer.step()
        found.append(optimizer.blocks["1"].factors["S"])
    torch.testing.assert_close(found[0], found[1])


def test_overflowed_statistics_are_rejected_and_counted() -> None:
    model = mlp()
    optimizer = AdaFisher(model, update_every=1)
    inputs, targets = images()
    optimizer.backward(criterion(model(inputs), targets))
    optimizer.step()
    good = optimizer.blocks["1"].factors["S"].clone()
    optimizer.zero_grad()
    optimizer.backward(criterion(model(inputs), targets) * 1e30)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    torch.testing.assert_close(optimizer.blocks["1"].factors["S"], good, rtol=0, atol=0)
    assert optimizer.diagnostics()["curvature/rejected"] >= 1


def test_published_settings_are_dominated_by_lambda() -> None:
    """The known limit of ema="reference": after three updates no direction's curvature exceeds Lambda."""
    model = mlp()
    optimizer = AdaFisher(model, update_every=1, ema="reference")
    inputs, targets = images()
    shares = []
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(criterion(model(inputs), targets))
        optimizer.step()
        shares.append(optimizer.diagnostics()["curvature/above_damping"])
    assert shares[0] == 1.0
    assert shares[-1] == 0.0


def test_a_reused_layer_sums_over_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.tanh(self.linear(x)))

    model = Twice()
    inputs, targets = torch.randn(5, 4), torch.randint(0, 4, (5,))
    optimizer = factors_of(model, inputs, targets)
    hidden = torch.tanh(model.linear(inputs))
    squares = torch.cat([inputs, hidden]).square().mean(0)
    torch.testing.assert_close(optimizer.blocks["linear"].factors["H"][0, :4], squares)


def test_windows_folded_into_the_batch_do_not_change_the_scale() -> None:
    """A layer that sees [batch * windows, ...] still gets per-example gradients of the model's batch."""
    inputs, targets = torch.randn(4, 6, 5), torch.randint(0, 3, (4,))
    found = []
    for fold in (False, True):
        torch.manual_seed(0)
        linear = nn.Linear(5, 3)
        shape = [nn.Flatten(0, 1)] if fold else []
        model = nn.Sequential(
            *shape, linear, *([nn.Unflatten(0, (4, 6))] if fold else []), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
        )
        optimizer = factors_of(model, inputs, targets)
        found.append(optimizer.blocks["1" if fold else "0"].factors["S"])
    torch.testing.assert_close(found[0], found[1])


def test_coverage_says_what_has_curvature_and_what_not() -> None:
    table = AdaFisher(PROBLEMS["vit"][0]()).coverage()
    kinds = {row[0]: row[1] for row in table.rows}
    assert kinds["patch"] == kinds["head"] == "KroneckerDiagonal"
    assert kinds["norm1"] == "Diagonal"
    assert kinds["position"] == "fallback: free parameter"
    assert kinds["attention"] == kinds["attention.out_proj"] == "KroneckerDiagonal"
    assert 0 < table.fraction < 1
    tied = {row[0]: row[1] for row in AdaFisher(PROBLEMS["tied"][0]()).coverage().rows}
    assert tied["embedding.weight"] == "fallback: tied to head"
    text = str(table)
    assert "of the trainable parameters under curvature" in text and "position" in text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr": -1.0}, r"lr must be in \[0, inf\), got -1.0"),
        ({"damping": 0.0}, r"damping must be in \(0, inf\), got 0.0"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"momentum": float("nan")}, "momentum must be in"),
        ({"update_every": 0}, "update_every must be in"),
        ({"ema": "paper"}, "ema must be one of reference, average, got 'paper'"),
        ({"loss_reduction": "none"}, "loss_reduction must be 'mean' or 'sum'"),
    ],
)
def test_bad_arguments_are_sentences(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        AdaFisher(mlp(), **options)


def test_coverage_counts_the_bytes_that_are_allocated() -> None:
    model, (inputs, targets) = conv_net(), images()
    optimizer = AdaFisher(model)
    optimizer.backward(criterion(model(inputs), targets))
    optimizer.step()
    kept = [t for block in optimizer.blocks.values() for t in block.factors.values()]
    kept += [t for _, t in optimizer._fisher.values()]
    assert optimizer.coverage().bytes == sum(t.untyped_storage().nbytes() for t in kept)


@pytest.mark.usefixtures("float64")
def test_updates_are_no_longer_than_their_limit() -> None:
    """Tensor by tensor, past momentum and bias correction; a shorter one is as it would be without a limit."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(8, 5), torch.randn(8, 3)
    models = [nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    free, held = (
        AdaFisher(model, lr=0.1, momentum=0.2, update_every=1, max_update=limit)
        for model, limit in zip(models, (None, 0.5), strict=True)
    )
    both = set()
    for step in range(6):
        models[1].load_state_dict(models[0].state_dict())
        moves = []
        for model, optimizer in zip(models, (free, held), strict=True):
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            (model(inputs) - targets).square().sum().mul(100.0 ** (-step)).backward()
            optimizer.step()
            moves.append([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
        for whole, short in zip(*moves, strict=True):
            length = float(whole.square().mean().sqrt()) / 0.1
            both.add(length > 0.5)
            torch.testing.assert_close(short, whole * min(1.0, 0.5 / length))
    assert both == {True, False}


def test_a_limit_of_a_group_is_checked() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="max_update must be in"):
        AdaFisher(model, [{"params": list(model.parameters()), "max_update": 0.0}])
