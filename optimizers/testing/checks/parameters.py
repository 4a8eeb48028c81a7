"""Parameter groups, frozen parameters, and parameters without a layer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..loop import Maker, named, train_step
from ..problems import frozen_net, images, mlp
from .common import demand, reached_by, seeded


@seeded
def check_groups_have_their_own_learning_rate(make: Maker) -> None:
    """A group with ``lr=0`` stays, another one moves."""
    model, batch = mlp(), images()
    groups: list[dict[str, Any]] = [
        {"params": list(model[1].parameters())},
        {"params": list(model[3].parameters()), "lr": 0.0, "weight_decay": 0.0},
    ]
    optimizer = make(model, groups)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        train_step(optimizer, model, batch)
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    demand(moved == [True, True, False, False], f"with lr=0 for the second layer alone, these moved: {moved}.")


@seeded
def check_filtered_parameters(make: Maker) -> None:
    """Given some of a model's parameters, as a list or a generator, it trains these and no other."""
    for listed in (True, False):
        model, batch = frozen_net(), images()
        chosen = (p for p in model.parameters() if p.requires_grad)
        optimizer = make(model, list(chosen) if listed else chosen)
        for p in model.parameters():
            p.requires_grad_(True)  # what it was not given is not its own even now
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        before, reached = named(model), reached_by(model, batch)
        for _ in range(3):
            train_step(optimizer, model, batch)
        for name, p in model.named_parameters():
            moved = not torch.equal(p, before[name])
            demand(id(p) in trained or not moved, f"{name} moves, which the optimizer was not given.")
            demand(moved or id(p) not in trained or name not in reached, f"{name} does not move.")


@seeded
def check_thawed_later(make: Maker) -> None:
    """Parameters that were frozen when the optimizer was built move once they require gradients."""
    model, batch = frozen_net(), images()
    optimizer = make(model)
    for _ in range(2):
        train_step(optimizer, model, batch)
    for p in model.parameters():
        p.requires_grad_(True)
    before, reached = named(model), reached_by(model, batch)
    for _ in range(3):
        train_step(optimizer, model, batch)
    still = [name for name, p in model.named_parameters() if name in reached and torch.equal(p, before[name])]
    demand(not still, f"thawed, and does not move: {', '.join(still)}.")


@seeded
def check_add_param_group_later(make: Maker) -> None:
    """``add_param_group`` in the middle of training trains what it adds, at its own learning rate."""
    model, batch = mlp(), images()
    for p in model[1].parameters():
        p.requires_grad_(False)
    optimizer = make(model, list(model[3].parameters()))
    for _ in range(2):
        train_step(optimizer, model, batch)
    for p in model[1].parameters():
        p.requires_grad_(True)
    optimizer.add_param_group({"params": [model[1].weight]})
    optimizer.add_param_group({"params": [model[1].bias], "lr": 0.0, "weight_decay": 0.0})
    before = named(model)
    for _ in range(3):
        train_step(optimizer, model, batch)
    moved = {name: not torch.equal(p, before[name]) for name, p in model.named_parameters()}
    expected = {"1.weight": True, "1.bias": False, "3.weight": True, "3.bias": True}
    demand(moved == expected, f"the weight was added, and the bias at lr=0: {moved}.")


@seeded
def check_model_without_a_trainable_layer(make: Maker) -> None:
    """Bare parameters alone, or all that is left beside a frozen layer, are trained, and without a warning."""

    class Shifted(nn.Module):
        def __init__(self, frozen: bool) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(2))
            self.layer = nn.Linear(2, 2).requires_grad_(False) if frozen else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + self.shift)

    for frozen in (False, True):
        model = Shifted(frozen)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = make(model)
            before = model.shift.detach().clone()
            for _ in range(3):
                train_step(optimizer, model, (torch.randn(4, 2), torch.tensor([0, 1, 0, 1])))
        moved = bool((model.shift != before).all()) and bool(model.shift.isfinite().all())
        demand(moved, f"a bare parameter {'beside a frozen layer ' if frozen else ''}does not move.")
