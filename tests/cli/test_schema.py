"""The signature is the schema: what fits a type hint, and how a misfit is put in words."""

from __future__ import annotations

import re
from typing import Any, Literal

import pytest
import torch

from training.errors import UserError
from training.settings import schema


def example(
    count: int,
    rate: float = 0.1,
    name: str | None = None,
    flag: bool = False,
    mode: Literal["fast", "slow", 3] = "fast",
    widths: list[int] | None = None,
    betas: tuple[float, float] = (0.9, 0.99),
    anything: Any = None,
) -> dict[str, Any]:
    if rate <= 0:
        raise ValueError(f"rate must be above 0, got {rate}")
    if count > 100:
        raise ValueError("the count is absurd")
    return locals()


def model(width: int = 3, *, num_classes: int, pretrained: bool = False) -> None: ...


TARGET = f"{__name__}.example"


@pytest.mark.parametrize(
    ("option", "value", "becomes"),
    [
        ("rate", 1, 1.0), ("rate", 1e-3, 1e-3), ("name", None, None), ("name", 7, "7"),
        ("mode", 3, 3), ("widths", [1, 2], [1, 2]), ("widths", [], []),
        ("betas", [0, 0.5], (0.0, 0.5)), ("anything", {"a": 1}, {"a": 1}),
    ],
)  # fmt: skip
def test_values_that_fit(option: str, value: Any, becomes: Any) -> None:
    checked = schema.check({"_target_": TARGET, "count": 1, option: value}, "group")
    assert checked[option] == becomes and type(checked[option]) is type(becomes)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("count", 1.0, "must be a whole number, got 1.0"),
        ("count", True, "must be a whole number, got True"),
        ("rate", "1e-3x", "must be a number, got '1e-3x'"),
        ("rate", None, "must be a number, got null"),
        ("rate", False, "must be a number, got False"),
        ("name", [1], "must be text or null, got [1]"),
        ("flag", 1, "must be true or false, got 1"),
        ("flag", "yes", "must be true or false, got 'yes'"),
        ("mode", "fats", "must be one of fast, slow, 3, got 'fats' (did you mean 'fast'?)"),
        ("mode", 3.0, "must be one of fast, slow, 3, got 3.0"),
        ("widths", [1, 2.5], "must be a list (each a whole number) or null, got [1, 2.5]"),
        ("widths", 3, "must be a list (each a whole number) or null, got 3"),
        ("betas", [0.9], "must be a list of 2 values (each a number), got [0.9]"),
    ],
)
def test_values_that_do_not(option: str, value: Any, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"group.{option} {says}")):
        schema.check({"_target_": TARGET, "count": 1, option: value}, "group")


def test_keys() -> None:
    with pytest.raises(UserError, match=r"group.coutn: example has no such option \(did you mean 'count'\?\)"):
        schema.check({"_target_": TARGET, "coutn": 1}, "group")
    with pytest.raises(UserError, match=r"group.zzz: example has no such option; it takes count, rate, "):
        schema.check({"_target_": TARGET, "count": 1, "zzz": 1}, "group")
    with pytest.raises(UserError, match=r"group.count is missing: example needs it"):
        schema.check({"_target_": TARGET}, "group")


def test_injected_parameters_belong_to_the_program() -> None:
    assert list(schema.parameters(model, "model")) == ["width", "pretrained"]
    for group, target, name in (
        ("model", f"{__name__}.model", "num_classes"),
        ("optimizer", "torch.optim.SGD", "params"),
        ("optimizer", "optimizers.AdaFisher", "model"),
        ("optimizer", "optimizers.AdaHessian", "seed"),
        ("dataset", "data.digits", "rank"),
        ("scheduler", "training.schedules.cosine", "ticks"),
    ):
        with pytest.raises(UserError, match=f"{group}.{name}: .* has no such option"):
            schema.check({"_target_": target, name: 1}, group, group)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Muon"])
def test_any_optimizer_of_torch_has_a_schema(name: str) -> None:
    if not hasattr(torch.optim, name):
        pytest.skip(f"this version of torch has no {name}")
    assert schema.check({"_target_": f"torch.optim.{name}", "lr": 1}, "optimizer", "optimizer")["lr"] == 1.0
    with pytest.raises(UserError, match=r"optimizer.lr must be a number, got 'x'"):
        schema.check({"_target_": f"torch.optim.{name}", "lr": "x"}, "optimizer", "optimizer")


@pytest.mark.parametrize("target", ["nowhere.Thing", "torch.optim.Sgd", "torch.optim", None, "SGD", 3])
def test_targets(target: Any) -> None:
    with pytest.raises(UserError, match=r"group._target_"):
        schema.check({"_target_": target}, "group")


def test_refusals_of_the_callable_name_the_group() -> None:
    with pytest.raises(UserError, match=r"^group.rate must be above 0, got 0$"):
        schema.build({"_target_": TARGET, "count": 1, "rate": 0}, "group")
    with pytest.raises(UserError, match=r"^group: the count is absurd$"):
        schema.build({"_target_": TARGET, "count": 101}, "group")
    assert schema.build({"_target_": TARGET, "count": 1}, "group", name="injected")["name"] == "injected"
