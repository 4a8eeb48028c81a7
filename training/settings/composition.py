"""From a command line to a checked configuration. Besides train.py and scripts/, nothing else imports Hydra.

Hydra composes; the checks here turn whatever is wrong with a command into one sentence before anything runs:
`prepare` composes and checks every job of a command, `current` gives the running job its `RunConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from training.errors import UserError
from training.runs.record import RunConfig, find, load
from training.settings.composing import FREE, compose, composition_of, settle
from training.settings.faults import refuse_additions
from training.settings.files import (
    BEHAVIOUR,
    CONFIG_FOLDER,
    CONFIG_NAME,
    NOTHING,
    known_choices,
    spelled_out,
    without_hydra,
)
from training.settings.overrides import Arguments, flags_of, name_of, opened, parse, quoted
from training.settings.own import is_own_choice, other_budgets, superseded
from training.settings.sweeps import Sweep, label_of, prepare_sweep, require_plugin, taken_out

__all__ = ["BEHAVIOUR", "CONFIG_FOLDER", "CONFIG_NAME", "Sweep", "compose", "current", "prepare", "settle"]


def prepare(argv: Sequence[str], tell: Callable[[str], None] = lambda line: None) -> RunConfig | Sweep | list[str]:
    """Check a command line, and complete it where Hydra is to act on it.

    Args:
        argv: arguments after `train.py`.
        tell: hears what takes a while.

    Returns:
        The one run that is asked for, or the sweep; or else arguments for Hydra, which shows what there is.

    Raises:
        UserError: for whatever is wrong with the run, or with any value that is swept.
    """
    for text in argv:
        if not text.isascii() and text.encode(errors="ignore").decode() != text:
            raise UserError(f"{text!a} is not in UTF-8, which run folders are written in: rename what it names")
    args = Arguments().parse_intermixed_args(list(argv))
    if args.shell_completion:
        if not any(text.startswith(("install=", "uninstall=", "query=")) for text in args.overrides):
            raise UserError("--shell-completion needs install=SHELL, uninstall=SHELL or query=SHELL")
        return list(argv)
    if args.help or args.hydra_help or args.version:  # whatever else is said
        return flags_of(argv, args.overrides)
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise UserError(f"--config-dir {args.config_dir}: there is no such folder")
    if args.config_name or args.config_path:
        raise UserError("--config-name and --config-path are not supported: write an experiment file, experiment=NAME")
    if args.experimental_rerun:
        raise UserError("--experimental-rerun is for folders of Hydra, which does not make any: resume=RUN_FOLDER")
    if (args.resolve or args.package) and not args.cfg:
        raise UserError("--resolve and --package say what --cfg is to print: add --cfg job, or leave them out")
    given = [quoted(text) for text in args.overrides]
    flags = flags_of(argv, args.overrides)
    if args.info == "all":  # alone, it would take the first override for its value
        flags = [f"{text}=all" if text == "--info" else f"{text}all" if text == "-i" else text for text in flags]
        flags = [text for text in flags if text != "all"]
    place = str(Path(args.config_dir).resolve()).replace("'", "\\'") if args.config_dir else ""
    search = [f"hydra.searchpath=['file://{place}']"] if args.config_dir else []
    given, shares = taken_out(spelled_out(given, search), args.multirun)
    overrides = [parse(text) for text in given]
    refuse_additions(overrides, search)
    given = [*search, *_groups_of_resumed(overrides), *opened(given)]
    for override in overrides:
        require_plugin(override)
        if not args.multirun and not (args.cfg or args.info):
            _refuse_hydras_own(override)
    if args.multirun:
        sweep = prepare_sweep([parse(text) for text in given], shares, flags, tell)
        return sweep.arguments if args.cfg or args.info else sweep
    for override in overrides:
        if override.is_sweep_override():
            raise UserError(
                f"{override.input_line!r} holds several values: add -m to sweep over them, or write [a,b] for a list"
            )
    if args.cfg or args.info:  # which show what is composed: nothing is to be built, and torch would take a while
        cfg = composition_of(given)
        dropped, _ = superseded(without_hydra(cfg), [text.removeprefix("++") for text in given])
        shown = [*(f"~{key}" for key in dropped), *(f"{key}=null" for key in other_budgets(given))]
        return [*flags, *shown, *(text for text in given if text not in NOTHING)]
    return compose(given)


def _refuse_hydras_own(override: Override) -> None:
    """A setting of Hydra's that a single run has no use for, and would drop in silence."""
    key = override.key_or_group
    if key.startswith(("hydra.", "hydra/")) and key != "hydra.searchpath":
        advice = {
            "hydra.run.dir": "runs go to paths.runs=FOLDER, in it to name=NAME",
            "hydra/launcher": "add -m to launch the runs of a sweep",
            "hydra/sweeper": "add -m to sweep",
        }.get(key, "leave it out")
        raise UserError(f"{override.input_line} is Hydra's, and nothing a single run goes by: {advice}")


def current(cfg: DictConfig) -> RunConfig:
    """The configuration of the job of a sweep that Hydra runs now."""
    hydra = HydraConfig.get()
    run = settle(cfg, hydra.runtime.choices, list(hydra.overrides.task))
    # What the sweep fixes for all of its jobs says nothing of this one.
    fixed = hydra.job.config.override_dirname.exclude_keys
    label = label_of(text for text in hydra.overrides.task if parse(text).key_or_group not in fixed)
    return RunConfig(run.values, run.choices, run.command, Path(hydra.sweep.dir), label)


def _groups_of_resumed(overrides: Sequence[Override]) -> list[str]:
    """The group choices of the run that `resume=PATH` names, unless the command contradicts them."""
    given = {name_of(override): override.value() for override in overrides}
    path = given.get("resume")
    if path in (None, "", "auto") or not isinstance(path, str):
        return []
    folder, _ = find(path)
    saved, choices = load(folder)
    known = known_choices(overrides)
    choices = {group: choice for group, choice in choices.items()
               if choice in known.get(group, ()) or not is_own_choice(group, choice, saved)}  # fmt: skip
    for group in given.keys() & known.keys() - {*FREE}:
        if given[group] != choices.get(group) and given[group] is not None:
            kind = f"with {group}={choices[group]}" if group in choices else f"without {group}"
            raise UserError(
                f"resume={path} is a run {kind}, which {group}={given[group]} contradicts: leave it out, or start a "
                "new run from its weights with init_from"
            )
    return [f"{group}={choice}" for group, choice in choices.items() if group not in given]
