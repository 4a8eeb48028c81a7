"""``debug=verify``: is what the configured optimizer records of this model, on this data, what it should be?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from optimizers.testing import check_curvature
from optimizers.testing.loop import Maker
from training.command.words import say
from training.errors import UserError
from training.loop.distributed import World
from training.names import TARGET
from training.settings.schema import locate
from training.tasks.task import Task

if TYPE_CHECKING:
    from data import DataModule


def verify(
    config: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, data: DataModule, task: Task, world: World
) -> dict[str, Any]:
    """Print a table of the model's layers (see ``check_curvature``); nothing is trained.

    Args:
        config: a checked configuration; ``config["verify"]`` is how many training examples are looked at.
        model: as it would be trained, on its device.
        optimizer: of it; its hooks are removed.
        data: gives the first batch of training.
        task: gives the loss.
        world: this process must be the only one.

    Returns:
        A summary.

    Raises:
        UserError: something deviates, or the check is not for such a model.
    """
    if not task.whole:
        raise UserError(f"verify must be null for {task.name}, which has two losses: check_curvature takes each alone")
    if world.world_size > 1:
        raise UserError(f"verify must be null with {world.world_size} processes: start one, without torchrun")
    if callable(close := getattr(optimizer, "close", None)):
        close()
    node = config["optimizer"]
    options = {name: value for name, value in node.items() if name != TARGET}
    maker = Maker(locate(node[TARGET], "optimizer"), likelihood=task.likelihood, **options)
    inputs, targets = next(iter(data.train.epoch(0)))
    try:
        report = check_curvature(
            model, maker, inputs.to(world.device), task.loss, targets=targets.to(world.device),
            examples=config["verify"], dtype=None if world.device.type == "mps" else torch.float64,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"verify: {error}") from error
    say(str(report))
    if not report.ok:
        names = ", ".join(layer.module or "(root)" for layer in report.wrong)
        raise UserError(f"the curvature of {len(report.wrong)} of {len(report.layers)} layers is not right: {names}")
    return {"status": "verified"}
