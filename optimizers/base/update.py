"""What updates are made of, for lists of tensors: rates, steps in place, limits of their length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def real(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Views of complex tensors as real ones of two channels, behind which they are optimized; others as they are."""
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]


def rate(group: Mapping[str, Any]) -> float | Tensor:
    """A group's learning rate: a number, or a tensor of no dimension on an accelerator, to read which would wait."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return lr
    return float(lr) if lr.device.type == "cpu" else lr.reshape(())


def known_rate(group: Mapping[str, Any]) -> float | Tensor:
    """A group's learning rate, or 1 where it has none that is a number: the optimizer then finds it by itself."""
    return rate(group) if isinstance(group.get("lr"), (int, float, Tensor)) else 1.0


def descend(params: list[Tensor], directions: list[Tensor], lr: float | Tensor) -> None:
    """``params -= lr * directions``, in place."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(directions, lr))
    else:
        torch._foreach_add_(params, directions, alpha=-lr)


def limited(updates: list[Tensor], largest: float, sizes: list[float]) -> list[float] | list[Tensor]:
    """``sizes``, less where the root mean square of ``size * update`` is above ``largest`` (Shazeer & Stern, 2018, 6).

    Numbers on a CPU; tensors of no dimension on an accelerator, to read which would wait.
    """
    wide = torch.float64 if any(u.dtype == torch.float64 for u in updates) else torch.float32
    norms = torch._foreach_norm(updates, 2, dtype=wide)
    ends = [largest * math.sqrt(u.numel()) for u in updates]
    if all(norm.device.type == "cpu" for norm in norms):
        lengths = torch.stack(list(norms)).tolist()
        # A length that is no number stays in the product with it.
        return [size if not size * n > end else end / n for size, n, end in zip(sizes, lengths, ends, strict=True)]
    shares = torch._foreach_reciprocal(norms)
    torch._foreach_mul_(shares, ends)
    return [share.clamp(max=size).to(u.dtype) for share, size, u in zip(shares, sizes, updates, strict=True)]


def descend_scaled(
    params: list[Tensor],
    moments: list[Tensor],
    denominators: list[Tensor],
    sizes: list[float],
    lr: float | Tensor,
    largest: float | None = None,
) -> None:
    """``params -= lr * updates``, in place, of ``sizes * moments / denominators``, each no longer than ``largest``."""
    if largest is None and not isinstance(lr, Tensor):
        torch._foreach_addcdiv_(params, moments, denominators, [-lr * size for size in sizes])
        return
    updates = list(torch._foreach_div(moments, denominators))
    scales = sizes if largest is None else limited(updates, largest, sizes)
    if isinstance(lr, Tensor) or isinstance(scales[0], Tensor):
        torch._foreach_mul_(updates, scales)
        descend(params, updates, lr)
    else:  # no pass that scales the updates
        for p, update, scale in zip(params, updates, scales, strict=True):
            p.add_(update, alpha=-lr * scale)
