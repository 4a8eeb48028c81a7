"""Fully connected nets."""

from __future__ import annotations

from typing import Literal

from torch import nn

from models.parts.checks import check_rates

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU}


def mlp(
    hidden: list[int],
    activation: Literal["relu", "tanh", "sigmoid", "gelu"] = "relu",
    dropout: float = 0.0,
    batch_norm: bool = False,
    *,
    in_channels: int,
    image_size: int,
    num_classes: int,
) -> nn.Module:
    """A fully connected net on flattened images: per hidden layer Linear, (BatchNorm,) activation (, Dropout).

    Args:
        hidden: widths of the hidden layers, the first one first; none at all make logistic regression.
        activation: after each hidden layer.
        dropout: probability of dropping a hidden unit.
        batch_norm: normalise each hidden layer before its activation (its bias is then left out).
        in_channels: of the images.
        image_size: side of the images.
        num_classes: outputs.

    Returns:
        A module from ``[b, in_channels, image_size, image_size]`` to logits ``[b, num_classes]``.

    Raises:
        ValueError: for a width, activation or probability out of its range.
    """
    if any(width < 1 for width in hidden):
        raise ValueError(f"hidden must hold widths of at least 1, got {list(hidden)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    check_rates(dropout=dropout)
    layers: list[nn.Module] = [nn.Flatten()]
    fan_in = in_channels * image_size**2
    for width in hidden:
        layers.append(nn.Linear(fan_in, width, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(ACTIVATIONS[activation]())
        if dropout:
            layers.append(nn.Dropout(dropout))
        fan_in = width
    return nn.Sequential(*layers, nn.Linear(fan_in, num_classes))
