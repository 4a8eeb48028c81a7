"""Starting values of affine layers. Each layer draws anew from torch's random state, so no two are equal."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import nn

Init = Literal["kaiming", "xavier", "sparse", "default"]
SPARSE_FAN_IN = 15  # incoming weights of a unit that do not start at zero


@torch.no_grad()
def initialise(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d, init: Init, followed_by: str = "linear") -> None:
    """Set a layer's weight, and its bias to zero.

    Args:
        layer: what to initialise, in place.
        init: ``kaiming``: uniform, so that the activations' size stays the same from layer to layer (He et al., 2015);
            ``xavier``: uniform, a compromise between forward and backward pass for an activation of slope 1 (Glorot &
            Bengio, 2010); ``sparse``: 15 incoming weights of a unit from N(0, 1), the others zero (Martens, 2010);
            ``default``: torch's own, the bias included.
        followed_by: the activation after the layer, as ``torch.nn.init.calculate_gain`` knows it; for ``kaiming``.

    Raises:
        ValueError: for an initialisation that does not exist.
    """
    if init not in get_args(Init):
        raise ValueError(f"init must be one of {', '.join(get_args(Init))}, got {init!r}")
    if init == "default":
        return
    if init == "kaiming":
        gain = nn.init.calculate_gain(followed_by)  # type: ignore[arg-type]  # checked by whoever names the activation
        bound = gain * math.sqrt(3 / _fan_in(layer))
        nn.init.uniform_(layer.weight, -bound, bound)
    elif init == "xavier":
        nn.init.xavier_uniform_(layer.weight)
    else:
        rows = layer.weight.flatten(1)
        count = min(SPARSE_FAN_IN, rows.shape[1])
        chosen = torch.rand_like(rows).topk(count, dim=1).indices
        values = torch.randn_like(rows[:, :count])
        layer.weight.copy_(torch.zeros_like(rows).scatter_(1, chosen, values).view_as(layer.weight))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _fan_in(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> float:
    """How many inputs add up to an output; of a transposed convolution the mean, for the stride spreads them out."""
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.in_channels / layer.groups * math.prod(layer.kernel_size) / math.prod(layer.stride)
    return layer.weight[0].numel()
