"""What of a run's events and of its configuration the loggers tell."""

from __future__ import annotations

import math
import re
from typing import Any

from training.runs.run import Run

#: Keys of an event that are not metrics.
HEADER = ("event", "step", "epoch", "seconds", "wall")


def hyperparameters(config: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """What runs are compared by: the choices under their groups' names, and the values that shape the training."""
    groups = ("dataset", "model", "optimizer", "step_length", "averaging", "scheduler")
    choices = {group: choice for group, choice in (config.get("choices") or {}).items() if group in groups}
    kept = {key: value for key, value in config.items() if key in (*groups, "trainer", "seed", "init_from")}
    return choices | {key: value for key, value in flattened(kept).items() if not key.endswith("_target_")}


def flattened(config: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Dotted names and plain values of a nested configuration; everything TensorBoard has no type for becomes text."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            number = isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
            flat[prefix + key] = value if number else str(value)
    return flat


def given(run: Run) -> set[str]:
    """Keys that the run's command has given values for, as the first line of its ``config.yaml`` has them."""
    command, _, _ = run.folder.config_file.read_text().partition("\n")
    return set(re.findall(r"\s\+*([\w.@]+)=", command)) if command.startswith("#") else set()
