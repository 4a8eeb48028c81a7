"""The input's own pixels."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from optimizers.likelihoods import Bernoulli, Gaussian
from training.errors import UserError
from training.tasks.metrics import Mean, Meters
from training.tasks.task import Task


class Reconstruction(Task):
    """The input's pixels; outputs are logits or means ``[batch, pixels]``, targets the pixels themselves.

    Trained on the likelihood, a sum over the pixels, so that curvature needs no scaling; reported a pixel, as
    auto-encoders are compared: the cross-entropy (Bernoulli) or the squared error (Gaussian) of the average pixel.

    Args:
        likelihood: bernoulli, pixels in [0, 1] as probabilities; or gaussian, of variance 1/2, whose negative
            log-likelihood is the squared error itself.

    Raises:
        ValueError: for a likelihood there is none of.
    """

    name = "reconstruction"
    metrics: ClassVar[dict[str, Literal["min", "max"]]] = {"loss": "min", "mse": "min"}
    main = "loss"

    def __init__(self, likelihood: str = "bernoulli") -> None:
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f"likelihood must be bernoulli or gaussian, got {likelihood!r}")
        self.likelihood = Bernoulli() if likelihood == "bernoulli" else Gaussian(sigma=math.sqrt(0.5))

    @classmethod
    def of(cls, facts: dict[str, Any], label_smoothing: float, seed: int) -> Task:
        """See Task."""
        cls._refuse_smoothing(label_smoothing)
        return cls(facts["likelihood"])

    def meters(self, device: torch.device) -> Meters:
        """See Task."""
        return Meters({"loss": Mean(device), "mse": Mean(device)})

    def measure(self, meters: Meters, outputs: Tensor, targets: Tensor, loss: Tensor | None = None) -> None:
        """See Task."""
        meters.examples += len(targets)
        loss = self.loss(outputs, targets) if loss is None else loss
        meters.metrics["loss"].update(loss / targets.shape[1], len(targets))
        meters.metrics["mse"].update((self.pixels(outputs) - targets).square().mean(), len(targets))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Task.

        Raises:
            UserError: the model's outputs are not as many as the pixels.
        """
        if outputs.shape != targets.shape:
            raise UserError(
                f"a reconstruction needs {targets.shape[1]} outputs an image, one a pixel, and this model gives "
                f"{list(outputs.shape[1:])}: choose an auto-encoder"
            )
        return super().loss(outputs, targets)

    def pixels(self, outputs: Tensor) -> Tensor:
        """The expected pixels, ``[batch, pixels]``."""
        return outputs.sigmoid() if isinstance(self.likelihood, Bernoulli) else outputs
