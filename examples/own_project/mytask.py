"""Numbers to be predicted, with errors of variance one."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from optimizers import Gaussian
from training.tasks import Task
from training.tasks.metrics import Mean, Meters


class Regression(Task):
    """Minimises the squared error; measures the mean absolute one."""

    name = "regression"
    metrics: ClassVar = {"loss": "min", "error": "min"}
    main = "error"

    def __init__(self) -> None:
        self.likelihood = Gaussian()

    @classmethod
    def of(cls, facts: dict[str, Any], label_smoothing: float, seed: int) -> Task:
        """Built of what the data set says of itself."""
        cls._refuse_smoothing(label_smoothing)
        return cls()

    def meters(self, device: torch.device) -> Meters:
        """Fresh ones."""
        return Meters({"loss": Mean(device), "error": Mean(device)})

    def measure(self, meters: Meters, outputs: Tensor, targets: Tensor, loss: Tensor | None = None) -> None:
        """Count a batch."""
        meters.examples += len(targets)
        meters.metrics["loss"].update(self.loss(outputs, targets) if loss is None else loss, len(targets))
        meters.metrics["error"].update((outputs - targets).abs().mean(), len(targets))
