"""One run's configuration as plain values: what identifies it, what `config.yaml` keeps of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from training.errors import UserError
from training.names import AROUND, PLAYERS, SHARING, TARGET
from training.runs.folder import exists

BUDGETS = ("max_epochs", "max_steps", "max_time")
CHOICES = "choices"  # in config.yaml: the name of each group's file
#: What the user says of a run, which leaves it what it is.
REMARKS = ("tags", "notes")
# What may differ between two launches of the same run: where it writes, how it reports, where it computes.
VOLATILE = (
    "paths", "logger", "resume", "name", *REMARKS, "verify", "summary", "trainer.device", "trainer.profile",
    "trainer.recompute",
    "trainer.log_every_steps", "trainer.checkpoint_every_epochs", "trainer.checkpoint_every_steps",
    "trainer.checkpoint_every_minutes", "trainer.keep_checkpoints",
    *(f"{name}.{SHARING}" for name in ("optimizer", *PLAYERS)),
)  # fmt: skip
# Options that leave a run what it was before there were any, by these values.
NEUTRAL = {
    "trainer.test": True,
    "dataset.limit_test": 1.0,
    "dataset.mixup": 0.0,
    "dataset.cutmix": 0.0,
    "dataset.randaugment": None,
}
# What `choices` may hold: a group, of a player perhaps, and a file of it.
_GROUP = re.compile(r"(?!hydra)\w+(@\w+)?")
_CHOICE = re.compile(r"\w[\w.+/-]*")
# As safe as safe_load, and written in C where that is built: a sweep has hundreds of these files.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# What people write for null.
NO = ("false", "no", "none", "off")
# How the names of callbacks end that only show what was learned.
ONLOOKERS = ("Plots", "SampleText", "Trajectory", "Diagnostics")


@dataclass(frozen=True)
class RunConfig:
    """One run's configuration, checked and resolved.

    Attributes:
        values: plain containers, as in `configs/train.yaml` with its groups.
        choices: name of the file each group was taken from ({"optimizer": "adafisher", ...}).
        command: the overrides that led here.
        sweep: folder of the sweep this run is a job of; None for a single run.
        label: the job's swept values ("optimizer-sgd_seed-0"); "" for a single run.
    """

    values: dict[str, Any]
    choices: dict[str, str]
    command: list[str] = field(default_factory=list)
    sweep: Path | None = None
    label: str = ""

    @property
    def id(self) -> str:
        """Eight hexadecimal digits that two runs share if they differ in volatile keys and budget alone."""
        return identity(self.values)

    @property
    def job_id(self) -> str:
        """The id of a sweep's job, in which the budget counts: runs of two budgets are two results."""
        return identity(self.values, budget=True)

    @property
    def group_name(self) -> str:
        """The folder that keeps this run beside its like: `name`, or what it is made of."""
        return self.values["name"] or "_".join(self.parts)

    @property
    def parts(self) -> tuple[str, str, str]:
        """What the run is made of: its optimizer (or those of its two players, "kfac-adam"), model and data set."""
        shared = self.choices["optimizer"]
        optimizers = dict.fromkeys(self.choices.get(f"optimizer@{player}", shared) for player in PLAYERS)
        return "-".join(optimizers), self.choices["model"], self.choices["dataset"]

    def record(self) -> dict[str, Any]:
        """What `config.yaml` holds: the values and the choices they came from."""
        return {**self.values, CHOICES: self.choices}

    def to_yaml(self) -> str:
        """Text of the run folder's `config.yaml`."""
        command = " ".join([os.environ.get("CURVLAB_COMMAND", "python train.py"), *self.command]).replace("\n", " ")
        return f"# {command}\n{yaml.safe_dump(as_lists(self.record()), sort_keys=False, allow_unicode=True)}"


def identity(values: Mapping[str, Any], budget: bool = False) -> str:
    """Eight hexadecimal digits of the configuration without what may differ between launches of the same run.

    Args:
        values: a checked configuration.
        budget: whether `trainer.max_*` counts.
    """
    kept = as_lists(values)
    for key in (*VOLATILE, *(() if budget else (f"trainer.{name}" for name in BUDGETS))):
        group, _, name = key.rpartition(".")
        ((kept.get(group) or {}) if group else kept).pop(name, None)
    for key, neutral in NEUTRAL.items():  # options that runs of earlier versions do not have
        group, _, name = key.rpartition(".")
        node = kept.get(group) or {}
        if name in node and node[name] == neutral:
            del node[name]
    for group, nothing in AROUND.items():  # which leaves a run what it is
        if kept.get(group, {}).get(TARGET) == nothing:
            del kept[group]
    callbacks = kept.get("callbacks") or {}
    kept["callbacks"] = {name: node for name, node in callbacks.items() if not node[TARGET].endswith(ONLOOKERS)}
    kept = replace_folder(kept, str(values["paths"]["data"]), "<paths.data>")
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def find(path: str, asked: str = "resume=") -> tuple[Path, Path | None]:
    """The run folder that `resume=path` means, and the checkpoint if the path is one.

    Args:
        path: of a run folder, or of a checkpoint in one.
        asked: how it was asked for, for the sentence.

    Raises:
        UserError: nothing is there, or it belongs to no run.
    """
    given = Path(path)
    if not exists(given):
        way = "give a run folder or a checkpoint in one"
        if asked == "resume=" and path.lower() in NO:
            way = "leave it out, and a new run begins"
        elif asked == "resume=" and "/" not in path:  # a word
            way = f"did you mean auto, the newest run of this very configuration? Or {way}"
        raise UserError(f"{asked}{path}: there is no such file or folder; {way}")
    folder, checkpoint = (given, None) if given.is_dir() else (given.parent, given)
    if folder.name == "checkpoints" or folder.absolute().name == "checkpoints":
        folder = folder.parent if folder.name else folder.absolute().parent
    if not (folder / "config.yaml").is_file():
        advice = "to start from its weights alone use init_from" if checkpoint else "it has no config.yaml"
        raise UserError(f"{asked}{path} lies in no run folder of train.py: {advice}")
    return folder, checkpoint


def load(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and choices of a finished or stopped run, from its `config.yaml`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = folder / "config.yaml"
    try:
        saved = yaml.load(path.read_bytes(), LOADER)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({error}): give the folder of a run of train.py") from error
    groups = (CHOICES, "paths", "trainer", "model", "optimizer", "dataset", "scheduler")
    if not isinstance(saved, dict) or not all(isinstance(saved.get(group), dict) for group in groups):
        raise UserError(f"{path} is not the configuration of a run of train.py, or it is damaged")
    choices = saved.pop(CHOICES)
    for group, choice in choices.items():  # which are given to Hydra, where other keys would mean other things
        if not (_GROUP.fullmatch(str(group)) and isinstance(choice, str) and _CHOICE.fullmatch(choice)):
            raise UserError(f"{path} has a choice that names no file of a group, {group}={choice}: it is not taken")
    if strange := _interpolation(saved):
        raise UserError(f"{path} holds {strange!r}, which train.py would have resolved: it is not taken")
    return saved, choices


def _interpolation(value: Any) -> str | None:
    """A text in a configuration that would be looked up, in the environment say; None without."""
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    if isinstance(value, str):
        return value if "${" in value else None
    return next(filter(None, map(_interpolation, parts)), None)


def replace_folder(value: Any, folder: str, new: str) -> Any:
    """`value` with every path at or under `folder` moved to `new`."""
    if isinstance(value, dict):
        return {key: replace_folder(item, folder, new) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_folder(item, folder, new) for item in value]
    if isinstance(value, str) and (value == folder or value.startswith(folder.rstrip("/") + "/")):
        return new + value[len(folder) :]
    return value


def as_lists(value: Any) -> Any:
    """`value` with its tuples as lists, as they are after a round through YAML."""
    return json.loads(json.dumps(value))
