"""Every key and value of a configuration against the signature of what it is for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.errors import UserError, did_you_mean
from training.names import AROUND, PLAYERS, TARGET
from training.schedules import ScalarSchedule
from training.settings import schema
from training.settings.overrides import OPEN, RATES

# Groups without a `_target_` of their own, which hold named nodes that have one.
CONTAINERS = ("logger", "callbacks")
# Groups whose files are not of one part of a run, and say so.
GLOBAL = ("experiment", "debug", "study", "preset")


def validate(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check every key and value against the signatures of what the configuration names.

    Raises:
        UserError: the first fault, in one sentence.
    """
    known = schema.parameters(_top_level)
    for key in (key for key in values if key not in known):
        lost = ": a file of it begins with the line # @package _global_" if key in GLOBAL else did_you_mean(key, known)
        raise UserError(f"unknown key {key!r}{lost}")
    checked = schema.check_options(_top_level, values, "")
    if not 0 <= checked["seed"] < 2**32:
        raise UserError(f"seed must be between 0 and 4294967295, got {checked['seed']}")
    if (name := checked["name"]) is not None and (".." in Path(name).parts or Path(name).is_absolute()):
        raise UserError(f"name must be that of a folder in paths.runs, got {name!r}: to write elsewhere set paths.runs")
    if checked["verify"] is not None and checked["verify"] < 1:
        raise UserError(f"verify must be at least 1 example, or null, got {checked['verify']}")
    checked["paths"] = schema.check_options(_paths, checked["paths"], "paths")
    checked["paths"] |= {name: os.path.expanduser(checked["paths"][name]) for name in ("runs", "sweeps")}
    for group in ("optimizer", "scheduler", "model", "dataset", "trainer"):
        checked[group] = schema.check(checked[group], group, group)
    for group, nothing in AROUND.items():  # which runs of earlier versions do not have
        checked[group] = schema.check(checked.get(group) or {TARGET: nothing}, group, group)
    for group in CONTAINERS:
        checked[group] = {
            name: schema.check(node if isinstance(node, Mapping) else {TARGET: node}, f"{group}.{name}", group)
            for name, node in (checked.get(group) or {}).items()
            if node is not None  # callbacks.early_stopping=null switches it off
        }
    checked |= {name: schema.check(checked[name], name, "optimizer") for name in PLAYERS if checked.get(name)}
    checked["finetune"] = schema.check_options(_finetune, checked.get("finetune") or {"lr_mult": {}}, "finetune")
    rates = checked["finetune"]["lr_mult"]
    rates |= {name: schema.check_value(rate, float, f"{RATES}.{name}") for name, rate in rates.items()}
    checked[OPEN] = {
        name: schema.check_options(ScalarSchedule, schema.check_value(node, dict, f"{OPEN}.{name}"), f"{OPEN}.{name}")
        for name, node in (checked.get(OPEN) or {}).items()
        if node is not None
    }
    return checked


def _top_level(
    paths: dict, dataset: dict, model: dict, optimizer: dict, scheduler: dict, trainer: dict,
    seed: int, name: str | None = None, resume: str | None = None, init_from: str | None = None,
    logger: dict | None = None, callbacks: dict | None = None, schedules: dict | None = None,
    finetune: dict | None = None, generator: dict | None = None, critic: dict | None = None,
    verify: int | None = None, averaging: dict | None = None, step_length: dict | None = None, summary: bool = False,
    tags: list[str] | None = None, notes: str | None = None,
) -> None:  # fmt: skip
    """The signature that `configs/train.yaml` is checked against."""


def _paths(data: str, runs: str, sweeps: str) -> None:
    """The signature of the group `paths`."""


def _finetune(lr_mult: dict, freeze: str | None = None) -> None:
    """The signature of `finetune`."""
