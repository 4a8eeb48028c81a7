"""Training: the loop, budgets, checkpoints, metrics, callbacks and loggers.

The names below load on first use, so that a command line that only prints help does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from training.errors import UserError

if TYPE_CHECKING:
    from training.loop.backward import backward
    from training.loop.distributed import World, session
    from training.loop.rng import seed_everything
    from training.loop.signals import Interrupted
    from training.runs.finite import Diverged
    from training.runs.folder import RunFolder
    from training.settings.loading import load_run
    from training.trainer import Trainer

__all__ = [
    "Diverged",
    "Interrupted",
    "RunFolder",
    "Trainer",
    "UserError",
    "World",
    "backward",
    "load_run",
    "seed_everything",
    "session",
]

_HOMES = {
    "Diverged": "runs.finite",
    "Interrupted": "loop.signals",
    "RunFolder": "runs.folder",
    "Trainer": "trainer",
    "World": "loop.distributed",
    "backward": "loop.backward",
    "load_run": "settings.loading",
    "seed_everything": "loop.rng",
    "session": "loop.distributed",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"training.{_HOMES[name]}"), name)
