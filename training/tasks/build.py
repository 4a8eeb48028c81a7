"""From what a data set says of itself to the task that it is for."""

from __future__ import annotations

import importlib
from typing import Any

from training.tasks.task import Task

#: Name, as data sets give it, of each task: its module and its class there, which are imported when one is asked for.
TASKS = {
    "classification": ("training.tasks.classification", "Classification"),
    "language_modelling": ("training.tasks.language_modelling", "LanguageModelling"),
    "reconstruction": ("training.tasks.reconstruction", "Reconstruction"),
    "generation": ("training.tasks.generation", "Adversarial"),
}


def build(name: str, facts: dict[str, Any], label_smoothing: float = 0.0, seed: int = 0) -> Task:
    """The task a data set asks for.

    Args:
        name: ``DataModule.task``.
        facts: ``DataModule.facts``.
        label_smoothing: of the training loss, where there are labels.
        seed: of what a task draws.

    Raises:
        ValueError: for a task there is none of, or label smoothing out of its range.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    module, kind = TASKS[name]
    task: Task = getattr(importlib.import_module(module), kind).of(facts, label_smoothing, seed)
    return task
