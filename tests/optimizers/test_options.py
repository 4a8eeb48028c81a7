"""Options that are declared once: signatures, type hints, docstrings and refusals have those of all bases."""

from __future__ import annotations

import inspect
import re
import typing
from typing import Any, ClassVar, Literal

import pytest
from torch import nn

import optimizers
from optimizers import EKFAC, KFAC, KPSVD, ExactNaturalGradient, Gaussian, TwoLevelKFAC
from optimizers.base import Params, with_fixed
from optimizers.natural_gradient import NaturalGradient

METHODS = [
    found
    for name in optimizers.__all__
    if isinstance(found := getattr(optimizers, name), type) and issubclass(found, NaturalGradient)
]


class Plain(EKFAC):
    """EKFAC without a choice of the basis: a fixed option below a fixed one."""

    fixed: ClassVar[dict[str, Any]] = {"basis": "eigh"}

    def __init__(self, model: nn.Module, params: Params | None = None, **shared: Any) -> None:
        super().__init__(model, params, **with_fixed(Plain, self, shared))


class Slower(KPSVD):
    """KPSVD with an option of its own.

    Args:
        pace: how fast.
        rank: less than usual.
    """

    fixed: ClassVar[dict[str, Any]] = {"sharing": "expand"}

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        pace: Literal["slow", "slower"] = "slow",
        rank: int | None = 4,
        **shared: Any,
    ) -> None:
        self.pace = pace
        super().__init__(model, params, rank=rank, **with_fixed(Slower, self, shared))


@pytest.mark.parametrize("method", [*METHODS, Plain, Slower], ids=lambda method: method.__name__)
def test_every_option_is_in_the_signature_with_its_hint_and_its_line(method: type[NaturalGradient]) -> None:
    parameters = inspect.signature(method).parameters
    names = list(parameters)
    assert names[:2] == ["model", "params"] and names[-1] == "flags"
    assert set(typing.get_type_hints(method.__init__)) == {*names, "return"}
    described = re.findall(r"^    (\w+): ", inspect.getdoc(method) or "", flags=re.MULTILINE)
    assert [name for name in described if name != "ValueError"] == names
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in list(parameters.values())[2:-1])
    fixed = {name for base in method.__mro__ for name in base.__dict__.get("fixed", {})}
    assert {"lr", "damping", "kl_clip", "likelihood", "decoupled_decay"} - fixed < set(names) and not fixed & set(names)


@pytest.mark.parametrize("method", [*METHODS, Plain, Slower], ids=lambda method: method.__name__)
def test_defaults_of_the_signature_are_those_that_are_taken(method: type[NaturalGradient]) -> None:
    optimizer = method(nn.Linear(2, 1), likelihood=Gaussian())
    for name, parameter in inspect.signature(method).parameters.items():
        known = {**vars(optimizer.options), **optimizer.defaults, **vars(optimizer)}
        if name in known and name not in ("model", "params", "likelihood", "solver", "solve_dtype", "blocks"):
            assert known[name] == parameter.default, name
    for base in method.__mro__:
        for name, value in base.__dict__.get("fixed", {}).items():
            known = {**vars(optimizer.options), **optimizer.defaults, **vars(optimizer)}
            assert (known[name] if name in known else getattr(optimizer, name)) == value


def test_what_differs_between_methods() -> None:
    def default(method: Any, name: str) -> Any:
        return inspect.signature(method).parameters[name].default

    assert [default(method, "refresh_every") for method in (KFAC, EKFAC)] == [10, 100]
    assert [default(method, "batch_fraction") for method in (KFAC, KPSVD, TwoLevelKFAC)] == [1.0, 0.25, 0.25]
    assert [default(method, "damping") for method in (KFAC, ExactNaturalGradient)] == [3e-3, 1e-2]
    assert default(Slower, "rank") == 4 and default(KPSVD, "rank") == 128
    assert "coarse" in inspect.signature(TwoLevelKFAC).parameters and "coarse" not in inspect.signature(KFAC).parameters
    assert typing.get_type_hints(Slower.__init__)["pace"] == Literal["slow", "slower"]


@pytest.mark.parametrize(
    ("method", "option"),
    [(KFAC, "momentun"), (EKFAC, "damping_mode"), (EKFAC, "pi"), (ExactNaturalGradient, "decay"), (KFAC, "rank"),
     (ExactNaturalGradient, "refresh_every"), (Slower, "sharing"), (Plain, "basis"), (Plain, "pi"),
     (TwoLevelKFAC, "options")],
)  # fmt: skip
def test_what_a_method_does_not_take_is_refused_in_its_name(method: Any, option: str) -> None:
    assert option not in inspect.signature(method).parameters
    with pytest.raises(TypeError, match=rf"{method.__name__}.__init__\(\) got an unexpected .* '{option}'"):
        method(nn.Linear(2, 1), likelihood=Gaussian(), **{option: 1})
