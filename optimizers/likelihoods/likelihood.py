"""Likelihoods: what a model's outputs say about the targets. Shared by the tasks and by every Fisher-based method.

A likelihood states a loss, ``nll(outputs, targets)``, in the shapes that the user has. For its curvature, the outputs
are brought to one form, ``[n, ..., features]`` (``observations``): every leading entry is one observation, with a
negative log-likelihood ``l_i`` of its own, a sum over its features. The loss is ``sum_i w_i l_i`` with the ``weights``
w, and so its Gauss-Newton matrix, which is its Fisher matrix, is ``sum_i w_i J_iᵀ R_i R_iᵀ J_i`` with
``R = hessian_sqrt(observations)`` and J the observations' Jacobian. ``sample``, ``score`` and ``hessian_sqrt`` are of
single observations in that form and know nothing of weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Generator, Tensor

#: How a loss adds up its observations: ``batchmean``: the mean over observations of the sum over their features;
#: ``mean``: the mean over both, torch's default; ``sum``: the sum over both.
Reduction = Literal["batchmean", "mean", "sum"]


def check_outputs(outputs: Any) -> Tensor:
    """The outputs, if a likelihood can take them.

    Raises:
        TypeError: they are not one tensor.
        ValueError: they are a single number, or no floating point numbers.
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(
            "outputs must be one tensor [batch, ..., features], such as outputs.logits or outputs[0], got "
            f"{type(outputs).__name__}."
        )
    if outputs.dim() == 0:
        raise ValueError(
            "outputs must be one tensor [batch, ..., features], got a single number: give what the loss was computed "
            "from, or reshape it to [1, 1]."
        )
    if not outputs.is_floating_point():
        raise ValueError(f"outputs must be floating point numbers (logits or means), got {outputs.dtype}.")
    return outputs


class Likelihood(ABC):
    """p(targets | outputs), and the loss that is stated by it.

    A subclass gives ``nll``, ``quantile``, ``score`` and ``hessian_sqrt``; the others are right for every likelihood
    whose features are last and whose ``nll`` is reduced as ``reduction`` says.

    Attributes:
        reduction: how ``nll`` adds up the observations; see Reduction.
        independent: whether each feature is a variable of its own (a pixel), not one of several classes, say.
    """

    reduction: str = "batchmean"
    independent: bool = False

    @abstractmethod
    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Scalar: the negative log-likelihood, reduced as ``reduction`` says, in float32 or wider.

        Args:
            outputs: in the user's shape.
            targets: theirs.

        Raises:
            TypeError: outputs are not one tensor.
            ValueError: outputs are a single number, or targets do not fit them.
        """

    def masked_nll(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """``nll`` of the observations that a mask keeps, as if there were no others; 0 of none.

        Args:
            outputs: in the user's shape.
            targets: theirs.
            mask: which observations count, bool ``[n, ...]``; None: all.

        Raises:
            TypeError: outputs are not one tensor.
            ValueError: outputs are a single number, or targets do not fit them.
        """
        seen = self.observations(outputs, targets)
        if mask is not None:
            outputs, targets = seen[mask], targets.reshape(seen.shape)[mask]
        return self.nll(outputs, targets) if outputs.numel() else seen.new_zeros((), dtype=wide(seen.dtype))

    def observations(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Outputs as ``[n, ..., features]``: a view, with the outputs' graph. ``[n]`` are n of one feature.

        Args:
            outputs: in the user's shape.
            targets: theirs, where their shape tells which dimension is which; None: as the likelihood takes it.

        Raises:
            TypeError: outputs are not one tensor.
            ValueError: outputs are a single number, or targets do not fit them.
        """
        check_outputs(outputs)
        if targets is not None:
            self._check_targets(outputs, targets)
        return outputs.unsqueeze(-1) if outputs.dim() == 1 else outputs

    def counted(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """Which observations the loss counts by these targets: bool ``[n, ...]``; None: all of them.

        Args:
            outputs: in the user's shape.
            targets: theirs.

        Raises:
            TypeError: outputs are not one tensor.
            ValueError: outputs are a single number, or targets do not fit them.
        """
        self.observations(outputs, targets)
        return None

    def weights(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Weight ``w_i`` of each observation's own nll in the loss: ``nll = sum_i w_i l_i(observations_i)``.

        Not normalised: 1 / n each for a mean over n observations, 1 each for a sum, 1 / (n features) each for a mean
        over the features, too; 0 for what does not count. ``w_i`` n, with n what counts, is 1 for ``batchmean``.

        Args:
            outputs: in the user's shape.
            targets: theirs; None: all count, and equally.

        Returns:
            ``[n, ...]``: the observations' leading shape, without a graph, in float32 or wider.

        Raises:
            TypeError: outputs are not one tensor.
            ValueError: outputs are a single number, targets do not fit them, or weights need targets.
        """
        seen = self.observations(outputs, targets)
        return seen.new_full(seen.shape[:-1], self._unit(seen), dtype=wide(seen.dtype))

    def _unit(self, outputs: Tensor) -> float:
        """What ``reduction`` multiplies the sum over all with; outputs are ``[n]`` or ``[n, ..., features]``."""
        features = outputs.shape[-1] if outputs.dim() > 1 else 1
        observations = outputs.numel() // max(features, 1)
        return {"batchmean": 1 / max(observations, 1), "mean": 1 / max(outputs.numel(), 1), "sum": 1.0}[self.reduction]

    def _check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError unless targets have the outputs' shape: they are never broadcast."""
        if not isinstance(targets, Tensor) or targets.shape != outputs.shape:
            got = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(
                f"targets must have the outputs' shape {list(outputs.shape)} for {type(self).__name__}, got {got}: "
                "reshape one of them."
            )

    @abstractmethod
    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Targets at which the model's cumulative distribution reaches ``uniforms`` (entries in [0, 1))."""

    def noise_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """How many uniform numbers a draw takes: one an output, unless a subclass says otherwise."""
        return tuple(outputs.shape)

    def sample(
        self, outputs: Tensor, generator: Generator | None = None, *, rank: int = 0, world_size: int = 1
    ) -> Tensor:
        """Targets drawn from the model's own distribution, as ``nll`` and ``score`` take them.

        A draw inverts the cumulative distribution at uniform numbers, which a generator yields one after another: k
        micro-batches draw what one batch would, and ``world_size`` ranks with equal generators what one process would.

        Args:
            outputs: observations, ``[n, ..., features]``.
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
        """Gradient of each observation's own nll by its outputs, ``[n, ..., features]``; no weights.

        Args:
            outputs: observations, ``[n, ..., features]``.
            targets: theirs, as ``sample`` draws them.
        """

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """KL divergence ``KL(p(. | before) || p(. | after))`` of each observation, ``[n, ...]``; no weights.

        Of a likelihood that does not say otherwise to second order: ``dᵀ F d / 2`` of the difference d.

        Args:
            before: observations, ``[n, ..., features]``.
            after: of the same shape.
        """
        difference = (after - before).unsqueeze(-1)
        return (self.hessian_sqrt(before).mT @ difference).square().sum((-2, -1)) / 2

    def variables(self, outputs: Tensor) -> int:
        """How many variables an observation's nll and KL divergence are sums over: of ``independent`` features, all.

        One where the reduction is their mean.

        Args:
            outputs: in the user's shape.
        """
        return self.observations(outputs).shape[-1] if self.independent and self.reduction != "mean" else 1

    def hessian_product(self, outputs: Tensor, tangents: Tensor) -> Tensor:
        """The Hessian of each observation's own nll by its outputs, times a vector: ``[n, ..., features]``; no weights.

        Args:
            outputs: observations, ``[n, ..., features]``.
            tangents: of the same shape.
        """
        root = self.hessian_sqrt(outputs)
        return (root @ (root.mT @ tangents.unsqueeze(-1))).squeeze(-1)

    @abstractmethod
    def hessian_sqrt(self, outputs: Tensor) -> Tensor:
        """``R [..., features, rank]``: ``R Rᵀ`` is the Hessian (= Fisher) of one observation's nll by its outputs."""


def positive(name: str, values: Tensor | Sequence[float] | float, *, zero: bool = False) -> Tensor:
    """Numbers as a tensor that nothing else writes to; checked once."""
    tensor = values.detach().clone() if isinstance(values, Tensor) else torch.tensor(values)
    tensor = tensor.to(wide(tensor.dtype)) if not tensor.is_complex() else tensor
    if tensor.is_complex() or not bool((tensor.isfinite() & (tensor >= 0 if zero else tensor > 0)).all()):
        raise ValueError(f"{name} must be {'numbers that are not negative' if zero else 'positive numbers'}")
    return tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or wider if the numbers are: sums over many of them are lost in half precision."""
    return torch.promote_types(dtype, torch.float32)
