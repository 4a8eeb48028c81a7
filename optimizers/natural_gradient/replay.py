"""The forward passes of a step once more, when it was taken: what it has changed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..base import placed_mask
from ..curvature.approximations import statistics_dtype
from ..curvature.recorder import RootInputs, UnderWay
from ..likelihoods import Likelihood


class Replay:
    """What the model was called with in a step and what it returned.

    Args:
        model: the whole module.
        likelihood: of its outputs.
        watches: whether the pass under way is to be kept.

    Attributes:
        inputs: of the calls.
        shown: outputs, targets and weights of calls.
        losses: of each of these calls, where they are to be compared.
        stated: what they were called with for a loss: micro-batches' shares of one.
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood, watches: Callable[[], bool]) -> None:
        self.likelihood = likelihood
        self.inputs = RootInputs(model, watches)
        self.shown: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self.losses: list[Tensor] = []
        self.stated: list[Tensor] = []
        self._masks: list[Tensor | None] = []

    def reset(self) -> None:
        """Forget the step."""
        for kept in (self.shown, self.losses, self.stated, self._masks):
            kept.clear()
        self.inputs.reset()

    def under_way(self) -> UnderWay:
        """Calls that no ``backward`` has shown the outputs of yet."""
        return self.inputs.under_way(len(self.shown))

    def close(self) -> None:
        """Remove every hook from the model."""
        self.inputs.close()

    def note_loss(self, loss: Tensor, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> None:
        """Keep what the loss of the last call shown is, before the step that is to be judged by it.

        Args:
            loss: what ``backward`` was called with, without its graph and any scale.
            outputs: of the call.
            targets: of the loss.
            mask: which observations count; None: all.

        Raises:
            ValueError: targets are not known, or the mask does not fit.
        """
        if targets is None and outputs.numel():
            raise ValueError(
                "targets must be given to backward(loss, outputs, targets=...) for damping='auto', which compares the "
                "likelihood's loss before and after steps: this loss does not state them."
            )
        if mask is not None:
            shape = self.likelihood.observations(outputs, targets).shape[:-1]
            mask = placed_mask(mask.to(outputs.device), shape)
        self.stated.append(loss)
        self._masks.append(mask)
        with torch.no_grad():
            self.losses.append(self._loss(len(self.losses), outputs))

    def check(self, asked: str, when: str) -> None:
        """See to it that what the model returned is known of each of its calls.

        Args:
            asked: the option that needs it.
            when: in each step, or in some.

        Raises:
            RuntimeError: it is not.
        """
        if not self.shown or len(self.shown) != len(self.inputs.gone_through()):
            raise RuntimeError(
                f"{asked} looks at what the model returns {when}, and saw {len(self.inputs.calls)} forward "
                f"passes for {len(self.shown)} backward(loss, outputs): call the model once for each of them."
            )

    def compare(self, *, divergence: bool, loss: bool) -> dict[str, Tensor]:
        """Means over calls of what has changed since.

        Args:
            divergence: whether to measure the KL divergence of predictions, ``"divergence"``.
            loss: whether to compute the losses, ``"before"`` and ``"after"``.
        """
        found: dict[str, list[Tensor]] = {}
        for index in range(len(self.shown)):
            after = self.inputs.again(index)
            if divergence:
                found.setdefault("divergence", []).append(self._divergence(index, after))
            if loss:
                found.setdefault("after", []).append(self._loss(index, after))
        if loss:
            found["before"] = self.losses
        return {name: torch.stack(values).mean() for name, values in found.items()}

    def rounding(self) -> float:
        """By what share losses are off as numbers are: outputs round each for itself, the sum in float32 or wider."""
        count = sum(outputs.numel() for outputs, _, _ in self.shown)
        each, total = torch.finfo(self.shown[0][0].dtype).eps, torch.finfo(self.losses[0].dtype).eps
        return max(each / max(count, 1) ** 0.5, total)

    def _loss(self, index: int, outputs: Tensor) -> Tensor:
        """The likelihood's loss of a call, with the outputs that it has now."""
        targets = self.shown[index][1]
        if targets is None:  # of no examples
            return outputs.new_zeros((), dtype=torch.promote_types(outputs.dtype, torch.float32))
        return self.likelihood.masked_nll(outputs, targets, self._masks[index])

    def _divergence(self, index: int, now: Tensor) -> Tensor:
        """KL divergence of a call's predictions as they were from those that they are now."""
        outputs, targets, weights = self.shown[index]
        before, after = (self.likelihood.observations(o, targets) for o in (outputs, now))
        wide = statistics_dtype(before)
        return (weights * self.likelihood.divergence(before.to(wide), after.to(wide))).sum()
