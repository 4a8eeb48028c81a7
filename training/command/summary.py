"""``debug=summary`` and ``python -m models``: a model layer by layer, and a forecast of what training it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models import GAN
from models.summary import summarize as layers_of
from optimizers.forecast import Forecast, forecast
from training.command.words import say
from training.errors import UserError
from training.loop.distributed import World
from training.loop.heap import keep_freed
from training.names import TARGET
from training.settings.schema import build_optimizers
from training.show.layers import forecast_text, layer_table, totals
from training.tasks.task import Task

if TYPE_CHECKING:
    from data import DataModule

#: What a forecast does not see, in a line.
UNSEEN = (
    "State is exact; seconds are a forecast for one process of this machine, without what numbers decide (iterations, "
    "repairs) and without updates that come early."
)


def summarize(
    config: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, data: DataModule, task: Task, world: World
) -> dict[str, Any]:
    """Print the layers of a configured model and what training it is forecast to hold and take; nothing is trained.

    Args:
        config: a checked configuration.
        model: as it would be trained, on its device.
        optimizer: of it; its hooks are removed.
        data: gives the first batch of training.
        task: gives the loss.
        world: this process must be the only one.

    Returns:
        A summary.

    Raises:
        UserError: the forecast is not for such a command.
    """
    if world.world_size > 1:
        raise UserError(f"summary must be false with {world.world_size} processes: start one, without torchrun")
    if callable(close := getattr(optimizer, "close", None)):
        close()
    inputs, targets = next(iter(data.train.epoch(0)))
    describe(config, model, inputs.to(world.device), targets.to(world.device), task)
    return {"status": "summarized"}


def describe(
    config: Mapping[str, Any], model: nn.Module, inputs: Tensor, targets: Tensor, task: Task, asked: bool = True
) -> Forecast | None:
    """Print a model's layers, and the forecast for its optimizer.

    Args:
        config: a checked configuration.
        model: to be trained.
        inputs: a batch.
        targets: theirs.
        task: gives the loss.
        asked: whether the optimizer is of interest; else the layers alone are printed.

    Returns:
        The forecast; None without an optimizer, and for a model of two players.

    Raises:
        UserError: the model or the optimizer does what cannot be done without numbers.
    """
    if isinstance(model, GAN):
        _players(model, inputs)
        return None
    try:
        layers = layers_of(model, inputs)
    except RuntimeError as error:
        name = type(model).__name__
        raise UserError(f"no summary of {name}, whose forward pass looks at numbers ({_said(error)})") from error
    if not asked:
        say(f"{layer_table(layers)}\n\n{totals(layers)}")
        return None
    make: Callable[[nn.Module], Optimizer] = partial(
        build_optimizers, config, likelihood=task.likelihood, seed=config["seed"]
    )
    name = name_of_optimizer(config)
    keep_freed()  # as in training
    try:
        found = forecast(model, make, inputs, targets, task.loss)
    except RuntimeError as error:
        say(f"{layer_table(layers)}\n\n{totals(layers)}\n")
        raise UserError(f"no forecast for {name}, which looks at numbers in its step ({_said(error)})") from error
    found.notes.append(UNSEEN)
    text = forecast_text(found, name, len(inputs))
    say(f"{layer_table(layers, found.coverage)}\n\n{totals(layers, found.coverage)}\n\n{text}")
    return found


def _players(model: GAN, inputs: Tensor) -> None:
    """Print the layers of both players, which have no step of one loss to be forecast."""
    latents = torch.zeros(len(inputs), model.latent, device=inputs.device)
    for name, player, given in (("generator", model.generator, latents), ("critic", model.critic, inputs)):
        layers = layers_of(player, given)
        say(f"{name}\n{layer_table(layers)}\n\n{totals(layers)}\n")
    say("Two players take turns, a loss each: there is no forecast of their steps.")


def name_of_optimizer(config: Mapping[str, Any]) -> str:
    """The class of the configured optimizer; of a package's, the one that is asked for."""
    node = config["optimizer"]
    return str(node.get("name") or node[TARGET].rpartition(".")[2])


def _said(error: Exception) -> str:
    """The first line of an exception, and its kind."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
