"""Likelihoods: what a model's outputs say about the targets. Shared by the tasks and by every Fisher-based method.

``outputs`` are ``[batch, ..., features]`` (logits or means), and every leading entry is one observation. ``nll`` is the
mean negative log-likelihood an observation (a sum over its features), so its curvature needs no further scaling.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from optimizers.base import check_range


class Likelihood(ABC):
    """p(targets | outputs)."""

    @abstractmethod
    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Scalar: the negative log-likelihood, averaged over observations."""

    @abstractmethod
    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Targets at which the model's cumulative distribution reaches ``uniforms`` (entries in [0, 1))."""

    def noise_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """How many uniform numbers a draw takes: one an output, unless a subclass says otherwise."""
        return tuple(outputs.shape)

    def sample(
        self, outputs: Tensor, generator: Generator | None = None, *, rank: int = 0, world_size: int = 1
    ) -> Tensor:
        """Targets drawn from the model's own distribution, of the shape ``nll`` takes.

        A draw inverts the cumulative distribution at uniform numbers, which a generator yields one after another: k
        micro-batches draw what one batch would, and ``world_size`` ranks with equal generators what one process would.

        Args:
            outputs: ``[batch, ..., features]``.
            generator: of the uniform numbers, on any device; None: torch's own.
            rank: which share of the joint batch ``outputs`` is.
            world_size: how many equal shares there are.
        """
        shape = self.noise_shape(outputs)
        dtype = torch.float64 if outputs.dtype == torch.float64 else torch.float32
        device = outputs.device if generator is None else generator.device
        joint = torch.rand((world_size * shape[0], *shape[1:]), generator=generator, dtype=dtype, device=device)
        uniforms = joint[rank * shape[0] : (rank + 1) * shape[0]].to(outputs.device, non_blocking=True)
        return self.quantile(outputs.detach().to(dtype), uniforms)

    @abstractmethod
    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of each observation's own nll by its outputs, ``[batch, ..., features]``."""

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

    def noise_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """See Likelihood."""
        return tuple(outputs.shape[:-1])

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """See Likelihood."""
        cumulative = outputs.softmax(-1).cumsum(-1)
        # Rounding may leave the last entry below 1; the comparison leaves it out.
        return (cumulative[..., :-1] <= uniforms.unsqueeze(-1)).sum(-1)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Likelihood. Without smoothing; zero where a target does not count."""
        counted = (targets != -100).unsqueeze(-1)
        classes = targets.clamp(min=0).unsqueeze(-1)
        gradient = outputs.detach().softmax(-1)
        return gradient.scatter_add(-1, classes, -torch.ones_like(gradient[..., :1])) * counted

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

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """See Likelihood."""
        return (uniforms < outputs.sigmoid()).to(outputs.dtype)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Likelihood."""
        return outputs.detach().sigmoid() - targets

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
        self._sigma = _checked(sigma)

    @property
    def sigma(self) -> float | Tensor:
        """Standard deviation of every feature."""
        return self._sigma

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Likelihood."""
        return (outputs - targets).square().sum() / (2 * self.sigma**2 * outputs[..., 0].numel())

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """See Likelihood."""
        tiny = torch.finfo(uniforms.dtype).eps / 4  # rand may return 0, whose quantile is infinite
        return outputs + self.sigma * torch.special.ndtri(uniforms.clamp(min=tiny))

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Likelihood."""
        return (outputs.detach() - targets) / self.sigma**2

    def hessian_sqrt(self, outputs: Tensor) -> Tensor:
        """See Likelihood."""
        eye = torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
        return (eye / self.sigma).expand(*outputs.shape[:-1], -1, -1)


class LearnedGaussian(nn.Module, Gaussian):
    """A Gaussian whose standard deviation is learned with the model: ``log_sigma`` is a parameter.

    ``nll`` has the term ``features log sigma`` that keeps sigma from growing, and its gradient reaches ``log_sigma`` as
    it reaches the model's parameters, so any optimizer trains it that is given it:
    ``KFAC(model, [*model.parameters(), *likelihood.parameters()], likelihood=likelihood)``. It lies outside of the
    model, where there is no layer to have curvature: ours take their first-order fallback for it. The Fisher matrix of
    the model is taken at the present sigma. ``state_dict`` belongs in the checkpoint, beside the model's.

    Args:
        sigma: where it starts.
    """

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.tensor(math.log(_checked(sigma))))

    @property
    def sigma(self) -> Tensor:
        """See Gaussian; without a gradient."""
        return self.log_sigma.detach().exp()

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Likelihood; but for the constant ``features log(sqrt(2 pi))``, the whole."""
        errors = (outputs - targets).square().sum() / (2 * outputs[..., 0].numel())
        return errors * (-2 * self.log_sigma).exp() + outputs.shape[-1] * self.log_sigma


def _checked(sigma: float) -> float:
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma must be a positive number, got {sigma!r}")
    return sigma
