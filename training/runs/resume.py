"""Where a run begins: in a new folder, at a checkpoint, or not at all because it is finished."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.loop.distributed import World
from training.runs import checkpoints
from training.runs.claims import NAME, claim, describe, release, turn
from training.runs.folder import RunFolder, atomic_file, file_name, label_name, unwritable
from training.runs.record import BUDGETS, REMARKS, RunConfig, find, load

# These runs have ended; every other status (interrupted, failed, or none after a kill) leaves something to resume.
ENDED = ("finished", "stopped_early", "diverged")
#: In the place of a summary: another process trains in the folder.
ELSEWHERE = "running elsewhere"

# How the names of runs' folders begin.
STAMP = "%Y-%m-%d_%H-%M-%S"

log = logging.getLogger(__name__)

__all__ = ["Start", "enter", "load_state", "plan", "release", "spent", "sweep_folder"]


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        folder: the run folder, which exists if there is a checkpoint or a summary in it.
        checkpoint: file to continue from; None for a fresh start.
        summary: the summary of a run that needs no more training; None when there is something to do.
        note: a line for the user; "" when there is nothing to say.
        again: whether a fresh run takes the place of an attempt that ended in the folder before its first checkpoint.
    """

    folder: Path
    checkpoint: Path | None = None
    summary: dict[str, Any] | None = None
    note: str = ""
    again: bool = False


def plan(run: RunConfig, begun: str | None = None) -> Start:
    """Decide where a run begins, and claim the folder if it exists, or is to: what was seen stays so until `release`.

    Args:
        run: its configuration.
        begun: folder in which a launcher that starts processes again has had this very run begun; None: it has not.

    Raises:
        UserError: `resume` names something that cannot be resumed, or another process trains there.
    """
    if run.sweep is not None:
        return _in_sweep(*claim_job(run))
    resume = run.values["resume"]
    if begun is None and resume is None:
        return Start(_fresh(run))
    if begun is None and resume != "auto":
        return _from(run, *find(resume))
    newest, passed = (Path(begun), None) if begun is not None else _newest(run)
    if newest is None:
        why = "no run of this configuration to resume" if passed is None else f"{passed} has finished another budget"
        way = "" if passed is None else f" (resume={passed} carries it on)"
        return Start(_fresh(run), note=f"resume=auto: {why}, starting a new one{way}")
    start = _from(run, newest, None, auto=True)
    if start is None:
        release()
        return Start(_fresh(run), note=f"resume=auto: all checkpoints of {newest} are damaged, starting a new run")
    return start


def claim_job(run: RunConfig) -> tuple[Path, bool]:
    """The one folder that a job of a sweep has, made if it is missing, and whether this process has claimed it.

    Raises:
        UserError: it cannot be made.
    """
    assert run.sweep is not None
    try:
        with turn(run.sweep):  # two launches that name the folder differently agree on the first one's name
            folder = sweep_folder(run)
            folder.mkdir(exist_ok=True)
            return folder, claim(folder)
    except OSError as error:
        raise UserError(unwritable(run.sweep, error)) from error


def sweep_folder(run: RunConfig) -> Path:
    """The folder of a job of a sweep, whenever it is launched and with whatever else it is swept."""
    assert run.sweep is not None
    existing = sorted(path for path in run.sweep.glob(f"*_{run.job_id}") if path.is_dir())
    return existing[0] if existing else run.sweep / job_name(run)


def job_name(run: RunConfig) -> str:
    """The name of a job's folder, unless another sweep has made one for it: its label, and its id."""
    return f"{label_name(run.label)}_{run.job_id}" if run.label else run.job_id


def enter(start: Start, run: RunConfig, world: World | None = None) -> RunFolder:
    """Make the folder of a fresh run, or open the one to continue in and bring its `config.yaml` up to date.

    Args:
        start: where the run begins.
        run: its configuration.
        world: who trains, for those who watch; None: this process alone, on the CPU.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = _enter(start, run)
    world = world or World()
    describe(device=str(world.device), processes=world.world_size, gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))
    return folder


def _enter(start: Start, run: RunConfig) -> RunFolder:
    if start.checkpoint is None:
        if not start.again:
            path = RunFolder.make(start.folder)
            while not claim(path):  # before it has a configuration: another launch takes it for a dead one's
                path = RunFolder.make(start.folder)
        else:
            path = start.folder
            _empty(path)  # of an attempt that ended before its first checkpoint
        return RunFolder.fill(path, run.to_yaml())
    folder = RunFolder.open(start.folder)
    try:
        saved, new = load(start.folder)[0], run.values
        current = all(saved.get(name) == new.get(name) for name in ("trainer", *REMARKS))
    except UserError as error:  # only where the command says all that the file would
        log.warning("%s: it is written anew.", error)
        current = False
    if not current:  # a longer budget, say
        with atomic_file(folder.config_file) as file:
            file.write(run.to_yaml().encode())
    return folder


def load_state(start: Start) -> dict[str, Any] | None:
    """Content of the checkpoint to continue from; None for a fresh start."""
    return checkpoints.load(start.checkpoint) if start.checkpoint else None


def spent(summary: Mapping[str, Any], trainer: Mapping[str, Any]) -> bool:
    """Whether a run that ended has used up the budget that is now given."""
    seconds = summary.get("seconds") or {}
    used = {"max_epochs": summary.get("epochs"), "max_steps": summary.get("steps"), "max_time": seconds.get("training")}
    return not any(trainer.get(key) is not None and trainer[key] > (done or 0) + 1e-9 for key, done in used.items())


def _empty(folder: Path) -> None:
    """Remove what is in a folder that this process has claimed, but the claim."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != NAME:
            path.unlink()


def _busy(folder: Path) -> str:
    return f"{folder} is being trained in by another process: wait for it, or stop it"


def _from(run: RunConfig, folder: Path, checkpoint: Path | None, auto: bool = False) -> Any:
    """A start in an existing folder; None (`auto`) or a sentence if all checkpoints there are damaged.

    With `auto` the command describes the whole run, which so can begin again in a folder that has no checkpoint yet.

    Raises:
        UserError: another process trains there, or nothing there can be resumed or read.
    """
    if not claim(folder):
        raise UserError(_busy(folder))
    dead = auto and not RunFolder(folder).config_file.is_file()
    summary = None if dead else RunFolder.open(folder).read_summary()
    status = (summary or {}).get("status")
    over = status in ENDED and (status != "finished" or spent(summary or {}, run.values["trainer"]))
    if over and checkpoint is None:
        note = f"{folder} is {_in_words(status)}: not trained again{_advice(status)}"
        return Start(folder, summary=summary, note=note)
    if checkpoint is not None:
        checkpoints.require(checkpoints.load(checkpoint), checkpoints.PARTS, checkpoint)
        return Start(folder, checkpoint, note=f"resuming {folder} from {checkpoint.name}")
    found = checkpoints.latest(folder / "checkpoints", checkpoints.PARTS)
    if found is not None:
        return Start(folder, found[0], note=f"resuming {folder} from {found[0].name}")
    if not auto:
        raise UserError(f"resume={folder}: it holds no checkpoint that can be read; start again without resume")
    if checkpoints.steps(folder / "checkpoints"):
        return None
    return Start(folder, note=f"{folder} ended before its first checkpoint: it begins again", again=True)


def _in_sweep(folder: Path, claimed: bool) -> Start:
    """A sweep's job has one folder for ever: finished there, or partial, or failed, or new."""
    if not claimed:
        return Start(folder, summary={"status": ELSEWHERE}, note=f"{folder.name} runs in another process: skipped")
    summary = RunFolder(folder).read_summary()
    if summary and summary.get("status") in ENDED:
        return Start(folder, summary=summary, note=f"{folder.name} is {_in_words(summary['status'])}: skipped")
    found = checkpoints.latest(folder / "checkpoints", checkpoints.PARTS)
    if found is not None:
        return Start(folder, found[0], note=f"resuming {folder.name} from {found[0].name}")
    if checkpoints.steps(folder / "checkpoints"):
        raise UserError(f"all checkpoints of {folder} are damaged: delete the folder to start this run again")
    return Start(folder, again=True)


def _fresh(run: RunConfig) -> Path:
    """The name of a new run's folder. Names sort as the runs began, also where the clock was set back in between."""
    group = Path(run.values["paths"]["runs"]) / file_name(run.group_name)
    now = f"{datetime.now():{STAMP}}"
    stamps = [path.name[: len(now)] for path in (*_folders(group.glob("*")), *_runs_like(run))]
    for stamp in sorted(stamps, reverse=True):
        if stamp <= now:
            break
        with suppress(ValueError):  # another folder that happens to lie here
            now = f"{datetime.strptime(stamp, STAMP) + timedelta(seconds=1):{STAMP}}"
            break
    return group / f"{now}_s{run.values['seed']}_{run.id}"


def _runs_like(run: RunConfig) -> list[Path]:
    """Folders of this very configuration under `paths.runs`, newest first (their names begin with the date)."""
    mine = re.compile(rf"(.*)_{run.id}(?:-(\d+))?")
    found = [
        (match[1], int(match[2] or 1), path)
        for path in _folders(Path(run.values["paths"]["runs"]).glob(f"*/*_{run.id}*"))
        if (match := mine.fullmatch(path.name))
        and ((path / "config.yaml").is_file() or _is_unborn(path))
    ]
    return [path for _, _, path in sorted(found, reverse=True)]


def _newest(run: RunConfig) -> tuple[Path | None, Path | None]:
    """The newest run of this configuration and name; and the one that was passed over, for it finished another budget.

    A run that has not ended goes on whatever its budget was.
    """
    passed = None
    for path in _runs_like(run):
        if path.parent.name != file_name(run.group_name):
            continue
        status = (RunFolder(path).read_summary() or {}).get("status")
        try:
            same = status != "finished" or _budget(load(path)[0]["trainer"]) == _budget(run.values["trainer"])
        except UserError:  # its configuration is damaged: the command says all that the file would
            same = True
        if same:
            return path, passed
        passed = passed or path
    return None, passed


def _budget(trainer: Mapping[str, Any]) -> list[float | None]:
    return [trainer.get(name) for name in BUDGETS]


def _is_unborn(folder: Path) -> bool:
    """Whether a run was killed here before it had its configuration."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")} <= {"checkpoints"}


def _folders(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.is_dir()]


def _in_words(status: str | None) -> str:
    return {"stopped_early": "finished (stopped early)"}.get(status or "", status or "unfinished")


def _advice(status: str | None) -> str:
    return {
        "finished": " (a larger trainer.max_epochs, max_steps or max_time carries on)",
        "diverged": " (start a new run with a smaller learning rate, or resume one of its checkpoints by path)",
    }.get(status or "", "")
