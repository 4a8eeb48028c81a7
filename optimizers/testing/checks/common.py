"""What the checks are made of: a fixed random state, demands with a sentence, and two runs compared."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ..loop import Batch, Maker, train_step, weights

Check = Callable[[Callable[..., Optimizer]], None]


def seeded(function: Callable[..., None]) -> Callable[..., None]:
    """Make a check of a function: it starts from one random state, leaves the caller's alone, is given a ``Maker``."""

    @functools.wraps(function)
    def check(make_optimizer: Callable[..., Optimizer], *args: Any, **kwargs: Any) -> None:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            function(Maker(make_optimizer), *args, **kwargs)

    return check


def demand(condition: bool, sentence: str) -> None:
    """Raise AssertionError unless the condition holds (as ``assert``, which ``python -O`` leaves out)."""
    if not condition:
        raise AssertionError(sentence)


def demand_close(found: Tensor, expected: Tensor, start: Tensor, tolerance: float, sentence: str) -> None:
    """Demand that two runs ended at the same weights, in units of how far they went."""
    travelled = float((expected - start).norm())
    apart = float((found - expected).norm())
    demand(apart <= tolerance * travelled, f"{sentence}: {apart:.2g} apart after {travelled:.2g} of way.")


def run(make: Maker, problem: Callable[[], nn.Module], batch: Batch, steps: int, **overrides: Any) -> Tensor:
    """Weights after some steps of a model that starts from the same random state each time."""
    torch.manual_seed(0)
    model = problem()
    optimizer = make(model, **overrides)
    for _ in range(steps):
        train_step(optimizer, model, batch)
    return weights(model)


def reached_by(model: nn.Module, batch: Batch) -> set[str]:
    """Names of the parameters whose gradient is more than rounding: a bias before a batch norm has none."""
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(batch[0]), batch[1]).backward()
    sizes = {name: float(p.grad.abs().max()) for name, p in twin.named_parameters() if p.grad is not None}
    return {name for name, size in sizes.items() if size > 1e-5 * max(sizes.values())}
