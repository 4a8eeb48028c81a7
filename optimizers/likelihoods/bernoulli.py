"""Independent bits by their logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice
from .likelihood import Likelihood, Reduction, positive, wide


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
        self.pos_weight = None if pos_weight is None else positive("pos_weight", pos_weight)

    def nll(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Likelihood."""
        self.observations(outputs, targets)
        dtype = wide(outputs.dtype)
        logits, positive = outputs.to(dtype), self._positive_weight(outputs)
        total = F.binary_cross_entropy_with_logits(logits, targets.to(dtype), pos_weight=positive, reduction="sum")
        return total * self._unit(outputs)

    def masked_nll(self, outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """See Likelihood. With ``pos_weight``, whose places are those of the outputs, it is bits that are kept."""
        if mask is None or self.pos_weight is None or not outputs.numel():
            return super().masked_nll(outputs, targets, mask)
        dtype = wide(outputs.dtype)
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
        equal = seen.new_full(seen.shape[:-1], self._unit(outputs), dtype=wide(seen.dtype))
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
        return self.pos_weight.to(outputs.device, wide(outputs.dtype))

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
