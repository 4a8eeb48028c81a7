"""Loops that are others': they call loss.backward() themselves, clear gradients when they like, and skip steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers import (
    EKFAC,
    EMA,
    KFAC,
    AdaFisher,
    AdaFisherW,
    AdaHessian,
    Categorical,
    Deflation,
    ExactNaturalGradient,
    FishLeg,
    TwoLevelKFAC,
)
from optimizers.curvature.layers import LinearLayer, TransposedLinearLayer, adapt, adapts
from tests import dense

pytestmark = pytest.mark.usefixtures("float64")

EVERY: dict[str, Any] = {"update_every": 2, "refresh_every": 2, "likelihood": Categorical()}
KINDS: dict[str, Callable[..., Any]] = {
    "kfac": partial(KFAC, **EVERY),
    "measured": partial(KFAC, **EVERY, kl_of="measured"),
    "auto": partial(EKFAC, **EVERY, lr="auto", momentum="auto", damping="auto"),
    "empirical": partial(KFAC, fisher="empirical", update_every=2, refresh_every=2),
    "exact": partial(ExactNaturalGradient, likelihood=Categorical()),
    "adafisher": partial(AdaFisher, update_every=2, normalize="none"),
    "adahessian": partial(AdaHessian, hessian_every=2),
    "fishleg": partial(FishLeg, aux_every=2, likelihood=Categorical()),
    "ema": lambda model: EMA(KFAC(model, **EVERY)),
}


class Returning(nn.Module):
    """Tokens to classes; returns its loss where it is given labels, as other packages' models do."""

    def __init__(self, how: str = "dict", autocast: bool = False) -> None:
        super().__init__()
        self.how, self.autocast = how, autocast
        self.table, self.middle, self.head = nn.Embedding(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits = self.head(self.middle(self.table(tokens)).tanh()).to(self.table.weight.dtype)
        found = {"logits": logits}
        if labels is not None:
            shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
            found = {"loss": F.cross_entropy(logits.flatten(0, 1), shifted.flatten()), "logits": logits}
        return {"dict": dict, "object": lambda d: SimpleNamespace(**d), "tuple": lambda d: tuple(d.values())}[self.how](
            found
        )


def tokens(seed: int) -> tuple[Tensor, Tensor]:
    """Sequences of unequal length and their labels, with padding left out."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 6, (5, 4), generator=draw)
    ends = torch.tensor([4, 2, 3, 4, 2]).unsqueeze(1)
    return x, (x % 4).masked_fill(torch.arange(4) >= ends, -100)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(6, 5, generator=draw), torch.randint(0, 4, (6,), generator=draw)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_that_calls_backward_itself_trains_as_ours_bit_for_bit(kind: str) -> None:
    found = []
    for ours in (True, False):
        optimizer = KINDS[kind](model := net())
        for step in range(5):
            optimizer.zero_grad()
            for part in range(2):
                x, y = batch(2 * step + part)
                outputs = model(x)
                loss = F.cross_entropy(outputs, y)
                if ours:
                    optimizer.backward(loss / 2 * 1024.0, outputs, scale=1024.0)
                else:
                    loss = optimizer.before_backward(loss, outputs, scale=lambda: 1024.0)
                    loss /= 2  # in place, as some do
                    (loss * 1024.0).backward()
            for p in model.parameters():
                p.grad /= 1024.0
            optimizer.step()
        found.append(weights(model))
    assert equal(*found)


@pytest.mark.parametrize("how", ["dict", "object"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ema"])
def test_a_model_that_returns_its_loss_is_followed(kind: str, how: str) -> None:
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = Returning(how)
        optimizer = KINDS[kind](model)
        if not ours:
            optimizer.follow_model()
            model, optimizer = copy.deepcopy((model, optimizer))  # copies follow theirs
        for step in range(4):
            x, labels = tokens(step)
            result = model(tokens=x, labels=labels)
            loss, logits = (result["loss"], result["logits"]) if how == "dict" else (result.loss, result.logits)
            if ours:
                optimizer.backward(loss, logits)
            else:
                loss.backward()
            optimizer.step()
            model.zero_grad()
        found.append(weights(model))
    assert equal(*found)


def test_what_cannot_be_followed_says_so() -> None:
    x, labels = tokens(0)
    optimizer = KFAC(model := Returning("tuple"), **EVERY)
    optimizer.follow_model()
    with pytest.raises(ValueError, match=r"returns tuple without 'loss' and 'logits'.*return_dict=True"):
        model(x, labels)
    optimizer = KFAC(model := Returning(), **EVERY)
    optimizer.follow_model(outputs="scores")
    with pytest.raises(ValueError, match="without 'loss' and 'scores'"):
        model(x, labels)
    model(x)  # no labels: the loss is somebody else's
    optimizer.close()
    model(x, labels)
    with pytest.raises(ValueError, match="model must be given to AdaHessian"):
        AdaHessian(nn.Linear(2, 2).parameters()).follow_model()
    with pytest.raises(ValueError, match=r"loss must be a single number, got the shape \[6\]"):
        KFAC(net(), **EVERY).before_backward(torch.zeros(6))


@pytest.mark.parametrize("kind", ["kfac", "adahessian"])
def test_a_loop_that_nobody_has_told_of_is_told(kind: str) -> None:
    optimizer = KINDS[kind](model := net())
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="before_backward"):
        optimizer.step()


def test_a_scaler_that_nobody_has_told_of_is_told() -> None:
    optimizer = AdaHessian(model := net())
    x, y = batch(0)
    loss = optimizer.before_backward(F.cross_entropy(model(x), y))
    with pytest.warns(UserWarning, match=r"multiplied by 65536 .* scale=scaler\.get_scale"):
        (loss * 65536.0).backward()


def test_without_a_backward_pass_nothing_happens_and_nothing_is_kept() -> None:
    optimizer = KFAC(model := net(), **EVERY)
    x, y = batch(0)
    with torch.no_grad():
        assert not optimizer.before_backward(F.cross_entropy(model(x), y)).requires_grad
    loss = optimizer.before_backward(F.cross_entropy(outputs := model(x), y), outputs)
    assert loss.requires_grad and not optimizer.curvature_matrices()
    optimizer.zero_grad()


# --- gradients that are cleared between the passes, steps that are not taken ------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_may_be_cleared_between_forward_and_backward(kind: str) -> None:
    found = []
    for between in (False, True):
        optimizer = KINDS[kind](model := net())
        for step in range(5):
            if step == 2:  # a loss that is not used: neither is what was seen on the way to it
                model(batch(77)[0])
            if not between:
                optimizer.zero_grad()
            x, y = batch(step)
            outputs = model(x)
            loss = F.cross_entropy(outputs, y)
            if between:
                optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                optimizer.backward(loss, outputs)
                optimizer.step()
        found.append(weights(model))
    assert equal(*found)


@pytest.mark.parametrize("clear", ["model", "model-zeros", "optimizer"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ema"])
def test_a_step_that_a_scaler_skipped_leaves_nothing(kind: str, clear: str) -> None:
    found = []
    for overflows in (False, True):
        optimizer = KINDS[kind](model := net())
        for step in range(4):
            if overflows and step == 2:
                x, y = batch(99)
                outputs = model(x)
                optimizer.backward(F.cross_entropy(outputs, y) * float("inf"), outputs)
                if clear == "optimizer":
                    optimizer.zero_grad()
                else:
                    model.zero_grad(set_to_none=clear == "model")
            x, y = batch(step)
            outputs = model(x)
            optimizer.backward(F.cross_entropy(outputs, y), outputs)
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.rejected == 0
        found.append(weights(model))
    assert equal(*found)


# --- what models return, and how they compute -------------------------------------------------------------------------


def learned(how: str, autocast: bool = False, announce: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Returning(how, autocast)
    optimizer = FishLeg(model, lr=0.0, aux_every=1, aux_lr=1e-2, likelihood=Categorical())
    for step in range(3):
        x, labels = tokens(step)
        model.autocast = False  # the gradient is the same; the auxiliary passes are what is compared
        result = model(x, labels)
        loss, logits = result if how == "tuple" else (result["loss"], result["logits"])
        optimizer.backward(loss, logits)
        model.autocast = autocast
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.inverse_matrices()


def test_fishleg_finds_the_outputs_among_what_a_model_returns() -> None:
    first, second = learned("dict"), learned("tuple")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any((matrix - torch.diag(matrix.diagonal())).abs().max() > 1e-4 for matrix in first.values())


def test_auxiliary_passes_are_in_full_precision_where_a_model_turns_autocast_on_itself() -> None:
    plain, inside = learned("dict"), learned("dict", autocast=True)
    assert all(torch.equal(plain[name], inside[name]) for name in plain)


def test_parts_of_a_sum_weigh_by_what_they_count() -> None:
    """Micro-batches' losses are sums over tokens, divided by the number of tokens in all of them."""
    torch.manual_seed(0)
    model = Returning()
    model.table.requires_grad_(False)
    parts = [tokens(0), tokens(1)]
    parts[1][1][:3] = -100
    whole = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    def shifted(labels: Tensor) -> Tensor:
        return F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()

    count = int((shifted(whole[1]) != -100).sum())
    optimizer = ExactNaturalGradient(model, fisher="exact", lr=0.0, likelihood=Categorical())
    for x, labels in parts:
        logits = model(x)["logits"]
        loss = F.cross_entropy(logits.flatten(0, 1), shifted(labels), reduction="sum") / count
        optimizer.before_backward(loss, logits, scale=8.0).mul(8.0).backward()
    optimizer.step()
    found = optimizer.curvature_matrices()
    for layer in (model.middle, model.head):
        right = dense.gauss_newton(
            lambda x: model(x)["logits"], lambda o, y: F.cross_entropy(o.flatten(0, 1), shifted(y)), *whole,
            list(layer.parameters()),
        )  # fmt: skip
        order = dense.as_matrix_order(layer)
        name = next(name for name, module in model.named_modules() if module is layer)
        assert torch.allclose(found[name], right[order][:, order], rtol=1e-8, atol=1e-12)


# --- layers of other packages, and what they put in an optimizer's place ----------------------------------------------


class Turned(nn.Module):
    """``y = x W + b``, by a function that no adapter knows."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d_in, d_out) / d_in**0.5), nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


adapts(f"{Turned.__module__}.Turned")(TransposedLinearLayer)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("auto", "ema")] + [EKFAC, "deflation", "twolevel"], ids=str
)
def test_a_layer_with_its_weight_turned_round_trains_as_the_other(kind: Any) -> None:
    more = {"deflation": partial(Deflation, **EVERY), "twolevel": partial(TwoLevelKFAC, **EVERY)}
    make = more.get(kind) or (partial(kind, **EVERY) if kind is EKFAC else KINDS[kind])
    found = []
    for turned in (False, True):
        torch.manual_seed(0)
        layer: nn.Module = nn.Linear(5, 3)
        last = nn.Linear(3, 4)
        if turned:
            weight, bias = layer.weight.detach(), layer.bias.detach()
            layer = Turned(5, 3)
            layer.weight.data, layer.bias.data = weight.mT.contiguous(), bias.clone()
        optimizer = make(model := nn.Sequential(layer, nn.Tanh(), last))
        for step in range(4):
            draw = torch.Generator().manual_seed(step)
            x, y = torch.randn(6, 2, 5, generator=draw), torch.randint(0, 4, (6, 2), generator=draw)
            outputs = model(x)
            optimizer.backward(F.cross_entropy(outputs.flatten(0, 1), y.flatten()), outputs)
            optimizer.step()
            optimizer.zero_grad()
        matrix = layer.weight.detach().mT if turned else layer.weight.detach()
        found.append([matrix, layer.bias.detach(), *weights(last)])
    tolerance = 1e-8 if kind != "adahessian" else 1.0  # whose probes are drawn in the weight's own order
    assert all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(*found, strict=True))


def test_a_layer_is_known_by_its_full_name_and_by_those_it_derives_from() -> None:
    class Derived(Turned):
        pass

    assert isinstance(adapt("x", Turned(3, 2)), TransposedLinearLayer)
    assert isinstance(adapt("x", Derived(3, 2)), TransposedLinearLayer)
    assert type(adapt("x", nn.Linear(3, 2))) is LinearLayer


class StandIn:
    """As Lightning's: of a class made from this one and the optimizer's, without the optimizer's attributes."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type("StandIn" + type(optimizer).__name__, (StandIn, type(optimizer)), {})

    @property
    def optimizer(self) -> Any:
        return self._optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


@pytest.mark.parametrize("kind", ["kfac", "adafisher", "adahessian", "fishleg", "ema"])
def test_what_stands_in_for_an_optimizer_hands_on(kind: str) -> None:
    found = []
    for through in (False, True):
        optimizer: Any = KINDS[kind](model := net())
        used = StandIn(optimizer) if through else optimizer
        assert isinstance(used, type(optimizer))
        used.update_every = 3
        assert optimizer.update_every == 3
        for step in range(5):
            x, y = batch(step)
            outputs = model(x)
            used.backward(F.cross_entropy(outputs, y) * 16.0, outputs, scale=16.0)
            for p in model.parameters():
                p.grad /= 16.0
            used.step()
            used.zero_grad()
        if kind == "ema":
            used.eval()
        found.append(weights(model))
    assert equal(*found)


def test_adafisherw_takes_the_loss_of_another_loop() -> None:
    """Its curvature needs no outputs; told of them, padding does not count as examples."""
    found = []
    for told in (True, False):
        torch.manual_seed(0)
        optimizer = AdaFisherW(model := Returning(), update_every=1, normalize="none")
        x, labels = tokens(0)
        labels[0] = -100
        result = model(x, labels)
        if told:
            optimizer.before_backward(result["loss"], result["logits"]).backward()
        else:
            optimizer.backward(result["loss"], result["logits"])
        optimizer.step()
        found.append(weights(model))
    assert equal(*found)
