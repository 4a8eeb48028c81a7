"""Whether a model and an optimizer go with a task and with the loop, found out before a run begins."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from data import DataError
from data.base import told
from data.options import Kind
from models import GAN, require_facts
from optimizers.checks import are_sharded
from optimizers.wrapper import innermost
from training import tasks
from training.errors import UserError, lack_of_memory
from training.loop import rng
from training.tasks.players import Players
from training.tasks.task import Task

if TYPE_CHECKING:
    from data import DataModule

#: Facts that say how many classes an output is one of.
CLASSES = {"num_classes", "vocabulary"}


def check_smoothing(smoothing: float, kind: Kind) -> None:
    """Refuse to smooth labels that a data set does not have.

    Args:
        smoothing: of labels.
        kind: of the data set.

    Raises:
        ValueError: it has none.
    """
    if not CLASSES & {*kind.facts}:
        tasks.find(kind.task)._refuse_smoothing(smoothing)


def check_choice(factory: Callable[..., nn.Module], options: Collection[str], kind: Kind) -> None:
    """Refuse a model that is none for a data set, as far as both say so before there are data: before they are fetched.

    Args:
        factory: makes the model.
        options: names of the arguments that it will be given besides facts of the data.
        kind: of the data set.

    Raises:
        ValueError: the model needs a fact that the data set does not have.
        UserError: it is a model for another task.
    """
    task = tasks.find(kind.task)
    two = makes_players(factory)
    if two is not None:
        task.check_players(two)
    require_facts(factory, kind.facts, options)
    asked = inspect.signature(factory).parameters
    if two is not None and CLASSES & {*kind.facts} and not CLASSES & asked.keys():
        raise UserError(
            f"a {kind.task.replace('_', ' ')} needs an output a class, and {factory.__name__} does not ask how many "
            "there are: choose a classifier, or a data set of images to rebuild"
        )


def makes_players(factory: Callable[..., nn.Module]) -> bool | None:
    """Whether a callable makes a model of two players; None: it is nobody's here, and its model will tell."""
    if str(getattr(factory, "__module__", "")).removeprefix("curvlab.").partition(".")[0] != "models":
        return None
    return typing.get_type_hints(factory).get("return") is GAN


def fill_lazy_layers(model: nn.Module, data: DataModule) -> None:
    """Let lazy layers, which know of their inputs by a first example, make their weights, as they would in training.

    Args:
        model: on its device; nothing happens to one that has none.
        data: whose first example is taken.

    Raises:
        UserError: the model fails on it.
        DataError: the example cannot be read.
    """
    if not any(map(is_lazy, model.parameters())):
        return
    inputs, _ = next(iter(data.train.epoch(0)))
    training = model.training
    model.eval()
    with torch.no_grad(), _failing(inputs):
        model(inputs[:1])
    model.train(training)


@contextmanager
def _failing(inputs: Tensor) -> Iterator[None]:
    """Within it, whatever a model raises on a data set's example becomes a sentence."""
    try:
        yield
    except (UserError, DataError):
        raise
    except Exception as error:
        if lack_of_memory(error):
            raise
        raise UserError(
            f"the model fails on an example of this data set, {list(inputs.shape[1:])}, with {told(error)}: choose "
            "another model or another data set"
        ) from error


def check_outputs(model: nn.Module, data: DataModule, task: Task) -> None:
    """One example through the model, as in evaluation: tasks refuse models that are none of theirs.

    Args:
        model: on its device.
        data: whose first example is taken.
        task: what is to be learned.

    Raises:
        UserError: the model fails on it, or is none for the task.
        DataError: the example cannot be read, or its batch holds what is no number.
    """
    inputs, targets = next(iter(data.train.epoch(0)))
    here = next((tensor.device for tensor in model.parameters()), inputs.device)
    if inputs.device != here:
        raise UserError(
            f"the data set serves its batches on {inputs.device} and the model is on {here}: let its callable take "
            "device, or make it by data.wrap, which knows it"
        )
    if not bool(inputs.isfinite().all()):
        raise DataError("inputs of the data set hold nan or inf, which spoil all weights: leave such examples out")
    with rng.observed(model, inputs.device), _failing(inputs):
        task.check(model, inputs[:1], targets[:1])
    for loader in (data.val, data.test):
        if _shape_of(loader) != _shape_of(data.train):  # images of another size, say
            others, theirs = next(iter(loader.epoch(0)))
            with rng.observed(model, inputs.device), _failing(others):
                task.check(model, others[:1], theirs[:1])


def _shape_of(loader: object) -> tuple[int, ...]:
    """Of an example in its store; () where there is no telling."""
    return tuple(getattr(getattr(loader, "store", None), "shape", ()))


def check_optimizer(optimizer: Optimizer, task: Task, *, compiled: bool, clipped: bool) -> None:
    """Refuse an optimizer that does not go with the task, or with what the loop does around it.

    Args:
        optimizer: one, or those of two players.
        task: what is to be learned.
        compiled: whether the model's training pass is.
        clipped: whether gradients are.

    Raises:
        ValueError: it does not go with the loop.
        UserError: it does not go with the task.
    """
    if isinstance(optimizer, Players):
        for player in optimizer.players.values():
            check_optimizer(player, task, compiled=compiled, clipped=clipped)
    name = type(innermost(optimizer)).__name__
    if compiled and getattr(optimizer, "needs_graph", False):
        raise ValueError(f"compile must be false for {name}: compiled models have no second derivatives")
    if getattr(optimizer, "needs_targets", False):
        if not task.whole:
            raise UserError(
                f"damping must be a number for {task.name}: auto compares likelihoods of targets before and after "
                "steps, and this loss is none"
            )
        if clipped:
            raise ValueError(
                "clip_norm must be null where damping is auto, which expects of a step what its gradient says: "
                "kl_clip bounds steps"
            )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(f"optimizer {name} calls the model itself, which this loop does not offer: choose another")


def check_weights(model: nn.Module) -> None:
    """Raise a sentence if a model's weights are sharded over processes, which the loop does not train."""
    if are_sharded(model.parameters()):
        raise UserError(
            "the model's weights are sharded over processes (fully_shard), and this loop trains whole ones: "
            "docs/processes.md has a loop for them"
        )
