"""Checks of hyper-parameters: a value out of its range ends in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import Tensor


def check_range(
    name: str,
    value: float | Tensor,
    low: float,
    high: float = float("inf"),
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raise ValueError with a sentence unless ``value`` is in the interval (ends included unless open)."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must be one number, got a tensor of {value.numel()}")
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (above and below):  # also catches NaN
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high or high == float('inf') else ']'}"
        raise ValueError(f"{name} must be in {interval}, got {value!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError with a sentence unless ``value`` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def are_sharded(params: Iterable[Tensor]) -> bool:
    """Whether some parameters are pieces of whole ones: ``DTensor``, as ``torch.distributed.fsdp.fully_shard`` has."""
    module = sys.modules.get("torch.distributed.tensor")  # without which there are none
    return module is not None and any(isinstance(p, module.DTensor) for p in params)


def refuse_sharded(name: str, params: Iterable[Tensor]) -> None:
    """See to it that no parameters are pieces of whole ones.

    Args:
        name: of what needs whole ones.
        params: all of them.

    Raises:
        TypeError: some are.
    """
    if are_sharded(params):
        raise TypeError(
            f"{name} needs whole weights, and these are sharded over processes (fully_shard): train with "
            "DistributedDataParallel, or these weights with a first-order optimizer of torch."
        )
