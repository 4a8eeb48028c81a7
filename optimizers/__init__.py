"""Curvature-aware optimizers. Imports torch alone: ``from optimizers import AdaFisher`` works in any script."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from optimizers.adafisher import AdaFisher, AdaFisherW
from optimizers.adahessian import AdaHessian
from optimizers.base import Coverage, CurvatureOptimizer, unwrap
from optimizers.kfac import EKFAC, KFAC
from optimizers.kronecker_svd import KPSVD, Deflation, KFACCorrected, Lanczos
from optimizers.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood

__all__ = [
    "EKFAC",
    "KFAC",
    "KPSVD",
    "AdaFisher",
    "AdaFisherW",
    "AdaHessian",
    "Bernoulli",
    "Categorical",
    "Coverage",
    "CurvatureOptimizer",
    "Deflation",
    "Gaussian",
    "KFACCorrected",
    "Lanczos",
    "Likelihood",
    "build_optimizer",
    "unwrap",
]


def build_optimizer(
    target: Callable[..., torch.optim.Optimizer],
    model: nn.Module,
    *,
    likelihood: Likelihood | None = None,
    seed: int = 0,
    **options: Any,
) -> torch.optim.Optimizer:
    """Build any optimizer, ours or another package's, for a model.

    Ours take the module itself; the others take its parameters. ``likelihood`` and ``seed`` reach those that ask.

    Args:
        target: an optimizer class, or a function that returns an optimizer.
        model: the module to train.
        likelihood: what the outputs say about the targets.
        seed: of whatever the optimizer samples.
        options: hyper-parameters.

    Returns:
        The optimizer.

    Raises:
        ValueError: for a hyper-parameter out of its range.
    """
    accepted = inspect.signature(target).parameters
    injected = {"likelihood": likelihood, "seed": seed}
    options |= {k: v for k, v in injected.items() if k in accepted and k not in options and v is not None}
    ours = isinstance(target, type) and issubclass(target, CurvatureOptimizer)
    return target(model if ours else model.parameters(), **options)
