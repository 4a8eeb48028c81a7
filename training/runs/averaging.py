"""The model as it is evaluated, where an average of the weights is: in checkpoints, pictures, validation and test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice

import torch
from torch import Tensor

from optimizers.averaging import Averaging, batch_norms, recalibrate
from optimizers.curvature.communication import average_
from training.loop import rng
from training.runs.run import Run
from training.tasks.players import members, unobserved


def averages(run: Run) -> list[Averaging]:
    """The averages around the run's optimizers: one, one a player, or none."""
    return [one for one in members(run.optimizer).values() if isinstance(one, Averaging)]


@contextmanager
def averaged(run: Run) -> Iterator[None]:
    """Within it the model is as it is evaluated; weights and buffers are then what they were, bit for bit.

    Every rank must enter it. Does nothing where nothing is averaged, or within itself.
    """
    entered = enter(run)
    try:
        yield
    finally:
        if entered:
            leave(run)


def enter(run: Run) -> bool:
    """Make the model what is evaluated, until ``leave``; whether that is something else than is trained."""
    own = averages(run)
    if not own or run.training_buffers is not None:
        return False
    run.training_buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    for one in own:
        one.eval()
    with run.clock.count("evaluation"):
        _calibrate(run, max(one.calibrate for one in own))
    return True


def leave(run: Run, buffers: Mapping[str, Tensor] | None = None) -> None:
    """Make the model what is trained.

    Args:
        run: in evaluation.
        buffers: those of training, from a checkpoint; None: what ``enter`` has put aside.
    """
    kept = run.training_buffers if buffers is None else buffers
    run.training_buffers = None
    for one in averages(run):
        one.train()
    for name, buffer in run.model.named_buffers():
        if kept is not None and name in kept:
            buffer.copy_(kept[name])


def _calibrate(run: Run, batches: int) -> None:
    """Give BatchNorm layers statistics that belong to the averages: a function of these and of the training set."""
    layers = batch_norms(run.model)
    if not layers or not batches:
        return
    if run.calibrated is None or run.calibrated[0] != run.step:
        device = run.world.device
        state = rng.get_state(device)
        try:
            with ExitStack() as stack:
                for one in averages(run):
                    stack.enter_context(unobserved(one))
                shown = enumerate(inputs for inputs, _ in islice(run.data.train.epoch(0), batches))
                recalibrate(
                    run.model, shown, lambda part: run.task.calibrate(run.model, part[1], run.precision, part[0])
                )
        finally:
            rng.set_state(state, device)
        statistics = [t for layer in layers for t in (layer.running_mean, layer.running_var)]
        counts = [layer.num_batches_tracked for layer in layers for _ in range(2)]
        average_([t for t in statistics if t is not None], torch.stack([c for c in counts if c is not None]))
        run.calibrated = run.step, {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    for name, buffer in run.model.named_buffers():
        buffer.copy_(run.calibrated[1][name])
