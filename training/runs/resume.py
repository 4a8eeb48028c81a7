"""Where a run begins: in a new folder, at a checkpoint, or not at all because it is finished."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from training.errors import UserError
from training.runs import checkpoints
from training.runs.folder import RunFolder, atomic_file
from training.runs.record import RunConfig, find, load

# These runs have ended; every other status (interrupted, failed, or none after a kill) leaves something to resume.
ENDED = ("finished", "stopped_early", "diverged")

log = logging.getLogger(__name__)

# The lock of the folder that this process trains in.
_held: list[FileLock] = []


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        folder: the run folder, which exists if there is a checkpoint or a summary in it.
        checkpoint: file to continue from; None for a fresh start.
        summary: the summary of a run that needs no more training; None when there is something to do.
        note: a line for the user; "" when there is nothing to say.
    """

    folder: Path
    checkpoint: Path | None = None
    summary: dict[str, Any] | None = None
    note: str = ""


def plan(run: RunConfig) -> Start:
    """Decide where a run begins; reads the disk, changes nothing on it.

    Raises:
        UserError: `resume` names something that cannot be resumed.
    """
    if run.sweep is not None:
        return _in_sweep(sweep_folder(run))
    resume = run.values["resume"]
    fresh = Path(run.values["paths"]["runs"]) / _file_name(run.group_name)
    fresh /= f"{datetime.now():%Y-%m-%d_%H-%M-%S}_s{run.values['seed']}_{run.id}"
    if resume is None:
        return Start(fresh)
    if resume != "auto":
        return _from(run, *find(resume))
    for folder in _runs_like(run):
        start = _from(run, folder, None, must_exist=False)
        if start is not None:
            return start
    return Start(fresh, note="resume=auto: no run of this configuration to resume, starting a new one")


def sweep_folder(run: RunConfig) -> Path:
    """The one folder that a job of a sweep has, whenever it is launched and with whatever else it is swept."""
    assert run.sweep is not None
    existing = sorted(run.sweep.glob(f"*_{run.job_id}"))
    return existing[0] if existing else run.sweep / _file_name(f"{run.label[:120]}_{run.job_id}")


def enter(start: Start, run: RunConfig) -> RunFolder:
    """Make the folder of a fresh run, or open the one to continue in and bring its `config.yaml` up to date.

    Raises:
        UserError: another process trains in it.
    """
    if start.checkpoint is None:
        if run.sweep is not None and start.folder.exists():
            shutil.rmtree(start.folder)  # an attempt that ended before its first checkpoint: `plan` has looked
        folder = RunFolder.create(start.folder, run.to_yaml())
        _lock(folder.path)
        return folder
    folder = RunFolder.open(start.folder)
    if not _lock(start.folder):
        raise UserError(_busy(start.folder))
    values, _ = load(start.folder)
    if values["trainer"] != run.values["trainer"]:  # a longer budget, say
        with atomic_file(folder.config_file) as file:
            file.write(run.to_yaml().encode())
    return folder


def release() -> None:
    """Let others train in the folder that this process entered last."""
    while _held:
        _held.pop().release()


def load_state(start: Start) -> dict[str, Any] | None:
    """Content of the checkpoint to continue from; None for a fresh start."""
    return checkpoints.load(start.checkpoint) if start.checkpoint else None


def spent(summary: Mapping[str, Any], trainer: Mapping[str, Any]) -> bool:
    """Whether a run that ended has used up the budget that is now given."""
    seconds = summary.get("seconds") or {}
    used = {"max_epochs": summary.get("epochs"), "max_steps": summary.get("steps"), "max_time": seconds.get("training")}
    return not any(trainer.get(key) is not None and trainer[key] > (done or 0) + 1e-9 for key, done in used.items())


def _lock(folder: Path) -> bool:
    """Claim a folder until `release` or the end of this process, however it ends; False if another one has it."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except (OSError, NotImplementedError) as error:
        log.warning("%s cannot be locked (%s): see to it that one process at a time trains in it.", folder, error)
        return True
    _held.append(lock)
    return True


def _is_busy(folder: Path) -> bool:
    """Whether another process trains in a folder."""
    if not _lock(folder):
        return True
    release()
    return False


def _busy(folder: Path) -> str:
    return f"{folder} is being trained in by another process: wait for it, or stop it"


def _from(run: RunConfig, folder: Path, checkpoint: Path | None, must_exist: bool = True) -> Any:
    """A start in an existing folder; None (`must_exist=False`) or a sentence if nothing there can be resumed."""
    if _is_busy(folder):
        raise UserError(_busy(folder))
    summary = RunFolder.open(folder).read_summary()
    status = (summary or {}).get("status")
    over = status in ENDED and (status != "finished" or spent(summary or {}, run.values["trainer"]))
    if over and checkpoint is None:
        note = f"{folder} is {_in_words(status)}: not trained again{_advice(status)}"
        return Start(folder, summary=summary, note=note)
    if checkpoint is None:
        found = checkpoints.latest(folder / "checkpoints")
        if found is None and not must_exist:
            return None
        if found is None:
            raise UserError(f"resume={folder}: it holds no checkpoint that can be read; start again without resume")
        checkpoint = found[0]
    else:
        checkpoints.load(checkpoint)
    return Start(folder, checkpoint, note=f"resuming {folder} from {checkpoint.name}")


def _in_sweep(folder: Path) -> Start:
    """A sweep's job has one folder for ever: finished there, or partial, or failed, or new."""
    if not folder.exists():
        return Start(folder)
    if _is_busy(folder):
        return Start(folder, summary={"status": "running"}, note=f"{folder.name} runs in another process: skipped")
    summary = RunFolder(folder).read_summary()
    if summary and summary.get("status") in ENDED:
        return Start(folder, summary=summary, note=f"{folder.name} is {_in_words(summary['status'])}: skipped")
    found = checkpoints.latest(folder / "checkpoints")
    if found is None and any((folder / "checkpoints").glob("step_*.pt")):
        raise UserError(f"all checkpoints of {folder} are damaged: delete the folder to start this run again")
    return Start(folder, found[0], note=f"resuming {folder.name} from {found[0].name}") if found else Start(folder)


def _runs_like(run: RunConfig) -> list[Path]:
    """Folders of this very configuration under `paths.runs`, newest first (their names begin with the date)."""
    mine = re.compile(rf".*_{run.id}(-\d+)?")
    folders = Path(run.values["paths"]["runs"]).glob(f"*/*_{run.id}*")
    found = [path for path in folders if mine.fullmatch(path.name) and (path / "config.yaml").is_file()]
    return sorted(found, key=lambda path: path.name, reverse=True)


def _in_words(status: str | None) -> str:
    return {"stopped_early": "finished (stopped early)"}.get(status or "", status or "unfinished")


def _advice(status: str | None) -> str:
    return {
        "finished": " (a larger trainer.max_epochs, max_steps or max_time carries on)",
        "diverged": " (start a new run with a smaller learning rate, or resume one of its checkpoints by path)",
    }.get(status or "", "")


def _file_name(text: str) -> str:
    """`text` without characters that mean something to a shell, a file system or Hydra's grammar."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-._ ") or "run"
