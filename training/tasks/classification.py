"""One of several classes an example."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from optimizers.likelihoods import Categorical
from training.errors import UserError
from training.tasks.metrics import Accuracy, Mean, Meters, TopAccuracy
from training.tasks.task import Task

#: How many outputs count for the accuracy that is named after them.
TOP = 5
TOP5 = "top5_accuracy"


class Classification(Task):
    """One of several classes an example; outputs are logits ``[batch, classes]``, targets int64 ``[batch]``.

    Of mixed images, targets are probabilities ``[batch, classes]``: the loss is their cross-entropy, and accuracy is
    that of the class with the largest part.

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

    @classmethod
    def of(cls, facts: dict[str, Any], label_smoothing: float, seed: int) -> Task:
        """See Task."""
        return cls(facts["num_classes"], label_smoothing)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Task.

        Raises:
            UserError: the model's outputs are not as many as the classes.
        """
        if outputs.shape[-1] != self.num_classes:
            raise UserError(
                f"a classification needs {self.num_classes} outputs an example, one a class, and this model gives "
                f"{list(outputs.shape[1:])}: choose a classifier, or a data set of images to rebuild"
            )
        return super().loss(outputs, targets)

    def count_top5(self) -> None:
        """Have evaluations measure the top-5 accuracy too, if there are more than five classes."""
        if self.num_classes > TOP:
            self.metrics = {**type(self).metrics, TOP5: "max"}  # type: ignore[misc]  # of this run alone

    def meters(self, device: torch.device) -> Meters:
        """See Task."""
        return Meters({"loss": Mean(device), "accuracy": Accuracy(device)})

    def examiners(self, device: torch.device) -> Meters:
        """See Task."""
        meters = self.meters(device)
        if TOP5 in self.metrics:
            meters.metrics[TOP5] = TopAccuracy(device, TOP)
        return meters

    def measure(self, meters: Meters, outputs: Tensor, targets: Tensor, loss: Tensor | None = None) -> None:
        """See Task."""
        meters.examples += len(targets)
        meters.metrics["loss"].update(self._proper.nll(outputs, targets) if loss is None else loss, len(targets))
        targets = targets.argmax(1) if targets.is_floating_point() else targets
        meters.metrics["accuracy"].update(outputs, targets)
        if TOP5 in meters.metrics:
            meters.metrics[TOP5].update(outputs, targets)
