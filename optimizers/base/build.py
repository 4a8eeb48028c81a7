"""Any optimizer for a model, ours or another package's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..likelihoods import Likelihood
from .groups import Params
from .optimizer import CurvatureOptimizer


def consolidate(optimizer: torch.optim.Optimizer) -> None:
    """Bring what each process keeps of an optimizer's state to all of them, before ``state_dict()``.

    Every process must call it; of an optimizer that is the same on all of them, and of one process, nothing happens.

    Args:
        optimizer: any, wrapped or not.
    """
    if (own := getattr(optimizer, "consolidate", None)) is not None:
        own()


def build_optimizer(
    target: Callable[..., torch.optim.Optimizer],
    model: nn.Module,
    *,
    params: Params | None = None,
    likelihood: Likelihood | None = None,
    seed: int = 0,
    **options: Any,
) -> torch.optim.Optimizer:
    """Build any optimizer, ours or another package's, for a model.

    Ours, and what asks for a ``model`` first, take the module itself; the others take its parameters. ``likelihood``
    and ``seed`` reach those that ask.

    Args:
        target: an optimizer class, or a function that returns an optimizer.
        model: the module to train.
        params: parameters or groups of it to train; None: all.
        likelihood: what the outputs say about the targets.
        seed: of whatever the optimizer samples.
        options: hyper-parameters.

    Returns:
        The optimizer.

    Raises:
        ValueError: for a hyper-parameter out of its range, groups for an optimizer that takes none, a model without
            parameters to train, or a target that makes no optimizer for dense gradients.
    """
    if params is None and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no parameters to train: choose another model")
    accepted = inspect.signature(target).parameters
    injected = {"likelihood": likelihood, "seed": seed}
    options |= {k: v for k, v in injected.items() if k in accepted and k not in options and v is not None}
    ours = isinstance(target, type) and issubclass(target, CurvatureOptimizer)
    takes_model = ours or next(iter(accepted), "") == "model"
    if params is None:
        made = target(model if takes_model else model.parameters(), **options)
    elif "params" not in accepted:
        raise ValueError("params cannot be given to this optimizer, which takes the whole model: choose another one")
    else:
        made = target(params=params, **({"model": model} if "model" in accepted else {}), **options)
    if not isinstance(made, torch.optim.Optimizer):
        name = getattr(target, "__name__", str(target))
        raise ValueError(f"{name} made what is of type {type(made).__name__}, and no torch.optim.Optimizer")
    if isinstance(made, torch.optim.SparseAdam):
        raise ValueError("SparseAdam is for sparse gradients, and those of this loop are dense: choose Adam")
    return made
