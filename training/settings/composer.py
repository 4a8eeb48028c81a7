"""Composing the jobs of a sweep, many of which differ from an earlier one in a few plain values."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from training.runs.record import RunConfig
from training.settings.composing import checked, command_of, composition_of
from training.settings.files import known_choices, without_hydra
from training.settings.overrides import name_of, parse


@dataclass(frozen=True)
class _Base:
    """A job that Hydra has composed, and the keys whose values only take each other's place in it."""

    run: RunConfig
    plain: frozenset[str]


class Composer:
    """Composes the jobs of a sweep; those that differ from an earlier one in plain values alone, without Hydra.

    What comes out is what `compose` gives. A value is plain if it chooses no file, adds nothing, and nothing refers to
    its key.

    Args:
        overrides: of the sweep.
        varying: those that not all jobs share.

    Attributes:
        plain: keys that vary over plain values, unless a job's own files refer to them.
        cfg: the first job as Hydra composed it.
    """

    def __init__(self, overrides: Sequence[Override], varying: Sequence[Override]) -> None:
        groups = known_choices(overrides)
        self.plain = frozenset(
            override.get_key_element()
            for override in varying
            if not (override.is_add() or override.is_force_add() or override.package)
            and name_of(override) not in groups
            and not override.key_or_group.startswith(("hydra", "resume"))
        )
        self.cfg: DictConfig = OmegaConf.create()
        self._bases: dict[tuple[str, ...], _Base] = {}

    def run(self, command: Sequence[str]) -> RunConfig:
        """The checked configuration of a job.

        Args:
            command: its overrides.

        Raises:
            UserError: for whatever is wrong with it.
        """
        values = {key: text for text in command if (key := text.partition("=")[0]) in self.plain}
        fixed = tuple(text for text in command if text.partition("=")[0] not in values)
        kind = (*fixed, *values)  # of two jobs, one may leave to its files what the other is given
        if (base := self._bases.get(kind)) is not None:
            parsed = [parse(text) for text in values.values()]
            if base.plain >= values.keys() and all(map(_is_plain, parsed)):
                return _with(base.run, parsed, command)
        cfg = composition_of(command)
        run = checked(cfg, command)
        if base is None:
            self.cfg = self.cfg if self._bases else cfg
            self._bases[kind] = _Base(run, self._plain_in(cfg, run.values))
        return run

    def _plain_in(self, cfg: DictConfig, values: Mapping[str, Any]) -> frozenset[str]:
        text = OmegaConf.to_yaml(without_hydra(cfg), resolve=False)
        referred = [f"{name}." for name in re.findall(r"\$\{\.*([\w.]+)", text)]
        return frozenset(
            key
            for key in self.plain
            if _home(values, key) is not None
            and not any(f"{key}.".startswith(name) or name.startswith(f"{key}.") for name in referred)
        )


def _is_plain(override: Override) -> bool:
    """Whether the value is what it says: no reference to another key, no group that Hydra would merge."""
    text = override.input_line or ""
    return not isinstance(override.value(), dict) and "${" not in text and "???" not in text


def _home(values: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """The group that holds a dotted key, and a value that is no group for it; None otherwise."""
    *groups, leaf = key.split(".")
    found: Any = values
    for group in groups:
        found = found.get(group) if isinstance(found, dict) else None
    return found if isinstance(found, dict) and leaf in found and not isinstance(found[leaf], dict) else None


def _with(run: RunConfig, overrides: Sequence[Override], command: Sequence[str]) -> RunConfig:
    """A checked configuration with other plain values, checked again."""
    from training.settings import schema  # with what it checks, and so with torch
    from training.settings.validation import validate

    values = copy.deepcopy(run.values)
    for override in overrides:
        home = _home(values, override.key_or_group)
        assert home is not None
        home[override.key_or_group.rpartition(".")[2]] = override.value()
    values = validate(values)
    schema.rehearse(values)
    return replace(run, values=values, command=command_of(command))
