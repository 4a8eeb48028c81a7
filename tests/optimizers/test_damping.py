"""damping="auto": what it predicts of a step and finds, against dense matrices; its rule; when inverses follow it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers import EKFAC, KFAC, Bernoulli, Categorical, ExactNaturalGradient, Gaussian, TwoLevelKFAC
from optimizers.curvature.damping import CALIBRATION_STEPS, OMEGA, RANGE, STALE, AdaptiveDamping
from optimizers.likelihoods import Likelihood
from tests import dense
from tests.optimizers.test_kl_clip import batch, net
from tests.optimizers.test_natural_gradient import METHODS, damped_dense
from tests.optimizers.test_quadratic import fisher
from tests.optimizers.test_two_level import layers_of

SPANS = [slice(0, 24), slice(24, 44), slice(44, 59)]  # of net()'s layers


def flat(tensors: Any) -> Tensor:
    return dense.flatten([t.detach().clone() for t in tensors])


def loss_at(model: nn.Module, where: Tensor, inputs: Tensor, targets: Tensor) -> float:
    twin = copy.deepcopy(model)
    nn.utils.vector_to_parameters(where, twin.parameters())
    return F.cross_entropy(twin(inputs), targets).item()


class Step:
    """One step on a batch, and what can be seen of it from outside."""

    def __init__(self, model: nn.Module, optimizer: Any, inputs: Tensor, targets: Tensor) -> None:
        self.judged, last = optimizer._adapted.due(optimizer.steps), optimizer._adapted.ratio
        self.damped = fisher(model, Categorical(), inputs, targets) if optimizer._is_auto else torch.empty(0)
        start = flat(model.parameters())
        optimizer.zero_grad()
        outputs = model(inputs)
        optimizer.backward(F.cross_entropy(outputs, targets), outputs)
        optimizer.step()
        self.move = flat(model.parameters()) - start
        if optimizer._measured is not None:
            self.move = self.move / optimizer._measured
        self.slope = float(flat(p.grad for p in model.parameters()) @ self.move)
        self.change = loss_at(model, start + self.move, inputs, targets) - loss_at(model, start, inputs, targets)

        self.last = last

    def ratio(self, length: float) -> float:
        """What is to be found; the last one where the model expected the loss to grow, which past directions do."""
        predicted = self.slope + length / 2
        return self.change / predicted if predicted < 0 else self.last


def block_length(model: nn.Module, optimizer: Any, move: Tensor) -> float:
    """``dᵀ (F + lambda) d`` with the dense blocks of the approximation and the lambda of the inverses in use."""
    total = 0.0
    for name, where in layers_of(optimizer, model):
        damping = optimizer._adapted.used
        if optimizer.damping_unit == "layer":
            damping *= float(torch.linalg.eigvalsh(optimizer.curvature_matrices()[name]).mean())
        block = torch.block_diag(*damped_dense(optimizer, name, damping))
        total += float(move[where] @ block @ move[where])
    return total


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer": {"damping_unit": "layer"},
    "no clip": {"kl_clip": None, "lr": 0.1},
    "direction": {"kl_of": "direction"},
    "measured": {"kl_of": "measured", "kl_clip": 1e-3},
    "coupled decay": {"weight_decay": 0.3},
    "decoupled decay": {"weight_decay": 0.03, "decoupled_decay": True},
    "maximized": {"maximize": True},
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_the_ratio_is_that_of_the_dense_blocks(method: str, setting: str) -> None:
    """In calibration, where each new lambda has inverses of its own, and after it, where inverses may be behind."""
    options: dict[str, Any] = {"momentum": 0.9, "batch_fraction": 1.0, "update_every": 8, "refresh_every": 8}
    options |= {"lr": 0.5, "kl_clip": 1e-2, "early_updates": False, "fisher": "exact"} | SETTINGS[setting]
    model = net()
    optimizer = METHODS[method](model, likelihood=Categorical(), damping="auto", **options)
    if setting == "maximized":
        backward = optimizer.backward
        optimizer.backward = lambda loss, outputs: backward(-loss, outputs)  # type: ignore[method-assign,assignment]
    behind = checked = 0
    for index in range(24):
        optimizer._adapted.calibrated |= index == 4
        step = Step(model, optimizer, *batch(index, 30))
        if setting == "maximized":
            step.slope = -step.slope
        if not step.judged or optimizer.diagnostics()["curvature/floored"]:
            continue
        assert optimizer.diagnostics()["curvature/reduction_ratio"] == pytest.approx(
            step.ratio(block_length(model, optimizer, step.move)), rel=1e-6
        )
        checked += 1
        behind += optimizer._adapted.used != optimizer._adapted.value
    assert checked >= 5 and behind
    assert optimizer.diagnostics()["curvature/damping"] == optimizer._adapted.value


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("setting", ["plain", "layer", "no clip", "coupled decay", "decoupled decay", "groups"])
@pytest.mark.parametrize("method", ["full", "blocks", "two-level"])
def test_the_ratio_is_that_of_the_samples(method: str, setting: str) -> None:
    """Of the methods whose F couples layers."""
    options: dict[str, Any] = {"momentum": 0.9, "lr": 0.5, "kl_clip": 1e-2, "update_every": 2, "fisher": "exact"}
    options |= SETTINGS.get(setting, {})
    model = net()
    params = list(model.parameters())
    groups: Any = params if setting != "groups" else [{"params": params[:2], "lr": 0.3}, {"params": params[2:]}]
    if method == "two-level":
        kind: Any = TwoLevelKFAC
        options |= {"batch_fraction": 1.0, "refresh_every": 4, "early_updates": False}
    else:
        kind = ExactNaturalGradient
        options |= {"blocks": "full" if method == "full" else "layer"}
    optimizer = kind(model, groups, likelihood=Categorical(), damping="auto", **options)
    matrix = torch.empty(0)
    checked = 0
    for index in range(15):
        inputs, targets = batch(index, 30)
        if index % 2 == 0:
            matrix = fisher(model, Categorical(), inputs, targets)
            if method == "blocks":
                matrix = torch.block_diag(*[matrix[s, s] for s in SPANS])
        step = Step(model, optimizer, inputs, targets)
        if not step.judged:
            continue
        shifts = optimizer._shifts.repeat_interleave(torch.tensor([24, 20, 15]))
        if setting != "layer":
            assert optimizer._shifts.tolist() == pytest.approx([optimizer._adapted.used] * 3)
        length = float(step.move @ matrix @ step.move + (shifts * step.move) @ step.move)
        assert optimizer._adapted.ratio == pytest.approx(step.ratio(length), rel=1e-6)
        checked += 1
    assert checked >= 3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kl_clip", [None, 1e-3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("method", [KFAC, EKFAC, TwoLevelKFAC, ExactNaturalGradient])
def test_where_rates_are_found_f_is_that_of_the_batch(method: Any, decay: float, kl_clip: float | None) -> None:
    model = net()
    optimizer = method(
        model, likelihood=Categorical(), lr="auto", momentum="auto", damping="auto", kl_clip=kl_clip, update_every=3,
        weight_decay=decay, decoupled_decay=True,
    )  # fmt: skip
    optimizer.param_groups[0]["lr"] *= 0.5  # a schedule
    checked = 0
    for index in range(22):
        past = flat(optimizer.state[p].get("momentum_buffer", torch.zeros_like(p)) for p in model.parameters())
        step = Step(model, optimizer, *batch(index, 30))
        if step.judged:
            damped = step.damped + optimizer._adapted.used * torch.eye(59)
            length = float(step.move @ damped @ step.move)
            assert optimizer._adapted.ratio == pytest.approx(step.ratio(length), rel=1e-5)
            checked += 1
            if kl_clip is None:  # the rate that is best for the direction alone
                sums = flat(optimizer.state[p]["momentum_buffer"] for p in model.parameters())
                found = optimizer.diagnostics()
                direction = (sums - found["curvature/momentum"] * past) / found["curvature/rate"]
                gradient = flat(p.grad for p in model.parameters())
                best = float(direction @ gradient) / float(direction @ damped @ direction)
                assert float(optimizer._planned.trust) == pytest.approx(best, rel=1e-6)
    assert checked >= 4


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(0.7)], ids=["bernoulli", "gaussian"])
def test_other_likelihoods_with_noise_and_parameters_without_curvature(likelihood: Likelihood) -> None:
    """The second pass has the noise of the first, and what the fallback moves counts by its slope."""
    torch.manual_seed(0)

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.drop, self.last = nn.Linear(5, 8), nn.Dropout(0.4), nn.Linear(8, 3)
            self.shift = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.drop(self.first(x).tanh())) + self.shift

    model = Noisy()
    optimizer = KFAC(
        model, likelihood=likelihood, damping="auto", fisher="exact", update_every=1, refresh_every=1, fallback_lr=0.1
    )
    names = dict(model.named_parameters())
    for index in range(5):
        inputs, classes = batch(index, 20)
        targets = F.one_hot(classes, 3).to(inputs)
        start, noise = {n: p.detach().clone() for n, p in names.items()}, torch.get_rng_state()
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = likelihood.nll(outputs, targets)
        optimizer.backward(loss, outputs, targets=targets)
        after = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), after)
        torch.set_rng_state(noise)
        change = likelihood.nll(model(inputs), targets).item() - loss.item()
        moves = {n: p.detach() - start[n] for n, p in names.items()}
        slope = sum(float((p.grad * moves[n]).sum()) for n, p in names.items() if p.grad is not None)
        length = 0.0
        for name in ("first", "last"):
            block = torch.block_diag(*damped_dense(optimizer, name, optimizer._adapted.used))
            move = torch.cat([moves[f"{name}.weight"], moves[f"{name}.bias"].unsqueeze(1)], 1).flatten()
            length += float(move @ block @ move)
        assert float(moves["shift"].norm()) > 0
        assert optimizer._adapted.ratio == pytest.approx(change / (slope + length / 2), rel=1e-6)


# -- the rule ----------------------------------------------------------------------------------------------------------


def judged(damping: AdaptiveDamping, ratio: float) -> float:
    """Lambda after a step of some ratio that was to lower a loss of 2 by 0.1."""
    damping.judge(2.0, 2.0 - 0.1 * ratio, -0.1, 1e-6)
    assert damping.value is not None
    return damping.value


def test_the_rule_by_hand() -> None:
    damping = AdaptiveDamping(1.0)
    found = [judged(damping, ratio) for ratio in (0.9, 1.2, 0.8)]
    assert found == [0.5, 0.25, 0.125] and all(damping.due(step) for step in range(7))
    assert judged(damping, 0.5) == 0.125, "between, it stays, and calibration is over"
    assert [step for step in range(20) if damping.due(step)] == [4, 9, 14, 19]
    assert judged(damping, 0.76) == pytest.approx(0.125 * 0.95**5)
    assert judged(damping, 0.24) == pytest.approx(0.125)
    assert judged(damping, 0.26) == judged(damping, 0.74) == pytest.approx(0.125)
    assert judged(damping, -0.1) == pytest.approx(0.25), "a loss that grew"
    assert damping.due(5) and damping.due(6)
    assert judged(damping, 0.1) == pytest.approx(0.25 / OMEGA) and not damping.due(5)


def test_the_lower_of_two_ratios_counts() -> None:
    damping = AdaptiveDamping(1.0)
    for trust, expected in ((2.0, 0.5), (0.3, 0.5), (0.2, 0.5 / OMEGA), (-0.1, 1.0 / OMEGA), (math.nan, 1.0)):
        damping.judge(2.0, 1.9, -0.1, 1e-6, trust)
        assert damping.value == pytest.approx(expected)
        assert damping.ratio == pytest.approx(1.0)


def test_calibration_ends() -> None:
    rising = AdaptiveDamping(1.0)
    assert [judged(rising, 0.1) for _ in range(3)] == [2.0, 4.0, 8.0]
    assert judged(rising, 0.9) == pytest.approx(8 * OMEGA) and rising.calibrated, "the other side"
    steady = AdaptiveDamping(1.0)
    for _ in range(CALIBRATION_STEPS):
        assert not steady.calibrated
        judged(steady, 1.0)
    assert steady.value == 2.0**-CALIBRATION_STEPS and steady.calibrated
    at_once = AdaptiveDamping(1.0)
    assert judged(at_once, 0.5) == 1.0 and at_once.calibrated


def test_what_is_no_test_of_the_model() -> None:
    damping = AdaptiveDamping(1.0)
    for before, after, predicted in ((2.0, 1.9, 0.1), (2.0, 2.1, 0.0), (2.0, 1.9, -1e-6), (2.0, 1.9, math.nan)):
        damping.judge(before, after, predicted, 1e-6)
        assert damping.value == 1.0 and damping.ratio is None and not damping.calibrated
    for before, after in ((2.0, math.inf), (2.0, math.nan), (math.nan, 1.0)):
        damping.value = 1.0
        damping.judge(before, after, -0.1, 1e-6)
        assert damping.value == 2.0, "not finite"


def test_lambda_stays_within_bounds() -> None:
    damping = AdaptiveDamping(3.0)
    for _ in range(2000):
        judged(damping, 1.0)
    assert damping.value == 3.0 / RANGE
    for _ in range(2000):
        damping.judge(1.0, math.inf, -1.0, 1e-6)
    assert damping.value == 3.0 * RANGE


def test_when_inverses_follow() -> None:
    damping = AdaptiveDamping(None)
    assert damping.renew(True, lambda: 4.0) and damping.used == 4.0
    assert not damping.renew(True, lambda: 5.0), "nothing has changed"
    damping.value = 4.0 / 1.4
    assert not damping.renew(False, lambda: 5.0) and damping.used == 4.0, "not for little"
    assert damping.renew(True, lambda: 5.0) and damping.used == 4.0 / 1.4, "but if they are made anyway"
    damping.value = damping.used * STALE * 1.01
    assert damping.renew(False, lambda: 5.0) and damping.used == damping.value
    twin = AdaptiveDamping(None)
    twin.restore(damping.state())
    assert vars(twin) == vars(damping)
    fresh = AdaptiveDamping(None)
    fresh.restore(AdaptiveDamping(None).state())
    assert vars(fresh) == vars(AdaptiveDamping(None))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", [KFAC, EKFAC, ExactNaturalGradient])
def test_it_starts_at_the_mean_eigenvalue(method: Any) -> None:
    model = net()
    optimizer = method(model, likelihood=Categorical(), damping="auto", fisher="exact", lr=0.1)
    inputs, targets = batch(0)
    outputs = model(inputs)
    optimizer.backward(F.cross_entropy(outputs, targets), outputs)
    optimizer.step()
    means = [float(matrix.diagonal().mean()) for matrix in optimizer.curvature_matrices().values()]
    assert optimizer._adapted.used == pytest.approx(sum(means) / 3)
    assert method(model, likelihood=Categorical(), damping="auto", damping_unit="layer")._adapted.value == 1.0


def test_inverses_are_made_anew_for_a_new_lambda_and_bases_are_not() -> None:
    """In calibration lambda is halved in every step; refreshes keep to their schedule."""
    for method in (KFAC, EKFAC):
        model = net()
        optimizer: Any = method(
            model, likelihood=Categorical(), damping="auto", early_updates=False, update_every=50, refresh_every=50,
            kl_clip=1e-6,
        )  # fmt: skip
        used = []
        for index in range(CALIBRATION_STEPS):
            Step(model, optimizer, *batch(index, 30))
            used.append(optimizer._adapted.used)
        assert used == pytest.approx([used[0] * 0.5**k for k in range(CALIBRATION_STEPS)])
        assert optimizer.refreshes == 1


# -- with others -------------------------------------------------------------------------------------------------------


OPTIONS: dict[str, dict[str, Any]] = {
    "kfac": {"method": KFAC, "update_every": 3, "refresh_every": 4},
    "ekfac": {"method": EKFAC, "update_every": 2, "refresh_every": 6, "damping_unit": "layer"},
    "exact": {"method": ExactNaturalGradient, "update_every": 3},
    "two-level": {"method": TwoLevelKFAC, "update_every": 3, "refresh_every": 4},
    "found": {"method": KFAC, "lr": "auto", "momentum": "auto"},
}


@pytest.mark.parametrize("saved_after", [0, 3, 11])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_goes_on_bit_for_bit(name: str, saved_after: int) -> None:
    options = dict(OPTIONS[name])
    method = options.pop("method")

    def build() -> tuple[nn.Module, Any]:
        model = net()
        return model, method(model, likelihood=Categorical(), damping="auto", **options)

    model, optimizer = build()
    state: Any = None
    for index in range(20):
        if index == saved_after:
            state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        Step(model, optimizer, *batch(index, 30))
    again, other = build()
    again.load_state_dict(state[0])
    other.load_state_dict(state[1])
    for index in range(saved_after, 20):
        Step(again, other, *batch(index, 30))
    assert torch.equal(flat(model.parameters()), flat(again.parameters()))
    assert vars(optimizer._adapted) == vars(other._adapted)
    assert optimizer.diagnostics() == other.diagnostics()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", OPTIONS)
def test_micro_batches_are_one_batch(name: str) -> None:
    results = []
    options = dict(OPTIONS[name])
    method = options.pop("method")
    for parts in (1, 2, 3):
        model = net()
        settings: dict[str, Any] = {"batch_fraction": 1.0, "fisher": "exact"} | options
        optimizer = method(model, likelihood=Categorical(), damping="auto", **settings)
        for index in range(8):
            inputs, targets = batch(index, 12)
            optimizer.zero_grad()
            for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
                outputs = model(x)
                optimizer.backward(F.cross_entropy(outputs, y) / parts, outputs)
            optimizer.step()
        assert optimizer._adapted.ratio is not None
        results.append(torch.cat([flat(model.parameters()), optimizer._adapted.state()]))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-6, atol=1e-8, equal_nan=True)


@pytest.mark.usefixtures("float64")
def test_what_is_masked_does_not_count() -> None:
    """A mask says what ignored targets say."""
    results = []
    for masked in (True, False):
        model = net()
        optimizer = KFAC(model, likelihood=Categorical(), damping="auto", fisher="exact")
        for index in range(6):
            inputs, targets = batch(index, 20)
            keep = torch.arange(20) % 3 != index % 3
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = F.cross_entropy(outputs[keep], targets[keep])
            if masked:
                optimizer.backward(loss, outputs, targets=targets, mask=keep)
            else:
                optimizer.backward(loss, outputs, targets=targets.masked_fill(~keep, -100))
            optimizer.step()
        results.append(torch.cat([flat(model.parameters()), optimizer._adapted.state()]))
    torch.testing.assert_close(*results)


KEPT: dict[str, tuple[Likelihood, Any]] = {
    "classes": (Categorical(0.1), lambda o: torch.randint(o.shape[-1], o.shape[:-1])),
    "classes apart": (
        Categorical(dim=1, weight=[1.0, 2.0, 0.5, 1.0]),
        lambda o: torch.randint(4, (o.shape[0], *o.shape[2:])),
    ),
    "probabilities": (Categorical(0.1, reduction="sum"), lambda o: torch.rand(o.shape).softmax(-1)),
    "bits": (Bernoulli(), lambda o: torch.rand(o.shape) > 0.5),
    "weighed bits": (Bernoulli(torch.tensor([1.0, 2.0, 0.5])), lambda o: (torch.rand(o.shape) > 0.5).to(o)),
    "weighed bits, mean": (Bernoulli(3.0, reduction="mean"), lambda o: torch.rand(o.shape)),
    "means": (Gaussian(0.7, reduction="mean"), lambda o: torch.rand(o.shape)),
    "sums": (Gaussian(0.7, reduction="sum"), lambda o: torch.rand(o.shape)),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", KEPT)
def test_the_loss_of_what_a_mask_keeps(name: str) -> None:
    """That of a batch which holds nothing else: whole examples are left out, so there is one."""
    likelihood, make = KEPT[name]
    outputs = torch.randn(6, 4, 3)
    targets = make(outputs)
    rows = torch.tensor([True, False, True, True, False, True])
    shape = likelihood.observations(outputs, targets).shape[:-1]
    mask = rows.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    found = likelihood.masked_nll(outputs, targets, mask)
    torch.testing.assert_close(found, likelihood.nll(outputs[rows], targets[rows]))
    torch.testing.assert_close(likelihood.masked_nll(outputs, targets, None), likelihood.nll(outputs, targets))
    assert float(likelihood.masked_nll(outputs, targets, torch.zeros(shape, dtype=torch.bool))) == 0
    assert float(likelihood.masked_nll(outputs[:0], targets[:0], None)) == 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_without_a_clip_it_holds_steps_in(seed: int) -> None:
    """A rate of 1, no clip and no average over steps: a lambda that it may end at would be ruinous from the start."""
    last = {}
    for damping in ("auto", 1e-3):
        model = net()
        generator = torch.Generator().manual_seed(seed)
        optimizer = KFAC(
            model, likelihood=Categorical(), damping=damping, kl_clip=None, lr=1.0, momentum=0.0, update_every=1,
            refresh_every=1,
        )  # fmt: skip
        inputs = torch.randn(64, 5, generator=generator)
        targets = inputs[:, :3].argmax(1)
        for _ in range(100):
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = F.cross_entropy(outputs, targets)
            optimizer.backward(loss, outputs)
            optimizer.step()
            last[damping] = loss.item()
    assert last["auto"] < 0.02 and not last[1e-3] < 0.5


def test_what_cannot_be_is_said() -> None:
    model, (inputs, targets) = net(), batch(0)
    for options, sentence in (
        ({"fisher": "empirical"}, "likelihood must be given for damping='auto'"),
        ({"damping": "automatic"}, "damping must be a number or 'auto', got 'automatic'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            KFAC(model, **{"damping": "auto"} | options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kl_clip must be the same in all groups where damping and lr"):
        KFAC(
            model, [{"params": model[0].parameters()}, {"params": model[2].parameters(), "kl_clip": 1.0}],
            damping="auto", lr="auto", likelihood=Categorical(),
        )  # fmt: skip
    optimizer = KFAC(model, damping="auto", likelihood=Gaussian())
    outputs = model(inputs)
    with pytest.raises(ValueError, match=r"targets must be given to backward\(loss, outputs, targets=...\)"):
        optimizer.backward((outputs - 1).square().sum(-1).mean() / 2, outputs)
    optimizer = KFAC(model, damping="auto", likelihood=Categorical())
    outputs = torch.cat([model(inputs), model(inputs)])  # which call gave which part of them?
    optimizer.backward(F.cross_entropy(outputs, targets.repeat(2)), outputs)
    with pytest.raises(RuntimeError, match=r"damping='auto' looks .* in some steps, and saw 2 forward passes for 1"):
        optimizer.step()


def test_another_loss_than_the_likelihoods_is_said() -> None:
    model, (inputs, targets) = net(), batch(0)
    optimizer = KFAC(model, damping="auto", likelihood=Categorical())
    outputs = model(inputs)
    optimizer.backward(F.cross_entropy(outputs, targets) + outputs.square().mean(), outputs, targets=targets)
    with pytest.warns(UserWarning, match=r"the loss is .* where the likelihood's is .*: train on likelihood.nll"):
        optimizer.step()
