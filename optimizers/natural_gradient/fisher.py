"""The estimate: what is sent back through the model so that layers see the Fisher matrix of a likelihood."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from ..base import placed_mask
from ..curvature import communication
from ..curvature.losses import stated
from ..curvature.recorder import set_aside
from ..likelihoods import Categorical, Likelihood
from .agreement import Agreement

Fisher = Literal["sampled", "empirical", "exact"]


class Once:
    """Warnings that are given once each."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, sentence: str) -> None:
        """Warn of something, unless that was done.

        Args:
            sentence: without its full stop.
        """
        if sentence not in self._said:
            self._said.add(sentence)
            warnings.warn(sentence + ".", stacklevel=5)


class FisherEstimate:
    """The gradients by outputs whose second moments are the Fisher matrix of a likelihood.

    Args:
        likelihood: of the model's outputs.
        fisher: targets are sampled from the predictions, or all of them, weighed (``exact``).
        seed: of the sampled targets.
        say: how a user is told, once.
    """

    def __init__(self, likelihood: Likelihood, fisher: Fisher, seed: int, say: Once) -> None:
        self.likelihood, self.fisher, self.seed, self.say = likelihood, fisher, seed, say
        #: Whether the loss is the likelihood's.
        self.agreement = Agreement(likelihood)
        self._generator: torch.Generator | None = None
        #: Sum of what ``share`` has found in this step; None: passes count by their examples.
        self.shares: Tensor | None = None

    def reset(self) -> None:
        """Begin a step: targets are drawn anew."""
        self._generator = None
        self.shares = None
        self.agreement.reset()

    def weights(
        self, loss: Tensor, outputs: Tensor, targets: Tensor | None, mask: Tensor | None, told: bool
    ) -> Tensor:
        """How much each observation weighs in the loss, ``[n, ...]``.

        Args:
            loss: with its graph.
            outputs: that it was computed from.
            targets: of the loss, if they are known.
            mask: which observations count; None: as targets say.
            told: whether nobody has to be told of observations without a gradient.

        Raises:
            ValueError: mask or targets do not fit the outputs.
        """
        weights = self.likelihood.weights(outputs, targets)
        if mask is not None:
            kept = weights * placed_mask(mask.to(weights.device), weights.shape)
            total = kept.sum()
            one = torch.ones_like(total)
            unit = one if self.likelihood.reduction == "sum" else weights.sum() / total.where(total > 0, one)
            return kept * unit
        if not told:
            with set_aside([outputs]):
                (own,) = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
            if own is not None:
                silent = self.likelihood.observations(own).eq(0).all(-1)
                if bool(silent.any()):
                    self.say(
                        f"the loss has no gradient at {int(silent.sum())} of {silent.numel()} observations, "
                        "which count all the same: if they are padding, say so by backward(..., mask=...)"
                    )
        return weights

    def share(self, loss: Tensor, outputs: Tensor, targets: Tensor | None, scale: float) -> Tensor | None:
        """What part of the step's loss a pass has, where that is not a micro-batch's plain share.

        Micro-batches whose losses are means have equal parts. Where each is a sum that is divided by what the whole
        batch counts (tokens, in the package transformers), it is those with more to count that weigh more.

        Args:
            loss: with its graph.
            outputs: that it was computed from.
            targets: of the loss, if they are known.
            scale: a scaler's factor in the loss.

        Returns:
            The loss's factor to the likelihood's nll; None: it is not reduced otherwise than the likelihood.
        """
        if targets is None or not isinstance(self.likelihood, Categorical) or self.likelihood.reduction != "mean":
            return None
        if not any(s.kind == "cross_entropy" and s.reduction == "sum" for s in stated(loss, outputs)):
            return None
        leaf = outputs.detach().requires_grad_()
        with set_aside([outputs]), torch.enable_grad():
            (own,) = torch.autograd.grad(loss, outputs, retain_graph=True)
            (mean,) = torch.autograd.grad(self.likelihood.nll(leaf, targets), leaf)
        own, mean = own.double(), mean.double()
        square = mean.square().sum()
        found = ((own * mean).sum() / square.where(square > 0, 1) / scale).clamp(min=0)
        self.shares = found if self.shares is None else self.shares + found
        return found

    @staticmethod
    def multiplier(weights: Tensor, chosen: Tensor | None) -> Tensor:
        """What turns weights into those with which a mean over the observed examples of all ranks is a weighted sum.

        An example's weight in the batch of all ranks is its weight on its rank, times that rank's share of examples.
        Where a share of them is observed, ranks compare what they have: each must ask, without weights if need be.

        Args:
            weights: of this rank's observations in its loss.
            chosen: which of them are observed; None: all.
        """
        shown = weights if chosen is None else weights[chosen]
        part, whole = shown.sum(), weights.sum()
        if chosen is None or communication.world_size() == 1:
            return len(shown) * (whole / part.where(part > 0, 1))
        own = [t.double() * len(weights) for t in (part, whole)]
        counts = weights.new_tensor([len(shown), len(weights)], dtype=torch.float64)
        observed, examples, part, whole = communication.total(torch.cat([counts, torch.stack(own)]))
        ratio = whole / part.where(part > 0, 1)
        return (len(weights) * observed / examples.clamp(min=1) * ratio).to(weights.dtype)

    def gradients(
        self, outputs: Tensor, weights: Tensor, chosen: Tensor | None, multiplier: Tensor, scale: float, step: int
    ) -> Iterator[Tensor]:
        """What to send back: each observation's score of sampled targets, or the columns of a root of its Fisher.

        Scaled so that a mean over examples is the weighted sum over observations. Zero for who is not chosen.

        Args:
            outputs: observations, ``[n, ..., features]``.
            weights: theirs in the loss.
            chosen: which of them are observed; None: all.
            multiplier: of the weights.
            scale: a factor inside the loss.
            step: that is under way, of which sampled targets are a function.

        Yields:
            Gradients by the outputs, of their shape.
        """
        outputs = outputs.detach()
        chosen = None if chosen is None else chosen.to(outputs.device)
        seen, shares = (outputs, weights) if chosen is None else (outputs[chosen], weights[chosen])
        unit = (shares * multiplier.to(shares)).sqrt().unsqueeze(-1) * scale

        def placed(gradient: Tensor) -> Tensor:
            if chosen is None:
                return gradient
            return torch.zeros_like(outputs, dtype=gradient.dtype).index_copy_(0, chosen, gradient)

        if self.fisher == "sampled":
            if self._generator is None:
                self._generator = torch.Generator(outputs.device).manual_seed(self.seed * 1_000_003 + step)
            targets = self.likelihood.sample(
                outputs, self._generator, rank=communication.rank(), world_size=communication.world_size()
            )
            yield placed(unit * self.likelihood.score(seen, targets if chosen is None else targets[chosen]))
            return
        root = unit.unsqueeze(-1) * self.likelihood.hessian_sqrt(seen)
        positions = root.flatten(1, -3) if root.dim() > 3 else root.unsqueeze(1)  # [n, positions, features, rank]
        for position in range(positions.shape[1]):
            for column in range(positions.shape[-1]):
                gradient = torch.zeros_like(positions[..., 0])
                gradient[:, position] = positions[:, position, :, column]
                yield placed(gradient.view_as(seen))
