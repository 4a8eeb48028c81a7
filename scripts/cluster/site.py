"""What a site is and what the command line adds to it: configs/cluster/*.yaml, and files of one's own."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.command import cluster
from training.command.cluster import Job
from training.errors import UserError
from training.settings.overrides import Arguments, jobs, name_of, parse, quoted

SHOWN = ("optimizer", "model", "dataset")  # what a job is called after


@dataclass
class Request:
    """A command of scripts/submit.py.

    Attributes:
        cluster: the site.
        options: by the names of its file.
        train: arguments of train.py.
        dry_run: print, submit nothing.
        check: compose what is to run first, so that no job waits for hours to fail of a typing error.
        output: write the script here; None: into `jobs/`.
        folders: where else there may be a `cluster/` folder of sites.
    """

    cluster: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    train: list[str] = field(default_factory=list)
    dry_run: bool = False
    check: bool = True
    output: Path | None = None
    folders: list[Path] = field(default_factory=list)


def read(argv: Sequence[str]) -> Request:
    """The arguments of scripts/submit.py.

    Raises:
        UserError: one that there is not, or no cluster.
    """
    at = argv.index("--") if "--" in argv else len(argv)
    words, train = list(argv[:at]), list(argv[at + 1 :])
    request = Request(train=train)
    given: list[str] = []
    while words:
        word = words.pop(0)
        if word == "--dry-run":
            request.dry_run = True
        elif word == "--no-check":
            request.check = False
        elif word in ("--output", "--config-dir"):
            if not words:
                raise UserError(f"{word} needs a path behind it.")
            path = Path(words.pop(0))
            if word == "--output":
                request.output = path
            else:
                request.folders.append(path)
                if not path.is_dir():
                    raise UserError(f"--config-dir {path}: there is no such folder.")
        elif word.startswith("-"):
            raise UserError(f"unknown flag {word!r}: there are --dry-run, --no-check, --output and --config-dir.")
        elif "=" not in word:
            raise UserError(f"{word!r} is no option: write key=value, and train.py's arguments behind --.")
        else:
            given.append(word)
    try:
        options = OmegaConf.to_container(OmegaConf.from_dotlist(given))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise UserError(f"options cannot be read: {' '.join(str(error).split())}") from error
    assert isinstance(options, dict)
    request.options = {str(key): value for key, value in options.items()}
    request.cluster = str(request.options.pop("cluster", ""))
    for text in given:  # 36:00:00 is a number of base 60 to YAML, and so is 90:00
        key, _, value = text.partition("=")
        if key == "time":
            request.options[key] = value
    return request


def describe(request: Request) -> Job:
    """The job that a command asks for.

    Raises:
        UserError: whatever is wrong with it.
    """
    site = cluster.defaults(request.cluster, request.folders)
    overrides = list(request.train)
    values = {**site, **request.options}
    if values.get("name") is None:
        values["name"] = _name(overrides)
    count = _count(overrides)
    sweeping = bool(values.get("array")) or bool(values.get("side"))
    if values.get("array") is True:
        values["array"] = count
    if sweeping and count < 2:
        raise UserError("array and side are for a sweep: give several values behind --, as in optimizer=sgd,adam.")
    if not sweeping and count > 1 and not {"-m", "--multirun"} & set(overrides):
        raise UserError(
            f"this is a sweep of {count} runs: add array=N (a job each, N at once), side=N (one job, N at once), or -m "
            "behind -- (one after another)."
        )
    return cluster.build(values, overrides=overrides, jobs=count if sweeping else 0)


def _count(overrides: Sequence[str]) -> int:
    """How many runs train.py's arguments are; 1 if their number is a sweeper's secret."""
    args = Arguments().parse_intermixed_args(list(overrides))
    parsed = [parse(quoted(text)) for text in args.overrides]
    if not all(override.is_discrete_sweep() for override in parsed if override.is_sweep_override()):
        return 1
    return len(jobs(parsed))


def _name(overrides: Sequence[str]) -> str:
    args = Arguments().parse_intermixed_args(list(overrides))
    given = {name_of(o): o for o in (parse(quoted(text)) for text in args.overrides)}
    if "name" in given:
        return str(given["name"].value())
    shown = [str(given[key].value()) for key in SHOWN if key in given and not given[key].is_sweep_override()]
    return "_".join(shown).replace("/", "-") or "curvlab"


def as_typed(argv: Sequence[str]) -> str:
    """The command, for the script's head."""
    return shlex.join(["python", "scripts/submit.py", *(word for word in argv if word != "--dry-run")])
