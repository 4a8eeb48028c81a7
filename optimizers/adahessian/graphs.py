"""What the graph behind a loss reaches, and what in it may hide parameters from second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..curvature import second_order

#: What is said of parameters that only a backward pass within the backward pass reaches.
UNSEEN = (
    "AdaHessian finds no second derivatives by {}, which a function of the model differentiates by in a backward pass "
    "of its own: give torch.utils.checkpoint use_reentrant=False, or compute it without that function."
)


def graph(*roots: Tensor) -> tuple[list[Any], list[Tensor]]:
    """The nodes behind some tensors, and the leaves they accumulate gradients of."""
    seen: set[Any] = set()
    found, waiting, leaves = [], [root.grad_fn for root in roots], []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.append(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        waiting += [before for before, _ in node.next_functions]
    return found, leaves


def may_hide(node: Any) -> bool:
    """Whether a node is a function written in Python, of which this package's own hide nothing."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return False
    return getattr(type(node), "_forward_cls", type(node)).__module__ != second_order.__name__


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether two gradients are not one up to the rounding of half precision."""
    return bool((a - b).norm() > 0.02 * b.norm())


def owned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, cloned where they share memory or are expanded: what ``.grad`` may hold and others may change."""
    seen: set[int] = set()
    result = []
    for tensor in tensors:
        if tensor.layout is not torch.strided:
            result.append(tensor)
            continue
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        own = place not in seen and storage.nbytes() == tensor.numel() * tensor.element_size()
        seen.add(place)
        result.append(tensor if own else tensor.clone(memory_format=torch.contiguous_format))
    return result
