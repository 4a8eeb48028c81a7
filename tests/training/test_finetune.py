"""Fine-tuning: what is frozen stays, the others learn at rates of their own, and patterns that miss are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optimizers import KFAC, AdaFisher, AdaHessian, Categorical
from training.runs.finetune import parameter_groups


def net() -> nn.Sequential:
    body = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU())
    return nn.Sequential(body, nn.Linear(5, 3))


def names(model: nn.Module, group: dict[str, Any]) -> list[str]:
    found = {parameter: name for name, parameter in model.named_parameters()}
    return [found[parameter] for parameter in group["params"]]


def test_without_options_there_is_one_group_of_everything() -> None:
    model = net()
    (group,) = parameter_groups(model, None, {}, 0.1)
    assert group["lr"] == 0.1 and len(group["params"]) == 6
    assert all(p.requires_grad for p in model.parameters())


def test_without_a_rate_there_is_none_to_multiply() -> None:
    (group,) = parameter_groups(net(), "bias", {}, None)
    assert set(group) == {"params"} and len(group["params"]) == 3
    with pytest.raises(ValueError, match=r"^lr_mult needs a learning rate to multiply: give the optimizer's lr$"):
        parameter_groups(net(), None, {"bias": 2}, None)


def test_frozen_parameters_are_in_no_group() -> None:
    model = net()
    (group,) = parameter_groups(model, r"^0\.", {}, 0.1)
    assert names(model, group) == ["1.weight", "1.bias"]
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2


def test_the_first_pattern_that_is_found_gives_the_rate() -> None:
    model = net()
    groups = parameter_groups(model, r"0\.0\.weight", {r"^1\.": 10, "bias": 0.5}, 0.1)
    assert [names(model, group) for group in groups] == [
        ["0.2.weight"],
        ["1.weight", "1.bias"],
        ["0.0.bias", "0.2.bias"],
    ]
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 1.0, 0.05])


def test_a_pattern_may_take_everything() -> None:
    model = net()
    (group,) = parameter_groups(model, None, {".": 2}, 0.1)
    assert len(group["params"]) == 6 and group["lr"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "freeze, lr_mult, sentence",
    [
        ("layer9", {}, "freeze 'layer9' is found in no name of a trained parameter; they begin with 0, 1"),
        (".", {}, "freeze '.' leaves nothing to train: choose a pattern that spares some parameters"),
        (None, {"head": 10}, "lr_mult 'head' is found in no name of a trained parameter; they begin with 0, 1"),
        (r"^1\.", {r"^1\.": 10}, r"lr_mult '\^1\\\\\.' is found in no name of a trained parameter; they begin with 0"),
        (None, {"weight": 2, r"0\.weight": 3}, "lr_mult .* is found in no name of a trained parameter; .*"),
        (None, {"1": 0}, r"lr_mult of '1' must be above 0 \(freeze leaves parameters alone\), got 0"),
        (None, {"1": float("nan")}, "lr_mult of '1' must be above 0 .*, got nan"),
        ("(", {}, r"freeze '\(' is no regular expression \(.*\)"),
    ],
)
def test_patterns_that_make_no_sense_end_in_a_sentence(freeze: str | None, lr_mult: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        parameter_groups(net(), freeze, lr_mult, 0.1)


@pytest.mark.parametrize("kind", ["sgd", "adafisher", "kfac", "adahessian"])
def test_optimizers_leave_what_is_frozen_and_use_the_rates(kind: str) -> None:
    model = net()
    groups = parameter_groups(model, r"^0\.0", {r"^1\.": 10}, 0.01)
    makers = {
        "sgd": lambda: torch.optim.SGD(groups),
        "adafisher": lambda: AdaFisher(model, groups),
        "kfac": lambda: KFAC(model, groups, likelihood=Categorical()),
        "adahessian": lambda: AdaHessian(groups),
    }
    optimizer = makers[kind]()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.1])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs, classes = torch.randn(8, 4), torch.randint(3, (8,))
    outputs = model(inputs)
    loss = F.cross_entropy(outputs, classes)
    optimizer.backward(loss, outputs) if kind != "sgd" else loss.backward()
    optimizer.step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == ["0.2.weight", "0.2.bias", "1.weight", "1.bias"]
