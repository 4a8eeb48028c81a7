"""Number formats of the forward pass: autocast, loss scaling, memory layout."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from training.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """How a model computes.

    Args:
        name: "fp32" leaves every dtype alone; "bf16" and "fp16" autocast the forward pass.
        device: where it computes.
        channels_last: image batches and convolutions in the layout that tensor cores prefer.

    Raises:
        UserError: for fp16 without a GPU.
    """

    def __init__(
        self, name: Literal["fp32", "bf16", "fp16"], device: torch.device, channels_last: bool = False
    ) -> None:
        if name == "fp16" and device.type != "cuda":
            raise UserError(
                f"precision=fp16 needs a CUDA GPU and this run is on {device.type}: set trainer.precision=bf16 or fp32."
            )
        self.device = device
        self._dtype = DTYPES[name]
        self._channels_last = channels_last

    def scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler that does something for fp16 only: the other formats hold small gradients."""
        return torch.amp.GradScaler(self.device.type, enabled=self._dtype is torch.float16)

    def autocast(self) -> AbstractContextManager[None]:
        """The context of forward passes and losses."""
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not torch.float32)

    def place(self, model: nn.Module) -> None:
        """Move a model to the device and the layout; its parameters stay the same objects."""
        model.to(self.device)
        if self._channels_last:
            model.to(memory_format=torch.channels_last)

    def prepare(self, inputs: Tensor) -> Tensor:
        """A batch in the model's layout."""
        return (
            inputs.contiguous(memory_format=torch.channels_last)
            if self._channels_last and inputs.dim() == 4
            else inputs
        )

    @staticmethod
    def full(outputs: Tensor) -> Tensor:
        """Outputs in a format fit for sums and logarithms."""
        return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs
