"""Pieces of one's own that a command names: found in the folder it is given in, and free of another piece's values."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf

from training.errors import UserError
from training.names import PLAYERS, TARGET
from training.runs.record import BUDGETS
from training.settings.overrides import parse


@contextmanager
def reachable() -> Iterator[None]:
    """Within it, modules of the working folder can be named, behind all that Python finds without it.

    Raises:
        UserError: that folder was deleted.
    """
    try:
        folder = os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the folder in which this command is given is gone: give it in another") from error
    added = not {"", folder} & set(sys.path)
    if added:
        sys.path.append(folder)
    try:
        yield
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)


def superseded(cfg: DictConfig, command: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """What of a composed configuration was said of other callables than those that a command names.

    ``model._target_=mynet.MyNet`` takes the place of the callable of the chosen file. If that file has a key which the
    new one does not take, its values were meant for another, and none of them counts.

    Args:
        cfg: without Hydra's node.
        command: the overrides that led to it.

    Returns:
        The keys that do not count, and names for the groups that hold another callable than that of their file.

    Raises:
        UserError: there is no such callable.
    """
    if not any(f".{TARGET}=" in text for text in command):
        return [], {}
    from optimizers.packaged import Package
    from training.settings import schema  # with torch

    overrides = [parse(text) for text in command]
    given = {override.key_or_group: override for override in overrides}
    dropped: list[str] = []
    names: dict[str, str] = {}
    for key in (key for key in given if key.endswith(f".{TARGET}")):
        where, target = key.removesuffix(f".{TARGET}"), OmegaConf.select(cfg, key)
        node = OmegaConf.select(cfg, where)
        held = map(str, node) if isinstance(node, DictConfig) else ()
        theirs = [f"{where}.{name}" for name in held if name != TARGET]
        theirs = [name for name in theirs if not any(f"{one}.".startswith(f"{name}.") for one in given)]
        function: Any = schema.locate(target, where)
        group = "optimizer" if where in PLAYERS else where.partition(".")[0]
        if isinstance(function, Package):
            continue
        takes = schema.parameters(function, group)
        if any(name.rpartition(".")[2] not in takes for name in theirs):
            dropped += theirs
            names[where] = str(target).rpartition(".")[2]
    return dropped, names


def is_own_choice(group: str, choice: str, saved: Any) -> bool:
    """Whether a run's choice is no file, but the name of a callable that its command put in a file's place.

    Args:
        group: such as model.
        choice: as the run's record has it.
        saved: the run's values.
    """
    node = saved.get(group.rpartition("@")[2])
    return isinstance(node, dict) and str(node.get(TARGET, "")).rpartition(".")[2] == choice


def other_budgets(command: Sequence[str]) -> list[str]:
    """The keys of the budgets that a command replaces: a run has one, and the command's is in the place of any other.

    Args:
        command: overrides. Where they give several themselves, that is refused later, by whoever knows why.
    """
    keys = {f"trainer.{name}": name for name in BUDGETS}
    given = {key: value for text in command for key, _, value in [text.partition("=")] if key in keys}
    asked = [key for key, value in given.items() if value not in ("null", "")]
    return [key for key in keys if key not in given] if len(asked) == 1 else []
