"""What runs are compared by: targets, published curves, spreads over seeds, and a row of figures a group."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from analysis.compare.groups import Group
from analysis.compare.runs import Curve

Row = dict[str, Any]


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
            number = float(value)
        except ValueError:
            number = math.nan
        if not metric or not math.isfinite(number):
            raise ValueError(f"target must be METRIC=VALUE such as train/loss=0.0796, got {text!r}")
        return cls(metric, number)

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


def rows(comparison: Comparison) -> list[Row]:
    """A row a group, the best first: a text, a number or a `Spread` by column; NaN where there is nothing to say.

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
    for column in [name for epoch in comparison.epochs for name in (f"epoch {epoch}", f"published epoch {epoch}")]:
        for row in found:
            if column in row:
                row[f"{column} / baseline"] = _ratio(row[column], unit[column])
    sign = -1 if higher_is_better(comparison.metric) else 1
    return sorted(found, key=lambda row: math.inf if math.isnan(row[final].mean) else sign * row[final].mean)


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
    tests = [(run.summary.get("final") or {}).get(f"test/{name}") for run in group.runs if run.status != "diverged"]
    row[f"final test/{name}"] = Spread.of(float(value) for value in tests if value is not None)
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
