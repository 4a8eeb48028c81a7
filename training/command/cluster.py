"""What a batch job is, whichever system runs it: machines, time, environment; and what a site says of them."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from training.errors import UserError, did_you_mean
from training.settings.files import CONFIG_FOLDER

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
LAUNCHERS = ("srun", "torchrun")
GIGABYTES = {"": 1e-3, "M": 1e-3, "G": 1.0, "T": 1e3}


@dataclass(frozen=True)
class Job:
    """A batch job. Fields are the keys of configs/cluster/*.yaml, where they are explained, and the two last ones.

    Attributes:
        overrides: arguments of train.py; for an array and for runs side by side, a sweep's.
        jobs: how many runs the sweep has; 0 where it is none, or runs as one job.
    """

    system: str
    name: str
    nodes: int = 1
    gpus: int = 0
    tasks: int | None = None
    cpus: int = 4
    time: str = "24h"
    memory: str | None = None
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclusive: bool = False
    filesystems: list[str] = field(default_factory=list)
    mail: str | None = None
    flags: list[str] = field(default_factory=list)
    launcher: str = "srun"
    array: int | None = None
    side: int | None = None
    signal: int | None = 120
    requeue: int = 20
    modules: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    offline: bool = False
    scratch: str | None = None
    logs: str = "."
    python: str = "python"
    overrides: list[str] = field(default_factory=list)
    jobs: int = 0

    def __post_init__(self) -> None:
        for key, least in (("nodes", 1), ("gpus", 0), ("cpus", 1), ("requeue", 0)):
            self._at_least(key, least)
        for key in ("tasks", "array", "side", "signal"):
            if getattr(self, key) is not None:
                self._at_least(key, 1)
        if self.launcher not in LAUNCHERS:
            raise UserError(f"launcher must be one of {', '.join(LAUNCHERS)}, got {self.launcher!r}.")
        if self.array and self.side:
            raise UserError("array starts a job for each run and side runs them within one: give one of them.")
        if self.signal and self.signal >= self.seconds:
            raise UserError(
                f"signal={self.signal} seconds before the end of time={self.time} is before its beginning: give more "
                "time, a smaller signal, or signal=null."
            )
        if self.side and self.launcher == "torchrun":
            raise UserError("side=N starts runs of one process each, for which there is no torchrun: leave it out.")
        if self.side and self.tasks:
            raise UserError("side=N starts runs of one process each: leave tasks out.")
        if self.side and self.gpus and self.side > self.nodes * self.gpus:
            raise UserError(
                f"side={self.side} runs at once need a GPU each, and nodes={self.nodes} gpus={self.gpus} are "
                f"{self.nodes * self.gpus}: ask for more, or run fewer at once (the others follow)."
            )
        if self.memory is not None:
            _ = self.gigabytes

    def _at_least(self, key: str, least: int) -> None:
        value = getattr(self, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{key} must be a whole number, {least} or more, got {value!r}.")

    @property
    def processes(self) -> int:
        """How many processes each machine has."""
        return math.ceil(self.side / self.nodes) if self.side else self.tasks or max(self.gpus, 1)

    @property
    def seconds(self) -> int:
        """The time limit."""
        return read_time(self.time)

    @property
    def gigabytes(self) -> float:
        """The memory of a machine; NaN where it is the partition's."""
        if self.memory is None:
            return math.nan
        found = re.fullmatch(r"(\d+)([MGT]?)B?", str(self.memory), re.IGNORECASE)
        if not found or not int(found[1]):
            raise UserError(f"memory={self.memory} cannot be read: write 64G, or 500M.")
        return int(found[1]) * GIGABYTES[found[2].upper()]

    def environment_lines(self) -> list[str]:
        """What is done in a job before anything starts."""
        lines = ["module purge", f"module load {shlex.join(self.modules)}"] if self.modules else []
        lines += [*self.setup, f"export OMP_NUM_THREADS={self.cpus}"]
        if self.offline:
            lines += ["export HF_HUB_OFFLINE=1 WANDB_MODE=offline  # python -m data.fetch NAME brings data beforehand"]
        if self.scratch:
            lines += [f'export CURVLAB_DATA="{self.scratch}/datasets"']
        return [*lines, *(f"export {name}={quoted(str(value))}" for name, value in self.environment.items())]


def quoted(word: str) -> str:
    """A word as the shell is to read it; what refers to variables of its own stays open to it."""
    return f'"{word}"' if "$" in word and "'" not in word and '"' not in word else shlex.quote(word)


def read_time(text: str) -> int:
    """Seconds of a time as people and queues write it: 90m, 24h, 1d12h, 36:00:00, 2-00:00:00.

    Raises:
        UserError: it cannot be read, has no unit (which queues take for minutes, or for seconds), or is nothing.
    """
    text = str(text).strip()
    words = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text) if text else None
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    found = words or clock
    seconds = sum(int(n or 0) * unit for n, unit in zip(found.groups(), UNITS.values(), strict=True)) if found else 0
    if not seconds:
        unit = " has no unit" if text.isdigit() and int(text) else " cannot be read"
        raise UserError(f"time={text}{unit}: write 90m, 24h, 1d12h or 36:00:00.")
    return seconds


def build(values: Mapping[str, Any], **further: Any) -> Job:
    """A job of what a site's file and the command line say.

    Args:
        values: by the names of `Job`'s fields.
        further: what is known besides.

    Raises:
        UserError: an unknown key, or a value that cannot be.
    """
    known = [entry.name for entry in fields(Job) if entry.name not in ("overrides", "jobs")]
    for key, value in values.items():
        if key not in known:
            raise UserError(f"unknown option {key!r}{did_you_mean(key, known)}: it is one of {', '.join(known)}.")
        kind = str(Job.__dataclass_fields__[key].type)
        if kind.startswith("str") and value is not None and not isinstance(value, str | int):
            raise UserError(f"{key} must be a word, got {value!r}.")
        if kind.startswith("list") and not isinstance(value, list):
            raise UserError(f"{key} must be a list, got {value!r}: write {key}=[{value}].")
        if kind.startswith("dict") and not isinstance(value, dict):
            raise UserError(f"{key} must be a mapping, got {value!r}: write {key}={{NAME: value}}.")
        if kind == "bool" and not isinstance(value, bool):
            raise UserError(f"{key} must be true or false, got {value!r}.")
    return Job(**{**values, **further})


def defaults(name: str, folders: Sequence[Path] = ()) -> dict[str, Any]:
    """What `cluster/NAME.yaml` says.

    Args:
        name: of the site.
        folders: where there may be a `cluster/` besides configs/.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    places = [folder / "cluster" for folder in (*folders, CONFIG_FOLDER)]
    known = {path.stem: path for place in reversed(places) for path in sorted(place.glob("*.yaml"))}
    if name not in known:
        what = f"there is no cluster={name}{did_you_mean(name, known)}" if name else "which cluster? Give cluster=NAME"
        raise UserError(
            f"{what}: there are {', '.join(sorted(known))}; a file of your own, mysite.yaml, belongs into "
            "configs/cluster, or into DIR/cluster with --config-dir DIR."
        )
    try:
        content = yaml.safe_load(known[name].read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{known[name]} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or "system" not in content:
        raise UserError(f"{known[name]} must have values by name, system: slurm or msub among them.")
    if isinstance(content.get("time"), int):
        raise UserError(f"{known[name]}: put quotes around time, which YAML takes for the number {content['time']}.")
    return content
