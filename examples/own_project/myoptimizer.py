"""Steps by the sign of an average of gradients."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class SignMomentum(Optimizer):
    """Each weight goes the same length, against the sign of its averaged gradient."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float = 1e-3, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take a step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group["decay"])
                    p.add_(average.sign(), alpha=-group["lr"])
