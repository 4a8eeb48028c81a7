"""From a command line to a checked configuration. Besides train.py and scripts/, nothing else imports Hydra.

Hydra composes; the checks here turn whatever is wrong with a command into one sentence before anything runs:
`prepare` composes and checks every job of a command, `current` gives the running job its `RunConfig`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.errors import UserError
from training.names import RESTORED
from training.runs.folder import shortened
from training.runs.record import RunConfig, find, load, replace_folder
from training.settings.faults import PRESET, diagnose, fault_of_choice, refuse_additions
from training.settings.files import (
    BEHAVIOUR,
    CONFIG_FOLDER,
    CONFIG_NAME,
    NOTHING,
    compose_files,
    known_choices,
    resolve,
    without_hydra,
)
from training.settings.overrides import Arguments, chosen, flags_of, jobs, name_of, opened, parse, quoted

__all__ = ["BEHAVIOUR", "CONFIG_FOLDER", "CONFIG_NAME", "compose", "current", "prepare", "settle"]

# Groups that a resumed run may choose anew: they do not change what is learned.
FREE = ("paths", "logger", "callbacks")


def prepare(argv: Sequence[str]) -> RunConfig | list[str]:
    """Check a command line and complete it for Hydra.

    Args:
        argv: arguments after `train.py`.

    Returns:
        The one run that is asked for; or else arguments for Hydra, which shows what there is and launches sweeps: those
        given, the groups of a run to be resumed, the folder of a sweep.

    Raises:
        UserError: for whatever is wrong with any of the command's jobs.
    """
    args = Arguments().parse_intermixed_args(list(argv))
    if args.help or args.hydra_help or args.shell_completion:
        return list(argv)
    if args.config_name or args.config_path:
        raise UserError("--config-name and --config-path are not supported: write an experiment file, experiment=NAME")
    given = [quoted(text) for text in args.overrides]
    flags = flags_of(argv, args.overrides)
    search = [f"hydra.searchpath=['file://{Path(args.config_dir).resolve()}']"] if args.config_dir else []
    overrides = [parse(text) for text in given]
    refuse_additions(overrides, search)
    given = [*search, *_groups_of_resumed(overrides), *map(opened, given)]
    if args.multirun:
        overrides = [parse(text) for text in given]
        further = _prepare_sweep(overrides)
        return [*flags, *(chosen(jobs(overrides)) or given), *further]
    for override in overrides:
        if override.is_sweep_override():
            raise UserError(
                f"{override.input_line!r} holds several values: add -m to sweep over them, or write [a,b] for a list"
            )
    if args.cfg or args.info:  # which show what is composed: nothing is to be built, and torch would take a while
        _compose(given)
        return [*flags, *(text for text in given if text not in NOTHING)]
    return compose(given)


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """Compose `configs/train.yaml` with overrides, check and resolve it.

    Raises:
        UserError: for an unknown key, group or choice, a malformed override, a broken file, or a bad value.
    """
    from training.settings import schema  # with what it checks, and so with torch

    overrides = [opened(quoted(text)) for text in overrides]
    cfg = _compose(overrides)
    command = [text for text in overrides if text not in NOTHING and not text.startswith("hydra.")]
    run = settle(without_hydra(cfg), cfg.hydra.runtime.choices, command)
    schema.rehearse(run.values)
    return run


def _compose(overrides: Sequence[str]) -> DictConfig:
    """What Hydra makes of overrides, or the sentence about the one that is at fault."""
    parsed = [parse(text) for text in overrides]
    options = known_choices(parsed)
    for override in parsed:
        if name_of(override) in options and (fault := fault_of_choice(override, options)):
            raise UserError(fault)
    try:
        return compose_files([text for text in overrides if text not in NOTHING])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(diagnose(parsed, options, error)) from error
    except yaml.YAMLError as error:
        raise UserError(f"a configuration file is not valid YAML: {error}") from error


def settle(cfg: DictConfig, choices: Mapping[str, str | None], command: Sequence[str] = ()) -> RunConfig:
    """Check a composed configuration and resolve it; a run to be resumed has its saved one with this command's values.

    Args:
        cfg: the configuration, without Hydra's node.
        choices: the file each group was taken from.
        command: the overrides that led to it.

    Raises:
        UserError: for a missing or mistyped value, or a broken interpolation.
    """
    from training.settings.validation import validate  # see compose

    chosen = {group: choice for group, choice in choices.items() if choice and not group.startswith("hydra")}
    chosen.pop(PRESET, None)
    if OmegaConf.select(cfg, "resume") not in (None, "auto"):
        cfg, chosen = _take_up(cfg, chosen, command)
    return RunConfig(validate(resolve(cfg)), chosen, [text.removeprefix("++") for text in command])


def current(cfg: DictConfig) -> RunConfig:
    """The configuration of the job of a sweep that Hydra runs now."""
    hydra = HydraConfig.get()
    run = settle(cfg, hydra.runtime.choices, list(hydra.overrides.task))
    given = [parse(text) for text in hydra.overrides.task]
    # What the sweep fixes for all of its jobs says nothing of this one.
    differing = [o for o in given if o.key_or_group not in hydra.job.config.override_dirname.exclude_keys]
    label = "_".join(sorted(o.input_line or "" for o in differing)).replace("=", "-")
    label = re.sub(r"(^|_)\+{1,2}", r"\1", label)  # without the signs that add keys
    return RunConfig(run.values, run.choices, run.command, Path(hydra.sweep.dir), label)


def _groups_of_resumed(overrides: Sequence[Override]) -> list[str]:
    """The group choices of the run that `resume=PATH` names, unless the command contradicts them."""
    given = {name_of(override): override.value() for override in overrides}
    path = given.get("resume")
    if path in (None, "", "auto") or not isinstance(path, str):
        return []
    folder, _ = find(path)
    _, choices = load(folder)
    for group in given.keys() & known_choices(overrides).keys() - {*FREE}:
        if given[group] != choices.get(group) and given[group] is not None:
            kind = f"with {group}={choices[group]}" if group in choices else f"without {group}"
            raise UserError(
                f"resume={path} is a run {kind}, which {group}={given[group]} contradicts: leave it out, or start a "
                "new run from its weights with init_from"
            )
    return [f"{group}={choice}" for group, choice in choices.items() if group not in given]


def _take_up(composed: DictConfig, chosen: dict[str, str], command: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    """Values and choices of the run to be resumed, with what this command gives for itself."""
    folder, _ = find(str(composed.resume))
    saved, choices = load(folder)
    paths = resolve(composed.paths, "paths.")
    values = OmegaConf.create(replace_folder(saved, str(saved["paths"]["data"]), str(paths["data"])))
    values.paths, values.resume = paths, composed.resume
    for key in (name_of(parse(text)) for text in command):
        before, now = (OmegaConf.select(cfg, key) for cfg in (values, composed))
        if key.split(".")[0] in RESTORED and key not in choices and before != now:
            raise UserError(
                f"{key} is {before} in the checkpoint of resume={folder} and cannot change: leave it out, or start a "
                "new run with init_from"
            )
        if key in FREE and chosen[key] != choices.get(key):
            values[key], choices[key] = resolve(composed[key], f"{key}."), chosen[key]
        elif "." in key and not key.startswith(("hydra.", "paths.")):
            OmegaConf.update(values, key, now)
    return values, choices


def _prepare_sweep(overrides: list[Override]) -> list[str]:
    """Check every job of a sweep and name its folder and its runs after what they differ in."""
    given = {name_of(override): override for override in overrides}
    if given.get("resume") and given["resume"].value() not in (None, "auto"):
        raise UserError("resume=PATH names one run, and a sweep resumes its own unfinished runs: leave resume out")
    if all(override.is_discrete_sweep() for override in overrides if override.is_sweep_override()):
        commands = jobs(overrides)
    else:  # a sweeper plugin will draw the values: check what is fixed
        commands = [[override.input_line or "" for override in overrides if not override.is_sweep_override()]]
    runs = [compose(command) for command in commands]
    if len({run.job_id for run in runs}) < len(runs):
        raise UserError("two jobs of this sweep are the same run: remove the value that is given twice")
    names = {run.values["name"] for run in runs}
    fixed = [parts[0] for parts in zip(*(run.parts for run in runs), strict=True) if len(set(parts)) == 1]
    name = names.pop() if len(names) == 1 else None
    # Hydra leaves keys out of a run's name without a look at packages: optimizer would be optimizer@critic, too.
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    constant = sorted({override.key_or_group for override in overrides} - swept)
    parts = Path(name or "_".join(fixed) or "sweep").parts
    folder = Path(runs[0].values["paths"]["sweeps"]).joinpath(*map(shortened, parts))
    extra = [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(constant)}]"]
    return extra if "hydra.sweep.dir" in given else [*extra, f"hydra.sweep.dir='{folder}'"]
