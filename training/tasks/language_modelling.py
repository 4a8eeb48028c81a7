"""The next token at every position."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from optimizers.likelihoods import Categorical
from training.errors import UserError
from training.tasks.metrics import Mean, Meters, Perplexity
from training.tasks.task import Task


class LanguageModelling(Task):
    """The next token at every position; outputs are logits ``[batch, sequence, vocabulary]``, targets int64.

    Every mean is over the tokens that count, which are those whose target is not -100. The perplexity of several
    batches is that of all their tokens together, not a mean of perplexities.

    Args:
        vocabulary: how many tokens there are.
        label_smoothing: of the training loss; evaluation, and perplexity, have none.
    """

    name = "language_modelling"
    metrics: ClassVar[dict[str, Literal["min", "max"]]] = {"loss": "min", "perplexity": "min"}
    main = "perplexity"

    def __init__(self, vocabulary: int, label_smoothing: float = 0.0) -> None:
        self.vocabulary = vocabulary
        self.likelihood = Categorical(label_smoothing)
        self._smoothed = label_smoothing > 0
        self._proper = Categorical()

    @classmethod
    def of(cls, facts: dict[str, Any], label_smoothing: float, seed: int) -> Task:
        """See Task."""
        return cls(facts["vocabulary"], label_smoothing)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Task.

        Raises:
            UserError: the model's outputs are not a logit a token of the vocabulary for each target.
        """
        if outputs.shape != (*targets.shape, self.vocabulary):
            raise UserError(
                f"language modelling needs outputs {[*targets.shape[1:], self.vocabulary]} an example, a logit a token "
                f"for every position, and this model gives {list(outputs.shape[1:])}: choose a language model"
            )
        return super().loss(outputs, targets)

    def meters(self, device: torch.device) -> Meters:
        """See Task."""
        return Meters({"loss": Mean(device), "perplexity": Perplexity(device)})

    def measure(self, meters: Meters, outputs: Tensor, targets: Tensor, loss: Tensor | None = None) -> None:
        """See Task."""
        meters.examples += len(targets)
        tokens = (targets != -100).sum()
        nll = self._proper.nll(outputs, targets) if loss is None or self._smoothed else loss
        meters.metrics["loss"].update(nll if loss is None else loss, tokens)
        meters.metrics["perplexity"].update(nll, tokens)
