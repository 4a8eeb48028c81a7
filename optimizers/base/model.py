"""The model inside its wrappers, and which of its outputs count."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel or torch.compile wrappers, whose names are stable."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def placed_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """A mask of the observations, bool, in their shape.

    Args:
        mask: of their leading dimensions, or of the first of them.
        shape: of the observations, ``[n, ...]``.

    Raises:
        ValueError: if it does not fit.
    """
    if mask.shape != shape[: mask.dim()] or not mask.dim():
        raise ValueError(
            f"mask must have the shape of the outputs' observations {list(shape)}, or of the first dimensions of it, "
            f"got {list(mask.shape)}."
        )
    return mask.bool().view(*mask.shape, *[1] * (len(shape) - mask.dim())).expand(shape)
