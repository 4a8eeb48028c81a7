"""What is counted of a model's outputs: sums that stay on the device, and are reduced over ranks when they are read.

torchmetrics has the same with more around it: it imports matplotlib, which takes longer than a short run, looks at its
inputs, which waits for the device, and counts every class. Where a metric is more than a few sums (Fréchet distances),
it is torchmetrics'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from optimizers.curvature.communication import world_size


class Metric(Protocol):
    """What ``Meters`` reads, and what tasks count with."""

    @property
    def update(self) -> Callable[..., None]:
        """Count a batch."""

    def compute(self) -> Tensor:
        """The value over all ranks. Every rank must call it."""

    def reset(self) -> None:
        """Start anew."""


class Sums:
    """A value of a few sums over examples.

    Args:
        device: where the sums are kept.

    Attributes:
        names: of the sums, which are attributes.
    """

    names: ClassVar[tuple[str, ...]]

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def _zero(self) -> Tensor:
        """Float64, so that one process and several agree to the last digits of the model's dtype."""
        return torch.zeros((), dtype=torch.float32 if self.device.type == "mps" else torch.float64, device=self.device)

    def value(self, *sums: Tensor) -> Tensor:
        """The value that sums over all ranks have, in the order of ``names``."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """The value over all ranks. Every rank must call it."""
        sums = torch.stack([getattr(self, name) for name in self.names])
        if world_size() > 1:
            dist.all_reduce(sums)
        return self.value(*sums)

    def reset(self) -> None:
        """Start anew."""
        for name in self.names:
            setattr(self, name, self._zero())

    def state_dict(self) -> dict[str, Tensor]:
        """The sums of this rank; those of several ranks may be added."""
        return {name: getattr(self, name).clone() for name in self.names}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved sums."""
        for name in self.names:
            setattr(self, name, state[name].to(self._zero(), copy=True))


class Mean(Sums):
    """A weighted mean.

    Args:
        device: where the sums are kept.
    """

    names = ("total", "weight")
    total: Tensor
    weight: Tensor

    def update(self, value: Tensor, weight: float | Tensor) -> None:
        """Count a scalar value as much as its weight says."""
        self.total += value.to(self.total.dtype) * weight
        self.weight += weight

    def value(self, *sums: Tensor) -> Tensor:
        """See Sums."""
        total, weight = sums
        return total / weight


class Perplexity(Mean):
    """The exponential of a mean negative log-likelihood: e to the (sum over all tokens / their number).

    Args:
        device: where the sums are kept.
    """

    def value(self, *sums: Tensor) -> Tensor:
        """See Sums."""
        return super().value(*sums).exp()


class Accuracy(Sums):
    """The share of examples whose largest output is the target's.

    Args:
        device: where the sums are kept.
    """

    names = ("tp", "fn")  # as torchmetrics calls what was right and what was not, in checkpoints
    tp: Tensor
    fn: Tensor

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch: outputs ``[batch, classes]``, targets ``[batch]``."""
        right = (outputs.argmax(1) == targets).sum()
        self.tp += right
        self.fn += len(targets) - right

    def value(self, *sums: Tensor) -> Tensor:
        """See Sums."""
        right, wrong = sums
        return right / (right + wrong)


class TopAccuracy(Accuracy):
    """The share of examples whose target is among the largest outputs.

    Args:
        device: where the sums are kept.
        k: how many outputs count.
    """

    def __init__(self, device: torch.device, k: int = 5) -> None:
        self.k = k
        super().__init__(device)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch: outputs ``[batch, classes]``, targets ``[batch]``."""
        right = (outputs.topk(self.k, dim=1).indices == targets[:, None]).any(1).sum()
        self.tp += right
        self.fn += len(targets) - right


class Meters:
    """Named metrics that are read, reset and saved together.

    Attributes:
        metrics: by name; every rank must hold the same names.
        examples: how many were counted since the last reset, on this rank.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics = dict(metrics)
        self.examples = 0

    def compute(self) -> dict[str, float]:
        """The values over all ranks. Every rank must call it; waits for the device."""
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
            assert isinstance(metric, Sums), "only an evaluation, which is never saved, has others"
            state |= {f"{name}.{key}": value for key, value in metric.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Go on from saved sums."""
        self.reset()
        self.examples = int(state["examples"])
        for name, metric in self.metrics.items():
            assert isinstance(metric, Sums)
            metric.load_state_dict({n: torch.as_tensor(state[f"{name}.{n}"]) for n in metric.names})
