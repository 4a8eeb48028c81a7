"""Classes by their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_range
from .likelihood import Likelihood, check_outputs, positive, wide


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
        self.weight = None if weight is None else positive("weight", weight, zero=True)
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
            return seen.new_zeros((), dtype=wide(seen.dtype))
        return self._cross_entropy(rows, self._by_observation(outputs, targets)[keep])

    def _cross_entropy(self, seen: Tensor, placed: Tensor) -> Tensor:
        """Of observations ``[n, classes]``, reduced."""
        seen = seen.to(wide(seen.dtype))
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
        dtype = wide(seen.dtype)
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
            return (moved.unsqueeze(0) if outputs.dim() == 1 else moved).to(wide(outputs.dtype))
        return (targets.unsqueeze(0) if outputs.dim() == 1 else targets).long()

    def _class_weight(self, outputs: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(outputs.device, wide(outputs.dtype))

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
