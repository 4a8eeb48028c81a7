"""What becomes of runs while they run: read from their folders alone, also from another machine that sees the files."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from training.errors import UserError
from training.runs.claims import BEAT, SIGN, namespace
from training.runs.folder import PLAN, label_name
from training.show.report import duration

#: States, those first that a reader looks for.
STATES = ("running", "starting", "dead", "failed", "diverged", "interrupted", "stopped early", "finished", "waiting")
#: Seconds without a sign of life after which a process counts as dead, where it cannot be asked for.
SILENCE = 9 * BEAT
#: Bytes of the end of `metrics.jsonl` that hold the last evaluation, and more.
TAIL = 1 << 17
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Status:
    """How it stands with a run.

    Attributes:
        run: its folder, relative to what was looked at; the label of a sweep's job that has none yet.
        state: one of `STATES`.
        progress: share of the budget that is used up, in [0, 1]; None if it is not known.
        left: seconds until it is, at the pace so far; None unless it runs.
        step: steps done.
        epoch: passes over the training set.
        seconds: of training.
        metrics: the last values that are known: of the training loss, of the validation set, of the test set.
        monitor: the metric that chooses the best weights; None before the end.
        best: its best value.
        host: where it runs.
        pid: of the process that speaks for the run.
        device: where it computes.
        processes: how many there are.
        silent: seconds since it last wrote a metric; None if it never did, or has ended.
        error: why it failed.
        tags: that its command gave it.
    """

    run: str
    state: str
    progress: float | None = None
    left: float | None = None
    step: int | None = None
    epoch: float | None = None
    seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    monitor: str | None = None
    best: float | None = None
    host: str | None = None
    pid: int | None = None
    device: str | None = None
    processes: int | None = None
    silent: float | None = None
    error: str | None = None
    tags: list[str] = field(default_factory=list)


def look(folder: str | Path) -> list[Status]:
    """Every run at or under a folder, and the jobs that its sweeps have not begun.

    Args:
        folder: of a run, of a sweep, or of many.

    Raises:
        UserError: there is no such folder.
    """
    top = Path(folder)
    if not top.is_dir():
        raise UserError(f"{top} is no folder: give that of a run, of a sweep, or one that holds some")
    found = [_status(path, _name(path, top)) for path in _runs(top)]
    for plan in _plans(top):
        found += _planned(plan, top)
    return found


def arranged(found: Iterable[Status], order: str = "state") -> list[Status]:
    """Runs in an order for readers.

    Args:
        found: what `look` returned.
        order: "state" (what needs a look first), "name", "progress", or a metric ("val/loss"), the smallest first.

    Raises:
        UserError: no run has such a metric.
    """
    by_name = sorted(found, key=lambda one: one.run)
    if order == "name":
        return by_name
    if order == "state":
        return sorted(by_name, key=lambda one: STATES.index(one.state))
    if order == "progress":
        return sorted(by_name, key=lambda one: -(one.progress or 0.0))
    if not any(order in one.metrics for one in by_name):
        known = sorted({name for one in by_name for name in one.metrics})
        known = ["state", "name", "progress", *known]
        raise UserError(f"sort must be one of {', '.join(known)}, got {order!r}")
    return sorted(by_name, key=lambda one: one.metrics.get(order, float("inf")))


def table(found: Sequence[Status]) -> Table:
    """A line a run."""
    counts = {state: sum(one.state == state for one in found) for state in STATES}
    title = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    shown = Table(title=f"{len(found)} runs: {title}" if found else "no runs", title_justify="left")
    shown.add_column("run", overflow="fold")
    shown.add_column("state", no_wrap=True)
    for column in ("done", "left", "step", "training", "last values"):
        shown.add_column(column, justify="left" if column == "last values" else "right", overflow="fold")
    shown.add_column("where", overflow="fold")
    colours = {"running": "green", "starting": "green", "dead": "red", "failed": "red", "diverged": "red"}
    for one in found:
        shown.add_row(
            f"{one.run} [{', '.join(one.tags)}]" if one.tags else one.run,
            one.state,
            "" if one.progress is None else f"{100 * one.progress:.0f} %",
            "" if one.left is None else duration(one.left, digits=0),
            "" if one.step is None else str(one.step),
            "" if one.seconds is None else duration(one.seconds, digits=0),
            one.error or "  ".join(f"{name} {_figure(name, value)}" for name, value in one.metrics.items()),
            _where(one),
            style=colours.get(one.state),
        )
    return shown


def as_json(found: Sequence[Status]) -> str:
    """For machines: a list of objects, a `Status` each."""
    return json.dumps([asdict(one) for one in found], indent=2, allow_nan=False)


def _where(one: Status) -> str:
    if one.host is None:
        return ""
    several = f" × {one.processes}" if (one.processes or 1) > 1 else ""
    silent = f", silent for {duration(one.silent, digits=0)}" if one.silent is not None and one.silent > SILENCE else ""
    return f"{one.host} ({one.pid}){' ' + one.device if one.device else ''}{several}{silent}"


def _figure(name: str, value: float) -> str:
    return f"{100 * value:.2f} %" if name.endswith("accuracy") else f"{value:.4g}"


# -- folders -----------------------------------------------------------------------------------------------------------


def _runs(top: Path) -> Iterator[Path]:
    """Run folders at or under a folder; what lies in one is its own."""
    for path, folders, files in os.walk(top):
        if {"config.yaml", "summary.json", SIGN} & set(files):
            folders.clear()
            yield Path(path)
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _plans(top: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(top):
        if "config.yaml" in files:
            folders.clear()
        if PLAN in files:
            yield Path(path) / PLAN


def _name(path: Path, top: Path) -> str:
    return path.name if path == top else path.relative_to(top).as_posix()


def _planned(path: Path, top: Path) -> list[Status]:
    """The jobs of a sweep's last launch that have no folder: nobody has begun them, or they do not compose."""
    plan = _read(path)
    begun = [folder.name for folder in path.parent.iterdir() if folder.is_dir()]
    known = set(begun) | {name.rpartition("_")[0] for name in begun}
    found = []
    for label in plan.get("jobs") or []:
        name = label_name(label)
        if name in known or plan.get("found", {}).get(label) in known:
            continue
        error = plan.get("refused", {}).get(label)
        where = _name(path.parent / name, top)
        found.append(Status(where, "failed" if error else "waiting", error=error))
    return found


def _status(folder: Path, name: str) -> Status:
    sign, summary = _read(folder / SIGN), _read(folder / "summary.json")
    alive = bool(sign) and _is_alive(folder / SIGN, sign)
    status = Status(name, str(summary.get("status", "dead")).replace("_", " "))
    if alive:
        status.host, status.pid = sign.get("host"), sign.get("pid")
        status.device, status.processes = sign.get("device"), sign.get("processes")
    elif status.state == "dead":
        status.host, status.pid = sign.get("host"), sign.get("pid")
    last = _follow(folder / "metrics.jsonl", status)
    if alive:
        status.state = "running" if last else "starting"
    if not last:
        return _ended(status, summary) if not alive else status
    settings = _settings(folder)
    status.tags = [str(tag) for tag in settings.get("tags") or []]
    status.progress = _progress(settings.get("trainer") or {}, status)
    if alive:
        with suppress(OSError):
            status.silent = max(0.0, time.time() - (folder / "metrics.jsonl").stat().st_mtime)
        if status.progress and isinstance(wall := last.get("wall"), int | float):
            status.left = wall * (1 - status.progress) / status.progress
        return status
    return _ended(status, summary)


def _ended(status: Status, summary: Mapping[str, Any]) -> Status:
    """What the summary says of a run that has ended."""
    status.error = " ".join(str(summary.get("error") or "").strip().splitlines()[-1:]) or None
    status.monitor = summary.get("monitor")
    status.best = (summary.get("best") or {}).get("value")
    if status.state in ("finished", "stopped early"):
        status.progress = 1.0
    if status.state not in STATES:
        status.state, status.error = "dead", f"summary.json has the status {status.state!r}"
    return status


def _follow(path: Path, status: Status) -> dict[str, Any]:
    """Take the last values from the end of `metrics.jsonl`; its last event, {} if there is none yet."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return {}
    events = []
    for line in lines:
        with suppress(ValueError):  # the first is cut off, the last may be half written
            if isinstance(event := json.loads(line), dict) and isinstance(event.get("step"), int):
                events.append(event)
    for event in events:
        wanted = ("train/loss", "val/", "test/")
        new = {key: value for key, value in event.items() if key.startswith(wanted) and isinstance(value, int | float)}
        status.metrics |= new
    if not events:
        return {}
    status.step, status.epoch, status.seconds = (events[-1].get(key) for key in ("step", "epoch", "seconds"))
    return events[-1]


def _settings(folder: Path) -> dict[str, Any]:
    """What `config.yaml` holds; {} if it cannot be read."""
    try:
        found = yaml.load((folder / "config.yaml").read_bytes(), LOADER)
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _progress(trainer: Mapping[str, Any], status: Status) -> float | None:
    """The share of the budget that is used up."""
    used = {"max_steps": status.step, "max_epochs": status.epoch, "max_time": status.seconds}
    shares = [
        done / trainer[key]
        for key, done in used.items()
        if isinstance(trainer.get(key), int | float) and isinstance(done, int | float)
    ]
    return min(1.0, max(shares)) if shares else None


def _is_alive(path: Path, sign: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a sign lives: asked for where that can be, or else by the age of the sign."""
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return False
    if sign.get("host") == socket.gethostname() and sign.get("namespace") == namespace():
        try:
            os.kill(int(sign.get("pid", -1)), 0)
        except (ProcessLookupError, OverflowError, ValueError):
            return False
        except PermissionError:  # another user's
            pass
    return age < SILENCE


def _read(path: Path) -> dict[str, Any]:
    """A file's object; {} where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
