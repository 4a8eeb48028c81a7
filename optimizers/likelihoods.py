"""Likelihoods: what a model's outputs say about the targets. Shared by the tasks and by every Fisher-based method.

A likelihood states a loss, ``nll(outputs, targets)``, in the shapes that the user has. For its curvature, the outputs
are brought to one form, ``[n, ..., features]`` (``observations``): every leading entry is one observation, with a
negative log-likelihood ``l_i`` of its own, a sum over its features. The loss is ``sum_i w_i l_i`` with the ``weights``
w, and so its Gauss-Newton matrix, which is its Fisher matrix, is ``sum_i w_i J_iᵀ R_i R_iᵀ J_i`` with
``R = hessian_sqrt(observations)`` and J the observations' Jacobian. ``sample``, ``score`` and ``hessian_sqrt`` are of
single observations in that form and know nothing of weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .checks import check_choice, check_range

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
        return self.nll(outputs, targets) if outputs.numel() else seen.new_zeros((), dtype=_wide(seen.dtype))

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
        return seen.new_full(seen.shape[:-1], self._unit(seen), dtype=_wide(seen.dtype))

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


class Categorical(Likelihood):
    """Classes by their logits: the loss is ``F.cross_entropy`` of the same arguments.

    Targets are class indices of the outputs' shape without the class dimension, or probabilities of the outputs' shape.
    ``[classes]`` is one observation without a batch, with a scalar target.

    Smoothing, probabilities and class weights change how much an observation weighs in the curvature, never its form:
    the Hessian of ``-sum_c t_c log p_c`` is ``(sum_c t_c) (diag(p) - p pᵀ)``, so that ``weights`` carries all of it.

    Args:
        label_smoothing: share of every target that is spread over all classes.
        ignore_index: the class index that does not count.
        weight: of each class, not negative; None: 1 each.
        dim: the class dimension; None: where the targets' shape tells it, else the last of ``[batch, classes]`` and
            ``[batch, positions, classes]``, and 1 of four and more dimensions, ``[batch, classes, height, width]``.
            If only ``[batch, classes, positions]`` with as many positions as classes is meant, say ``dim=1``.
        reduction: ``mean``: over what counts, by weight, as torch's; ``sum``.

    Raises:
        ValueError: for a setting out of its range.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        *,
        ignore_index: int = -100,
        weight: Tensor | Sequence[float] | None = None,
        dim: int | None = None,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        check_range("label_smoothing", label_smoothing, 0, 1, open_high=True)
        check_choice("reduction", reduction, ("mean", "sum"))
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise ValueError(f"ignore_index must be an integer, got {ignore_index!r}")
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
            raise ValueError(f"dim must be an integer or None, got {dim!r}")
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.dim, self.reduction = dim, reduction
        self.weight = None if weight is None else _positive("weight", weight, zero=True)
        if self.weight is not None and self.weight.dim() != 1:
            raise ValueError(f"weight must be one number a class, [classes], got the shape {list(self.weight.shape)}")

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Likelihood."""
        seen = self.observations(outputs, targets)
        placed = self._by_observation(outputs, targets)
        return self._cross_entropy(seen.flatten(0, -2), placed.flatten(0, seen.dim() - 2))

    def masked_nll(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """See Likelihood."""
        seen = self.observations(outputs, targets)
        if mask is None and seen.numel():
            return self.nll(outputs, targets)
        keep = torch.ones(seen.shape[:-1], dtype=torch.bool, device=seen.device) if mask is None else mask
        rows = seen[keep]
        if not len(rows):
            return seen.new_zeros((), dtype=_wide(seen.dtype))
        return self._cross_entropy(rows, self._by_observation(outputs, targets)[keep])

    def _cross_entropy(self, seen: Tensor, placed: Tensor) -> Tensor:
        """Of observations ``[n, classes]``, reduced."""
        seen = seen.to(_wide(seen.dtype))
        return F.cross_entropy(
            seen,
            placed,
            weight=self._class_weight(seen),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    def observations(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """See Likelihood. The class dimension is moved to the end; ``[classes]`` becomes ``[1, classes]``."""
        dim = self.class_dim(check_outputs(outputs), targets)
        return outputs.unsqueeze(0) if outputs.dim() == 1 else outputs.movedim(dim, -1)

    def counted(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """See Likelihood. All of them where targets are probabilities."""
        self.class_dim(check_outputs(outputs), targets)
        if targets.is_floating_point():
            return None
        return self._by_observation(outputs, targets) != self.ignore_index

    def weights(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """See Likelihood. An observation's is its target's mass, each class at its weight.

        Raises:
            ValueError: also for class weights without targets, which the curvature depends on then.
        """
        seen = self.observations(outputs, targets)
        dtype = _wide(seen.dtype)
        per_class = self._class_weight(seen)
        if targets is None:
            if per_class is not None:
                raise ValueError("targets must be given: the curvature of Categorical(weight=...) depends on them.")
            return seen.new_full(seen.shape[:-1], self._unit(seen), dtype=dtype)
        placed = self._by_observation(outputs, targets).detach().to(seen.device)
        per_class = seen.new_ones(seen.shape[-1], dtype=dtype) if per_class is None else per_class
        if placed.is_floating_point():
            mass = (placed * per_class).sum(-1)
            total = torch.tensor(float(max(mass.numel(), 1)), dtype=dtype, device=mass.device)
        else:
            counts = placed != self.ignore_index
            mass = per_class[placed.where(counts, 0)] * counts
            total = mass.sum()
        spread = per_class.mean() * (1 if placed.is_floating_point() else counts)
        mass = (1 - self.label_smoothing) * mass + self.label_smoothing * spread
        return mass if self.reduction == "sum" else mass / total.where(total > 0, 1)

    def _unit(self, outputs: Tensor) -> float:
        """See Likelihood. No mean is over classes."""
        return 1 / max(outputs.shape[:-1].numel(), 1) if self.reduction == "mean" else 1.0

    def class_dim(self, outputs: Tensor, targets: Tensor | None = None) -> int:
        """Which dimension of the outputs is taken for that of the classes.

        Args:
            outputs: in the user's shape.
            targets: theirs; None: without their help.

        Raises:
            ValueError: targets, class weights or ``dim`` do not fit the outputs.
        """
        shape, last = outputs.shape, outputs.dim() - 1
        if self.dim is not None and last:
            if not -outputs.dim() <= self.dim <= last or self.dim % outputs.dim() == 0:
                raise ValueError(
                    f"dim must be a dimension of the outputs {list(shape)} behind the first, which is the batch, got "
                    f"{self.dim}."
                )
            choices = [self.dim % outputs.dim()]
        else:
            choices = list(dict.fromkeys([last, min(1, last)] if last < 3 else [1, last]))
        dim = choices[0]
        if targets is not None:
            if not isinstance(targets, Tensor):
                raise ValueError(f"targets must be a tensor for Categorical, got {type(targets).__name__}.")
            if targets.is_floating_point():
                self._check_probabilities(outputs, targets)
            elif targets.dtype == torch.bool or targets.is_complex():
                raise ValueError(
                    "targets must be class indices (integers) or probabilities (floating point) for Categorical, got "
                    f"{targets.dtype}."
                )
            else:
                fitting = [d for d in choices if targets.shape == (*shape[:d], *shape[d + 1 :])]
                if not fitting:
                    at = "" if self.dim is None else f" with dim={self.dim}"
                    raise ValueError(
                        f"targets {list(targets.shape)} do not fit outputs {list(shape)}{at}: class indices have the "
                        "outputs' shape without the class dimension, which Categorical(dim=...) names, and "
                        "probabilities are floating point numbers of the outputs' shape."
                    )
                dim = fitting[0]
        if self.weight is not None and len(self.weight) != shape[dim]:
            raise ValueError(
                f"weight must have one entry for each of the {shape[dim]} classes of the outputs {list(shape)}, got "
                f"{len(self.weight)}; if another dimension holds the classes, name it with Categorical(dim=...)."
            )
        return dim

    def _check_probabilities(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.shape != outputs.shape:
            raise ValueError(
                f"targets of floating point are probabilities for Categorical and must have the outputs' shape "
                f"{list(outputs.shape)}, got {list(targets.shape)}: convert class indices with targets.long()."
            )
        if self.ignore_index >= 0:
            raise ValueError(
                f"ignore_index={self.ignore_index} has no meaning for targets that are probabilities: give class "
                "indices, or leave ignore_index out."
            )

    def _by_observation(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Fitting targets in the observations' order: int64 ``[n, ...]`` or ``[n, ..., classes]``."""
        if targets.is_floating_point():
            moved = targets.movedim(self.class_dim(outputs, targets), -1)
            return (moved.unsqueeze(0) if outputs.dim() == 1 else moved).to(_wide(outputs.dtype))
        return (targets.unsqueeze(0) if outputs.dim() == 1 else targets).long()

    def _class_weight(self, outputs: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(outputs.device, _wide(outputs.dtype))

    def noise_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """See Likelihood."""
        return tuple(outputs.shape[:-1])

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """See Likelihood."""
        cumulative = outputs.softmax(-1).cumsum(-1)
        # Rounding may leave the last entry below 1; the comparison leaves it out.
        return (cumulative[..., :-1] <= uniforms.unsqueeze(-1)).sum(-1)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Likelihood. Without smoothing and class weights; zero where a target is no class.

        An ``ignore_index`` that is a class is one here, because a draw may be it: ``counted`` tells what counts.
        """
        counted = ((targets >= 0) & (targets < outputs.shape[-1])).unsqueeze(-1)
        classes = targets.unsqueeze(-1).where(counted, 0)
        gradient = outputs.detach().softmax(-1)
        return gradient.scatter_add(-1, classes, -torch.ones_like(gradient[..., :1])) * counted

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """See Likelihood."""
        old, new = before.log_softmax(-1), after.log_softmax(-1)
        return (old.exp() * (old - new)).sum(-1)

    def hessian_product(self, outputs: Tensor, tangents: Tensor) -> Tensor:
        """See Likelihood."""
        p = outputs.detach().softmax(-1)
        return p * (tangents - (p * tangents).sum(-1, keepdim=True))

    def hessian_sqrt(self, outputs: Tensor) -> Tensor:
        """See Likelihood. ``diag(p) - p pᵀ = R Rᵀ`` with ``R = (I - p 1ᵀ) diag(sqrt p)``."""
        p = outputs.detach().softmax(-1)
        root = p.sqrt()
        return torch.diag_embed(root) - p.unsqueeze(-1) * root.unsqueeze(-2)


class Bernoulli(Likelihood):
    """Independent bits by their logits: the loss is ``F.binary_cross_entropy_with_logits`` but for the reduction.

    Outputs are ``[n]`` or ``[n, ..., features]``; targets are probabilities, bits or booleans of the same shape.

    Args:
        pos_weight: of the positive answers, a number or a tensor that broadcasts to the outputs; None: 1. The curvature
            depends on the targets then, each bit's by its own, and so each bit is an observation: ``observations`` of
            several features are ``[n, ..., features, 1]``.
        reduction: ``batchmean``: the mean over ``[n, ...]`` of the sum over features; ``mean``: over both, torch's
            default; ``sum``.

    Raises:
        ValueError: for a setting out of its range.
    """

    independent = True

    def __init__(self, pos_weight: Tensor | float | None = None, *, reduction: Reduction = "batchmean") -> None:
        check_choice("reduction", reduction, ("batchmean", "mean", "sum"))
        self.reduction = reduction
        self.pos_weight = None if pos_weight is None else _positive("pos_weight", pos_weight)

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Likelihood."""
        self.observations(outputs, targets)
        dtype = _wide(outputs.dtype)
        logits, positive = outputs.to(dtype), self._positive_weight(outputs)
        total = F.binary_cross_entropy_with_logits(logits, targets.to(dtype), pos_weight=positive, reduction="sum")
        return total * self._unit(outputs)

    def masked_nll(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """See Likelihood. With ``pos_weight``, whose places are those of the outputs, it is bits that are kept."""
        if mask is None or self.pos_weight is None or not outputs.numel():
            return super().masked_nll(outputs, targets, mask)
        dtype = _wide(outputs.dtype)
        terms = F.binary_cross_entropy_with_logits(
            outputs.to(dtype), targets.to(dtype), pos_weight=self._positive_weight(outputs), reduction="none"
        )
        share = 1.0 if self.reduction == "sum" else mask.numel() / max(int(mask.sum()), 1)
        return (terms * mask.view(terms.shape)).sum() * (self._unit(outputs) * share)

    def observations(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """See Likelihood; each bit is one with ``pos_weight``."""
        seen = super().observations(outputs, targets)
        self._positive_weight(outputs)
        return seen.unsqueeze(-1) if self.pos_weight is not None and seen.shape[-1] != 1 else seen

    def weights(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """See Likelihood. ``-(a y log p + (1 - y) log(1 - p))`` has the Hessian ``(1 + (a - 1) y) p (1 - p)``.

        Raises:
            ValueError: also for ``pos_weight`` without targets, which the curvature depends on then.
        """
        seen = self.observations(outputs, targets)
        equal = seen.new_full(seen.shape[:-1], self._unit(outputs), dtype=_wide(seen.dtype))
        positive = self._positive_weight(outputs)
        if positive is None:
            return equal
        if targets is None:
            raise ValueError("targets must be given: the curvature of Bernoulli(pos_weight=...) depends on them.")
        return equal * (1 + (positive - 1) * targets.detach().to(equal)).reshape(equal.shape)

    def _positive_weight(self, outputs: Tensor) -> Tensor | None:
        if self.pos_weight is None:
            return None
        try:
            fits = torch.broadcast_shapes(self.pos_weight.shape, outputs.shape) == outputs.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"pos_weight must be one number or broadcast to the outputs {list(outputs.shape)}, got the shape "
                f"{list(self.pos_weight.shape)}."
            )
        return self.pos_weight.to(outputs.device, _wide(outputs.dtype))

    def _check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        super()._check_targets(outputs, targets)
        if targets.is_complex():
            raise ValueError(f"targets must be probabilities, bits or booleans for Bernoulli, got {targets.dtype}.")

    def quantile(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """See Likelihood."""
        return (uniforms < outputs.sigmoid()).to(outputs.dtype)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Likelihood."""
        return outputs.detach().sigmoid() - targets

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """See Likelihood. Of independent features: the sum of theirs."""
        terms = F.binary_cross_entropy_with_logits(after, before.sigmoid(), reduction="none")
        return (terms - F.binary_cross_entropy_with_logits(before, before.sigmoid(), reduction="none")).sum(-1)

    def hessian_product(self, outputs: Tensor, tangents: Tensor) -> Tensor:
        """See Likelihood."""
        p = outputs.detach().sigmoid()
        return p * (1 - p) * tangents

    def hessian_sqrt(self, outputs: Tensor) -> Tensor:
        """See Likelihood."""
        p = outputs.detach().sigmoid()
        return torch.diag_embed((p * (1 - p)).sqrt())


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
        dtype = _wide(outputs.dtype)
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


def _positive(name: str, values: Tensor | Sequence[float] | float, *, zero: bool = False) -> Tensor:
    """Numbers as a tensor that nothing else writes to; checked once."""
    tensor = values.detach().clone() if isinstance(values, Tensor) else torch.tensor(values)
    tensor = tensor.to(_wide(tensor.dtype)) if not tensor.is_complex() else tensor
    if tensor.is_complex() or not bool((tensor.isfinite() & (tensor >= 0 if zero else tensor > 0)).all()):
        raise ValueError(f"{name} must be {'numbers that are not negative' if zero else 'positive numbers'}")
    return tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or wider if the numbers are: sums over many of them are lost in half precision."""
    return torch.promote_types(dtype, torch.float32)
