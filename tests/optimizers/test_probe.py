"""What finding out about a model costs: a few backward passes at first, none afterwards."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers import EKFAC, KFAC, KPSVD, AdaFisher, Categorical, ExactNaturalGradient, TwoLevelKFAC

METHODS = [AdaFisher, KFAC, EKFAC, KPSVD, TwoLevelKFAC, ExactNaturalGradient]
passes: list[int] = []


class Counted(torch.autograd.Function):
    """The identity, which counts the backward passes that come through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        passes.append(1)
        return g


class Net(nn.Module):
    """Its layers lie before what counts; rows may be folded, and outputs flattened."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.i, self.n, self.o = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "positions first":
            h = self.n(self.i(x.transpose(0, 1))).tanh().transpose(0, 1)
        elif self.layout == "folded":
            h = self.n(self.i(x.flatten(0, 1))).tanh().unflatten(0, x.shape[:2])
        else:
            h = self.n(self.i(x)).tanh()
        y = Counted.apply(self.o(h))
        return y.flatten(0, 1) if self.layout == "flattened" else y


def built(kind: type, model: nn.Module, fisher: str, **options: Any) -> Any:
    if kind is not AdaFisher:
        options |= {"fisher": fisher, "likelihood": Categorical()}
        options |= {} if kind is ExactNaturalGradient else {"early_updates": False}
    return kind(model, **options)


def counted(optimizer: Any, model: nn.Module) -> int:
    passes.clear()
    optimizer.zero_grad()
    outputs = model(torch.randn(4, 6, 4))
    optimizer.backward(F.cross_entropy(outputs.flatten(0, -2), torch.arange(24) % 3), outputs)
    optimizer.step()
    return len(passes)


@pytest.mark.parametrize("layout", ["batch first", "positions first", "folded", "flattened"])
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("kind", METHODS)
def test_the_probe_is_three_passes_at_most_and_once(kind: type, fisher: str, layout: str) -> None:
    model = Net(layout)
    optimizer = built(kind, model, fisher, update_every=2)
    own = 1 + (fisher == "sampled" and kind is not AdaFisher)  # the loss's, and that of the sampled targets
    counts = [counted(optimizer, model) for _ in range(5)]
    assert own < counts[0] <= own + 3
    assert counts[1:] == [1, own, 1, own]
    assert optimizer.coverage().fraction == 1.0


class Perceptron(nn.Module):
    """With a forward pass of its own: those of torch.nn are not compiled where a module has hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.mark.parametrize("inside", [False, True], ids=["whole", "inside"])
@pytest.mark.parametrize("kind", METHODS)
def test_compiled_models_train_without_being_compiled_anew_and_again(kind: type, inside: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = Perceptron()
    model: Any = torch.compile(plain, backend="eager")
    model = nn.Sequential(model) if inside else model
    optimizer = built(kind, model, "sampled", update_every=2)
    handler, logger = Records(), logging.getLogger("torch._dynamo")
    logger.addHandler(handler)
    try:
        graphs = []
        for _ in range(25):
            optimizer.zero_grad()
            outputs = model(torch.randn(6, 4))
            optimizer.backward(F.cross_entropy(outputs, torch.arange(6) % 3), outputs)
            optimizer.step()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    finally:
        logger.removeHandler(handler)
        torch._dynamo.reset()
    assert optimizer.coverage().fraction == 1.0
    assert not [m for m in handler.messages if "limit" in m]
    assert 0 < graphs[9] == graphs[-1]  # nothing is compiled after the first steps of either kind
