"""Training: the loop, budgets, checkpoints, metrics, callbacks and loggers.

The names below load on first use, so that a command line that only prints help does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from training.errors import UserError

if TYPE_CHECKING:
    from training.distributed import World, session
    from training.finite import Diverged
    from training.rng import seed_everything
    from training.run_folder import RunFolder
    from training.signals import Interrupted
    from training.trainer import Trainer, backward

__all__ = [
    "Diverged",
    "Interrupted",
    "RunFolder",
    "Trainer",
    "UserError",
    "World",
    "backward",
    "seed_everything",
    "session",
]

_HOMES = {
    "Diverged": "finite",
    "Interrupted": "signals",
    "RunFolder": "run_folder",
    "Trainer": "trainer",
    "World": "distributed",
    "backward": "trainer",
    "seed_everything": "rng",
    "session": "distributed",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"training.{_HOMES[name]}"), name)
