"""Checks for one's own optimizers, models and losses. Needs torch alone, and pytest for its decorator only.

``check_optimizer(MyOptimizer, lr=0.01)`` runs the contract that every optimizer here meets; ``parametrize_with_checks``
makes a test of each of its points. ``check_curvature(model, KFAC, inputs, loss, targets=targets)`` compares what an
optimizer records of each layer of a model with a backward pass of each example alone.
"""

from __future__ import annotations

from .checks import optimizer_checks
from .curvature import CurvatureReport, LayerCheck, check_curvature
from .runner import OptimizerReport, check_optimizer, parametrize_with_checks

__all__ = [
    "CurvatureReport",
    "LayerCheck",
    "OptimizerReport",
    "check_curvature",
    "check_optimizer",
    "optimizer_checks",
    "parametrize_with_checks",
]
