"""What a command may ask of a configuration in place of a run: ``debug=verify``, ``debug=summary``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

#: The key that asks, and who answers: a module, imported when it is asked, and a function there.
QUESTIONS = {
    "verify": ("training.command.verification", "verify"),
    "summary": ("training.command.summary", "summarize"),
}

Answer = Callable[..., dict[str, Any]]


def asked(config: Mapping[str, Any]) -> Answer | None:
    """Who answers what a configuration asks; None: it is a run.

    Args:
        config: a checked configuration.

    Returns:
        ``answer(config, model, optimizer, data, task, world)``, which prints and returns a summary.
    """
    for key, (module, function) in QUESTIONS.items():
        if config.get(key):
            answer: Answer = getattr(importlib.import_module(module), function)
            return answer
    return None
