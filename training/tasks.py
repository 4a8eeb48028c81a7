"""What a model is trained for: its loss, what is measured, and which of these choose the best weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from optimizers.likelihoods import Categorical, Likelihood
from training.metrics import Mean, Meters, accuracy


class Task(ABC):
    """Loss and metrics of one kind of problem.

    Attributes:
        name: what data sets call it.
        metrics: names and which way is better.
        main: the metric that chooses the best weights unless the user says otherwise.
        likelihood: p(targets | outputs) that is trained on; curvature methods sample from it.
    """

    name: ClassVar[str]
    metrics: ClassVar[dict[str, Literal["min", "max"]]]
    main: ClassVar[str]
    likelihood: Likelihood

    @abstractmethod
    def meters(self, device: torch.device) -> Meters:
        """Fresh meters of ``metrics``."""

    @abstractmethod
    def measure(self, meters: Meters, outputs: Tensor, targets: Tensor, loss: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            meters: what ``meters`` made.
            outputs: ``[batch, ...]``, full precision, no gradient.
            targets: ``[batch, ...]``.
            loss: the training loss of the batch, a scalar; None: the likelihood's own is computed.
        """

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The scalar to train on: the mean over the batch."""
        return self.likelihood.nll(outputs, targets)


class Classification(Task):
    """One of several classes an example; outputs are logits ``[batch, classes]``, targets int64 ``[batch]``.

    Args:
        num_classes: how many.
        label_smoothing: of the training loss; evaluation has none.
    """

    name = "classification"
    metrics: ClassVar[dict[str, Literal["min", "max"]]] = {"loss": "min", "accuracy": "max"}
    main = "accuracy"

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        self.num_classes = num_classes
        self.likelihood = Categorical(label_smoothing)
        self._proper = Categorical()

    def meters(self, device: torch.device) -> Meters:
        """See Task."""
        return Meters({"loss": Mean(device), "accuracy": accuracy(self.num_classes, device)})

    def measure(self, meters: Meters, outputs: Tensor, targets: Tensor, loss: Tensor | None = None) -> None:
        """See Task."""
        meters.examples += len(targets)
        meters.metrics["loss"].update(self._proper.nll(outputs, targets) if loss is None else loss, len(targets))
        meters.metrics["accuracy"].update(outputs, targets)


def build(name: str, facts: dict[str, Any], label_smoothing: float = 0.0) -> Task:
    """The task a data set asks for.

    Args:
        name: ``DataModule.task``.
        facts: ``DataModule.facts``.
        label_smoothing: of the training loss.

    Raises:
        ValueError: for a task there is none of, or label smoothing out of its range.
    """
    if name == Classification.name:
        return Classification(facts["num_classes"], label_smoothing)
    raise ValueError(f"task must be {Classification.name!r}, got {name!r}")
