"""What run folders hold: their settings, how they ended, and the curve of any metric."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.runs.record import ONLOOKERS, VOLATILE, load, replace_folder
from training.show.curves import read_metrics

AXES = {"epoch": "epoch", "step": "step", "seconds": "training seconds"}


@dataclass(frozen=True)
class Curve:
    """The values of one metric of one run.

    Attributes:
        epoch: where each value stands, in epochs.
        step: and in optimizer steps.
        seconds: and in training seconds.
        value: the values.
    """

    epoch: np.ndarray
    step: np.ndarray
    seconds: np.ndarray
    value: np.ndarray


@dataclass(frozen=True)
class LoadedRun:
    """What one run folder holds.

    Attributes:
        folder: the folder.
        values: the configuration.
        choices: the file each of its groups came from.
        events: of `metrics.jsonl`.
        summary: of `summary.json`; {} while there is none.
    """

    folder: Path
    values: dict[str, Any]
    choices: dict[str, str]
    events: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def seed(self) -> int:
        """The seed."""
        return int(self.values["seed"])

    @property
    def status(self) -> str:
        """How it ended: finished, diverged, ...; unfinished if it has not."""
        return str(self.summary.get("status", "unfinished")).replace("_", " ")

    @property
    def settings(self) -> dict[str, str]:
        """Dotted names and values of all that shapes the training, the seed excepted."""
        values = replace_folder(self.values, str(self.values["paths"]["data"]), "<paths.data>")
        flat = {key: _text(value) for key, value in _flat(values)}
        pictures = {f"{key.rpartition('.')[0]}." for key, value in flat.items() if value.endswith(ONLOOKERS)}
        ignored = (*(f"{key}." for key in VOLATILE), "seed.", *pictures)
        return {key: value for key, value in flat.items() if not f"{key}.".startswith(ignored)}

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps a pass over the training set; NaN for a run that has logged nothing."""
        last = self.events[-1] if self.events else {}
        return last["step"] / last["epoch"] if last.get("epoch") else math.nan

    def curve(self, metric: str) -> Curve:
        """The values of a metric, as defined at the head of this module; of no length if it was not logged."""
        if metric.startswith("train/"):
            return self._by_epoch(metric)
        found = [event for event in self.events if event.get(metric) is not None and event["event"] == "eval"]
        return Curve(*(np.array([e[x] for e in found], dtype=float) for x in (*AXES, metric)))

    def _by_epoch(self, metric: str) -> Curve:
        """Means over epochs: an event counts by the number of its steps that lie in the epoch."""
        length, since = self.steps_per_epoch, 0
        sums: dict[int, float] = {}
        weights: dict[int, float] = {}
        for event in (event for event in self.events if event["event"] == "train"):
            first, since = since, event["step"]
            if event.get(metric) is None:
                continue
            for epoch in range(int(first / length), math.ceil(since / length - 1e-6)):
                share = min(since, (epoch + 1) * length) - max(first, epoch * length)
                sums[epoch] = sums.get(epoch, 0.0) + share * event[metric]
                weights[epoch] = weights.get(epoch, 0.0) + share
        if not sums:
            return Curve(*(np.array([]) for _ in range(4)))
        steps = np.array([min((epoch + 1) * length, self.events[-1]["step"]) for epoch in sums])
        seconds = np.interp(steps, [e["step"] for e in self.events], [e["seconds"] for e in self.events])
        return Curve(steps / length, steps, seconds, np.array([sums[epoch] / weights[epoch] for epoch in sums]))

    def plateau(self, metric: str) -> float | None:
        """What the best constant output scores, where the run knows it."""
        name = metric.partition("/")[2]
        recorded = self.summary.get("plateau")
        if isinstance(recorded, Mapping):
            recorded = recorded.get(metric, recorded.get(name))
        elif name != "loss":
            recorded = None
        logged = [event[f"plateau/{name}"] for event in self.events if event.get(f"plateau/{name}") is not None]
        found = logged[-1] if logged else recorded
        return None if found is None else float(found)


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Every run folder among the given folders or anywhere below them, once each.

    Raises:
        ValueError: a folder is missing, or holds no run.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"runs: there is no folder {path}; give run folders, or folders that hold some")
        configs = [path / "config.yaml"] if (path / "config.yaml").is_file() else sorted(path.rglob("config.yaml"))
        here = [config.parent for config in configs if (config.parent / "metrics.jsonl").is_file()]
        if not here:
            raise ValueError(f"runs: {path} holds no run that has begun to train; give folders that train.py wrote")
        found |= dict.fromkeys(folder.resolve() for folder in here)
    return list(found)


def read_run(folder: Path, events: list[dict[str, Any]] | None = None) -> LoadedRun:
    """Read a run folder.

    Args:
        folder: that train.py wrote.
        events: of its `metrics.jsonl`, where somebody has read them; None: all are read.

    Raises:
        ValueError: `metrics.jsonl` or `summary.json` is damaged.
        UserError: `config.yaml` is.
    """
    values, choices = load(folder)
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_bytes()) if path.exists() else {}
        if not isinstance(summary, dict):
            raise ValueError("it holds no group of keys")
    except ValueError as error:  # no JSON, no text
        raise ValueError(f"runs: {path} is no JSON of a run: the file is damaged, leave this run out") from error
    return LoadedRun(folder, values, choices, read_metrics(folder) if events is None else events, summary)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    """A value as it is given on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
