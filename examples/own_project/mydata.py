"""Waves on a grid, whose direction is to be found: as one of eight classes, or as an angle."""

import math

import torch
from torch.utils.data import TensorDataset

from data import DataModule, wrap


def waves(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [count, 1, 8, 8] of waves, and their angles [count] in 0..1 of a turn."""
    draw = torch.Generator().manual_seed(seed)
    angles = torch.rand(count, generator=draw)
    x, y = torch.meshgrid(*[torch.linspace(-2, 2, 8)] * 2, indexing="ij")
    turns = 2 * math.pi * angles[:, None, None]
    return torch.sin(turns.cos() * x + turns.sin() * y)[:, None], angles


def make(count: int = 600, batch_size: int = 32) -> DataModule:
    """A classification: python train.py dataset._target_=mydata.make dataset.batch_size=64."""
    train, test = (TensorDataset(x, (8 * a).long()) for x, a in (waves(count, 0), waves(200, 1)))
    return wrap(train, test=test, batch_size=batch_size)


def angles(count: int = 600, batch_size: int = 32) -> DataModule:
    """A regression, by the task in mytask.py."""
    images, turns = waves(count, 0)
    targets = torch.stack([(2 * math.pi * turns).cos(), (2 * math.pi * turns).sin()], dim=1)
    return wrap(TensorDataset(images, targets), task="mytask.Regression", batch_size=batch_size)
