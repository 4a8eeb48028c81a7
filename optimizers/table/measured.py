"""What the table says of each optimizer, asked of it or tried out on small nets."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import CurvatureOptimizer, build_optimizer
from ..forecast import total
from ..likelihoods import Categorical
from ..packaged import Package
from .catalogue import Entry, Target, present


@dataclass(frozen=True)
class Row:
    """A line of the table; an entry that does not apply is empty.

    Attributes:
        name: of the file in configs/optimizer.
        kind: the class.
        idea: what the step is made of.
        paper: where it was published.
        needs: what it takes beyond gradients: the whole module, outputs, a graph, an auxiliary pass.
        state: bytes of optimizer state a parameter.
        layers: those with curvature; "any" where layers do not matter.
        numbers: the formats it trains in.
        ranks: how processes that train together come to the same step.
    """

    name: str
    kind: str
    idea: str
    paper: str
    needs: str
    state: str
    layers: str
    numbers: str
    ranks: str


NUMBERS: dict[str, dict[str, Any]] = {
    "fp32": {}, "fp64": {"dtype": torch.float64}, "bf16": {"dtype": torch.bfloat16}, "autocast": {"autocast": True},
}  # fmt: skip

def rows(names: list[str] | None = None) -> list[Row]:
    """The table. Takes seconds: the optimizers are run.

    Args:
        names: of the rows; default all.
    """
    return [_row(name, entry, target) for name, entry, target in present(names)]


def _row(name: str, entry: Entry, target: Target) -> Row:
    kind = getattr(target, "__name__", "")
    if isinstance(target, Package):
        return Row(name, "", entry.idea, "", "", "", "any", "", "by gradients")
    ranks = "by gradients"
    optimizer, _ = _trained(target, entry.options, _small_net, _images)
    if isinstance(optimizer, CurvatureOptimizer):
        blocks = optimizer.blocks.values()
        ranks = "gathered" if any(getattr(block, "gathers", False) for block in blocks) else "averaged"
    numbers = [label for label, setting in NUMBERS.items() if _runs(target, entry.options, setting)]
    return Row(
        name, kind, entry.idea, entry.paper, ", ".join(needs(target)), measure(target, entry.options),
        _layers(target, entry.options), "all" if len(numbers) == len(NUMBERS) else " ".join(numbers), ranks,
    )  # fmt: skip


def needs(target: Target) -> list[str]:
    """What an optimizer takes beyond gradients, as its signature says.

    Args:
        target: a class, or a function that returns an optimizer.
    """
    parameters = inspect.signature(target).parameters
    asked = {
        "module": next(iter(parameters)) == "model",
        "outputs": "fisher" in parameters,
        "graph": getattr(target, "needs_graph", False),
        "auxiliary pass": any(name.startswith("aux_") for name in parameters),
    }
    return [need for need, is_needed in asked.items() if is_needed]


def measure(target: Target, options: dict[str, Any]) -> str:
    """Bytes of optimizer state a parameter: all tensors of ``state_dict``, after two steps on a net of linear layers.

    Args:
        target: a class, or a function that returns an optimizer.
        options: its hyper-parameters.
    """
    optimizer, model = _trained(target, options, _dense_net, _vectors)
    return f"{total(optimizer) / sum(p.numel() for p in model.parameters()):.1f}"


def _layers(target: Target, options: dict[str, Any]) -> str:
    """The kinds of layers that ``coverage`` says have curvature, of a net with one of each."""
    model = _every_layer()
    optimizer = build_optimizer(target, model, likelihood=Categorical(), **options)
    if not isinstance(optimizer, CurvatureOptimizer) or not optimizer.blocks:
        return "any"
    bare = {row[0].split(".")[0] for row in optimizer.coverage().rows if row[1].startswith("fallback")}
    optimizer.close()
    kinds = {name: type(module).__name__ for name, module in model.named_children()}
    found = [kind for name, kind in kinds.items() if name not in bare]
    return "all" if len(found) == len(kinds) else ", ".join(found)


def _every_layer() -> nn.Module:
    layers = (
        nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.BatchNorm1d(2),
        nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.RMSNorm(2), nn.Embedding(2, 2),
    )  # fmt: skip
    return nn.Sequential(*layers)


def _dense_net() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 400), nn.Tanh(), nn.Linear(400, 200), nn.Tanh(), nn.Linear(200, 100))


def _vectors(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.rand(32, 784, generator=generator), torch.randint(100, (32,), generator=generator)


def _small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, 4))


def _images(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.rand(8, 1, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)


def _trained(
    target: Target,
    options: dict[str, Any],
    net: Callable[[], nn.Module],
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
) -> tuple[torch.optim.Optimizer, nn.Module]:
    """An optimizer after two steps on a net, and the net."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = net().to(dtype)
    optimizer = build_optimizer(target, model, likelihood=Categorical(), **options)
    for _ in range(2):
        inputs, labels = draw(generator)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = model(inputs.to(dtype))
        loss = F.cross_entropy(outputs.float() if autocast else outputs, labels)
        if isinstance(optimizer, CurvatureOptimizer):
            optimizer.backward(loss, outputs)
        else:
            loss.backward()
        optimizer.step()
    if isinstance(optimizer, CurvatureOptimizer):
        optimizer.close()
    return optimizer, model


def _runs(target: Target, options: dict[str, Any], setting: dict[str, Any]) -> bool:
    """Whether two steps in a number format leave finite weights."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, model = _trained(target, options, _small_net, _images, **setting)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return False
    return all(bool(p.isfinite().all()) for p in model.parameters())

