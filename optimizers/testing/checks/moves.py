"""What moves: every trainable parameter with a gradient, downhill, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from unittest import SkipTest

import torch
from torch import nn

from ..loop import Maker, differentiate, named, same_state, train_step, weights
from ..problems import PROBLEMS, Problem, conv_net, images, mlp
from .common import demand, reached_by, seeded


@seeded
def check_every_trainable_tensor_moves(make: Maker, problems: Mapping[str, Problem] | None = None) -> None:
    """Every parameter with a gradient moves within three steps, all stay finite, and no frozen one moves.

    Args:
        make: the optimizer.
        problems: models and data to try; None: all of this package's.
    """
    for problem, (factory, data) in (problems or PROBLEMS).items():
        model, batch = factory(), data()
        optimizer = make(model)
        before, reached = named(model), reached_by(model, batch)
        for _ in range(3):  # an even number of equal steps may lead back
            train_step(optimizer, model, batch)
        for name, p in model.named_parameters():
            moved = not torch.equal(p, before[name])
            demand(moved or name not in reached, f"{name} of {problem!r} has a gradient and does not move.")
            demand(p.requires_grad or not moved, f"{name} of {problem!r} is frozen and moves.")
            demand(bool(p.isfinite().all()), f"{name} of {problem!r} is not finite after three steps.")


@seeded
def check_the_loss_goes_down(make: Maker) -> None:
    """Forty steps on one batch lower its loss."""
    model, batch = conv_net(), images(16)
    optimizer = make(model)
    losses = [train_step(optimizer, model, batch) for _ in range(40)]
    demand(losses[-1] < losses[0], f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g} in forty steps.")


@seeded
def check_no_gradient_no_move(make: Maker) -> None:
    """A step without gradients changes and raises nothing; a layer that the loss does not reach stays put."""
    model, batch = mlp(), images()
    optimizer = make(model)
    before = weights(model)
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may say so
        optimizer.step()
    demand(torch.equal(weights(model), before), "a step without gradients moves the parameters.")

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    model.add_module("aside", nn.Linear(3, 3))
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    optimizer = make(model)
    aside = named(model[2])
    for _ in range(3):
        train_step(optimizer, model, batch)
    demand(same_state(named(model[2]), aside), "parameters that never had a gradient move.")


@seeded
def check_lr_zero_no_move(make: Maker) -> None:
    """With a learning rate of zero in every group nothing moves, to the bit."""
    model, batch = conv_net(), images()
    optimizer = make(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = weights(model)
    for _ in range(3):
        train_step(optimizer, model, batch)
    demand(torch.equal(weights(model), before), "parameters move at lr=0.")


@seeded
def check_weight_decay_pulls_to_zero(make: Maker) -> None:
    """Where the loss is flat, weight decay makes weights smaller, and without it they stay."""
    model, batch = mlp(), images()
    if "weight_decay" not in make(model).defaults:
        raise SkipTest("no weight_decay")
    moved = {}
    for decay in (0.0, 0.1):
        torch.manual_seed(0)
        model = mlp()
        start = weights(model)
        optimizer = make(model, weight_decay=decay)
        for _ in range(3):
            optimizer.zero_grad()
            outputs = model(batch[0])
            differentiate(optimizer, outputs.sum() * 0, outputs)
            optimizer.step()
        moved[decay] = weights(model) - start
    demand(not bool(moved[0.0].any()), "zero gradients move parameters without weight decay.")
    inwards = -float(moved[0.1] @ start) / float(start.norm())
    demand(inwards > 0, f"weight decay moves weights outwards, by {-inwards:.2g}.")
