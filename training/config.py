"""From a command line to a checked configuration. Besides train.py and scripts/, nothing else imports Hydra.

Hydra composes; the checks here turn whatever is wrong with a command into one sentence before anything runs:
`prepare` composes and checks every job of a command, `current` gives the running job its `RunConfig`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from optimizers.packaged import Package
from training import schema
from training.errors import UserError
from training.players import PLAYERS
from training.run_config import AROUND, RunConfig, find, load, replace_folder
from training.schedules import ScalarSchedule
from training.schema import TARGET, did_you_mean

CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "configs"
CONFIG_NAME = "train"
# Groups without a `_target_` of their own, which hold named nodes that have one.
CONTAINERS = ("logger", "callbacks")
# The one key whose names are not in the files: those of the chosen optimizer's scalars, which are checked against it.
OPEN = "schedules"
# Another one, checked against the names of the model's parameters.
RATES = "finetune.lr_mult"
# And another, against the options of a class of torch.optim.
GRAFTED = "step_length.options"
# Regular expressions, which are full of what Hydra's grammar takes for its own.
EXPRESSIONS = ("finetune.freeze", "optimizer.skip", "generator.skip", "critic.skip")
# A group that follows from the others: hyper-parameters that a study has for an optimizer, if it has some.
PRESET = "preset"
# What these two are anyway; Hydra refuses null as a choice on the command line.
NOTHING = ("experiment=null", "debug=null")
# Groups that a resumed run may choose anew: they do not change what is learned.
FREE = ("paths", "logger", "callbacks")
# Keys that a resumed run cannot change: their state lies in a checkpoint, or they go with what does.
RESTORED = (
    "seed", "model", "optimizer", *PLAYERS, *AROUND, "scheduler", "schedules", "init_from", "finetune",
)  # fmt: skip


def prepare(argv: Sequence[str]) -> list[str]:
    """Check a command line and complete it for Hydra.

    Args:
        argv: arguments after `train.py`.

    Returns:
        Arguments for Hydra: those given, the groups of a run to be resumed, the folder of a sweep.

    Raises:
        UserError: for whatever is wrong with any of the command's jobs.
    """
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(list(argv))
    if args.help or args.hydra_help or args.shell_completion:
        return list(argv)
    if args.config_name or args.config_path:
        raise UserError("--config-name and --config-path are not supported: write an experiment file, experiment=NAME")
    given = [_quoted(text) for text in args.overrides]
    flags = _flags(argv, args.overrides)
    search = [f"hydra.searchpath=['file://{Path(args.config_dir).resolve()}']"] if args.config_dir else []
    overrides = [_parse(text) for text in given]
    _refuse_additions(overrides, search)
    given = [*search, *_groups_of_resumed(overrides), *map(_opened, given)]
    if args.multirun:
        return [*flags, *given, *_prepare_sweep([_parse(text) for text in given])]
    for override in overrides:
        if override.is_sweep_override():
            raise UserError(
                f"{override.input_line!r} holds several values: add -m to sweep over them, or write [a,b] for a list"
            )
    compose(given)
    return [*flags, *(text for text in given if text not in NOTHING)]


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """Compose `configs/train.yaml` with overrides, check and resolve it.

    Raises:
        UserError: for an unknown key, group or choice, a malformed override, a broken file, or a bad value.
    """
    overrides = [_opened(_quoted(text)) for text in overrides]
    parsed = [_parse(text) for text in overrides]
    options = _options(parsed)
    for override in parsed:
        if _name(override) in options and (fault := _fault_of_choice(override, options)):
            raise UserError(fault)
    try:
        cfg = _compose([text for text in overrides if text not in NOTHING])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_diagnose(parsed, options, error)) from error
    except yaml.YAMLError as error:
        raise UserError(f"a configuration file is not valid YAML: {error}") from error
    run = settle(_without_hydra(cfg), cfg.hydra.runtime.choices, overrides)
    schema.rehearse(run.values)
    return run


def settle(cfg: DictConfig, choices: Mapping[str, str | None], command: Sequence[str] = ()) -> RunConfig:
    """Check a composed configuration and resolve it; a run to be resumed has its saved one with this command's values.

    Args:
        cfg: the configuration, without Hydra's node.
        choices: the file each group was taken from.
        command: the overrides that led to it.

    Raises:
        UserError: for a missing or mistyped value, or a broken interpolation.
    """
    chosen = {group: choice for group, choice in choices.items() if choice and not group.startswith("hydra")}
    chosen.pop(PRESET, None)
    if OmegaConf.select(cfg, "resume") not in (None, "auto"):
        cfg, chosen = _take_up(cfg, chosen, command)
    return RunConfig(validate(_resolve(cfg)), chosen, [text.removeprefix("++") for text in command])


def current(cfg: DictConfig) -> RunConfig:
    """The configuration of the job that Hydra runs now."""
    hydra = HydraConfig.get()
    run = settle(cfg, hydra.runtime.choices, list(hydra.overrides.task))
    if hydra.mode != RunMode.MULTIRUN:
        return run
    label = re.sub(r"(^|_)\+{1,2}", r"\1", hydra.job.override_dirname)  # without the signs that add keys
    return RunConfig(run.values, run.choices, run.command, Path(hydra.sweep.dir), label)


def validate(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check every key and value against the signatures of what the configuration names.

    Raises:
        UserError: the first fault, in one sentence.
    """
    checked = schema.check_options(_top_level, values, "")
    if not 0 <= checked["seed"] < 2**32:
        raise UserError(f"seed must be between 0 and 4294967295, got {checked['seed']}")
    if checked["verify"] is not None and checked["verify"] < 1:
        raise UserError(f"verify must be at least 1 example, or null, got {checked['verify']}")
    checked["paths"] = schema.check_options(_paths, checked["paths"], "paths")
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
    verify: int | None = None, averaging: dict | None = None, step_length: dict | None = None,
) -> None:  # fmt: skip
    """The signature that `configs/train.yaml` is checked against."""


def _paths(data: str, runs: str, sweeps: str) -> None:
    """The signature of the group `paths`."""


def _finetune(lr_mult: dict, freeze: str | None = None) -> None:
    """The signature of `finetune`."""


def _compose(overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return hydra_compose(CONFIG_NAME, list(overrides), return_hydra_config=True)


def _parse(text: str) -> Override:
    try:
        return OverridesParser.create().parse_overrides([text])[0]
    except OverrideParseException as error:
        why = str(error).splitlines()[0]
        hint = f" ({why}); quote values with special characters" if "=" in text else ": write key=value"
        raise UserError(f"malformed override {text!r}{hint}") from error


def _name(override: Override) -> str:
    """A key or group, the latter with the package that it is chosen for: `optimizer@critic`."""
    return override.key_or_group + (f"@{override.package}" if override.package else "")


def _refuse(message: str) -> NoReturn:
    """What argparse calls on a flag it does not know; values are given as key=value."""
    unknown = re.search(r"unrecognized arguments: (--?)(\S+)", message)
    if unknown:
        flag = "".join(unknown.groups())
        raise UserError(f"unknown flag {flag!r}: values are given as key=value, e.g. optimizer.lr=0.01 (see --help)")
    raise UserError(f"{message} (see --help)")


def _flags(argv: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The arguments that are no overrides, flags with their values."""
    left = list(overrides)
    flags = []
    for text in argv:
        if left and text == left[0]:
            left.pop(0)
        else:
            flags.append(text)
    return flags


def _quoted(text: str) -> str:
    """Quote a regular expression, and the path of an existing file, that means something to Hydra's grammar."""
    key, _, value = text.partition("=")
    if value.startswith(("'", '"')) or not re.search(r"[^\w./:~-]", value):
        return text
    if key in EXPRESSIONS:
        return f"{key}='{value}'" if value.strip() and "'" not in value else text
    special = re.search(r"[=,{}\[\]()]", value) and not value.startswith("[")
    return f"{key}='{value}'" if special and Path(value).exists() else text


def _opened(text: str) -> str:
    """An override under `schedules` in the form that adds what is not there, which Hydra would refuse."""
    key = text.partition("=")[0]
    return f"++{text}" if key.split(".")[0] == OPEN or key.startswith((RATES, GRAFTED)) else text


def _refuse_additions(overrides: Sequence[Override], search: Sequence[str]) -> None:
    """Hydra's + accepts any key, so a typo would be dropped in silence. Options of a package's classes are checked."""
    for override in overrides:
        if not (override.is_add() or override.is_force_add()):
            continue
        plain = (override.input_line or "").lstrip("+")
        tree = _tree([*search, *_choices(overrides)])
        if _is_option_of_a_class(override, tree):
            continue
        fault = _fault_of_key(override, tree)
        advice = f"; {fault}" if fault else f": write {plain}"
        raise UserError(f"{override.input_line!r}: keys cannot be added with +{advice}")


def _groups_of_resumed(overrides: Sequence[Override]) -> list[str]:
    """The group choices of the run that `resume=PATH` names, unless the command contradicts them."""
    given = {_name(override): override.value() for override in overrides}
    path = given.get("resume")
    if path in (None, "", "auto") or not isinstance(path, str):
        return []
    folder, _ = find(path)
    _, choices = load(folder)
    for group in given.keys() & _options(overrides).keys() - {*FREE}:
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
    paths = _resolve(composed.paths, "paths.")
    values = OmegaConf.create(replace_folder(saved, str(saved["paths"]["data"]), str(paths["data"])))
    values.paths, values.resume = paths, composed.resume
    for key in (_name(_parse(text)) for text in command):
        before, now = (OmegaConf.select(cfg, key) for cfg in (values, composed))
        if key.split(".")[0] in RESTORED and key not in choices and before != now:
            raise UserError(
                f"{key} is {before} in the checkpoint of resume={folder} and cannot change: leave it out, or start a "
                "new run with init_from"
            )
        if key in FREE and chosen[key] != choices.get(key):
            values[key], choices[key] = _resolve(composed[key], f"{key}."), chosen[key]
        elif "." in key and not key.startswith(("hydra.", "paths.")):
            OmegaConf.update(values, key, now)
    return values, choices


def _prepare_sweep(overrides: list[Override]) -> list[str]:
    """Check every job of a sweep and name its folder and its runs after what they differ in."""
    given = {_name(override): override for override in overrides}
    if given.get("resume") and given["resume"].value() not in (None, "auto"):
        raise UserError("resume=PATH names one run, and a sweep resumes its own unfinished runs: leave resume out")
    if all(override.is_discrete_sweep() for override in overrides if override.is_sweep_override()):
        jobs = [job for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]
    else:  # a sweeper plugin will draw the values: check what is fixed
        jobs = [[override.input_line or "" for override in overrides if not override.is_sweep_override()]]
    runs = [compose(job) for job in jobs]
    if len({run.job_id for run in runs}) < len(runs):
        raise UserError("two jobs of this sweep are the same run: remove the value that is given twice")
    names = {run.values["name"] for run in runs}
    fixed = [parts[0] for parts in zip(*(run.parts for run in runs), strict=True) if len(set(parts)) == 1]
    name = names.pop() if len(names) == 1 else None
    # Hydra leaves keys out of a run's name without a look at packages: optimizer would be optimizer@critic, too.
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    constant = sorted({override.key_or_group for override in overrides} - swept)
    folder = Path(runs[0].values["paths"]["sweeps"]) / (name or "_".join(fixed) or "sweep")
    extra = [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(constant)}]"]
    return extra if "hydra.sweep.dir" in given else [*extra, f"hydra.sweep.dir='{folder}'"]


def _resolve(cfg: DictConfig, prefix: str = "") -> dict[str, Any]:
    """Plain containers, all interpolations resolved; a missing mandatory value or a broken one is a sentence."""
    try:
        for key in sorted(OmegaConf.missing_keys(cfg)):
            raise UserError(f"{prefix}{key} is required: give {prefix}{key}=...")
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        why = str(error).splitlines()[0]
        broken = re.search(r"Interpolation key '([^']+)'", why)
        hint = did_you_mean(broken[1], _keys(cfg)) if broken else ""
        key = getattr(error, "full_key", None) or "the configuration"
        raise UserError(f"{key} cannot be resolved: {why}{hint}") from error


def _diagnose(overrides: Sequence[Override], options: Mapping[str, list[str]], error: Exception) -> str:
    """Why a configuration does not compose, in a sentence about the override that is at fault."""
    for override in overrides:
        if override.is_delete() and override.key_or_group in ("study", "optimizer"):  # both name `PRESET`
            return f"{override.key_or_group} is missing from the configuration: ~ cannot remove it"
    tree = _tree(_choices(overrides))
    for override in overrides:
        if tree is not None and (fault := _fault_of_key(override, tree)):
            return fault
    return " ".join(str(error).split())


def _options(overrides: Sequence[Override]) -> dict[str, list[str]]:
    """Every group with its choices, nested ones as `folder/name`."""
    folders = [CONFIG_FOLDER]
    for override in overrides:
        if override.key_or_group == "hydra.searchpath":
            folders += [Path(str(path).removeprefix("file://")) for path in override.value()]  # type: ignore[union-attr]
    options: dict[str, list[str]] = {}
    for group in (path for folder in folders for path in sorted(folder.iterdir()) if path.is_dir()):
        names = [path.relative_to(group).with_suffix("").as_posix() for path in group.rglob("*.yaml")]
        options.setdefault(group.name, []).extend(sorted(names))
    return options | {f"optimizer@{player}": options["optimizer"] for player in PLAYERS}


def _fault_of_choice(override: Override, options: Mapping[str, list[str]]) -> str | None:
    group, value = _name(override), override.value()
    known = options[group]
    if override.is_delete() or f"{group}={override.get_value_element_as_str()}" in NOTHING:
        return None
    for choice in value if isinstance(value, list) else [value]:
        if not isinstance(choice, str):
            return f"{group} must be one of {', '.join(known)}, got {override.get_value_element_as_str()}"
        if choice not in known:
            return f"{group} has no choice {choice!r}{did_you_mean(choice, known)}; it has {', '.join(known)}"
    return None


def _fault_of_key(override: Override, tree: DictConfig | None) -> str | None:
    """A sentence if the key is not in the tree, with what it may have been meant to be."""
    key = override.key_or_group
    if tree is None or key.startswith(("hydra", RATES, GRAFTED)) or key.split(".")[0] == OPEN:
        return None
    known = _keys(tree)
    groups = sorted(_options([]))
    if override.package and _name(override) not in groups:
        return f"unknown key {_name(override)!r}{did_you_mean(_name(override), groups)}"
    if key in known or key in groups:
        return None
    parents = [parent for parent in itertools.accumulate(key.split("."), "{}.{}".format) if parent in known]
    if _is_option_of_a_class(override, tree):
        return f"{key} is not in the file of this optimizer: add it with +{(override.input_line or '').lstrip('+')}"
    if (player := key.split(".")[0]) in PLAYERS and player not in known:
        return f"there is no key {key!r} as long as the {player} has no optimizer of its own: optimizer@{player}=NAME"
    if parents:
        parent, leaf = parents[-1], key.removeprefix(parents[-1])[1:].split(".")[0]
        children = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
        listed = [name for name in children if name != TARGET]
        hint = f"; it has {', '.join(listed)}" if listed else "; it is a single value"
        return f"{parent} has no key {leaf!r}{did_you_mean(leaf, listed) or hint}"
    leaves = {name: name.rpartition(".")[2] for name in known}
    wanted = key.rpartition(".")[2]
    homes = [name for name, leaf in leaves.items() if leaf == wanted]  # lr=0.1 for optimizer.lr=0.1
    homes = homes or [name for name, leaf in leaves.items() if wanted in leaf.split("_")]  # epochs: max_epochs
    hint = f" (did you mean {homes[0]!r}?)" if homes else did_you_mean(key, [*known, *groups])
    return f"unknown key {key!r}{hint or '; python train.py --cfg job prints all keys'}"


def _is_option_of_a_class(override: Override, tree: DictConfig | None) -> bool:
    """Whether a key that is not in the tree may be an option of a class that is asked for by its name."""
    group, _, name = override.key_or_group.partition(".")
    known = [] if tree is None else _keys(tree)
    if tree is None or group not in ("optimizer", *PLAYERS) or group not in known or not name:
        return False
    return override.key_or_group not in known and isinstance(schema.locate(tree[group][TARGET], group), Package)


def _choices(overrides: Sequence[Override]) -> list[str]:
    """The overrides that choose a group's file (or are Hydra's own), as far as they choose one."""
    groups = _options(overrides)
    chosen = [o for o in overrides if _name(o) in groups or o.key_or_group.startswith("hydra")]
    return [o.input_line or "" for o in chosen if not (o.is_sweep_override() or o.input_line in NOTHING)]


def _tree(groups: Sequence[str]) -> DictConfig | None:
    """The configuration that the group choices alone give, or None if they do not compose."""
    try:
        cfg = _compose(groups)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError):
        return None  # the caller is explaining an error already and says it in its own words
    return _without_hydra(cfg)


def _without_hydra(cfg: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def _keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    """All dotted keys, groups included."""
    keys: list[str] = []
    for name in map(str, cfg):
        keys.append(f"{prefix}{name}")
        node = cfg._get_node(name)
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing() or node._is_interpolation()):
            keys += _keys(node, f"{prefix}{name}.")
    return keys
