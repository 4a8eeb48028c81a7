"""Shampoo as it is used today: the package's preconditioner, and steps of another optimizer's length."""

from __future__ import annotations

import importlib

from torch.optim import Optimizer

from optimizers.base import Params
from optimizers.checks import check_range
from optimizers.step_length import Graft


def shampoo(
    params: Params,
    *,
    lr: float = 3e-3,
    graft: str | None = "adam",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    weight_decouple: bool = False,
    preconditioning_compute_steps: int = 10,
    matrix_eps: float = 1e-2,
) -> Optimizer:
    """pytorch_optimizer's Shampoo, each tensor's step as long as another optimizer's.

    Its own steps have no usable length: the matrices are sums over all of the past, and the first roots are of a few
    gradients. Practice gives them Adam's length, tensor by tensor.

    Source: Gupta, Koren & Singer, "Shampoo", 2018 (arXiv 1802.09568); the length: Anil et al., "Scalable Second Order
    Optimization for Deep Learning", 2020 (arXiv 2002.09018).

    Args:
        params: parameters or groups.
        lr: learning rate of the optimizer whose length steps have; without one, Shampoo's own.
        graft: that optimizer: adam, adamw, sgd, or another class of torch.optim by its name; None: steps as long as
            Shampoo makes them.
        momentum: share of the last preconditioned step that is mixed into the raw gradient.
        weight_decay: added to the gradient.
        weight_decouple: weight decay apart from the gradient.
        preconditioning_compute_steps: steps between inverse roots; nothing moves before the first are there.
        matrix_eps: multiple of the identity that the sums start from.

    Raises:
        ValueError: for a value out of its range.
    """
    check_range("lr", lr, 0)
    made: Optimizer = importlib.import_module("pytorch_optimizer").Shampoo(
        params, lr=lr, momentum=momentum, weight_decay=weight_decay, weight_decouple=weight_decouple,
        preconditioning_compute_steps=preconditioning_compute_steps, matrix_eps=matrix_eps,
    )  # fmt: skip
    return made if graft is None else Graft(made, graft, lr)
