"""Rate and momentum from the exact quadratic model: against a dense solve, and what they need said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers import EKFAC, KFAC, Bernoulli, Categorical, ExactNaturalGradient, Gaussian, TwoLevelKFAC
from optimizers.curvature.quadratic import minimizer
from optimizers.likelihoods import Likelihood
from tests import dense
from tests.optimizers.test_kl_clip import batch, net

DAMPING = 0.03


def fisher(model: nn.Module, likelihood: Likelihood, inputs: Tensor, targets: Tensor) -> Tensor:
    """Of the batch, all layers together, from the Jacobian of the outputs."""
    named = dict(model.named_parameters())

    def outputs(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in named.values()])
        return torch.func.functional_call(
            model, {n: t.view_as(p) for (n, p), t in zip(named.items(), parts, strict=True)}, (inputs,)
        )

    flat = dense.flatten([p.detach() for p in named.values()])
    jacobian = torch.func.jacrev(outputs)(flat)
    root = likelihood.hessian_sqrt(outputs(flat).detach())
    columns = torch.einsum("nfp,nfr->nrp", jacobian, root).flatten(0, 1)
    return columns.T @ columns / len(inputs)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("lr, momentum", [("auto", "auto"), ("auto", 0.7), (0.2, "auto")])
@pytest.mark.parametrize("method", [KFAC, EKFAC, TwoLevelKFAC, ExactNaturalGradient])
@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "gaussian"])
def test_rate_and_momentum_are_the_dense_solution(kind: str, method: Any, lr: Any, momentum: Any) -> None:
    """On the span of the direction and the last step, with F of the very batch and damping; 1e-8."""
    likelihood: Likelihood = {"categorical": Categorical(), "bernoulli": Bernoulli(), "gaussian": Gaussian(0.8)}[kind]
    model = net()
    params = list(model.parameters())
    optimizer = method(
        model, likelihood=likelihood, lr=lr, momentum=momentum, damping=DAMPING, kl_clip=None, update_every=3
    )
    for group in optimizer.param_groups:
        group["lr"] *= 0.8  # a schedule
    rate = optimizer.param_groups[0]["lr"]
    for index in range(6):
        inputs, classes = batch(index)
        one_hot = F.one_hot(classes, 3).to(inputs.dtype)
        targets = classes if kind == "categorical" else one_hot
        damped = fisher(model, likelihood, inputs, targets) + DAMPING * torch.eye(59)
        before = dense.flatten([p.detach().clone() for p in params])
        past = [optimizer.state[p].get("momentum_buffer", torch.zeros_like(p)).clone() for p in params]
        past = dense.flatten(past)
        optimizer.zero_grad()
        outputs = model(inputs)
        optimizer.backward(likelihood.nll(outputs, targets), outputs)
        gradient = dense.flatten([p.grad for p in params])
        optimizer.step()
        sums = dense.flatten([optimizer.state[p]["momentum_buffer"] for p in params])
        found = optimizer.diagnostics()
        share = found.get("curvature/momentum", 1.0) * (1.0 if momentum == "auto" else momentum)
        direction = (sums - share * past) / found.get("curvature/rate", 1.0)
        torch.testing.assert_close(dense.flatten([p.detach() for p in params]), before - rate * sums)
        # The minimum of gᵀ d + dᵀ C d / 2 over d = -unit (a v + b m), for what is free of a and b.
        unit = 1.0 if lr == "auto" else rate  # a rate that is found is the whole step's, which groups' then multiply
        basis = torch.stack([unit * direction, unit * past * (1.0 if momentum == "auto" else momentum)], 1)
        matrix, slopes = basis.T @ damped @ basis, basis.T @ gradient
        expected = torch.ones(2)
        free = [i for i, auto in enumerate((lr == "auto", momentum == "auto")) if auto]
        free = [i for i in free if index or i == 0]  # there is no past at first
        fixed = [i for i in (0, 1) if i not in free]
        right = slopes[free] - matrix[free][:, fixed] @ expected[fixed]
        expected[free] = torch.linalg.solve(matrix[free][:, free], right)
        if "curvature/rate" in found:
            assert found["curvature/rate"] == pytest.approx(float(expected[0]), rel=1e-8)
        if "curvature/momentum" in found:
            assert found["curvature/momentum"] == pytest.approx(float(expected[1]) if index else 0.0, rel=1e-8)


@pytest.mark.usefixtures("float64")
def test_the_clip_holds_the_exact_length() -> None:
    model = net()
    optimizer = KFAC(
        model, likelihood=Categorical(), lr="auto", momentum="auto", damping=DAMPING, kl_clip=1e-3, update_every=3
    )
    for index in range(6):
        inputs, targets = batch(index)
        damped = fisher(model, Categorical(), inputs, targets) + DAMPING * torch.eye(59)
        before = dense.flatten([p.detach().clone() for p in model.parameters()])
        optimizer.zero_grad()
        outputs = model(inputs)
        optimizer.backward(F.cross_entropy(outputs, targets), outputs)
        optimizer.step()
        move = dense.flatten([p.detach() for p in model.parameters()]) - before
        assert float(move @ damped @ move) == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("groups", [False, True])
def test_schedules_multiply_the_rate_that_is_found(groups: bool) -> None:
    """Half the rate is half the step, in whatever proportion groups have theirs; a clip holds what is left."""
    moves = []
    for factor, clip in ((1.0, None), (0.5, None), (0.5, 1e-6)):
        model = net()
        inputs, targets = batch(0)
        damped = fisher(model, Categorical(), inputs, targets) + DAMPING * torch.eye(59)
        params: Any = list(model.parameters())
        if groups:
            params = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3}]
        optimizer = KFAC(model, params, likelihood=Categorical(), lr="auto", damping=DAMPING, kl_clip=clip)
        for group in optimizer.param_groups:
            group["lr"] *= factor
        before = dense.flatten([p.detach().clone() for p in model.parameters()])
        outputs = model(inputs)
        optimizer.backward(F.cross_entropy(outputs, targets), outputs)
        optimizer.step()
        moves.append(dense.flatten([p.detach() for p in model.parameters()]) - before)
    torch.testing.assert_close(moves[1], moves[0] / 2)
    assert float(moves[2] @ damped @ moves[2]) == pytest.approx(1e-6, rel=1e-6)
    torch.testing.assert_close(moves[2] / moves[2].norm(), moves[0] / moves[0].norm())


def test_it_trains_with_noise_norms_and_a_fallback() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.drop = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2)
            self.shift, self.head = nn.Parameter(torch.zeros(144)), nn.Linear(144, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.drop(F.relu(self.norm(self.conv(x))).flatten(1)) + self.shift)

    model = Net()
    optimizer = KFAC(model, likelihood=Categorical(), lr="auto", momentum="auto", kl_clip=1e-2)
    inputs = torch.randn(32, 1, 8, 8)
    targets = inputs.flatten(1)[:, :10].argmax(1)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = F.cross_entropy(outputs, targets)
        optimizer.backward(loss, outputs)
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        state = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_what_it_needs_is_said() -> None:
    model = net()
    for options, sentence in (
        ({"fisher": "empirical"}, "likelihood must be given for lr or momentum 'auto'"),
        ({"likelihood": Categorical(), "weight_decay": 0.1}, "decoupled_decay must be true for weight_decay"),
        ({"likelihood": Categorical(), "kl_of": "direction"}, "kl_of must be 'step' or 'measured'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            KFAC(model, lr="auto", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lr must be a number or 'auto', got 'automatic'"):
        KFAC(model, lr="automatic", likelihood=Categorical())  # type: ignore[arg-type]


@pytest.mark.parametrize("behind", [True, False])
def test_what_has_no_forward_mode_is_said_where_it_matters(behind: bool) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.cells, self.head = nn.Linear(4, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cells(self.first(x) if behind else x)[0][:, -1])

    model = Recurrent()
    optimizer = KFAC(model, likelihood=Categorical(), lr="auto")
    outputs = model(torch.randn(6, 3, 4))
    optimizer.backward(F.cross_entropy(outputs, torch.randint(3, (6,))), outputs)
    if behind:
        with pytest.raises(ValueError, match=r"an operation without them .*: give numbers"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.diagnostics()["curvature/rate"] > 0


@pytest.mark.usefixtures("float64")
def test_directions_of_no_length_and_parallel_ones() -> None:
    matrix, slopes = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([1.0, 0.0])
    nan = float("nan")
    assert minimizer(matrix, slopes, torch.tensor([nan, nan])).tolist() == pytest.approx([0.5, 0.0])
    twins = torch.tensor([[1.0, 1e-9], [1e-9, 1e-18]])  # the second is 1e-9 of the first
    found = minimizer(twins, torch.tensor([1.0, 1e-9]), torch.tensor([nan, nan]))
    assert float(found[0] + 1e-9 * found[1]) == pytest.approx(1.0)
    fixed = minimizer(torch.tensor([[2.0, 1.0], [1.0, 4.0]]), torch.tensor([3.0, 1.0]), torch.tensor([nan, 1.0]))
    assert fixed.tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(0.7)], ids=["c", "b", "g"])
def test_hessian_products_are_those_of_the_root(likelihood: Likelihood) -> None:
    outputs, tangents = torch.randn(5, 2, 4), torch.randn(5, 2, 4)
    expected = Likelihood.hessian_product(likelihood, outputs, tangents)
    torch.testing.assert_close(likelihood.hessian_product(outputs, tangents), expected)
