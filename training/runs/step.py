"""One step: the updates that a task makes of it, each of as many batches as gradients are accumulated over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from optimizers.curvature.communication import average_
from training.loop.backward import backward
from training.runs.finite import matrix_failure
from training.runs.run import Run
from training.tasks.task import Turn


def take(run: Run, batches: Iterator[tuple[Tensor, Tensor]], clip_norm: float | None) -> None:
    """Take the next step. Nothing in it waits for the device.

    Args:
        run: that is under way.
        batches: those of training, from the present one on.
        clip_norm: largest norm of the gradient of an update; None: no clipping.
    """
    run.phases.mark(None)
    run.scalars.set(run.progress)
    turns = run.task.turns(run)
    served: Iterable[tuple[Tensor, Tensor]] = (next(batches) for _ in range(run.accumulate))
    served = served if len(turns) == 1 else list(served)
    for turn in turns:
        turn.optimizer.zero_grad()
        losses = [
            _micro_batch(run, turn, inputs, targets, last=part == run.accumulate)
            for part, (inputs, targets) in enumerate(served, 1)
        ]
        _update(run, turn, losses, clip_norm)
    run.lr = float(run.optimizer.param_groups[0]["lr"])
    run.scaler.update()
    run.phases.mark("update")


def _micro_batch(run: Run, turn: Turn, inputs: Tensor, targets: Tensor, last: bool) -> Tensor:
    """Add a batch's share to the gradients of an update; its loss."""
    run.phases.mark("data")
    for callback in run.callbacks:
        callback.on_batch(run, turn, inputs, targets)
    # Gradients travel between ranks once an update, with the last batch.
    with nullcontext() if last or not run.replicated else run.forward.no_sync():  # type: ignore[attr-defined]
        with run.precision.autocast():
            outputs, loss = turn.play(inputs, targets)
        run.phases.mark("forward")
        share = loss if run.accumulate == 1 else loss / run.accumulate
        scale = run.scaler.get_scale() if run.scaler.is_enabled() else 1.0
        backward(turn.optimizer, run.scaler.scale(share), outputs, scale, targets)
        run.phases.mark("backward")
    turn.measure(run.precision.full(outputs.detach()), targets, loss.detach())
    run.phases.mark("measure")
    return loss.detach()


def _update(run: Run, turn: Turn, losses: list[Tensor], clip_norm: float | None) -> None:
    optimizer = turn.optimizer
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not run.replicated:
        average_([p.grad for p in params if p.grad is not None])
    run.scaler.unscale_(optimizer)
    for callback in run.callbacks:
        callback.on_gradients(run, turn, losses)
    if clip_norm is not None:
        run.grad_norm = nn.utils.clip_grad_norm_(params, clip_norm)
    try:
        run.scaler.step(optimizer)
    except torch.linalg.LinAlgError as error:  # what some packages make of gradients that are not finite
        raise matrix_failure(run, error) from error
