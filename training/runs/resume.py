"""Where a run begins: in a new folder, at a checkpoint, or not at all because it is finished."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.runs import checkpoints
from training.runs.claims import NAME, claim, release, turn
from training.runs.folder import LONGEST, RunFolder, atomic_file, file_name, unwritable
from training.runs.record import RunConfig, find, load

# These runs have ended; every other status (interrupted, failed, or none after a kill) leaves something to resume.
ENDED = ("finished", "stopped_early", "diverged")
#: In the place of a summary: another process trains in the folder.
ELSEWHERE = "running elsewhere"

__all__ = ["Start", "enter", "load_state", "plan", "release", "spent", "sweep_folder"]


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
    """Decide where a run begins, and claim the folder if it exists, or is to: what was seen stays so until `release`.

    Raises:
        UserError: `resume` names something that cannot be resumed, or another process trains there.
    """
    if run.sweep is not None:
        return _in_sweep(*claim_job(run))
    resume = run.values["resume"]
    fresh = Path(run.values["paths"]["runs"]) / file_name(run.group_name)
    fresh /= f"{datetime.now():%Y-%m-%d_%H-%M-%S}_s{run.values['seed']}_{run.id}"
    if resume is None:
        return Start(fresh)
    if resume != "auto":
        return _from(run, *find(resume))
    for folder in _runs_like(run):
        start = _from(run, folder, None, must_exist=False)
        if start is not None:
            return start
        release()
    return Start(fresh, note="resume=auto: no run of this configuration to resume, starting a new one")


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
    label = f"{file_name(run.label[:120], LONGEST - 9)}_" if run.label else ""
    return existing[0] if existing else run.sweep / f"{label}{run.job_id}"


def enter(start: Start, run: RunConfig) -> RunFolder:
    """Make the folder of a fresh run, or open the one to continue in and bring its `config.yaml` up to date.

    Raises:
        UserError: the folder cannot be written.
    """
    if start.checkpoint is None:
        if run.sweep is None:
            path = RunFolder.make(start.folder)
            claim(path)  # before it has a configuration, without which it is no run's to others
        else:
            path = start.folder
            _empty(path)  # of an attempt that ended before its first checkpoint
        return RunFolder.fill(path, run.to_yaml())
    folder = RunFolder.open(start.folder)
    values, _ = load(start.folder)
    if values["trainer"] != run.values["trainer"]:  # a longer budget, say
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


def _from(run: RunConfig, folder: Path, checkpoint: Path | None, must_exist: bool = True) -> Any:
    """A start in an existing folder; None (`must_exist=False`) or a sentence if nothing there can be resumed."""
    if not claim(folder):
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


def _in_sweep(folder: Path, claimed: bool) -> Start:
    """A sweep's job has one folder for ever: finished there, or partial, or failed, or new."""
    if not claimed:
        return Start(folder, summary={"status": ELSEWHERE}, note=f"{folder.name} runs in another process: skipped")
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
