"""Training that leaves the finite numbers is stopped before it overwrites anything good."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.errors import UserError
from training.loop.distributed import maximum
from training.runs.run import Run


class Diverged(UserError):
    """A loss, a weight or an optimizer's state that is no longer finite."""


def require_finite_loss(run: Run, loss: float, which: str = "training") -> None:
    """See to it that a loss is finite.

    Args:
        run: for the sentence.
        loss: the same on every rank.
        which: "training" or "validation".

    Raises:
        Diverged: it is not.
    """
    if not math.isfinite(loss):
        raise Diverged(f"The {which} loss is {loss} by step {run.step}{_advice(run)}")


def require_finite(run: Run) -> None:
    """See to it that the loss since the last log, the weights and the optimizer's state are finite.

    Every rank must call it; waits for the device, once for the loss and once for all tensors.

    Raises:
        Diverged: something is not.
    """
    if run.window_steps:
        require_finite_loss(run, run.window.compute()["loss"])
    states = (value for state in run.optimizer.state.values() for value in state.values())
    # An optimizer may start a minimum at infinity, but none means NaN.
    checks = [p.isfinite().all() for p in run.model.parameters()]
    checks += [~value.isnan().any() for value in states if isinstance(value, Tensor)]
    good = not checks or bool(torch.stack([check.to(run.world.device) for check in checks]).all())
    if maximum([0.0 if good else 1.0], run.world)[0]:
        raise Diverged(f"A weight or the optimizer's state is no longer finite at step {run.step}{_advice(run)}")


def matrix_failure(run: Run, error: Exception) -> Diverged:
    """What to raise when an optimizer could not decompose a matrix.

    Args:
        run: for the sentence.
        error: the library's.
    """
    return Diverged(f"The optimizer could not decompose a matrix in step {run.step + 1} ({error}){_advice(run)}")


def _advice(run: Run) -> str:
    saved = sorted(run.folder.checkpoints.glob("step_*.pt"))
    kept = f"; the last good checkpoint is {saved[-1].name}" if saved else ""
    return f": lower the learning rate, warm it up (scheduler.warmup), or clip gradients (trainer.clip_norm){kept}."
