"""Averages against plain float64 recursions; the switch between weights; BatchNorm's statistics."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers import KFAC, Categorical
from optimizers.averaging import EMA, Averaging, ScheduleFree, batch_norms, none, recalibrate
from optimizers.testing.loop import same_state, train_step, weights
from tests.optimizers.problems import conv_net, images, mlp


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    inputs, targets = images(16)
    return inputs.roll(step, 0).to(dtype), targets.roll(2 * step, 0)


def start(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return mlp().double()


def put(model: nn.Module, vector: Tensor) -> None:
    with torch.no_grad():
        nn.utils.vector_to_parameters(vector, model.parameters())


def gradient(model: nn.Module, at: Tensor, step: int) -> Tensor:
    put(model, at)
    model.zero_grad()
    F.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def averages(optimizer: Averaging, model: nn.Module) -> Tensor:
    with optimizer.averaged():
        return weights(model)


# -- EMA ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, 1.0), (0.9, 10.0), (0.5, 2.5), (0.0, 1.0)])
def test_ema_is_its_recursion(decay: float, warmup: float) -> None:
    model = start()
    optimizer = EMA(torch.optim.Adam(model.parameters(), lr=1e-2), decay=decay, warmup=warmup)
    expected = weights(model)
    for t in range(1, 31):
        train_step(optimizer, model, batch(t))
        d = min(decay, (1 + t) / (warmup + t))
        expected = d * expected + (1 - d) * weights(model)
        torch.testing.assert_close(averages(optimizer, model), expected, rtol=1e-13, atol=1e-14)


def test_ema_leaves_training_alone() -> None:
    ends = []
    for around in (none, EMA):
        model = start()
        optimizer = around(KFAC(model, lr=0.05, likelihood=Categorical()))
        for t in range(10):
            train_step(optimizer, model, batch(t))
        ends.append(weights(model))
    assert torch.equal(*ends)


def test_ema_of_half_precision_is_kept_in_float32() -> None:
    """Updates of a 1/1000 are less than a bfloat16's last bit."""
    model = start().bfloat16()
    optimizer = EMA(torch.optim.SGD(model.parameters(), lr=0.5), decay=0.999, warmup=1)
    expected = weights(model).double()
    for t in range(60):
        train_step(optimizer, model, batch(t, torch.bfloat16))
        expected = 0.999 * expected + 0.001 * weights(model).double()
    found = torch.cat([own["ema"]["average"].reshape(-1) for own in optimizer.state.values()])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(averages(optimizer, model), found.bfloat16())


def test_parameters_that_join_later_begin_their_own_average() -> None:
    model = start()
    late = list(model[3].parameters())
    optimizer = EMA(torch.optim.SGD(model[1].parameters(), lr=0.1), decay=0.9, warmup=5)
    for t in range(3):
        train_step(optimizer, model, batch(t))
    optimizer.add_param_group({"params": late})
    expected = late[0].detach().clone()
    for t in range(1, 4):
        train_step(optimizer, model, batch(t))
        d = min(0.9, (1 + t) / (5 + t))
        expected = d * expected + (1 - d) * late[0].detach()
    torch.testing.assert_close(optimizer.state[late[0]]["ema"]["average"], expected, rtol=1e-13, atol=1e-14)


# -- schedule-free -----------------------------------------------------------------------------------------------------


class PlainSGD:
    """Its update of z, from a gradient."""

    def __init__(self, decay: float = 0.0) -> None:
        self.decay = decay

    def __call__(self, z: Tensor, grad: Tensor, lr: float, t: int) -> Tensor:
        return -lr * (grad + self.decay * z)


class PlainAdamW(PlainSGD):
    """Without a first moment, as in the paper."""

    square: Tensor | float = 0.0

    def __call__(self, z: Tensor, grad: Tensor, lr: float, t: int) -> Tensor:
        self.square = 0.99 * self.square + 0.01 * grad**2
        return -lr * (grad / ((self.square / (1 - 0.99**t)).sqrt() + 1e-8) + self.decay * z)


BASES: dict[str, tuple[Callable[..., torch.optim.Optimizer], Callable[[], PlainSGD]]] = {
    "sgd": (lambda params: torch.optim.SGD(params, lr=0.3), PlainSGD),
    "decay": (lambda params: torch.optim.SGD(params, lr=0.3, weight_decay=0.1), lambda: PlainSGD(0.1)),
    "adamw": (
        lambda params: torch.optim.AdamW(params, lr=0.02, betas=(0.0, 0.99), weight_decay=0.1),
        lambda: PlainAdamW(0.1),
    ),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("beta", "r", "power", "warmup"), [(0.9, 0.0, 2.0, 0), (0.6, 1.0, 2.0, 7), (1.0, 0.0, 0.0, 0), (0.98, 0.5, 1.0, 3)]
)
@pytest.mark.parametrize("schedule", ["constant", "falling"])
def test_schedule_free_is_the_papers_recursion(
    base: str, beta: float, r: float, power: float, warmup: int, schedule: str
) -> None:
    """Algorithm 1 with its three sequences all kept."""
    model, twin = start(), start()
    build, plain = BASES[base]
    inner = build(model.parameters())
    lr = inner.param_groups[0]["lr"]
    optimizer = ScheduleFree(inner, beta=beta, r=r, lr_power=power, warmup=warmup)
    update = plain()
    z = x = weights(twin)
    total = 0.0
    for t in range(1, 31):
        rate = lr * (1 - t / 50 if schedule == "falling" else 1)
        inner.param_groups[0]["lr"] = rate
        train_step(optimizer, model, batch(t))
        assert inner.param_groups[0]["lr"] == rate
        rate *= min(1, t / warmup) if warmup else 1
        y = (1 - beta) * z + beta * x
        z = z + update(z, gradient(twin, y, t), rate, t)
        weight = t**r * rate**power
        total += weight
        x = (1 - weight / total) * x + weight / total * z
        torch.testing.assert_close(weights(model), (1 - beta) * z + beta * x, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(averages(optimizer, model), x, rtol=1e-9, atol=1e-11)


def test_schedule_free_keeps_one_copy_of_the_weights() -> None:
    model = start()
    optimizer = ScheduleFree(torch.optim.SGD(model.parameters(), lr=0.1))
    train_step(optimizer, model, batch(0))
    for p, own in optimizer.state.items():
        kept = [t for t in own["schedule_free"].values() if isinstance(t, Tensor)]
        assert [t.shape for t in kept] == [p.shape]


def test_groups_of_schedule_free_have_their_own_weights() -> None:
    """Each as if it were alone with its rate; a group at rate 0 stays."""
    model = start()
    groups = [{"params": model[1].parameters(), "lr": 0.0}, {"params": model[3].parameters(), "lr": 0.2}]
    optimizer = ScheduleFree(torch.optim.SGD(groups, lr=0.1), beta=0.8)
    alone = start()
    other = ScheduleFree(torch.optim.SGD(alone[3].parameters(), lr=0.2), beta=0.8)
    before = weights(model[1])
    for t in range(8):
        train_step(optimizer, model, batch(t))
        train_step(other, alone, batch(t))
    assert torch.equal(weights(model[1]), before)
    torch.testing.assert_close(averages(optimizer, model), averages(other, alone), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("beta", [0.9, 0.3])
def test_the_average_does_not_drift_in_float32(beta: float) -> None:
    """x is worked out from y and z, over a thousand steps."""
    model, twin = start().float(), start()
    optimizer = ScheduleFree(torch.optim.SGD(model.parameters(), lr=0.05), beta=beta)
    z = x = weights(twin)
    for t in range(1, 1001):
        y = (1 - beta) * z + beta * x
        z = z - 0.05 * gradient(twin, y, t % 16)
        x = x + (z - x) / t
        train_step(optimizer, model, batch(t % 16, torch.float32))
    found = averages(optimizer, model).double()
    assert float((found - x).norm()) < 1e-4 * float((x - weights(start())).norm())


def test_a_thousand_steps_in_bfloat16_still_average() -> None:
    """The share of a late step is less than a bfloat16's last bit."""
    model = start().bfloat16()
    optimizer = ScheduleFree(torch.optim.SGD(model.parameters(), lr=0.05))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(400):
            train_step(optimizer, model, batch(t % 16, torch.bfloat16))
    before = [own["schedule_free"]["y"].clone() for own in optimizer.state.values()]
    train_step(optimizer, model, batch(0, torch.bfloat16))
    after = [own["schedule_free"]["y"] for own in optimizer.state.values()]
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_step_that_fails_leaves_the_weights_of_training() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if self.param_groups[0]["lr"] == 7:
                raise torch.linalg.LinAlgError("no decomposition")
            return super().step(closure)

    model = start()
    optimizer = ScheduleFree(Failing(model.parameters(), lr=0.1))
    for t in range(3):
        train_step(optimizer, model, batch(t))
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 7
    with pytest.raises(torch.linalg.LinAlgError):
        train_step(optimizer, model, batch(3))
    optimizer.param_groups[0]["lr"] = 0.1
    assert torch.equal(weights(model), before) and same_state(optimizer.state_dict(), state)


def test_a_momentum_beside_schedule_free_is_said() -> None:
    model = start()
    with pytest.warns(UserWarning, match=r"takes the place of momentum, and SGD has its own: set momentum to 0\."):
        ScheduleFree(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    with pytest.warns(UserWarning, match=r"AdamW has its own: set betas\[0\] to 0\."):
        ScheduleFree(torch.optim.AdamW(model.parameters()))
    with pytest.warns(UserWarning, match="KFAC has its own: set momentum to 0"):
        ScheduleFree(KFAC(model, likelihood=Categorical()))


# -- the switch --------------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[nn.Module], Averaging]] = {
    "ema": lambda model: EMA(torch.optim.Adam(model.parameters(), lr=1e-2), decay=0.9),
    "free": lambda model: ScheduleFree(torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.0, 0.99))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_looking_at_averages_changes_nothing(kind: str, dtype: torch.dtype) -> None:
    ends = []
    for looks in (False, True):
        model = start().to(dtype)
        optimizer = KINDS[kind](model)
        for t in range(12):
            train_step(optimizer, model, batch(t, dtype))
            if looks:
                before = weights(model)
                optimizer.eval()
                optimizer.eval()
                assert optimizer.evaluating and (t == 0 or not torch.equal(weights(model), before))
                optimizer.train()
                optimizer.train()
                assert not optimizer.evaluating and torch.equal(weights(model), before)
        ends.append((weights(model), optimizer.state_dict()))
    assert torch.equal(ends[0][0], ends[1][0]) and same_state(ends[0][1], ends[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_averages_is_refused(kind: str) -> None:
    model = start()
    optimizer = KINDS[kind](model)
    train_step(optimizer, model, batch(0))
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"would train these: call optimizer.train\(\) first"):
        train_step(optimizer, model, batch(1))
    optimizer.train()
    train_step(optimizer, model, batch(1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_saved_in_evaluation_has_both(kind: str) -> None:
    """The model's file then holds the averages, and the optimizer's the weights to go on from."""
    model = start()
    optimizer = KINDS[kind](model)
    for t in range(5):
        train_step(optimizer, model, batch(t))
    optimizer.eval()
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    shown = weights(model)
    other = start(1)
    second = KINDS[kind](other)
    other.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    assert second.evaluating and torch.equal(weights(other), shown)
    second.train()
    optimizer.train()
    for t in range(5, 9):
        train_step(optimizer, model, batch(t))
        train_step(second, other, batch(t))
    assert torch.equal(weights(model), weights(other))
    assert same_state(optimizer.state_dict(), second.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_step_the_average_is_the_model(kind: str) -> None:
    model = start()
    optimizer = KINDS[kind](model)
    before = weights(model)
    assert torch.equal(averages(optimizer, model), before)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(weights(model), before)


def test_the_state_of_another_model_is_a_sentence() -> None:
    optimizer = KINDS["ema"](model := start())
    train_step(optimizer, model, batch(0))
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Linear(5, 4)).double()
    with pytest.raises(ValueError, match=r"average of ema is \[6, 192\] in the state and the parameter \[5, 192\]"):
        KINDS["ema"](other).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        (EMA, {"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        (EMA, {"decay": math.nan}, r"decay must be in \[0, 1\), got nan"),
        (EMA, {"warmup": 0.5}, r"warmup must be in \[1, inf\), got 0.5"),
        (EMA, {"calibrate": -1}, r"calibrate must be in \[0, inf\), got -1"),
        (ScheduleFree, {"beta": 0.0}, r"beta must be in \(0, 1\], got 0.0"),
        (ScheduleFree, {"r": -1.0}, r"r must be in \[0, inf\), got -1.0"),
        (ScheduleFree, {"lr_power": -1.0}, r"lr_power must be in \[0, inf\), got -1.0"),
        (ScheduleFree, {"warmup": -1}, r"warmup must be in \[0, inf\), got -1"),
    ],
)
def test_values_out_of_range_are_sentences(kind: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        kind(torch.optim.SGD(start().parameters(), lr=0.1), **options)


# -- BatchNorm ---------------------------------------------------------------------------------------------------------


def norm_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 6),
        nn.BatchNorm1d(6, momentum=0.3), nn.Linear(6, 4),
    ).double()  # fmt: skip


def test_recalibrated_statistics_are_plain_means_over_batches() -> None:
    model = norm_net()
    for _ in range(3):
        model(batch(0)[0])
    batches = [batch(t)[0] * (t + 1) for t in range(3)]
    modes = [m.training for m in model.modules()]
    layers = recalibrate(model, batches)
    assert layers == [model[1], model[6]] and [m.training for m in model.modules()] == modes
    assert (model[1].momentum, model[6].momentum) == (0.1, 0.3)
    first = [model[0](b).detach().transpose(0, 1).flatten(1) for b in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([f.mean(1) for f in first]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([f.var(1) for f in first]).mean(0))
    # The second layer sees what the first one makes of a batch's own statistics, without dropout.
    seen = []
    for b in batches:
        h = F.batch_norm(model[0](b), None, None, model[1].weight, model[1].bias, training=True, eps=model[1].eps)
        seen.append(model[5](h.relu().flatten(1)).detach())
    torch.testing.assert_close(model[6].running_mean, torch.stack([s.mean(0) for s in seen]).mean(0))
    torch.testing.assert_close(model[6].running_var, torch.stack([s.var(0) for s in seen]).mean(0))


def test_recalibration_leaves_frozen_layers_and_others_alone() -> None:
    model = norm_net()
    model(batch(0)[0])
    model[1].eval()
    kept = model[1].running_mean.clone()
    rng = torch.get_rng_state()
    assert recalibrate(model, [batch(1)[0]]) == [model[6]] == batch_norms(model)
    assert torch.equal(model[1].running_mean, kept) and not model[1].training and model[3].training
    assert torch.equal(torch.get_rng_state(), rng), "dropout drew"
    calls: list[Tensor] = []
    assert recalibrate(mlp(), [batch(1)[0]], calls.append) == [] and calls == []
    assert all(p.grad is None for p in model.parameters())


def test_statistics_of_training_are_not_those_of_the_average() -> None:
    """What the calibration is for: the average with the statistics of training is another function."""
    model = conv_net().double()
    optimizer = EMA(torch.optim.SGD(model.parameters(), lr=0.5), decay=0.98)
    for t in range(30):
        train_step(optimizer, model, batch(t))
    optimizer.eval()
    model.eval()
    stale = F.cross_entropy(model(batch(0)[0]), batch(0)[1])
    recalibrate(model, [batch(t)[0] for t in range(4)])
    fresh = F.cross_entropy(model(batch(0)[0]), batch(0)[1])
    model.train()
    own = F.cross_entropy(model(batch(0)[0]), batch(0)[1])  # by statistics of this very batch
    assert float((fresh - own).detach().abs()) < 0.2 * float((stale - own).detach().abs())
