"""Sweeps: what is wrong with their values is found before the first job runs; a job is composed when it is due."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from training.errors import UserError, did_you_mean
from training.loop.launch import place
from training.runs.folder import shortened
from training.runs.record import BUDGETS, RunConfig
from training.settings.composer import Composer
from training.settings.files import tree_of
from training.settings.overrides import due, jobs, name_of, opened, parse, quoted, values_of

#: The keys of a command that are a sweep's and no job's.
WORKERS, THREADS, RUNS = "workers", "threads", "runs"
#: The launcher that is this program's own.
SLURM = "slurm"
#: Hydra's own settings that say what a sweep is, not who launches it.
OURS = ("hydra.searchpath", "hydra.sweep.dir")
#: Who else may launch jobs or draw values, and the package that brings it.
PLUGINS = {
    "hydra/launcher=joblib": "hydra-joblib-launcher",
    "hydra/launcher=ray": "hydra-ray-launcher",
    "hydra/launcher=rq": "hydra-rq-launcher",
    "hydra/launcher=slurm": "submitit",
    "hydra/launcher=submitit_local": "hydra-submitit-launcher",
    "hydra/launcher=submitit_slurm": "hydra-submitit-launcher",
    "hydra/sweeper=ax": "hydra-ax-sweeper",
    "hydra/sweeper=nevergrad": "hydra-nevergrad-sweeper",
    "hydra/sweeper=optuna": "hydra-optuna-sweeper",
}
#: How many compositions go without a word, at some seven a second.
SILENT = 10


@dataclass(frozen=True)
class Sweep:
    """A sweep.

    Attributes:
        folder: of its jobs' folders.
        commands: the overrides of each job, in order; none where a sweeper plugin draws the values.
        shared: names of what all jobs have in common, which their labels leave out.
        arguments: what Hydra is to be told where it launches the jobs.
        native: whether this program runs them; else a plugin of Hydra's does, or SLURM.
        queue: what `hydra/launcher=slurm` asks SLURM for; None where it is not asked.
        workers: how many jobs run at a time.
        threads: of torch in each job; None: this process's, shared out among the workers.
        names: what a file calls its jobs, in place of what tells them apart; "" for those that it does not name.
        due: numbers of the jobs that this launch is to run.
        composer: composes them.
    """

    folder: Path
    commands: list[list[str]]
    due: list[int]
    shared: frozenset[str]
    arguments: list[str]
    composer: Composer
    native: bool = True
    workers: int = 1
    threads: int | None = None
    names: tuple[str, ...] = ()
    queue: dict[str, Any] | None = None

    @property
    def labels(self) -> list[str]:
        """What tells the jobs apart: `optimizer-sgd_seed-0`."""
        return [self._label(index) for index in range(len(self.commands))]

    def _label(self, index: int) -> str:
        if self.names and (name := self.names[index]):
            return name
        return label_of(text for text in self.commands[index] if _element(text) not in self.shared)

    def job(self, index: int) -> RunConfig:
        """The configuration of a job.

        Raises:
            UserError: something is wrong with it that its values alone did not tell.
        """
        command = self.commands[index]
        return replace(self.composer.run(command), sweep=self.folder, label=self._label(index))


@dataclass(frozen=True)
class Shares:
    """What a command says of its sweep and of no job.

    Attributes:
        workers: how many jobs run at a time.
        threads: of torch in each job; None: this process's, shared out among the workers.
        runs: file that lists the jobs; None: all combinations of the values that keys are given.
    """

    workers: int = 1
    threads: int | None = None
    runs: Path | None = None


def taken_out(given: Sequence[str], multirun: bool) -> tuple[list[str], Shares]:
    """A command's overrides without `workers=N`, `threads=N` and `runs=FILE`, and what these say.

    Raises:
        UserError: one is malformed, or there is nothing to share out.
    """
    own = {key: text for text in given if (key := text.partition("=")[0]) in (WORKERS, THREADS, RUNS)}
    rest = [text for text in given if text.partition("=")[0] not in own]
    values = {key: text.partition("=")[2].strip("'\"") for key, text in own.items()}
    for key in (WORKERS, THREADS):
        if key in own and not re.fullmatch(r"[1-9]\d*", values[key]):
            raise UserError(f"{key} must be a whole number of at least 1, got {values[key] or 'nothing'}")
    for text in own.values():
        if not multirun:
            advice = ": set OMP_NUM_THREADS for one run" if text.startswith(THREADS) else ": leave it out"
            raise UserError(f"{text} is for the runs of a sweep, which -m asks for{advice}")
    if WORKERS in own and place().world_size > 1:
        raise UserError(f"{own[WORKERS]} starts processes itself: start one, without torchrun or srun")
    numbers = {key: int(values[key]) for key in (WORKERS, THREADS) if key in values}
    return rest, Shares(**numbers, runs=Path(values[RUNS]) if RUNS in values else None)


def listed(path: Path) -> list[tuple[str, list[str]]]:
    """The jobs that a file lists: what each is called, "" unless it is said, and its overrides.

    Args:
        path: of the file. A line a job: words as in a shell, the first of which may be the job's name and a colon, or a
            JSON list of such words. Empty lines and those that begin with # are skipped.

    Raises:
        UserError: it cannot be read, a line is malformed, or it lists nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"{RUNS}={path}: {why}; give a file with a line of overrides for each run") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            words = json.loads(line) if line.lstrip().startswith("[") else shlex.split(line)
        except ValueError as error:
            raise UserError(f"{RUNS}={path}, line {number}: {error}; write optimizer=sgd optimizer.lr=0.1") from error
        named = bool(words) and isinstance(words[0], str) and re.fullmatch(r"[^=]*[^=:]:", words[0])
        row = words[1:] if named else words
        if not all(isinstance(text, str) and "=" in text for text in row):
            raise UserError(f"{RUNS}={path}, line {number}: each run is a list of key=value, got {line.strip()}")
        found.append((words[0][:-1] if named else "", [quoted(text) for text in row]))
    if not found:
        raise UserError(f"{RUNS}={path} lists no run: write a line of overrides for each")
    return found


def prepare_sweep(
    overrides: Sequence[Override], shares: Shares, flags: Sequence[str], tell: Callable[[str], None]
) -> Sweep:
    """Check what a sweep's jobs differ in and name its folder and its runs after what they have in common.

    Each value of each key is checked with the first values of the others. What only two together make wrong is found
    when their job is due. Of jobs that a file lists, each is checked.

    Args:
        overrides: of the command.
        shares: what it says of the sweep alone.
        flags: of the command, for Hydra.
        tell: hears what takes a while.

    Raises:
        UserError: for the first fault.
    """
    given = {name_of(override): override for override in overrides}
    if given.get("resume") and given["resume"].value() not in (None, "auto"):
        raise UserError("resume=PATH names one run, and a sweep resumes its own unfinished runs: leave resume out")
    discrete = all(override.is_discrete_sweep() for override in overrides if override.is_sweep_override())
    for override in overrides:
        if override.is_interval_sweep() and given.get("hydra/sweeper") is None:
            key = override.key_or_group
            raise UserError(
                f"{override.input_line} is for sweepers that draw values, such as hydra/sweeper=optuna (pip install "
                f"hydra-optuna-sweeper): name one, or give values, {key}=0.1,0.3,1"
            )
    # A sweeper plugin will draw other values: what is fixed is checked.
    lists = values_of([o for o in overrides if discrete or not o.is_sweep_override()])
    rows = [(name, opened(row)) for name, row in listed(shares.runs)] if shares.runs else []
    parsed = [parse(text) for _, row in rows for text in row]
    for override in parsed:
        _refuse_in_row(override, shares.runs)
    varying = [*(override for override in overrides if override.is_sweep_override()), *parsed]
    composer = Composer([*overrides, *parsed], varying)
    common, names = jobs(overrides) if discrete else [], []
    if rows:
        names = [_called(name, each, lists) for name, _ in rows for each in common]
    commands = [_merged(each, row) for _, row in rows for each in common] if rows else common
    found = _look_at(composer, commands if rows else _one_by_one(lists), tell)
    cfg = composer.cfg
    if len({one.id for one in found}) < len(found):
        raise UserError("two jobs of this sweep are the same run: remove the value that is given twice")
    workers = shares.workers
    # Hydra leaves keys out of a run's name without a look at packages: optimizer would be optimizer@critic, too.
    swept = {override.key_or_group for override in varying}
    shared = {override.key_or_group for override in overrides} - swept
    folder, extra = _folder(cfg, found), []
    if "hydra.sweep.dir" in given:
        folder = Path(str(given["hydra.sweep.dir"].value()))
    else:
        extra = [f"hydra.sweep.dir='{folder}'"]
    native = discrete and _is_native(cfg, overrides)
    queue = _queue(cfg, discrete)
    if workers > 1 and not native:
        raise UserError(
            f"{WORKERS}={workers} is for lists of values that this program hands out itself: leave it out, and let "
            "Hydra's launcher share out the runs (hydra/launcher=joblib hydra.launcher.n_jobs=4)"
        )
    for key, value in ((THREADS, shares.threads), (RUNS, shares.runs)):
        if value is not None and not native and queue is None:
            raise UserError(
                f"{key}={value} is for runs that this program hands out itself: leave Hydra's launcher and sweeper out "
                f"({WORKERS}=N runs several at a time, hydra/launcher={SLURM} submits them)"
            )
    extra.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(shared))}]")
    numbers = due(len(commands)) if discrete else []
    told = commands[numbers[0]] if len(numbers) == 1 else [override.input_line or "" for override in overrides]
    return Sweep(
        folder=folder,
        commands=commands,
        due=numbers,
        shared=frozenset(shared),
        arguments=[*flags, *told, *extra],
        composer=composer,
        native=native,
        workers=workers,
        threads=shares.threads,
        names=tuple(names),
        queue=queue,
    )


def label_of(differing: Iterable[str]) -> str:
    """The label of a job by the overrides that tell it from others."""
    label = "_".join(sorted(differing)).replace("=", "-")
    return re.sub(r"(^|_)\+{1,2}", r"\1", label)  # without the signs that add keys


def _element(text: str) -> str:
    """The key or group of an override, without signs and packages."""
    return re.split(r"[=@]", text.lstrip("+~"), maxsplit=1)[0]


# -- what is looked at before the first job runs -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What a job tells of the sweep: its identity, its name, and what it is made of."""

    id: str
    name: str | None
    parts: tuple[str, str, str]

    @classmethod
    def of(cls, run: RunConfig) -> _Seen:
        return cls(run.job_id, run.values["name"], run.parts)


def _one_by_one(lists: Mapping[str, list[str]]) -> list[list[str]]:
    """The first job, and those that differ from it in one value."""
    first = {key: values[0] for key, values in lists.items()}
    others = [first | {key: text} for key, values in lists.items() for text in values[1:]]
    return [[*command.values()] for command in (first, *others)]


def _look_at(composer: Composer, commands: Sequence[Sequence[str]], tell: Callable[[str], None]) -> list[_Seen]:
    """What jobs tell."""
    slow = len({tuple(text for text in command if _element(text) not in composer.plain) for command in commands}) - 1
    if slow > SILENT:
        tell(f"checking {slow} choices before the first run")
    return [_Seen.of(composer.run(command)) for command in commands]


def _merged(shared: Sequence[str], row: Sequence[str]) -> list[str]:
    """The overrides of a job: its line's take the place of the command's, as does a budget of one of another kind."""
    own = {_element(text): text for text in row}
    budgets = {f"trainer.{name}" for name in BUDGETS}
    dropped = budgets if budgets & own.keys() else set()
    return [*({key: text for text in shared if (key := _element(text)) not in dropped} | own).values()]


def _called(name: str, each: Sequence[str], lists: Mapping[str, list[str]]) -> str:
    """The label of a job that a file names, with what the command sweeps over besides."""
    swept = label_of(text for text in each if len(lists[text.partition("=")[0]]) > 1)
    return "_".join(filter(None, (name, swept))) if name else ""


def _refuse_in_row(override: Override, path: Path | None) -> None:
    """What a line of a file of runs cannot say: it is of the command, or of the launch."""
    text = override.input_line or ""
    if override.is_sweep_override():
        raise UserError(f"{RUNS}={path}: {text} holds several values: a line is one run, write [a,b] for a list")
    if override.key_or_group.startswith("hydra") or override.key_or_group in (WORKERS, THREADS, RUNS, "resume"):
        raise UserError(f"{RUNS}={path}: {text} is for the command, not for one of its runs")


def _folder(cfg: DictConfig, found: Sequence[_Seen]) -> Path:
    """Where the jobs' folders go: named by `name`, or by what the jobs have in common."""
    names = {one.name for one in found}
    fixed = [parts[0] for parts in zip(*(one.parts for one in found), strict=True) if len(set(parts)) == 1]
    name = names.pop() if len(names) == 1 else None
    return Path(str(cfg.paths.sweeps)).joinpath(*map(shortened, Path(name or "_".join(fixed) or "sweep").parts))


def _is_native(cfg: DictConfig, overrides: Sequence[Override]) -> bool:
    """Whether nothing of Hydra's own is asked for that would have a say in how jobs are launched."""
    asked = any(o.key_or_group.startswith("hydra") and o.key_or_group not in OURS for o in overrides)
    chosen = cfg.hydra.runtime.choices
    basic = chosen["hydra/launcher"] == chosen["hydra/sweeper"] == "basic"
    return basic and not asked and not cfg.hydra.sweeper.get("params") and not cfg.hydra.get("callbacks")


def _queue(cfg: DictConfig, discrete: bool) -> dict[str, Any] | None:
    """What SLURM is asked for, if it is to run the jobs."""
    if cfg.hydra.runtime.choices["hydra/launcher"] != SLURM:
        return None
    if not discrete or cfg.hydra.runtime.choices["hydra/sweeper"] != "basic":
        raise UserError(
            f"hydra/launcher={SLURM} is for lists of values: a sweeper that draws them takes "
            "hydra/launcher=submitit_slurm, of the package hydra-submitit-launcher"
        )
    return OmegaConf.to_container(cfg.hydra.launcher, resolve=True)  # type: ignore[return-value]


def require_plugin(override: Override) -> None:
    """Raise a sentence where a plugin of Hydra's is not installed, or there is none of that name."""
    group, text = override.key_or_group, (override.input_line or "").lstrip("+")
    if group not in ("hydra/launcher", "hydra/sweeper"):
        return
    package = PLUGINS.get(text)
    try:
        importlib.metadata.version(package or "hydra-core")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"{text} needs a package that is not installed: pip install {package}") from error
    value = override.value()
    if package is None and value != "basic" and tree_of([text]) is None:
        known = ["basic", *(name.partition("=")[2] for name in PLUGINS if name.startswith(f"{group}="))]
        hint = did_you_mean(str(value), known) or f"; known are {', '.join(known)}, each of a package of its own"
        raise UserError(f"{group} has no choice {value!r}{hint}")
