"""What a run takes: passes through its model, and the processor's time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.transformers.gpt import Block
from training.callbacks import Callback
from training.runs.run import Run
from training.tasks.task import Turn


class Meter(Callback):
    """Counts passes through the model, and the processor's seconds, up to the last step; they join the summary."""

    def __init__(self) -> None:
        self._batch, self._began, self._seconds = 0, 0.0, 0.0
        self._forward = self._backward = 0.0

    def on_fit_start(self, run: Run) -> None:
        """See Callback."""
        self._began = time.process_time()
        # A block's outputs: some methods ask for gradients by the net's outputs alone, which is no pass through it.
        first = next((module for module in run.model.modules() if isinstance(module, Block)), run.model)
        first.register_forward_hook(self._passed)

    def on_batch(self, run: Run, turn: Turn, inputs: Tensor, targets: Tensor) -> None:
        """See Callback."""
        self._batch = len(inputs)

    def on_step(self, run: Run) -> None:
        """See Callback."""
        self._seconds = time.process_time() - self._began

    def on_fit_end(self, run: Run, summary: dict[str, Any]) -> None:
        """See Callback."""
        steps = max(1, run.step)
        summary["meter"] = {
            "cpu": self._seconds / steps, "forward": self._forward / steps, "backward": self._backward / steps,
        }  # fmt: skip

    def _passed(self, model: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor | None:
        if not model.training:
            return None
        share = len(outputs) / self._batch
        self._forward += share

        def back() -> None:
            self._backward += share

        return _Gate.apply(outputs, back) if outputs.requires_grad else None


class _Gate(torch.autograd.Function):
    """The identity, which tells when a gradient comes through, whatever a pass asks for; hooks of tensors do not."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, back: Callable[[], None]) -> Tensor:
        ctx.back = back
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
        ctx.back()
        return gradients[0], None
