"""Several runs side by side: one picture and one table, with a line for all runs that differ by their seed alone.

Definitions, the same for every run:

- A training metric has one value an epoch, the mean over its steps (`metrics.jsonl` holds means over a few steps each),
  which stands at the epoch's end. A validation metric has one value an evaluation.
- A target is reached at the first of these values that is at least as good; what counts are the training seconds until
  then, or infinity. Over seeds this is a median, everything else a mean and a sample standard deviation.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from analysis.curves import GREY, _dress, read_metrics
from training.runs.record import BUDGETS, VOLATILE, load, replace_folder

# One colour a group; grey is kept for what belongs to no group.
PALETTE = (
    "#4477aa", "#cc6677", "#228833", "#ddaa33", "#aa3377", "#33bbee", "#ee7733", "#885533", "#882255", "#999933",
)  # fmt: skip
AXES = {"epoch": "epoch", "step": "step", "seconds": "training seconds"}
# A logarithmic axis from this ratio of the largest to the smallest value on.
LOG_RANGE = 5

# Lines of single runs where their group has no mean.
THIN: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.6}

Row = dict[str, Any]


# -- runs --------------------------------------------------------------------------------------------------------------


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
        pictures = {f"{key.rpartition('.')[0]}." for key, value in flat.items() if value.endswith("Plots")}
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


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed alone.

    Attributes:
        label: what sets them apart from the other groups, e.g. "optimizer=kfac".
        runs: the runs, by seed.
    """

    label: str
    runs: list[LoadedRun]

    @property
    def status(self) -> str:
        """How the runs ended."""
        counts = Counter(run.status for run in self.runs)
        return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{n} {status}" for status, n in counts.items())

    def curves(self, metric: str) -> list[Curve]:
        """The curves of the runs that logged the metric."""
        return [curve for run in self.runs if len((curve := run.curve(metric)).value)]


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


def read_run(folder: Path) -> LoadedRun:
    """Read a run folder.

    Raises:
        ValueError: `metrics.jsonl` or `summary.json` is damaged.
        UserError: `config.yaml` is.
    """
    values, choices = load(folder)
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"runs: {path} is no JSON: the file is damaged, leave this run out") from error
    return LoadedRun(folder, values, choices, read_metrics(folder), summary)


def group_runs(runs: Sequence[LoadedRun]) -> tuple[list[Group], list[str]]:
    """Group runs over seeds and label the groups by what they differ in.

    Returns:
        The groups, in the order of their first runs, and remarks: of runs of the same configuration and seed, the one
        written to last counts.
    """
    remarks: list[str] = []
    groups: dict[tuple[tuple[str, str], ...], dict[int, LoadedRun]] = {}
    for run in runs:
        same = groups.setdefault(tuple(sorted(run.settings.items())), {})
        if earlier := same.get(run.seed):
            older, run = sorted((earlier, run), key=lambda r: (r.folder / "metrics.jsonl").stat().st_mtime)
            remarks.append(f"left out, because {run.folder} is the same run again and newer: {older.folder}")
        same[run.seed] = run
    members = [[same[seed] for seed in sorted(same)] for same in groups.values()]
    labels = _labels([runs[0] for runs in members])
    return [Group(label, runs) for label, runs in zip(labels, members, strict=True)], remarks


def match(groups: Sequence[Group], text: str, argument: str) -> Group:
    """The group that a text means: its label, settings (`optimizer=kfac optimizer.lr=0.1`), or bare values (`kfac`).

    Args:
        groups: to choose from.
        text: what is looked for.
        argument: name of the option, for the sentence.

    Raises:
        ValueError: it means none, or several.
    """
    exact = [group for group in groups if group.label == text]
    fitting = exact or [group for group in groups if all(_fits(group, term) for term in text.split())]
    if len(fitting) == 1 and text:
        return fitting[0]
    labels = "; ".join(group.label for group in fitting or groups)
    trouble = f"fits {len(fitting)} groups" if fitting else "fits no group"
    raise ValueError(f"{argument}: {text!r} {trouble}; write one of: {labels}")


def _fits(group: Group, term: str) -> bool:
    key, equals, value = term.partition("=")
    if not equals:
        return any(part.partition("=")[2] == term for part in group.label.split())
    run = group.runs[0]
    return value in (run.choices.get(key), run.settings.get(key))


def _labels(runs: Sequence[LoadedRun]) -> list[str]:
    """What sets each of these runs apart: the choice of a group where it differs, and values that differ within it."""
    settings = [run.settings for run in runs]
    keys = list(dict.fromkeys(key for one in settings for key in one if not key.endswith("_target_")))
    labels = []
    for mine, run in zip(settings, runs, strict=True):
        parts = []
        for section in dict.fromkeys(key.partition(".")[0] for key in keys):
            inside = [key for key in keys if key.partition(".")[0] == section]
            peers = settings
            if section in run.choices and any(_part(one, section) != _part(mine, section) for one in settings):
                same = [other.choices.get(section) == run.choices[section] for other in runs]
                peers = [one for one, alike in zip(settings, same, strict=True) if alike]
                parts += [] if all(same) else [f"{section}={run.choices[section]}"]
            differing = [key for key in inside if len({one.get(key) for one in peers}) > 1 and key in mine]
            parts += [f"{key}={mine[key]}" for key in differing if not (_is_budget(key) and mine[key] == "null")]
        labels.append(" ".join(parts) or f"optimizer={run.choices.get('optimizer', '?')}")
    return [label if labels.count(label) == 1 else f"{label} ({i + 1})" for i, label in enumerate(labels)]


def _part(settings: Mapping[str, str], section: str) -> dict[str, str]:
    return {key: value for key, value in settings.items() if key.partition(".")[0] == section}


def _is_budget(key: str) -> bool:
    return key in [f"trainer.{name}" for name in BUDGETS]


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


# -- what they are compared by -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A value to be reached.

    Attributes:
        metric: e.g. "train/loss".
        value: reached by what is at least as good.
    """

    metric: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """A target from `train/loss=0.0796`.

        Raises:
            ValueError: the text has another form.
        """
        metric, _, value = text.partition("=")
        try:
            return cls(metric, float(value))
        except ValueError:
            raise ValueError(f"target must be METRIC=VALUE such as train/loss=0.0796, got {text!r}") from None

    def reached(self, curve: Curve) -> tuple[float, float]:
        """Training seconds and epochs until it is reached; infinite if it is not."""
        better = curve.value >= self.value if higher_is_better(self.metric) else curve.value <= self.value
        if not better.any():
            return math.inf, math.inf
        first = int(np.argmax(better))
        return float(curve.seconds[first]), float(curve.epoch[first])


@dataclass(frozen=True)
class Reference:
    """A published curve: one value an epoch, the first after one epoch.

    Attributes:
        name: what it is called in its file.
        series: the values by metric ("val/accuracy"), or of the loss by split ("train").
    """

    name: str
    series: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> tuple[Reference, str]:
        """A reference and the group it belongs to, from `FILE.json:KEY=label`.

        Raises:
            ValueError: the text has another form, or the file is missing, no JSON, or without that key.
        """
        parts = re.fullmatch(r"(.+\.json):([^=]+)=(.+)", text)
        if not parts:
            raise ValueError(f"reference must be FILE.json:KEY=label, got {text!r}")
        path, key, label = parts.groups()
        try:
            content = json.loads(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"reference: {path} cannot be read as JSON ({error}); give the file of a curve") from error
        entry = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entry, dict):
            known = ", ".join(content) if isinstance(content, dict) else "no keys"
            raise ValueError(f"reference: {path} has no curves under {key!r}; it has {known}")
        return cls(key, entry), label

    def curve(self, metric: str) -> np.ndarray:
        """The values of a metric, one an epoch; of no length if it was not published."""
        split, _, name = metric.partition("/")
        found = self.series.get(metric, self.series.get(split) if name == "loss" else None)
        return np.array(found if isinstance(found, list) else [], dtype=float)


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, with its standard deviation where there are several.

    Attributes:
        mean: NaN for no values.
        std: NaN for fewer than two.
    """

    mean: float
    std: float = math.nan

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Over values, those that are NaN left out."""
        kept = [value for value in values if not math.isnan(value)]
        mean = statistics.fmean(kept) if kept else math.nan
        return cls(mean, statistics.stdev(kept) if len(kept) > 1 else math.nan)


@dataclass(frozen=True)
class Comparison:
    """Groups of runs and what to compare them by.

    Attributes:
        groups: at least one.
        metric: what is drawn, "train/..." or "val/...".
        target: whose time is taken; None: no time is taken.
        epochs: at which the metric is given.
        baseline: the group that ratios are to; None: the first.
        references: published curves by the label of their group.
        remarks: sentences that belong below the table.

    Raises:
        ValueError: a metric that no run logged, or a reference or an epoch that is none.
    """

    groups: list[Group]
    metric: str = "train/loss"
    target: Target | None = None
    epochs: Sequence[int] = ()
    baseline: Group | None = None
    references: dict[str, Reference] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, metric in (("metric", self.metric), ("target", self.target.metric if self.target else self.metric)):
            if not any(group.curves(metric) for group in self.groups):
                events = [event for group in self.groups for run in group.runs for event in run.events]
                logged = {key for event in events for key in event if key.startswith(("train/", "val/"))}
                known = ", ".join(sorted(logged)) or "no metric at all"
                raise ValueError(f"{name}: no run has logged {metric!r}; they have {known}")
        if wrong := [epoch for epoch in self.epochs if epoch < 1]:
            raise ValueError(f"epochs must be at least 1, got {wrong[0]}")
        for reference in self.references.values():
            if not len(reference.curve(self.metric)):
                raise ValueError(f"reference: {reference.name} has no curve of {self.metric}; draw another --metric")

    @property
    def unit(self) -> Group:
        """The group that ratios are to."""
        return self.baseline or self.groups[0]

    @property
    def title(self) -> str:
        """What all groups have in common: the model and the data set."""
        parts: list[str] = []
        for group in ("model", "dataset"):
            choices = {run.choices.get(group, "?") for one in self.groups for run in one.runs}
            parts += choices if len(choices) == 1 else []
        return " on ".join(parts)


def higher_is_better(metric: str) -> bool:
    """Whether a metric is one that training raises."""
    return metric.endswith("accuracy")


# -- the table ---------------------------------------------------------------------------------------------------------


def rows(comparison: Comparison) -> list[Row]:
    """A row a group: a text, a number or a `Spread` by column; NaN where there is nothing to say.

    Final and best values of diverged runs do not count: the status tells of them.
    """
    found = [_measured(comparison, group) for group in comparison.groups]
    unit = found[comparison.groups.index(comparison.unit)]
    final, target = f"final {comparison.metric}", comparison.target
    for row, group in zip(found, comparison.groups, strict=True):
        for column in (final, "s/step", *(["s to target"] if target else [])):
            row[f"{column} / baseline"] = _ratio(row[column], unit[column])
        if comparison.references:
            reference = comparison.references.get(group.label)
            published = reference.curve(comparison.metric) if reference else np.array([])
            for epoch in comparison.epochs:
                row |= _published(row[f"epoch {epoch}"], published, epoch, f"epoch {epoch}")
            last = round(max(curve.epoch[-1] for curve in curves)) if (curves := group.curves(comparison.metric)) else 0
            row["last epoch"] = last
            row |= _published(row[final], published, last, "final")
    return found


def _measured(comparison: Comparison, group: Group) -> Row:
    """What a group's own runs say."""
    metric, target, name = comparison.metric, comparison.target, comparison.metric.partition("/")[2]
    row: Row = {"group": group.label, "runs": len(group.runs), "status": group.status}
    for one in (f"train/{name}", f"val/{name}"):
        best = np.max if higher_is_better(one) else np.min
        lasting = [run for run in group.runs if run.status != "diverged"]
        values = [curve.value for curve in Group(group.label, lasting).curves(one)]
        row[f"final {one}"] = Spread.of(float(value[-1]) for value in values)
        row[f"best {one}"] = Spread.of(float(best(value)) for value in values)
    for epoch in comparison.epochs:
        row[f"epoch {epoch}"] = Spread.of(_at(curve, epoch) for curve in group.curves(metric))
    ends = [run.events[-1] for run in group.runs if run.events and run.events[-1]["step"]]
    row["s/epoch"] = Spread.of(end["seconds"] / end["epoch"] for end in ends)
    row["s/step"] = Spread.of(end["seconds"] / end["step"] for end in ends)
    if target is not None:
        times = [target.reached(run.curve(target.metric)) for run in group.runs]
        row["reached"] = sum(math.isfinite(seconds) for seconds, _ in times)
        row["epochs to target"] = statistics.median(epochs for _, epochs in times)
        row["s to target"] = statistics.median(seconds for seconds, _ in times)
    return row


def _at(curve: Curve, epoch: int) -> float:
    """The value of an epoch: the last that stands after the one before it."""
    inside = (curve.epoch > epoch - 1 + 1e-6) & (curve.epoch <= epoch + 1e-6)
    whole = curve.epoch[-1] >= epoch - 1e-6
    return float(curve.value[inside][-1]) if whole and inside.any() else math.nan


def _published(ours: Spread, curve: np.ndarray, epoch: int, column: str) -> Row:
    value = float(curve[epoch - 1]) if 0 < epoch <= len(curve) else math.nan
    return {f"published {column}": value, f"{column} / published": _ratio(ours, value)}


def _ratio(one: Spread | float, other: Spread | float) -> float:
    """NaN where there is nothing to compare with."""
    above, below = (x.mean if isinstance(x, Spread) else x for x in (one, other))
    return above / below if below and math.isfinite(below) else math.nan


def to_csv(found: Sequence[Row]) -> str:
    """The rows with all their digits; a column of its own for each standard deviation."""
    text = io.StringIO()
    table = [
        {
            name: part
            for column, cell in row.items()
            for name, part in (
                {column: cell.mean, f"{column} std": cell.std} if isinstance(cell, Spread) else {column: cell}
            ).items()
        }
        for row in found
    ]
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in line.items()} for line in table
    )
    return text.getvalue()


@dataclass(frozen=True)
class Sheet:
    """A part of the table that fits a page.

    Attributes:
        title: what it shows.
        header: names of its columns.
        lines: text of its cells.
    """

    title: str
    header: list[str]
    lines: list[list[str]]


def sheets(comparison: Comparison, found: Sequence[Row]) -> list[Sheet]:
    """The rows as tables to be read: results, values at epochs, time to target and ratios, published values.

    Args:
        comparison: what is compared.
        found: its `rows`.
    """
    metric, target, published = comparison.metric, comparison.target, bool(comparison.references)
    name = metric.partition("/")[2]
    group, unit = {"group": "group", "runs": "runs"}, f"; ratios to {comparison.unit.label}"
    if any(row["status"] != "finished" for row in found):
        group["status"] = "status"
    results = {c: c for split in ("train", "val") for c in (f"final {split}/{name}", f"best {split}/{name}")}
    results[f"final {metric} / baseline"] = f"final {metric.partition('/')[0]} ratio"
    parts = [_sheet(f"Results{unit}", group | results, found, name)]
    group = {"group": "group"}
    if comparison.epochs:
        columns = {}
        for epoch in comparison.epochs:
            columns[f"epoch {epoch}"] = f"epoch {epoch}"
            if published:
                columns |= {f"published epoch {epoch}": "paper", f"epoch {epoch} / published": "ratio"}
        parts.append(_sheet(f"{metric} at chosen epochs", group | columns, found, name))
    columns = {"s/epoch": "s/epoch", "s/step": "s/step", "s/step / baseline": "s/step ratio"}
    if target is not None:
        columns |= {column: column for column in ("reached", "epochs to target", "s to target")}
        columns["s to target / baseline"] = "s to target ratio"
    title = f"Training seconds{f', target {target.metric} = {target.value:g}' if target else ''}{unit}"
    parts.append(_sheet(title, group | columns, found, name))
    if published:
        columns = {"last epoch": "epoch", f"final {metric}": f"final {metric}", "published final": "paper"}
        columns["final / published"] = "ratio"
        parts.append(_sheet(f"{metric} beside what was published, at the last epoch", group | columns, found, name))
    return parts


def _sheet(title: str, columns: dict[str, str], found: Sequence[Row], name: str) -> Sheet:
    """Columns of the rows under short headers; `name` is the metric's without its split."""
    ratios = ("/ baseline", "/ published", "to target")
    values = [c for c in columns if c.startswith(("final", "best", "epoch", "published")) and not c.endswith(ratios)]
    lines = [[_cell(row[column], name if column in values else "") for column in columns] for row in found]
    return Sheet(title, list(columns.values()), lines)


def _cell(value: Any, metric: str) -> str:
    """A figure as text; a metric's in per cent where it is an accuracy."""
    scale, unit = (100, " %") if higher_is_better(metric) else (1, "")
    if isinstance(value, Spread):
        spread = "" if math.isnan(value.std) else f" ± {_digits(scale * value.std, 2)}"
        return "–" if math.isnan(value.mean) else f"{_digits(scale * value.mean, 4)}{spread}{unit}"
    if isinstance(value, float):
        return (
            "–" if math.isnan(value) else "not reached" if math.isinf(value) else f"{_digits(scale * value, 4)}{unit}"
        )
    return str(value)


def _digits(value: float, digits: int) -> str:
    """A number to so many significant digits, without an exponent where that is readable."""
    if value and not 1e-6 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    return str(np.format_float_positional(value, digits, unique=False, fractional=False, trim="-"))


def to_markdown(comparison: Comparison, found: Sequence[Row]) -> str:
    """The tables with a heading each, and below them what was measured how and where.

    Args:
        comparison: what is compared.
        found: its `rows`.
    """
    lines = [f"# {comparison.title or 'Comparison'}: {len(comparison.groups)} groups of runs", ""]
    for sheet in sheets(comparison, found):
        lines += [f"## {sheet.title}", "", f"| {' | '.join(sheet.header)} |"]
        lines += [f"| {' | '.join(['---', *['---:'] * (len(sheet.header) - 1)])} |"]
        lines += [f"| {' | '.join(line)} |" for line in sheet.lines] + [""]
    lines += [f"- {remark}" for remark in notes(comparison)]
    return "\n".join(lines) + "\n"


def notes(comparison: Comparison) -> list[str]:
    """How the figures are defined and where they were measured."""
    runs = [run for group in comparison.groups for run in group.runs]
    said = ["Mean ± standard deviation over seeds; a training metric is the mean over an epoch's steps."]
    if comparison.target:
        said.append(
            "Time to target: training seconds until the first epoch (training metrics) or evaluation (validation "
            "metrics) that is at least as good; median over seeds, a run that never is counts as infinite."
        )
    machines = Counter(_machine(run) for run in runs)
    said += [f"Measured on {'; '.join(machines)}."] if any(machines) else []
    if len(machines) > 1:
        said.append("The runs were not all made on the same machine: seconds do not compare.")
    return said + comparison.remarks


def _machine(run: LoadedRun) -> str:
    """Where a run was trained, in a few words."""
    hardware = run.summary.get("hardware") or {}
    name = hardware.get("gpu") or hardware.get("cpu")
    words = [str(hardware.get("device", "")), *([str(name)] if name else [])]
    words += [f"{hardware['threads']} thread(s)"] if hardware.get("threads") else []
    return ", ".join(word for word in words if word)


# -- the picture -------------------------------------------------------------------------------------------------------


def plot(comparison: Comparison) -> Figure:
    """The metric by epoch, step and training seconds: a line a group, with a band of one standard deviation.

    A mean reaches as far as all runs of its group do, those that diverged excepted; what single runs have beyond is
    thin. Published curves are dashed in their group's colour, by epoch and, an epoch taken to have as many steps as
    here, by step; their seconds are another machine's.
    """
    metric = comparison.metric
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    drawn: list[np.ndarray] = []
    for group, colour in zip(comparison.groups, _colours(len(comparison.groups)), strict=True):
        diverged = Group(group.label, [run for run in group.runs if run.status == "diverged"]).curves(metric)
        lasting = Group(group.label, [run for run in group.runs if run.status != "diverged"]).curves(metric)
        drawn += [curve.value for curve in (*lasting, *diverged)]
        for axes, x in zip(panels, AXES, strict=True):
            _draw_group(axes, [(getattr(curve, x), curve.value) for curve in lasting], colour)
            for curve in diverged:
                axes.plot(getattr(curve, x), curve.value, **THIN, color=colour)
    longest = max(curve.epoch[-1] for group in comparison.groups for curve in group.curves(metric))
    for group, colour in zip(comparison.groups, _colours(len(comparison.groups)), strict=True):
        if reference := comparison.references.get(group.label):
            published = reference.curve(metric)[: math.ceil(longest - 1e-6)]
            drawn.append(published)
            epochs = np.arange(1, len(published) + 1)
            for axes, per_epoch in ((panels[0], 1.0), (panels[1], group.runs[0].steps_per_epoch)):
                axes.plot(epochs * per_epoch, published, "--", color=colour, linewidth=1.3)
    plateaus = sorted({f"{p:.4g}" for group in comparison.groups for run in group.runs if (p := run.plateau(metric))})
    shown = comparison.target if comparison.target and comparison.target.metric == metric else None
    for axes, label in zip(panels, AXES.values(), strict=True):
        for plateau in plateaus:
            axes.axhline(float(plateau), color=GREY, linestyle="--", linewidth=1.2)
        if shown:
            axes.axhline(shown.value, color=GREY, linestyle=":", linewidth=1.2)
        _dress(axes, label, metric if axes is panels[0] else "")
    _scale(panels[0], drawn, metric, list(map(float, plateaus)), shown)
    _legend(figure, comparison, [f"constant output {plateau}" for plateau in plateaus], shown)
    figure.suptitle(comparison.title, fontsize="medium")
    return figure


def _colours(count: int) -> list[Any]:
    """As many colours as there are groups, far apart while ten are enough."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    return list(matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, count)))


def _draw_group(axes: Axes, lines: list[tuple[np.ndarray, np.ndarray]], colour: Any) -> None:
    """The mean of several lines over the positions of all, its band, and single lines beyond its end."""
    if not lines:
        return
    end = min(x[-1] for x, _ in lines)
    grid = np.unique(np.concatenate([x[x <= end] for x, _ in lines]))
    grid = grid[grid >= max(x[0] for x, _ in lines)]
    if len(grid):
        values = np.stack([np.interp(grid, x, y) for x, y in lines])
        mean = values.mean(0)
        axes.plot(grid, mean, "o-" if len(grid) == 1 else "-", color=colour, linewidth=1.8, markersize=4)
        if len(lines) > 1:
            std = values.std(0, ddof=1)
            low, high = np.maximum(mean - std, values.min(0)), np.minimum(mean + std, values.max(0))
            axes.fill_between(grid, low, high, color=colour, alpha=0.2, linewidth=0)
    for x, y in lines:
        if x[-1] > end or not len(grid):
            start = max(int(np.searchsorted(x, end, side="right")) - 1, 0)
            axes.plot(x[start:], y[start:], **THIN, color=colour)


def _scale(axes: Axes, drawn: list[np.ndarray], metric: str, plateaus: list[float], target: Target | None) -> None:
    """The shared vertical axis: per cent for accuracies; logarithmic for a large range; no room for what blew up."""
    if higher_is_better(metric):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        return
    extra = [*plateaus, *([target.value] if target else [])]
    values = np.concatenate([*drawn, extra])
    # Training starts about where every curve does; what is far above has diverged and would flatten all others.
    ceiling = max(3 * float(np.median([line[0] for line in drawn if len(line)])), max(extra, default=0.0))
    last = [float(line[-1]) for line in drawn if len(line)]
    if plateaus and last and float(np.median(last)) < 0.9 * max(plateaus):  # what matters lies below the plateau
        ceiling = max(1.1 * max(plateaus), max(last))
    low, top = float(values.min()), min(float(values.max()), ceiling)
    logarithmic = low > 0 and top / low > LOG_RANGE
    if logarithmic:
        axes.set_yscale("log")  # shared with the others
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if top / low < 300 else (1.0,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if top < values.max():
        margin = 0.05 * (math.log(top / low) if logarithmic else top - low)
        axes.set_ylim(
            *((low / math.exp(margin), top * math.exp(margin)) if logarithmic else (low - margin, top + margin))
        )


def _legend(figure: Figure, comparison: Comparison, plateaus: list[str], target: Target | None) -> None:
    """Below the panels, in as many columns as the labels leave room for."""
    colours = _colours(len(comparison.groups))
    entries = []
    for group, colour in zip(comparison.groups, colours, strict=True):
        count = f" ({len(group.runs)} seeds)" if len(group.runs) > 1 else ""
        trouble = "" if group.status == "finished" else f" [{group.status}]"
        entries.append(Line2D([], [], color=colour, linewidth=1.8, label=f"{group.label}{count}{trouble}"))
    if comparison.references:
        names = {reference.name for reference in comparison.references.values()}
        label = f"published {names.pop()}" if len(names) == 1 else "published, in the group's colour"
        entries.append(Line2D([], [], color="black", linestyle="--", linewidth=1.3, label=label))
    entries += [Line2D([], [], color=GREY, linestyle="--", linewidth=1.2, label=label) for label in plateaus]
    if target:
        label = f"target {target.value:g}"
        entries.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1.2, label=label))
    widest = max(len(str(entry.get_label())) for entry in entries)
    columns = min(len(entries), max(1, 190 // (widest + 9)))
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    figure.set_figheight(4.5 + 0.2 * math.ceil(len(entries) / columns))
