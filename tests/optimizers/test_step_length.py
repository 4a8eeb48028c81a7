"""Lengths of steps against the same rules written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from optimizers import KFAC, AdaFisherW, Categorical
from optimizers.packaged import muon
from optimizers.step_length import Graft, Normalized, StepLength, own
from optimizers.testing.loop import same_state, train_step, weights
from tests.optimizers.problems import conv_net, images, mlp

INNER: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda model, params=None: torch.optim.SGD(params or model.parameters(), lr=0.05, momentum=0.9),
    "adamw": lambda model, params=None: torch.optim.AdamW(params or model.parameters(), lr=1e-3, weight_decay=0.1),
    "kfac": lambda model, params=None: KFAC(model, params, lr=0.05, likelihood=Categorical(), weight_decay=1e-3),
    "adafisherw": lambda model, params=None: AdaFisherW(model, params, lr=1e-3, update_every=2),
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    inputs, targets = images(16)
    return inputs.roll(step, 0).double(), targets.roll(2 * step, 0)


def start(factory: Callable[[], nn.Module] = mlp) -> nn.Module:
    torch.manual_seed(0)
    return factory().double()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def units(model: nn.Module, per: str) -> list[list[int]]:
    """Places of the parameters that have a length together."""
    if per == "all":
        return [list(range(len(list(model.parameters()))))]
    found: dict[str, list[int]] = {}
    for place, (name, _) in enumerate(model.named_parameters()):
        found.setdefault(name.rpartition(".")[0], []).append(place)
    return list(found.values())


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def apart(new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    return [a - b for a, b in zip(new, old, strict=True)]


class Follower:
    """An optimizer on a twin of the model that is put to the same weights and gradients before every step."""

    def __init__(self, build: Callable[[nn.Module], torch.optim.Optimizer], factory: Callable[[], nn.Module]) -> None:
        self.model = start(factory)
        self.optimizer = build(self.model)

    def step(self, at: list[Tensor], grads: list[Tensor | None]) -> list[Tensor]:
        with torch.no_grad():
            for p, value, grad in zip(self.model.parameters(), at, grads, strict=True):
                p.copy_(value)
                p.grad = None if grad is None else grad.clone()
        self.optimizer.step()
        return apart(values(self.model), at)


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


# -- graft -------------------------------------------------------------------------------------------------------------

SHADOWS: dict[str, tuple[dict[str, Any], Callable[..., torch.optim.Optimizer]]] = {
    "adam": ({"to": "adam", "lr": 2e-3}, lambda ps: torch.optim.Adam(ps, lr=2e-3)),
    "adamw": (
        {"to": "AdamW", "lr": 1e-2, "options": {"betas": [0.8, 0.9], "weight_decay": 0.3}},
        lambda ps: torch.optim.AdamW(ps, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.3),
    ),
    "sgd": (
        {"to": "sgd", "lr": 0.1, "options": {"momentum": 0.5}},
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.5),
    ),
    "rmsprop": ({"to": "RMSprop", "lr": 1e-3}, lambda ps: torch.optim.RMSprop(ps, lr=1e-3)),
}


@pytest.mark.parametrize("per", ["layer", "all"])
@pytest.mark.parametrize("shadow", SHADOWS)
@pytest.mark.parametrize("factory", [mlp, conv_net])
def test_grafted_steps_have_the_direction_of_one_and_the_length_of_the_other(
    per: Any, shadow: str, factory: Callable[[], nn.Module]
) -> None:
    options, build = SHADOWS[shadow]
    model = start(factory)
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = Graft(inner, **options, per=per, model=model)
    direction = Follower(lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9), factory)
    length = Follower(lambda m: build(m.parameters()), factory)
    scheduler, twins = CosineAnnealingLR(optimizer, 12), []
    twins += [CosineAnnealingLR(one.optimizer, 12) for one in (direction, length)]
    for t in range(9):
        before = values(model)
        train_step(optimizer, model, batch(t))
        grads = gradients(model)
        way, far = direction.step(before, grads), length.step(before, grads)
        for some in units(model, per):
            factor = norm([far[i] for i in some]) / norm([way[i] for i in some])
            for i in some:
                expected = before[i] + factor * way[i]
                torch.testing.assert_close(list(model.parameters())[i].detach(), expected, rtol=1e-9, atol=1e-12)
        for one in (scheduler, *twins):
            one.step()


def test_the_modules_are_known_from_the_optimizer_or_the_model() -> None:
    """Without either, each tensor is a layer of its own."""
    model = start()
    for optimizer, count in (
        (Graft(INNER["kfac"](model)), 2),
        (Graft(INNER["sgd"](model), model=nn.DataParallel(model)), 2),
        (Graft(INNER["sgd"](model)), 4),
        (Graft(INNER["sgd"](model), model=model, per="all"), 1),
    ):
        train_step(optimizer, model, batch(0))
        assert optimizer._factors is not None and len(optimizer._factors) == count


@pytest.mark.parametrize("kind", INNER)
def test_grafting_onto_itself_changes_nothing_but_rounding(kind: str) -> None:
    ends = []
    for around in (own, lambda o: Graft(o, to="adamw", lr=1e-3, options={"weight_decay": 0.1})):
        model = start()
        optimizer = around(INNER["adamw"](model))
        for t in range(6):
            train_step(optimizer, model, batch(t))
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_decay_and_maximize_of_the_groups_hold_for_the_length() -> None:
    """Unless the options have their own."""
    model = start()
    groups = [
        {"params": model[1].parameters(), "weight_decay": 0.5},
        {"params": model[3].parameters(), "maximize": True},
    ]
    inner = torch.optim.SGD(groups, lr=0.1)
    optimizer = Graft(inner, to="sgd", lr=0.1, model=model)
    before = weights(model)
    train_step(optimizer, model, batch(0))
    grads = torch.cat([g.reshape(-1) for g in gradients(model) if g is not None])
    first = model[1].weight.numel() + 6
    expected = torch.cat([-0.1 * (grads[:first] + 0.5 * before[:first]), 0.1 * grads[first:]])
    torch.testing.assert_close(weights(model) - before, expected, rtol=1e-9, atol=1e-12)
    inner.param_groups[0]["weight_decay"] = 0.2  # as a schedule does
    train_step(optimizer, model, batch(1))
    assert optimizer.shadow.param_groups[0]["weight_decay"] == 0.2
    apart_ = Graft(INNER["adamw"](model), to="adamw", options={"weight_decay": 0.7})
    assert apart_.shadow.param_groups[0]["weight_decay"] == 0.7


def test_rates_of_groups_count_for_the_length() -> None:
    """A head at ten times the rate takes steps ten times as long."""
    model = start()
    groups = [{"params": list(model[1].parameters())}, {"params": list(model[3].parameters()), "lr": 0.5}]
    optimizer = Graft(torch.optim.SGD(groups, lr=0.05), to="sgd", lr=0.01, model=model)
    before = values(model)
    train_step(optimizer, model, batch(0))
    steps, grads = apart(values(model), before), gradients(model)
    for i, rate in enumerate((0.01, 0.01, 0.1, 0.1)):
        torch.testing.assert_close(steps[i], -rate * grads[i], rtol=1e-9, atol=1e-12)  # type: ignore[operator]


def test_a_default_that_no_group_has_is_no_reference() -> None:
    """Muon's groups have rates of two methods: both at their full length, whatever the class's default."""
    model = start()
    optimizer = Normalized(muon(model, lr=5e-3, adamw_lr=3e-4), ratio=0.02, floor=0.0, cap=None, model=model)
    before = values(model)
    train_step(optimizer, model, batch(0))
    steps = apart(values(model), before)
    for some in units(model, "layer"):
        assert norm([steps[i] for i in some]) == pytest.approx(0.02 * norm([before[i] for i in some]), rel=1e-6)


def test_the_reference_rate_comes_back_with_the_state() -> None:
    """An optimizer that is built at another rate goes on at the saved one, and at its lengths."""
    model, other = start(), start()
    optimizer = Graft(torch.optim.SGD(model.parameters(), lr=0.1), to="sgd", lr=0.03)
    second = Graft(torch.optim.SGD(other.parameters(), lr=7.0), to="sgd", lr=0.03)
    for _ in range(2):
        train_step(optimizer, model, batch(0))
    other.load_state_dict(model.state_dict())
    second.load_state_dict(optimizer.state_dict())
    for t in range(3):
        train_step(optimizer, model, batch(t))
        train_step(second, other, batch(t))
    assert torch.equal(weights(model), weights(other)) and same_state(optimizer.state_dict(), second.state_dict())


def test_gradients_and_the_inner_state_are_left_alone() -> None:
    model, twin = start(), start()
    optimizer, alone = Graft(INNER["adamw"](model)), INNER["adamw"](twin)
    train_step(optimizer, model, batch(0))
    train_step(alone, twin, batch(0))
    assert same_state(optimizer.inner.state_dict(), alone.state_dict())
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))  # type: ignore[arg-type]


# -- normalized --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["layer", "all"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("factory", [mlp, conv_net])
def test_normalized_steps_are_a_share_of_the_weights(per: Any, kind: str, factory: Callable[[], nn.Module]) -> None:
    model = start(factory)
    optimizer = Normalized(INNER[kind](model), ratio=0.02, floor=1e-4, cap=None, per=per, model=model)
    direction = Follower(INNER[kind], factory)
    scheduler, twin = CosineAnnealingLR(optimizer, 8), CosineAnnealingLR(direction.optimizer, 8)
    for t in range(6):
        before = values(model)
        train_step(optimizer, model, batch(t))
        way = direction.step(before, gradients(model))
        share = 0.02 * (1 + math.cos(math.pi * t / 8)) / 2
        for some in units(model, per):
            floor = 1e-4 * math.sqrt(sum(before[i].numel() for i in some))
            wanted = share * max(norm([before[i] for i in some]), floor)
            factor = wanted / norm([way[i] for i in some])
            for i in some:
                expected = before[i] + factor * way[i]
                torch.testing.assert_close(list(model.parameters())[i].detach(), expected, rtol=1e-6, atol=1e-12)
        scheduler.step()
        twin.step()


def test_a_layer_that_starts_at_zero_moves_by_the_floor() -> None:
    model = start()
    nn.init.zeros_(model[3].weight)
    nn.init.zeros_(model[3].bias)
    optimizer = Normalized(INNER["sgd"](model), ratio=0.5, floor=1e-2, cap=None, model=model)
    train_step(optimizer, model, batch(0))
    moved = torch.cat([p.detach().reshape(-1) for p in model[3].parameters()])
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.5e-2, rel=1e-6)


def test_the_cap_bounds_how_much_longer_a_step_becomes() -> None:
    model = start()
    optimizer = Normalized(torch.optim.SGD(model.parameters(), lr=1e-9), ratio=0.1, cap=50.0, model=model)
    before = values(model)
    train_step(optimizer, model, batch(0))
    for step, grad in zip(apart(values(model), before), gradients(model), strict=True):
        torch.testing.assert_close(step, -50e-9 * grad, rtol=1e-5, atol=1e-15)  # type: ignore[operator]
    assert optimizer.diagnostics() == {f"step_length/normalized_{k}": 50.0 for k in ("min", "median", "max")}
    # Steps are made shorter without limit.
    large = Normalized(torch.optim.SGD(model.parameters(), lr=1e9), ratio=0.1, cap=50.0, model=model)
    before = values(model)
    train_step(large, model, batch(0))
    assert norm(apart(values(model), before)[:2]) == pytest.approx(0.1 * norm(before[:2]), rel=1e-6)


@pytest.mark.parametrize("kind", INNER)
def test_held_matrices_keep_their_norms_and_turn(kind: str) -> None:
    model = start(conv_net)
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    first = {name: model.get_parameter(name).detach().clone() for name in names}
    optimizer = Normalized(INNER[kind](model), ratio=0.05, cap=None, hold=True, model=model)
    for t in range(10):
        before = {name: model.get_parameter(name).detach().clone() for name in names}
        train_step(optimizer, model, batch(t))
        for name in names:
            now = model.get_parameter(name).detach()
            assert float(now.norm()) == pytest.approx(float(first[name].norm()), rel=1e-12)
            cosine = float((now * before[name]).sum() / now.norm() / before[name].norm())
            assert math.acos(min(cosine, 1.0)) < 0.0501  # by at most the ratio, in radians
    assert all(float((model.get_parameter(name) - first[name]).detach().norm()) > 0.02 for name in names)
    assert float(model[1].bias.detach().norm()) > 0  # no matrix


def test_a_hyperball_step_is_its_formula() -> None:
    """W ← R n(W + η R n(u)) with n(·) of norm 1."""
    model = start()
    optimizer = Normalized(torch.optim.SGD(model.parameters(), lr=0.1), ratio=0.03, cap=None, hold=True, model=model)
    before = values(model)
    train_step(optimizer, model, batch(0))
    for i in (0, 2):
        radius, grad = before[i].norm(), gradients(model)[i]
        assert grad is not None
        expected = before[i] - 0.03 * radius * grad / grad.norm()
        expected = radius * expected / expected.norm()
        torch.testing.assert_close(values(model)[i], expected, rtol=1e-9, atol=1e-12)


def test_a_held_matrix_that_starts_at_zero_grows() -> None:
    model = start()
    nn.init.zeros_(model[3].weight)
    optimizer = Normalized(INNER["sgd"](model), ratio=0.1, floor=1e-2, cap=None, hold=True, model=model)
    sizes = []
    for t in range(3):
        train_step(optimizer, model, batch(t))
        sizes.append(float(model[3].weight.detach().norm()))
    assert 0 < sizes[0] < sizes[1] < sizes[2]


def test_a_state_of_the_other_hold_is_refused() -> None:
    model = start()
    optimizer = Normalized(INNER["sgd"](model), hold=True)
    train_step(optimizer, model, batch(0))
    with pytest.raises(ValueError, match="saved with hold=True, and here hold is False"):
        Normalized(INNER["sgd"](model)).load_state_dict(optimizer.state_dict())


# -- of both -----------------------------------------------------------------------------------------------------------

RULES: dict[str, Callable[..., StepLength]] = {
    "graft": lambda o, m: Graft(o, model=m),
    "graft_all": lambda o, m: Graft(o, model=m, per="all"),
    "normalized": lambda o, m: Normalized(o, model=m),
    "uncapped": lambda o, m: Normalized(o, model=m, cap=None),
    "hold": lambda o, m: Normalized(o, model=m, hold=True),
}


@pytest.mark.parametrize("rule", RULES)
def test_zero_steps_stay_zero(rule: str) -> None:
    model = start()
    optimizer = RULES[rule](torch.optim.SGD(model.parameters(), lr=0.1), model)
    before = weights(model)
    for _ in range(3):
        optimizer.zero_grad()
        (model(batch(0)[0]).sum() * 0).backward()
        optimizer.step()
    assert torch.equal(weights(model), before)
    assert not any(key.startswith("step_length/") for key in optimizer.diagnostics())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e250])
def test_steps_that_are_not_finite_show(rule: str, bad: float) -> None:
    """Or so large that no norm of them is: they do not become steps of zero."""
    model = start()
    optimizer = RULES[rule](torch.optim.SGD(model.parameters(), lr=0.1), model)
    train_step(optimizer, model, batch(0))
    model[3].weight.grad[0, 0] = bad  # type: ignore[index]
    optimizer.step()
    assert not bool(model[3].weight.isfinite().all())
    if rule != "graft_all":
        assert bool(model[1].weight.isfinite().all())


@pytest.mark.parametrize("rule", RULES)
def test_complex_parameters(rule: str) -> None:
    """As the two real tensors that they are."""
    torch.manual_seed(0)
    complex_ = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))
    module = nn.Module()
    module.p = complex_
    real = nn.Module()
    real.p = nn.Parameter(torch.view_as_real(complex_.detach()).clone())
    ends = []
    for m in (module, real):
        optimizer = RULES[rule](torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), m)
        for t in range(3):
            optimizer.zero_grad()
            p = torch.view_as_real(m.p) if m is module else m.p
            (p * torch.arange(12.0).view(3, 2, 2) * (t + 1)).square().sum().backward()  # type: ignore[operator]
            optimizer.step()
        ends.append(torch.view_as_real(m.p.detach()) if m is module else m.p.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-9)


def test_factors_are_told() -> None:
    model = start(conv_net)
    optimizer = Graft(KFAC(model, lr=0.05, likelihood=Categorical()), per="layer")
    assert not any(key.startswith("step_length/") for key in optimizer.diagnostics())
    train_step(optimizer, model, batch(0))
    found = optimizer.diagnostics()
    low, mid, high = (found[f"step_length/graft_{name}"] for name in ("min", "median", "max"))
    assert 0 < low <= mid <= high and low < high


def test_wrong_values_are_sentences() -> None:
    model = start()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for build, sentence in (
        (lambda: Graft(sgd, to="adamm"), r"to must be an optimizer of torch.optim, got 'adamm' \(did you mean 'Adam'"),
        (lambda: Graft(sgd, to="lbfgs"), "to must not be LBFGS, which calls the model itself"),
        (lambda: Graft(sgd, lr=-1.0), r"lr must be in \[0, inf\), got -1.0"),
        (lambda: Graft(sgd, options={"beta": 0.9}), r"options: adam has no option 'beta'; it has betas, eps"),
        (lambda: Graft(sgd, options={"eps": -1.0}), "options of adam are refused: Invalid epsilon value"),
        (lambda: Graft(sgd, per="tensor"), "per must be one of layer, all, got 'tensor'"),  # type: ignore[arg-type]
        (lambda: Graft(torch.optim.SGD(model.parameters(), lr=0.0)), "the optimizer's lr must be above 0"),
        (lambda: Normalized(sgd, ratio=-1.0), r"ratio must be in \[0, inf\), got -1.0"),
        (lambda: Normalized(sgd, floor=-1.0), r"floor must be in \[0, inf\), got -1.0"),
        (lambda: Normalized(sgd, cap=0.0), r"cap must be in \(0, inf\), got 0.0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            build()


def test_no_gradients_no_step() -> None:
    model = start()
    optimizer = Graft(INNER["adamw"](model))
    before = weights(model)
    optimizer.step()
    F.cross_entropy(model[3](torch.ones(2, 6, dtype=torch.float64)), torch.tensor([0, 1])).backward()
    optimizer.step()  # of the last layer alone
    assert torch.equal(weights(model)[: 192 * 6 + 6], before[: 192 * 6 + 6]) and not torch.equal(weights(model), before)
    train_step(optimizer, model, batch(0))
    assert not torch.equal(weights(model)[: 192 * 6 + 6], before[: 192 * 6 + 6])
