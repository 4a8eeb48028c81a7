"""Why a command does not compose, in a sentence about the override that is at fault."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from training.errors import UserError, did_you_mean
from training.names import PLAYERS, TARGET
from training.settings.files import CLUSTER, CONFIG_FOLDER, NOTHING, SPACES, all_keys, choosing, known_choices, tree_of
from training.settings.overrides import GRAFTED, OPEN, RATES, name_of

# A group that follows from the others: hyper-parameters that a study has for an optimizer, if it has some.
PRESET = "preset"
#: How many choices are named that have a key which the chosen one lacks.
FEW = 3


def diagnose(overrides: Sequence[Override], options: Mapping[str, list[str]], error: Exception) -> str:
    """Why a configuration does not compose, in a sentence about the override that is at fault."""
    for override in overrides:
        if override.is_delete() and override.key_or_group in ("study", "optimizer"):  # both name `PRESET`
            return f"{override.key_or_group} is missing from the configuration: ~ cannot remove it"
    tree = tree_of(choosing(overrides))
    for override in overrides:
        if tree is not None and (fault := fault_of_key(override, tree)):
            return fault
    return " ".join(str(error).split())


def refuse_additions(overrides: Sequence[Override], search: Sequence[str]) -> None:
    """Hydra's + accepts any key, so a typo would be dropped in silence. Options of a package's classes are checked."""
    for override in overrides:
        if not (override.is_add() or override.is_force_add()):
            continue
        plain = (override.input_line or "").lstrip("+")
        tree = tree_of([*search, *choosing(overrides)])
        if is_option_of_a_class(override, tree):
            continue
        fault = fault_of_key(override, tree)
        advice = f"; {fault}" if fault else f": write {plain}"
        raise UserError(f"{override.input_line!r}: keys cannot be added with +{advice}")


def fault_of_choice(override: Override, options: Mapping[str, list[str]]) -> str | None:
    """A sentence if a group has no such choice, with what it may have been meant to be."""
    group, value = name_of(override), override.value()
    known = options[group]
    if override.is_delete() or f"{group}={override.get_value_element_as_str()}" in NOTHING:
        return None
    for choice in value if isinstance(value, list) else [value]:
        if not isinstance(choice, str):
            return f"{group} must be one of {', '.join(known)}, got {override.get_value_element_as_str()}"
        if choice not in known:
            hint = did_you_mean(choice, known) or f"; it has {', '.join(known)}"
            return f"{group} has no choice {choice!r}{hint}"
    return None


def fault_of_key(override: Override, tree: DictConfig | None) -> str | None:
    """A sentence if the key is not in the tree, with what it may have been meant to be."""
    key = override.key_or_group
    if key == CLUSTER:
        return (
            f"{override.input_line} is for scripts/submit.py, in front of --; a sweep's runs are sent to a cluster by "
            "hydra/launcher=slurm hydra.launcher.cluster=NAME"
        )
    if key == SPACES:
        return (
            f"{override.input_line} is what scripts/tune.py tries, and no value of a run: "
            f"python scripts/tune.py optimizers=[{override.get_value_element_as_str()}] ..."
        )
    if tree is None or key.startswith(("hydra", RATES, GRAFTED)) or key.split(".")[0] == OPEN:
        return None
    known = all_keys(tree)
    groups = sorted(known_choices([]))
    if override.package and name_of(override) not in groups:
        return f"unknown key {name_of(override)!r}{did_you_mean(name_of(override), groups)}"
    if key in known or key in groups:
        return None
    parents = [parent for parent in itertools.accumulate(key.split("."), "{}.{}".format) if parent in known]
    if is_option_of_a_class(override, tree):
        return f"{key} is not in the file of this optimizer: add it with +{(override.input_line or '').lstrip('+')}"
    if (player := key.split(".")[0]) in PLAYERS and player not in known:
        return f"there is no key {key!r} as long as the {player} has no optimizer of its own: optimizer@{player}=NAME"
    if parents:
        parent, leaf = parents[-1], key.removeprefix(parents[-1])[1:].split(".")[0]
        children = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
        listed = [name for name in children if name != TARGET]
        hint = f"; it has {', '.join(listed)}" if listed else "; it is a single value"
        others = _choices_with(parent, leaf) if parent in groups and not did_you_mean(leaf, listed) else []
        if 0 < len(others) <= FEW:
            return f"{parent} has no key {leaf!r} as it is chosen: {', '.join(f'{parent}={one}' for one in others)} has"
        if parent in groups and not listed:
            hint = ": its choice has no values"
        return f"{parent} has no key {leaf!r}{did_you_mean(leaf, listed) or hint}"
    leaves = {name: name.rpartition(".")[2] for name in known}
    wanted = key.rpartition(".")[2]
    homes = [name for name, leaf in leaves.items() if leaf == wanted]  # lr=0.1 for optimizer.lr=0.1
    homes = homes or [name for name, leaf in leaves.items() if wanted in leaf.split("_")]  # epochs: max_epochs
    hint = f" (did you mean {homes[0]!r}?)" if homes else did_you_mean(key, [*known, *groups])
    return f"unknown key {key!r}{hint or '; python train.py --cfg job prints all keys'}"


def _choices_with(group: str, key: str) -> list[str]:
    """The files of a group that have a key of their own of this name."""
    files = [CONFIG_FOLDER / group / f"{choice}.yaml" for choice in known_choices([]).get(group, ())]
    return [path.stem for path in files if path.is_file() and re.search(rf"^{re.escape(key)}:", path.read_text(), re.M)]


def is_option_of_a_class(override: Override, tree: DictConfig | None) -> bool:
    """Whether a key that is not in the tree may be an option of a class that is asked for by its name."""
    from optimizers.packaged import Package  # with torch: only a command that is wrong, or adds such an option, waits
    from training.settings import schema

    group, _, name = override.key_or_group.partition(".")
    known = [] if tree is None else all_keys(tree)
    if tree is None or group not in ("optimizer", *PLAYERS) or group not in known or not name:
        return False
    return override.key_or_group not in known and isinstance(schema.locate(tree[group][TARGET], group), Package)
