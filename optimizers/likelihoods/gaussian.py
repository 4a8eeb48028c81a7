"""Means with one standard deviation, fixed or learned with the model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..checks import check_choice
from .likelihood import Likelihood, Reduction, wide


class Gaussian(Likelihood):
    """Means with one fixed standard deviation: the loss is the squared error over ``2 sigma²``.

    Outputs are ``[n]`` or ``[n, ..., features]``; targets have the same shape.
    ``Gaussian(sigma=0.5**0.5, reduction="mean")`` is ``F.mse_loss``.

    Args:
        sigma: standard deviation of every feature. ``nll`` leaves out the constant ``features log(sigma sqrt(2 pi))``.
        reduction: ``batchmean``: the mean over ``[n, ...]`` of the sum over features; ``mean``: over both, torch's
            default; ``sum``.

    Raises:
        ValueError: for a setting out of its range.
    """

    independent = True

    def __init__(self, sigma: float = 1.0, *, reduction: Reduction = "batchmean") -> None:
        check_choice("reduction", reduction, ("batchmean", "mean", "sum"))
        self._sigma, self.reduction = _checked(sigma), reduction

    @property
    def sigma(self) -> float | Tensor:
        """Standard deviation of every feature."""
        return self._sigma

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Likelihood."""
        return self._squares(outputs, targets) / (2 * self.sigma**2)

    def _squares(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The reduced squared errors."""
        self.observations(outputs, targets)
        dtype = wide(outputs.dtype)
        return (outputs.to(dtype) - targets.to(dtype)).square().sum() * self._unit(outputs)

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """See Likelihood."""
        tiny = torch.finfo(uniforms.dtype).eps / 4  # rand may return 0, whose quantile is infinite
        return outputs + self.sigma * torch.special.ndtri(uniforms.clamp(min=tiny))

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Likelihood."""
        return (outputs.detach() - targets) / self.sigma**2

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """See Likelihood."""
        return (after - before).square().sum(-1) / (2 * self.sigma**2)

    def hessian_product(self, outputs: Tensor, tangents: Tensor) -> Tensor:
        """See Likelihood."""
        return tangents / self.sigma**2

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
        reduction: see Gaussian.

    Raises:
        ValueError: for a setting out of its range.
    """

    def __init__(self, sigma: float = 1.0, *, reduction: Reduction = "batchmean") -> None:
        super().__init__()
        check_choice("reduction", reduction, ("batchmean", "mean", "sum"))
        self.reduction = reduction
        self.log_sigma = nn.Parameter(torch.tensor(math.log(_checked(sigma))))

    @property
    def sigma(self) -> Tensor:
        """See Gaussian; without a gradient."""
        return self.log_sigma.detach().exp()

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Likelihood; but for the constant ``features log(sqrt(2 pi))``, the whole."""
        errors = self._squares(outputs, targets) / 2
        return errors * (-2 * self.log_sigma).exp() + outputs.numel() * self._unit(outputs) * self.log_sigma


def _checked(sigma: float) -> float:
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma must be a positive number, got {sigma!r}")
    return sigma
