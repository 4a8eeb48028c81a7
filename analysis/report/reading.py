"""What a page is made of: the runs of any sweep, and all that `scripts/verdict.py` keeps in its folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from analysis.compare import Group, LoadedRun, find_runs, group_runs, higher_is_better, match, read_run
from training.show.curves import read_metrics

#: A run of more lines of one kind than this is read in part: so many of them, evenly spaced.
LINES = 2000
KEPT = 500
#: Lines of which a part shows the whole; evaluations and tests are all read.
FREQUENT = (b"train", b"curvature")
#: How a run ends that has used what it was given.
ENDED = ("finished", "stopped early")


@dataclass(frozen=True)
class Trial:
    """A run that a verdict tuned with, by its line of `trials.jsonl`.

    Attributes:
        arm: the optimizer.
        rung: of successive halving, 0 the first.
        number: of the values that were tried, the same in every rung.
        overrides: those values, by key.
        folder: of the run; None where the line names none.
        status: how it ended.
        value: of the metric, NaN where it did not come to an end.
        charged: seconds that it counts for.
        error: why it failed; None otherwise.
    """

    arm: str
    rung: int
    number: int
    overrides: dict[str, Any]
    folder: Path | None
    status: str
    value: float
    charged: float
    error: str | None


@dataclass(frozen=True)
class ArmRuns:
    """One of those that are compared.

    Attributes:
        name: the optimizer, or what sets a sweep's group of runs apart.
        runs: one a seed, ascending.
        trials: that it was tuned with.
        pace: `verdict.json`'s seconds and memory; {} if they were not measured.
        choice: `verdict.json`'s values that tuning chose; {} before that.
    """

    name: str
    runs: list[LoadedRun]
    trials: list[Trial] = field(default_factory=list)
    pace: Mapping[str, Any] = field(default_factory=dict)
    choice: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Material:
    """All that a page is made of.

    Attributes:
        folder: what the runs have in common, or the verdict's.
        metric: by which the arms are compared.
        higher: whether more of it is better.
        test_metric: the same of the test set.
        arms: in their order.
        baseline: name of the arm that costs are compared with.
        target: value of the metric whose time is taken; None: what half of the arms reach.
        command: that made the runs; "" if nobody wrote it down.
        verdict: `verdict.json`; {} for a plain sweep.
        begun: folders of runs that have logged nothing yet, and what they say of it.
        remarks: sentences about what was read.
    """

    folder: Path
    metric: str
    higher: bool
    test_metric: str
    arms: list[ArmRuns]
    baseline: str
    target: float | None = None
    command: str = ""
    verdict: Mapping[str, Any] = field(default_factory=dict)
    begun: list[tuple[Path, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What all runs have in common: the model and the data set."""
        parts: list[str] = []
        for group in ("model", "dataset"):
            choices = {run.choices.get(group, "?") for arm in self.arms for run in arm.runs}
            parts += choices if len(choices) == 1 else []
        return " on ".join(parts)


def is_verdict(folder: Path) -> bool:
    """Whether `scripts/verdict.py` has made a folder its own."""
    return (folder / "verdict.json").is_file()


def read_verdict(folder: Path) -> Material:
    """Read a verdict's folder, finished or not.

    Args:
        folder: with `verdict.json`; all else in it may be missing.

    Raises:
        ValueError: a file in it is damaged, or there is no `verdict.json`.
    """
    path = folder / "verdict.json"
    try:
        verdict = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): give the folder of scripts/verdict.py") from error
    if not isinstance(verdict, dict):
        raise ValueError(f"{path} holds no object: give the folder of scripts/verdict.py")
    metric = str(verdict.get("metric") or "val/accuracy")
    found, remarks = (
        _by_optimizer(read_runs(_runs_in(folder / "final"), metric)) if (folder / "final").is_dir() else ({}, [])
    )
    trials = read_trials(folder)
    names = list(dict.fromkeys([*map(str, verdict.get("optimizers") or ()), *found, *(trial.arm for trial in trials)]))
    arms = [
        ArmRuns(
            name,
            [paced(run, (verdict.get("pace") or {}).get(name) or {}) for run in found.get(name, [])],
            [trial for trial in trials if trial.arm == name],
            (verdict.get("pace") or {}).get(name) or {},
            (verdict.get("choices") or {}).get(name) or {},
        )
        for name in names
    ]
    if not arms:
        raise ValueError(f"{path} names no optimizers, and there are no runs beside it: nothing can be said")
    higher = verdict.get("higher")
    target = verdict.get("target")
    return Material(
        folder,
        metric,
        higher_is_better(metric) if higher is None else bool(higher),
        str(verdict.get("test_metric") or _of_test(metric)),
        arms,
        "sgd" if "sgd" in names else names[0],
        float(target) if isinstance(target, int | float) else None,
        str(verdict.get("command") or ""),
        verdict,
        not_begun(folder / "final") if (folder / "final").is_dir() else [],
        remarks,
    )


def read_sweep(
    folders: Sequence[Path], folder: Path, metric: str | None = None, target: float | None = None, baseline: str = ""
) -> Material:
    """Read any runs: those that differ by their seed alone are an arm.

    Args:
        folders: of runs, as `analysis.compare.find_runs` returns them.
        folder: what they have in common.
        metric: by which they are compared; None: what chose the best weights, or the validation loss.
        target: value of the metric whose time is taken; None: what half of the arms reach.
        baseline: the arm that costs are compared with, as `analysis.compare.match` understands it; "": the first.

    Raises:
        ValueError: a file is damaged, or no run has such a metric.
    """
    runs = read_runs(folders, metric or "")
    groups, remarks = group_runs(runs)
    monitors = [run.summary.get("monitor") for run in runs if run.summary.get("monitor")]
    metric = metric or (str(monitors[0]) if monitors else "val/loss")
    if not any(run_score(run, metric, (*ENDED, "unfinished")) is not None for run in runs):
        logged = {key for run in runs for event in run.events for key in event if key.startswith(("train/", "val/"))}
        known = ", ".join(sorted(logged)) or "no metric at all"
        if metric not in logged:
            raise ValueError(f"metric: no run has logged {metric!r}; they have {known}")
    unit = match(groups, baseline, "baseline") if baseline else groups[0]
    arms = [ArmRuns(short_label(group, groups), group.runs) for group in groups]
    return Material(
        folder,
        metric,
        higher_is_better(metric),
        _of_test(metric),
        arms,
        arms[groups.index(unit)].name,
        target,
        remarks=remarks,
    )


def short_label(group: Group, groups: Sequence[Group]) -> str:
    """A group's label without the word "optimizer=" where all labels begin with it: "kfac optimizer.lr=0.1"."""
    word = "optimizer="
    return group.label[len(word) :] if all(one.label.startswith(word) for one in groups) else group.label


def read_runs(folders: Iterable[Path], metric: str = "") -> list[LoadedRun]:
    """Read run folders, of long ones a part of the training lines; see `read_events`.

    Args:
        folders: of runs that have begun to train.
        metric: that is looked at.

    Raises:
        ValueError: a file is damaged.
    """
    return [read_run(folder, read_events(folder / "metrics.jsonl", metric)) for folder in folders]


def read_events(path: Path, metric: str = "") -> list[dict[str, Any]]:
    """The events of a run, of more than `LINES` training lines `KEPT` alone, evenly spaced.

    What a line that is kept says of the metric is then the mean over it and the lines that are left out before it, so
    that means over epochs remain what they are but for the places of their limits. Other training metrics are those of
    the lines that are kept.

    Args:
        path: a `metrics.jsonl`.
        metric: that is looked at.

    Raises:
        ValueError: a line that is read is no JSON object; the last one may be half a line.
    """
    content = path.read_bytes()
    lines = content.splitlines()
    try:
        json.loads(lines[-1] if lines else b"0")
    except ValueError:  # a killed run may have left half of it
        content = content[: len(content) - len(lines.pop())]
    if len(lines) <= LINES:
        return _parsed(lines, path)
    dropped: set[int] = set()
    counts = {}
    for kind in FREQUENT:
        start = b'{"event": "%s"' % kind
        places = [i for i, line in enumerate(lines) if line.startswith(start)] if start in content else []
        counts[kind] = len(places)
        if len(places) > LINES:
            dropped.update(set(places).difference(places[:: -(-len(places) // KEPT)], places[-1:]))
    events = _parsed([line for i, line in enumerate(lines) if i not in dropped], path)
    if metric.startswith("train/") and counts[b"train"] > LINES:
        _average([event for event in events if event["event"] == "train"], metric, content, counts[b"train"])
    return events


def _average(events: Sequence[dict[str, Any]], metric: str, whole: bytes, count: int) -> None:
    """Let events say the means of a metric over all lines since the one before."""
    found = re.findall(b'"%s": ([^,}]+)' % re.escape(metric.encode()), whole)
    if len(found) != count:  # some lines have no such metric: what was kept stands for the rest
        return
    values = np.array([math.nan if value == b"null" else float(value) for value in found])
    stride, last = -(-count // KEPT), 0
    ends = [*range(0, count, stride)]
    ends += [count - 1] if ends[-1] != count - 1 else []
    for event, end in zip(events, ends, strict=False):
        block = values[last : end + 1]
        event[metric] = float(np.nanmean(block)) if not np.isnan(block).all() else None
        last = end + 1


def _parsed(lines: Sequence[bytes], path: Path) -> list[dict[str, Any]]:
    try:  # at once, which is twice as fast and shares the names of metrics
        events = json.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        events = None
    if isinstance(events, list) and len(events) == len(lines) and all(isinstance(event, dict) for event in events):
        return events
    return read_metrics(path)  # which says what line is damaged


def paced(run: LoadedRun, pace: Mapping[str, Any]) -> LoadedRun:
    """A run whose training seconds are its steps times the pace that its verdict measured, and shared time out by.

    What else the machine did while it was trained so changes nothing. What its own clock said stays in its summary, as
    ``seconds.measured``.

    Args:
        run: as it was read.
        pace: `verdict.json`'s of its arm; {} if it was not measured.
    """
    step = pace.get("seconds")
    if not step:
        return run
    events = [event | {"seconds": event["step"] * step} for event in run.events]
    clocks = run.summary.get("seconds") or {}
    summary = dict(run.summary)
    if "training" in clocks and "steps" in summary:
        summary["seconds"] = clocks | {"training": summary["steps"] * step, "measured": clocks["training"]}
    return replace(run, events=events, summary=summary)


def is_share(metric: str) -> bool:
    """Whether a metric is written in per cent."""
    return metric.endswith("accuracy")


def read_trials(folder: Path) -> list[Trial]:
    """The trials of a verdict; of one that was made again, the last line counts.

    Args:
        folder: that has `trials.jsonl`, or not yet.

    Raises:
        ValueError: a line is no JSON object; the last one may be half a line.
    """
    path = folder / "trials.jsonl"
    if not path.is_file():
        return []
    found: dict[tuple[Any, ...], Trial] = {}
    starts = _starts(folder)
    for line in read_metrics(path):
        where = line.get("folder")
        value, charged = line.get("value"), line.get("charged")
        ended = str(line.get("status")).replace("_", " ") in ENDED and isinstance(value, int | float)
        trial = Trial(
            str(line.get("arm")),
            int(line.get("rung") or 0),
            int(line.get("trial") or 0),
            dict(line.get("values") or starts.get(str(line.get("arm"))) or {}),
            folder / str(where) if where else None,
            str(line.get("status") or "unfinished").replace("_", " "),
            float(value) if ended and value is not None else math.nan,
            float(charged) if isinstance(charged, int | float) else 0.0,
            line.get("error"),
        )
        found[trial.arm, trial.rung, trial.number] = trial
    return list(found.values())


def _starts(folder: Path) -> dict[str, dict[str, Any]]:
    """What each arm is configured with, which is its trial 0; {} where that was not written down."""
    try:
        arms = json.loads((folder / "tuning.json").read_bytes())["plan"]["arms"]
        return {arm: {key: yaml.safe_load(text) for key, text in arms[arm]["start"].items()} for arm in arms}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return {}


def not_begun(folder: Path) -> list[tuple[Path, str]]:
    """Runs below a folder that have logged nothing, with their sentence.

    Args:
        folder: of a sweep.
    """
    found = []
    for config in sorted(folder.rglob("config.yaml")):
        if not (config.parent / "metrics.jsonl").is_file():
            summary = config.parent / "summary.json"
            try:
                said = json.loads(summary.read_bytes()).get("error") if summary.is_file() else None
            except (ValueError, AttributeError):
                said = "its summary.json is damaged"
            found.append((config.parent, str(said or "has not begun to train")))
    return found


def run_score(run: LoadedRun, metric: str, statuses: Sequence[str] = ENDED) -> float | None:
    """A run's last value of a metric; None if it ended in another way, or the value is not finite.

    Args:
        run: that was read.
        metric: "val/accuracy".
        statuses: how a run ends whose value counts.
    """
    if run.status not in statuses:
        return None
    value = (run.summary.get("final") or {}).get(metric)
    if value is None:
        values = run.curve(metric).value if run.events else np.array([])
        value = float(values[-1]) if len(values) else None
    return float(value) if value is not None and math.isfinite(value) else None


def _of_test(metric: str) -> str:
    return f"test/{metric.partition('/')[2]}"


def _runs_in(folder: Path) -> list[Path]:
    return find_runs([folder]) if any(folder.rglob("metrics.jsonl")) else []


def _by_optimizer(runs: Iterable[LoadedRun]) -> tuple[dict[str, list[LoadedRun]], list[str]]:
    """Runs of each optimizer by seed, and what is odd about them."""
    found: dict[str, dict[int, LoadedRun]] = {}
    remarks = []
    for run in runs:
        own = found.setdefault(run.choices.get("optimizer", "?"), {})
        if earlier := own.get(run.seed):
            older, run = sorted((earlier, run), key=lambda one: (one.folder / "metrics.jsonl").stat().st_mtime)
            remarks.append(f"{older.folder.name} is left out: {run.folder.name} has its seed too and is newer.")
        own[run.seed] = run
    for name, own in found.items():
        if len({tuple(sorted(run.settings.items())) for run in own.values()}) > 1:
            remarks.append(f"The runs of {name} differ in more than their seed: their settings tell in what.")
    return {name: [own[seed] for seed in sorted(own)] for name, own in found.items()}, remarks
