"""Which examples belong to which split: orders that depend on a seed alone, cut into parts."""

from __future__ import annotations

import torch
from torch import Tensor

from data.base import DataError


def random_order(count: int, seed: int) -> Tensor:
    """A random order of so many examples."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def stratified_order(targets: Tensor, seed: int) -> Tensor:
    """A random order of the examples in which every stretch holds the classes in their proportions.

    Each example gets a place in (0, 1) by its rank among its own class, and all are sorted by place.
    """
    shuffled = random_order(len(targets), seed)
    place = torch.empty(len(targets), dtype=torch.float64)
    for label in targets.unique():
        mine = (targets[shuffled] == label).nonzero().flatten()
        place[mine] = (torch.arange(len(mine), dtype=torch.float64) + 0.5) / len(mine)
    return shuffled[place.argsort(stable=True)]


def cut(order: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """The first ``fraction`` of an order (at least one example, unless it is 0), and the rest."""
    count = max(1, round(fraction * len(order))) if fraction else 0
    if count >= len(order):
        raise DataError(f"the {len(order)} examples found are too few to split into train, validation and test")
    return order[:count], order[count:]


def limited(rows: Tensor, name: str, limit: float) -> Tensor:
    """A share of the rows: the first ones of an order that is random, of a test set, which has its own, some of all."""
    count = round(limit * len(rows))
    if not count:
        raise ValueError(f"{name} must leave at least one of the {len(rows)} examples, got {limit}")
    return spread(rows, count) if name == "limit_test" else rows[:count]


def spread(rows: Tensor, count: int) -> Tensor:
    """So many of the rows, evenly: a test set may be sorted by class."""
    return rows[torch.arange(count) * len(rows) // count]
