"""Likelihoods: what a model's outputs say about the targets. Shared by the tasks and by every Fisher-based method.

``outputs`` are ``[batch, ..., features]`` (logits or means), and every leading entry is one observation. ``nll`` is the
mean negative log-likelihood an observation (a sum over its features), so its curvature needs no further scaling.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from optimizers.base import check_range


class Likelihood(ABC):
    """p(targets | outputs)."""

    @abstractmethod
    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Scalar: the negative log-likelihood, averaged over observations."""

    @abstractmethod
    def sample(self, outputs: Tensor, generator: Generator | None = None) -> Tensor:
        """Targets drawn from the model's own distribution, of the shape ``nll`` takes."""

    @abstractmethod
    def hessian_sqrt(self, outputs: Tensor) -> Tensor:
        """``R [..., features, rank]``: ``R Rᵀ`` is the Hessian (= Fisher) of one observation's nll by its outputs."""


class Categorical(Likelihood):
    """Classes with logits ``[..., classes]``; targets are int64 ``[...]``, and -100 marks what does not count.

    Args:
        label_smoothing: in ``nll`` only; 0 is the likelihood proper.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        check_range("label_smoothing", label_smoothing, 0, 1, open_high=True)
        self.label_smoothing = label_smoothing

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Likelihood."""
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), label_smoothing=self.label_smoothing)

    def sample(self, outputs: Tensor, generator: Generator | None = None) -> Tensor:
        """See Likelihood."""
        probabilities = outputs.detach().flatten(0, -2).float().softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator).view(outputs.shape[:-1])

    def hessian_sqrt(self, outputs: Tensor) -> Tensor:
        """See Likelihood. ``diag(p) - p pᵀ = R Rᵀ`` with ``R = (I - p 1ᵀ) diag(sqrt p)``."""
        p = outputs.detach().softmax(-1)
        root = p.sqrt()
        return torch.diag_embed(root) - p.unsqueeze(-1) * root.unsqueeze(-2)


class Bernoulli(Likelihood):
    """Independent bits with logits ``[..., features]``; targets in [0, 1] of the same shape."""

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Likelihood."""
        total = F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
        return total / outputs[..., 0].numel()

    def sample(self, outputs: Tensor, generator: Generator | None = None) -> Tensor:
        """See Likelihood."""
        return torch.bernoulli(outputs.detach().sigmoid(), generator=generator)

    def hessian_sqrt(self, outputs: Tensor) -> Tensor:
        """See Likelihood."""
        p = outputs.detach().sigmoid()
        return torch.diag_embed((p * (1 - p)).sqrt())


class Gaussian(Likelihood):
    """Means ``[..., features]`` with one fixed standard deviation; targets of the same shape.

    Args:
        sigma: standard deviation of every feature. ``nll`` leaves out the constant ``features log(sigma sqrt(2 pi))``.
    """

    def __init__(self, sigma: float = 1.0) -> None:
        if not (sigma > 0 and math.isfinite(sigma)):
            raise ValueError(f"sigma must be a positive number, got {sigma!r}")
        self.sigma = sigma

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Likelihood."""
        return (outputs - targets).square().sum() / (2 * self.sigma**2 * outputs[..., 0].numel())

    def sample(self, outputs: Tensor, generator: Generator | None = None) -> Tensor:
        """See Likelihood."""
        noise = torch.empty_like(outputs).normal_(generator=generator)
        return outputs.detach() + self.sigma * noise

    def hessian_sqrt(self, outputs: Tensor) -> Tensor:
        """See Likelihood."""
        eye = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
        return (eye / self.sigma).expand(*outputs.shape[:-1], -1, -1)
