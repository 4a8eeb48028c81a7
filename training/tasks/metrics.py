"""Means over examples, kept on the device and reduced over ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy


class Mean(Metric):
    """A weighted mean with float64 sums, so that one process and several agree to the last digits of the model's dtype.

    torchmetrics' MeanMetric waits for the device at every update to look for NaN, and drops the weights if told not
    to.

    Args:
        device: where the sums are kept.
    """

    total: Tensor
    weight: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which "mps" lacks
        for name in ("total", "weight"):
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.to(device)

    def update(self, value: Tensor, weight: float | Tensor) -> None:
        """Count a scalar value as much as its weight says."""
        self.total += value.to(self.total.dtype) * weight
        self.weight += weight

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.weight


class Perplexity(Mean):
    """The exponential of a mean negative log-likelihood: e to the (sum over all tokens / their number).

    Args:
        device: where the sums are kept.
    """

    def compute(self) -> Tensor:
        """The perplexity so far."""
        return super().compute().exp()


def accuracy(num_classes: int, device: torch.device) -> Metric:
    """The share of examples whose largest output is the target's; counted in whole numbers."""
    return MulticlassAccuracy(num_classes, average="micro", validate_args=False).to(device)


class Meters:
    """Named metrics that are read, reset and saved together.

    Attributes:
        metrics: torchmetrics by name; every rank must hold the same names.
        examples: how many were counted since the last reset, on this rank.
    """

    def __init__(self, metrics: dict[str, Metric]) -> None:
        self.metrics = metrics
        self.examples = 0
        for metric in metrics.values():
            metric.persistent(True)

    def compute(self) -> dict[str, float]:
        """The values over all ranks. Every rank must call it; waits for the device."""
        for metric in self.metrics.values():
            metric._update_count = max(metric._update_count, 1)  # an empty share of the data is no reason to warn
        return {name: float(metric.compute()) for name, metric in self.metrics.items()}

    def reset(self) -> None:
        """Start anew."""
        self.examples = 0
        for metric in self.metrics.values():
            metric.reset()

    def state_dict(self) -> dict[str, Tensor | int]:
        """The sums of this rank; those of several ranks may be added."""
        state: dict[str, Tensor | int] = {"examples": self.examples}
        for name, metric in self.metrics.items():
            state |= {f"{name}.{key}": value.clone() for key, value in metric.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Go on from saved sums."""
        self.reset()
        self.examples = int(state["examples"])
        for name, metric in self.metrics.items():
            metric.load_state_dict(
                {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            )
