"""Checkpoints: written whole or not at all, verified when read, holding all that a run needs to go on bit for bit."""

from training.runs.checkpoints.files import (
    FORMAT,
    CheckpointError,
    UnreadableError,
    best_file,
    latest,
    link,
    load,
    require,
    rotate,
    save,
    set_aside,
    step_file,
    steps,
)  # fmt: skip
from training.runs.checkpoints.state import PARTS, capture, named, restore, settings
from training.runs.checkpoints.stores import store, store_best, tidy

__all__ = [
    "FORMAT", "PARTS", "CheckpointError", "UnreadableError", "best_file", "capture", "latest", "link", "load", "named",
    "require", "restore", "rotate", "save", "set_aside", "settings", "step_file", "steps", "store", "store_best",
    "tidy",
]  # fmt: skip
