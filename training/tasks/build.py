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
        name: ``DataModule.task``: one of ``TASKS``, or the dotted name of a class.
        facts: ``DataModule.facts``.
        label_smoothing: of the training loss, where there are labels.
        seed: of what a task draws.

    Raises:
        ValueError: for a task there is none of, or label smoothing out of its range.
    """
    return find(name).of(facts, label_smoothing, seed)


def find(name: str) -> type[Task]:
    """The class of a task.

    Args:
        name: see ``build``.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS and "." not in name:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, or a dotted name of your own, got {name!r}")
    module, kind = TASKS[name] if name in TASKS else (name.rpartition(".")[0], name.rpartition(".")[2])
    try:
        found = getattr(importlib.import_module(module), kind, None)
    except ImportError as error:
        raise ValueError(f"task {name} of this data set cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ValueError(f"task {name} of this data set must be a class made from training.tasks.Task")
    return found
