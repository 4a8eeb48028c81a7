"""From overrides to a checked configuration: Hydra composes, and what is wrong becomes a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.errors import UserError
from training.names import PLAYERS, RESTORED, SHARING
from training.runs.record import REMARKS, RunConfig, find, load, replace_folder
from training.settings.faults import PRESET, diagnose, fault_of_choice
from training.settings.files import NOTHING, compose_files, known_choices, resolve, without_hydra
from training.settings.overrides import name_of, opened, parse, quoted
from training.settings.own import other_budgets, superseded

# Groups that a resumed run may choose anew: they do not change what is learned.
FREE = ("paths", "logger", "callbacks")


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """Compose `configs/train.yaml` with overrides, check and resolve it.

    Raises:
        UserError: for an unknown key, group or choice, a malformed override, a broken file, or a bad value.
    """
    overrides = opened([quoted(text) for text in overrides])
    for override in map(parse, overrides):
        if override.is_sweep_override():
            raise UserError(f"{override.input_line!r} holds several values, and one is to be given here")
    return checked(composition_of(overrides), overrides)


def checked(cfg: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """What was composed of overrides, resolved, and everything that needs no data built once.

    Raises:
        UserError: for a bad value.
    """
    from training.settings import schema  # with what it checks, and so with torch

    run = settle(without_hydra(cfg), cfg.hydra.runtime.choices, command_of(overrides))
    schema.rehearse(run.values)
    return run


def command_of(overrides: Sequence[str]) -> list[str]:
    """What a run's record says of the overrides that led to it: what is not Hydra's own, nor nothing."""
    return [text.removeprefix("++") for text in overrides if text not in NOTHING and not text.startswith("hydra")]


def composition_of(overrides: Sequence[str]) -> DictConfig:
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
    except UnicodeDecodeError as error:
        raise UserError(f"a configuration file is not in UTF-8 ({error})") from error
    except RecursionError as error:
        raise UserError("a configuration file takes itself up, by its defaults or those of a file there") from error


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

    command = [text.removeprefix("++") for text in command]
    chosen = {group: choice for group, choice in choices.items() if choice and not group.startswith("hydra")}
    chosen.pop(PRESET, None)
    if OmegaConf.select(cfg, "resume") not in (None, "auto"):
        cfg, chosen = _take_up(cfg, chosen, command)
    dropped, names = superseded(cfg, command)
    replaced = other_budgets(command)
    if dropped or replaced:
        cfg = OmegaConf.create(OmegaConf.to_container(cfg))  # type: ignore[assignment]  # the caller's stays as it is
        for key in dropped:
            OmegaConf.select(cfg, key.rpartition(".")[0]).pop(key.rpartition(".")[2])
        for key in replaced:
            OmegaConf.update(cfg, key, None)
    chosen |= {f"optimizer@{where}" if where in PLAYERS else where: name for where, name in names.items()
               if "." not in where}  # fmt: skip
    return RunConfig(validate(resolve(cfg)), chosen, command)


def _take_up(composed: DictConfig, chosen: dict[str, str], command: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    """Values and choices of the run to be resumed, with what this command gives for itself."""
    from training.settings.trust import require_own  # see compose

    folder, _ = find(str(composed.resume))
    saved, choices = load(folder)
    require_own(saved, OmegaConf.to_container(composed), folder)  # type: ignore[arg-type]
    paths = resolve(composed.paths, "paths.")
    values = OmegaConf.create(replace_folder(saved, str(saved["paths"]["data"]), str(paths["data"])))
    values.paths, values.resume = paths, composed.resume
    for key in (name_of(parse(text)) for text in command):
        before, now = (OmegaConf.select(cfg, key) for cfg in (values, composed))
        belongs = key.split(".")[0] in RESTORED and key.split(".")[1:] != [SHARING]
        if belongs and key not in choices and before != now:
            raise UserError(
                f"{key} is {before} in the checkpoint of resume={folder} and cannot change: leave it out, or start a "
                "new run with init_from"
            )
        if key in FREE and chosen[key] != choices.get(key):
            values[key], choices[key] = resolve(composed[key], f"{key}."), chosen[key]
        elif key in REMARKS or ("." in key and not key.startswith(("hydra.", "paths."))):
            OmegaConf.update(values, key, now)
    return values, choices
