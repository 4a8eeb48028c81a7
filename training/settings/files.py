"""The files of `configs/`: groups and their choices, and the trees that Hydra composes of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.errors import UserError, did_you_mean
from training.names import PLAYERS
from training.settings.overrides import name_of, parse

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "configs"
CONFIG_NAME = "train"
#: Folders of configs/ that are no groups of a run.
CLUSTER, SPACES = "cluster", "hparams_search"
#: What these two are anyway; Hydra refuses null as a choice on the command line.
NOTHING = ("experiment=null", "debug=null")
#: Which defaults of its own Hydra is to have: 1.3 asks, and to later versions the question is a relic.
BEHAVIOUR: dict[str, Any] = {"version_base": "1.3"} if hydra.__version__.startswith("1.3") else {}


def compose_files(overrides: Sequence[str]) -> DictConfig:
    """The configuration that overrides give, Hydra's node included; Hydra's own exceptions where they give none."""
    with initialize_config_dir(str(CONFIG_FOLDER), **BEHAVIOUR):
        return hydra_compose(CONFIG_NAME, list(overrides), return_hydra_config=True)


def known_choices(overrides: Sequence[Override]) -> dict[str, list[str]]:
    """Every group with its choices, nested ones as `folder/name`."""
    folders = [CONFIG_FOLDER]
    for override in overrides:
        if override.key_or_group == "hydra.searchpath":
            folders += [Path(str(path).removeprefix("file://")) for path in override.value()]  # type: ignore[union-attr]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"hydra.searchpath: there is no folder {folder}")
    options: dict[str, list[str]] = {}
    found = (path for folder in folders for path in sorted(folder.iterdir()) if path.is_dir())
    for group in (path for path in found if path.name not in (CLUSTER, SPACES)):
        names = [path.relative_to(group).with_suffix("").as_posix() for path in group.rglob("*.yaml")]
        options.setdefault(group.name, []).extend(sorted(names))
    return options | {f"optimizer@{player}": options["optimizer"] for player in PLAYERS}


def spelled_out(texts: Sequence[str], search: Sequence[str]) -> list[str]:
    """Overrides, with the names of a group's choices in the place of a pattern: `optimizer=glob(ad*)`.

    Args:
        texts: overrides.
        search: one that says where else choices lie.

    Raises:
        UserError: a pattern is of no group, or like none of its choices.
    """

    def spell(text: str) -> str:
        if "=glob(" not in text:
            return text
        override = parse(text)
        pattern, group = override.value(), name_of(override)
        if not isinstance(pattern, Glob):
            return text
        options = known_choices([parse(one) for one in search]).get(group)
        if options is None:
            raise UserError(f"{text}: glob is for the choices of a group, and {group} is none")
        names = pattern.filter(options)
        if not names:
            raise UserError(f"{text} is like no choice of {group}; it has {', '.join(options)}")
        return f"{text.partition('=')[0]}={','.join(names)}"

    return [spell(text) for text in texts]


def choosing(overrides: Sequence[Override]) -> list[str]:
    """The overrides that choose a group's file (or are Hydra's own), as far as they choose one."""
    groups = known_choices(overrides)
    chosen = [o for o in overrides if name_of(o) in groups or o.key_or_group.startswith("hydra")]
    return [o.input_line or "" for o in chosen if not (o.is_sweep_override() or o.input_line in NOTHING)]


def tree_of(groups: Sequence[str]) -> DictConfig | None:
    """The configuration that the group choices alone give, or None if they do not compose."""
    try:
        cfg = compose_files(groups)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError):
        return None  # the caller is explaining an error already and says it in its own words
    return without_hydra(cfg)


def without_hydra(cfg: DictConfig) -> DictConfig:
    """A composed configuration without Hydra's node."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def all_keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    """All dotted keys, groups included."""
    keys: list[str] = []
    for name in map(str, cfg):
        keys.append(f"{prefix}{name}")
        node = cfg._get_node(name)
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing() or node._is_interpolation()):
            keys += all_keys(node, f"{prefix}{name}.")
    return keys


def resolve(cfg: DictConfig, prefix: str = "") -> dict[str, Any]:
    """Plain containers, all interpolations resolved; a missing mandatory value or a broken one is a sentence."""
    try:
        for key in sorted(OmegaConf.missing_keys(cfg)):
            raise UserError(f"{prefix}{key} is required: give {prefix}{key}=...")
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        why = str(error).splitlines()[0]
        broken = re.search(r"Interpolation key '([^']+)'", why)
        hint = did_you_mean(broken[1], all_keys(cfg)) if broken else ""
        key = getattr(error, "full_key", None) or "the configuration"
        raise UserError(f"{key} cannot be resolved: {why}{hint}") from error
