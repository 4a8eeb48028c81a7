"""Shampoo as it is used today: the package's preconditioner, and steps of another optimizer's length."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from .base import Params
from .checks import check_range
from .curvature import linalg
from .step_length import Graft


class SymmetricSVD(TorchFunctionMode):
    """While active, ``torch.linalg.svd`` takes its matrices for symmetric and positive semi-definite.

    Their decomposition by eigenvectors is the same one, and converges where LAPACK's SVD of sums of squares, most of
    whose directions were never seen, gives up.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept one call of a torch function."""
        if func is not torch.linalg.svd:
            return func(*args, **(kwargs or {}))
        matrix: Tensor = args[0]
        values, vectors = linalg.eigh(matrix.reshape(-1, *matrix.shape[-2:]))
        rounding = torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)
        values, vectors = torch.maximum(values, rounding).flip(-1), vectors.flip(-1)
        return vectors.view_as(matrix), values.view(matrix.shape[:-1]), vectors.mT.reshape(matrix.shape)


@functools.cache
def _package() -> Callable[..., Optimizer]:
    """pytorch_optimizer's class with roots by eigenvectors; imported when first asked for."""
    plain: Any = importlib.import_module("pytorch_optimizer").Shampoo

    class Shampoo(plain):
        """With another decomposition of its matrices."""

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            """Take one step; the closure is run apart: its own decompositions are what they are."""
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            with SymmetricSVD():
                super().step()
            return loss

    return Shampoo


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
    made = _package()(
        params, lr=lr, momentum=momentum, weight_decay=weight_decay, weight_decouple=weight_decouple,
        preconditioning_compute_steps=preconditioning_compute_steps, matrix_eps=matrix_eps,
    )  # fmt: skip
    return made if graft is None else Graft(made, graft, lr)
