"""What may be built from a configuration that came with a run folder, which may be another person's.

A `_target_` is called. Of a saved configuration, those alone are that lie in this project or in one of the packages
named here and make what their place asks for, and those that the command line, or a file of the configuration folder,
names in the same place.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from data import DataModule
from optimizers.packaged import Package
from training.callbacks import Callback
from training.errors import UserError
from training.loggers import Logger
from training.names import AROUND, PLAYERS, TARGET
from training.settings.schema import MOVED
from training.trainer import Trainer

# Groups whose nodes have names of their own: callbacks.plots, ...
NAMED = ("callbacks", "logger")
OPTIMIZERS = (Optimizer, ("optimizers", "torch.optim", "pytorch_optimizer"))
# By place: what is to be made there, and the packages that may make it.
KINDS: dict[str, tuple[type, tuple[str, ...]]] = {
    "model": (nn.Module, ("models", "torch.nn", "torchvision.models", "timm.models")),
    "dataset": (DataModule, ("data",)),
    "scheduler": (LRScheduler, ("training.schedules", "torch.optim.lr_scheduler")),
    "trainer": (Trainer, ("training",)),
    "callbacks": (Callback, ("training",)),
    "logger": (Logger, ("training",)),
    **dict.fromkeys(("optimizer", *PLAYERS), OPTIMIZERS),
    **dict.fromkeys(AROUND, (Optimizer, ("optimizers",))),
}
# Functions of these make what they are asked for; of others (a loader of pickles, say) only classes are taken.
FACTORIES = ("models", "data", "optimizers", "training", "torchvision.models")


def require_own(saved: Mapping[str, Any], composed: Mapping[str, Any], folder: Path) -> None:
    """See to it that nothing of a saved configuration is called that a foreign folder could bring along.

    Args:
        saved: the content of a run's `config.yaml`.
        composed: what the command line and the configuration folder give, in plain containers.
        folder: of the run, for the sentence.

    Raises:
        UserError: a callable is neither known nor named by the user.
    """
    named = dict(targets(composed))
    strange = [f"{where}={target}" for where, target in targets(saved)
               if named.get(where) != target and not is_known(where, target)]  # fmt: skip
    if strange:
        raise UserError(
            f"resume={folder}: its config.yaml has {strange[0]}, which is no part of Curvlab or of its packages for "
            "this place, so that a foreign folder could run any code; if it is yours, say so: add "
            f"{' '.join(strange)}, or have it in a file of the configuration folder"
        )


def targets(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every callable that a configuration names, at any depth, with its dotted place."""
    if not isinstance(node, Mapping | list | tuple):
        return
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
        place = f"{where}.{key}" if where else str(key)
        if key == TARGET:
            yield place, value
        elif where in NAMED and value is not None and not isinstance(value, Mapping):
            yield f"{place}.{TARGET}", value  # short for a node without options
        else:
            yield from targets(value, place)


def is_known(where: str, target: Any) -> bool:
    """Whether a callable is one of this project or of its packages, and makes what belongs in its place.

    Args:
        where: dotted name of the `_target_`, "model._target_" or "callbacks.plots._target_".
        target: a dotted path. Its module is imported only if its name is one of those.
    """
    group, *inner = where.removesuffix(f".{TARGET}").split(".")
    if group not in KINDS or len(inner) != (group in NAMED) or not isinstance(target, str):
        return False
    kind, packages = KINDS[group]
    module_name, _, name = _short(target).rpartition(".")
    module_name = MOVED.get(module_name, module_name)
    if not _lies_in(module_name, packages):
        return False
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except ImportError:
        return False
    home = _short(str(getattr(found, "__module__", "")))
    if not _lies_in(home, packages) or not callable(found):
        return False
    if isinstance(found, Package):
        return issubclass(Optimizer, kind)
    if not inspect.isclass(found):
        found = _made_by(found) if _lies_in(home, FACTORIES) else None
    return inspect.isclass(found) and issubclass(found, kind)


def _made_by(function: Any) -> Any:
    """What a function says that it returns."""
    try:
        made = typing.get_type_hints(function).get("return")
    except (NameError, TypeError, AttributeError):
        return None
    return typing.get_origin(made) or made


def _short(name: str) -> str:
    return name.removeprefix("curvlab.")


def _lies_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


