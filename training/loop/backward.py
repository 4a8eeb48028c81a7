"""The one verb of the loop."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from training.errors import UserError


def backward(
    optimizer: Optimizer,
    loss: Tensor,
    outputs: Tensor | None = None,
    scale: float = 1.0,
    targets: Tensor | None = None,
) -> None:
    """Leave gradients in ``.grad``: the optimizer's own ``backward`` where it has one, else ``loss.backward()``.

    Args:
        optimizer: any.
        loss: scalar; in accumulation, the micro-batch's loss divided by the number of micro-batches.
        outputs: the model's outputs, which methods that sample targets need.
        scale: a gradient scaler's factor inside ``loss``, which curvature must not see.
        targets: of the loss, for optimizers that ask for them (``needs_targets``).

    Raises:
        UserError: nothing leads from the loss to a parameter.
    """
    if not loss.requires_grad:
        raise UserError(
            "the loss depends on no parameter that is trained: let the model compute its outputs from its parameters, "
            "without detach() or no_grad()"
        )
    own = getattr(optimizer, "backward", None)
    if own is None:
        loss.backward()
    else:
        told = {"targets": targets} if getattr(optimizer, "needs_targets", False) else {}
        own(loss, outputs, scale=scale, **told)
