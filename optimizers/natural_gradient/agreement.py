"""Whether the loss that is trained is the one whose curvature is taken, told by their gradients at the outputs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import placed_mask
from ..curvature.losses import Stated, stated
from ..curvature.recorder import set_aside
from ..likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from ..likelihoods.likelihood import wide

#: Less of a cosine between the two gradients, and they are of two losses.
ALIKE = 0.9
#: A factor between them that is told of: beyond it, or below its inverse.
FACTOR = 1.5
#: Of a loss of a softmax, an observation's gradients add up to 0: what is left of their size at most.
LEFT = 0.1
#: Of more outputs than these (a quarter of a GiB) a second gradient is not computed for comparison.
LARGEST = 2**26


class Agreement:
    """Compares a loss with a likelihood's ``nll`` over the micro-batches of one step, the first that can be compared.

    A loss of another scale, of other outputs (probabilities, logits before a temperature) or of another kind is a legal
    loss, and its gradients are right: but the curvature is not its own, and nothing else would say so.

    Args:
        likelihood: whose ``nll`` the loss is taken for.
    """

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood
        #: Whether it is known.
        self.settled = False
        self._parts: list[Tensor] = []

    def reset(self) -> None:
        """Begin a step."""
        self._parts.clear()

    def see(
        self,
        loss: Tensor,
        outputs: Tensor,
        given: Tensor | None,
        told: Tensor | None,
        mask: Tensor | None,
        scale: float,
    ) -> None:
        """Compare them on a micro-batch.

        Args:
            loss: with its graph.
            outputs: that it was computed from.
            given: targets, by the user.
            told: the same, or else those that the loss tells; see ``targets_of``.
            mask: which observations count.
            scale: a scaler's factor in the loss.
        """
        if self.settled or not (loss.requires_grad and outputs.requires_grad):
            return
        found = stated(loss, outputs)
        if known := next(filter(None, (self._known(one, outputs) for one in found)), None):
            self._tell(known)
            return
        with set_aside([outputs]):
            (own,) = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
        if own is None:
            return
        own = own.to(wide(own.dtype))
        if isinstance(self.likelihood, Categorical):
            own, left = _within_softmax(own, outputs.detach(), self.likelihood.class_dim(outputs, told))
            if left > LEFT:
                self._tell(
                    "the loss changes when a number is added to all the logits of an observation, which their softmax "
                    "does not feel: it is no loss of Categorical's, whose curvature is taken. Give logits as outputs, "
                    "not probabilities, and the likelihood that the loss is of"
                )
                return
        targets = given if given is not None else self._targets(found, told, outputs)
        if targets is None or outputs.numel() > LARGEST:
            return
        leaf = outputs.detach().requires_grad_()
        with set_aside(), torch.enable_grad():
            seen = self.likelihood.observations(leaf, targets).shape[:-1]
            kept = None if mask is None else placed_mask(mask.to(leaf.device), seen)
            nll = self.likelihood.masked_nll(leaf, targets, kept)
            mean = torch.autograd.grad(nll, leaf)[0].to(own) if nll.requires_grad else torch.zeros_like(own)
        pairs = ((own, mean), (mean, mean), (own, own))
        inner, length, of_loss = (torch.dot(a.flatten(), b.flatten()).double() for a, b in pairs)
        self._parts.append(torch.stack([inner / scale, length, of_loss / scale**2]))

    def conclude(self) -> None:
        """At the step that the micro-batches belong to: warn if the loss is another one."""
        if self.settled or not self._parts:
            return
        inner, mean, own = torch.stack(self._parts).unbind(1)
        factor, lengths = float((inner / mean).nan_to_num().sum()), float((mean * own).sqrt().sum())
        if not 0 < lengths < float("inf"):
            return
        self.settled = True
        name, cosine = type(self.likelihood).__name__, float(inner.sum()) / lengths
        if cosine < ALIKE:
            self._tell(
                f"the loss is not the nll of {name} at these outputs, whose curvature is taken (the cosine of their "
                f"gradients is {cosine:.2f}): give the outputs, targets and likelihood that the loss is of"
            )
        elif not 1 / FACTOR < factor < FACTOR:
            length = f"{factor:.3g} times too long" if factor > 1 else f"{1 / factor:.3g} times too short"
            self._tell(
                f"the loss is {factor:.3g} times the nll of {name}, whose curvature is taken, so that a step that no "
                f"bound holds is {length}: average over observations, divide micro-batches by their number, tell of a "
                "scaler by scale=, or give the likelihood the loss's scale"
            )

    def _tell(self, sentence: str) -> None:
        self.settled = True
        warnings.warn(sentence + ".", stacklevel=5)

    def _known(self, found: Stated, outputs: Tensor) -> str | None:
        """What to say of one of torch's losses where its arguments tell how it is another one; None: they do not."""
        likelihood = self.likelihood
        if isinstance(likelihood, Categorical) and found.kind == "cross_entropy":
            if found.weight is not None and likelihood.weight is None:
                return "the loss weighs classes and the likelihood does not: use Categorical(weight=...)"
        elif isinstance(likelihood, Bernoulli) and found.kind == "probabilities":
            return (
                "the loss takes the outputs for probabilities, and Bernoulli() takes them for logits: leave the "
                "sigmoid out of the model, and use F.binary_cross_entropy_with_logits"
            )
        elif isinstance(likelihood, Gaussian if found.kind == "mse" else Bernoulli) and found.kind != "cross_entropy":
            features = likelihood.observations(outputs).shape[-1]
            if found.reduction == "mean" and likelihood.reduction != "mean" and features > 1:
                name = type(likelihood).__name__
                return (
                    f"the loss averages over {features} features and {name}() sums over them, so curvature is so "
                    f"many times too large: use {name}(reduction='mean')"
                    + (", and sigma=0.5**0.5 for F.mse_loss" if isinstance(likelihood, Gaussian) else "")
                )
        return None

    def _targets(self, found: Sequence[Stated], told: Tensor | None, outputs: Tensor) -> Tensor | None:
        """Those that the loss states, if there is one of torch's in it and no other."""
        if len(found) != 1:
            return None
        (only,) = found
        if not isinstance(self.likelihood, Categorical):
            return only.given if only.given.shape == outputs.shape else None
        shape = self.likelihood.observations(outputs).shape[:-1]
        if told is None and only.kind == "cross_entropy" and only.given.numel() == shape.numel():
            # A temperature, say, which leaves their order.
            told = only.given.masked_fill(only.given == -100, self.likelihood.ignore_index).reshape(shape)
        return told


def _within_softmax(own: Tensor, outputs: Tensor, dim: int) -> tuple[Tensor, float]:
    """A gradient by logits, by what the logits' softmax feels of it alone, and the part that this left out.

    Of outputs that are logarithms of probabilities already nothing is said by the part that changes their sum.
    """
    total = own.sum(dim, keepdim=True)
    rounding = max(1e-3, 16 * torch.finfo(outputs.dtype).eps)
    outputs = outputs.to(own.dtype)
    if bool((outputs.logsumexp(dim).abs() < rounding).all()):
        return own - outputs.exp() * total, 0.0
    size = own.abs().sum()
    return own, float(total.abs().sum() / size.where(size > 0, 1))
