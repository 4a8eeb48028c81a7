"""The numbers of a page: a row an arm, by the definitions of `analysis.statistics`."""

from __future__ import annotations

import math
import statistics as plain
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from analysis import statistics
from analysis.compare import LoadedRun, Target
from analysis.report.reading import ENDED, ArmRuns, Material, is_share, run_score
from analysis.sensitivity import NEAR, number
from analysis.statistics import Difference, Interval

#: From this p on a difference counts as not shown.
LEVEL = 0.05
#: By how much clocks may differ before a sentence says so.
ALIKE = 1.1


@dataclass(frozen=True)
class Row:
    """What is known of an arm.

    Attributes:
        name: of the arm.
        scores: last value of the metric, by seed, of runs that came to an end.
        value: their mean with its interval; None where no run came to an end.
        test: the same of the test set.
        difference: of the leader to this arm, over common seeds, positive where the leader's value is larger; None for
            the leader, and for fewer than two common seeds.
        p: of that difference, adjusted by Holm over all arms; NaN without one.
        probability: of being best, NaN where it cannot be told.
        times: training seconds to the target by seed, infinite where it was not reached.
        to_target: their median with its interval; None without times.
        training_seconds: of a run, the mean; NaN without one.
        steps: of a run, the mean.
        step_seconds: of an optimizer step.
        ratio: those to the baseline's.
        memory: bytes, None where nobody measured them.
        tuning_seconds: of all its trials.
        trials: how many sets of values were tried.
        statuses: how its runs ended, and how many.
    """

    name: str
    scores: dict[int, float]
    value: Interval | None
    test: Interval | None
    difference: Difference | None
    p: float
    probability: float
    times: dict[int, float]
    to_target: Interval | None
    training_seconds: float
    steps: float
    step_seconds: float
    ratio: float
    memory: float | None
    tuning_seconds: float
    trials: int
    statuses: Counter[str]

    @property
    def reached(self) -> int:
        """How many runs reached the target."""
        return sum(math.isfinite(time) for time in self.times.values())


@dataclass(frozen=True)
class Results:
    """What a page says.

    Attributes:
        material: what it was made of.
        rows: an arm each, in the order of the material.
        leader: name of the arm with the best mean; None before a run has ended.
        target: value of the metric whose time is taken; None without any.
        warnings: sentences about what was unequal, missing or odd.
    """

    material: Material
    rows: list[Row]
    leader: str | None
    target: float | None
    warnings: list[str] = field(default_factory=list)

    def row(self, name: str) -> Row:
        """The row of an arm."""
        return next(row for row in self.rows if row.name == name)

    @property
    def ranked(self) -> list[Row]:
        """Rows from the best mean to the worst, those without one last."""
        sign = -1 if self.material.higher else 1
        return sorted(self.rows, key=lambda row: sign * row.value.middle if row.value else math.inf)


def results(material: Material) -> Results:
    """Compute what a page says.

    Args:
        material: that was read.
    """
    scores = {arm.name: _scores(arm, material.metric) for arm in material.arms}
    scores = {name: own for name, own in scores.items() if own}
    sign = 1 if material.higher else -1
    leader = max(scores, key=lambda name: sign * plain.fmean(scores[name].values()), default=None)
    differences = {
        name: statistics.paired_t(scores[leader], own)
        for name, own in scores.items()
        if leader is not None and name != leader and len(set(own) & set(scores[leader])) > 1
    }
    adjusted = statistics.holm({name: own.p for name, own in differences.items()}) if differences else {}
    likely = _likely(scores, material.higher)
    target = material.target if material.target is not None else _target(scores)
    paces = {arm.name: _pace(arm) for arm in material.arms}
    unit = paces.get(material.baseline, math.nan)
    rows = []
    for arm in material.arms:
        times = _times(arm, Target(material.metric, target), material.higher) if target is not None else {}
        tests = [run_score(run, material.test_metric) for run in arm.runs if run.status in ENDED]
        tested = [value for value in tests if value is not None]
        spent = [seconds(run) for run in arm.runs if run.seed in scores.get(arm.name, {})]
        rows.append(
            Row(
                arm.name,
                scores.get(arm.name, {}),
                _interval(list(scores.get(arm.name, {}).values()), material.metric),
                _interval(tested, material.test_metric),
                differences.get(arm.name),
                adjusted.get(arm.name, math.nan),
                likely.get(arm.name, math.nan),
                times,
                statistics.median_time(list(times.values())) if times else None,
                plain.fmean(spent) if spent else math.nan,
                plain.fmean([steps(run) for run in arm.runs]) if arm.runs else math.nan,
                paces[arm.name],
                float(arm.pace.get("ratio") or paces[arm.name] / unit),
                _memory(arm),
                sum(trial.charged for trial in arm.trials),
                len({trial.number for trial in arm.trials}),
                Counter(run.status for run in arm.runs),
            )
        )
    found = Results(material, rows, leader, target)
    return Results(material, rows, leader, target, _warnings(found))


def _interval(values: Sequence[float], metric: str) -> Interval | None:
    """Student's interval of the mean; that of a share ends at 0 and 1."""
    if not values:
        return None
    found = statistics.t_interval(values)
    if not is_share(metric) or not math.isfinite(found.low):
        return found
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def _scores(arm: ArmRuns, metric: str) -> dict[int, float]:
    found = {run.seed: run_score(run, metric) for run in arm.runs}
    return {seed: value for seed, value in found.items() if value is not None}


def _likely(scores: Mapping[str, Mapping[int, float]], higher: bool) -> dict[str, float]:
    """Probabilities of being best, among arms of two runs or more that have two seeds in common."""
    several = {name: own for name, own in scores.items() if len(own) > 1}
    common = set.intersection(*(set(own) for own in several.values())) if several else set()
    return statistics.probability_best(several, higher) if len(several) > 1 and len(common) > 1 else {}


def _target(scores: Mapping[str, Mapping[int, float]]) -> float | None:
    """What half of the arms reach: the median of their last means, rounded to three digits."""
    means = [plain.fmean(own.values()) for own in scores.values()]
    return float(f"{plain.median(means):.3g}") if means else None


def _times(arm: ArmRuns, target: Target, higher: bool) -> dict[int, float]:
    """Seconds to the target; a run that has not ended counts once it is there."""
    times = {}
    for run in arm.runs:
        curve = run.curve(target.metric) if run.events else None
        time = math.inf
        if curve is not None and len(curve.value):
            reached = curve.value >= target.value if higher else curve.value <= target.value
            time = float(curve.seconds[int(np.argmax(reached))]) if reached.any() else math.inf
        if math.isfinite(time) or run.status in (*ENDED, "diverged"):
            times[run.seed] = time
    return times


def seconds(run: LoadedRun) -> float:
    """Training seconds of a run, so far if it has not ended."""
    taken = (run.summary.get("seconds") or {}).get("training")
    return float(taken if taken is not None else run.events[-1]["seconds"] if run.events else 0.0)


def steps(run: LoadedRun) -> float:
    """Optimizer steps of a run, so far if it has not ended."""
    taken = run.summary.get("steps")
    return float(taken if taken is not None else run.events[-1]["step"] if run.events else 0)


def _pace(arm: ArmRuns) -> float:
    """Seconds a step: as they were measured, or those of the runs."""
    if arm.pace.get("seconds"):
        return float(arm.pace["seconds"])
    found = [seconds(run) / steps(run) for run in arm.runs if steps(run)]
    return plain.median(found) if found else math.nan


def _memory(arm: ArmRuns) -> float | None:
    """Bytes: as they were measured, or the most that a run took of its GPU."""
    if arm.pace.get("memory") is not None:
        return float(arm.pace["memory"])
    found = [(run.summary.get("hardware") or {}).get("peak_memory_bytes") for run in arm.runs]
    found += [run.summary.get("peak_memory_bytes") for run in arm.runs]
    known = [float(value) for value in found if isinstance(value, int | float)]
    return max(known) if known else None


def machine(run: LoadedRun) -> str:
    """Where a run was trained, in a few words."""
    hardware = run.summary.get("hardware") or {}
    words = [str(hardware.get("gpu") or hardware.get("cpu") or "")]
    words += [f"{hardware['threads']} thread{'s'[: hardware['threads'] > 1]}"] if hardware.get("threads") else []
    return ", ".join(word for word in words if word)


def _warnings(found: Results) -> list[str]:
    material, said = found.material, []
    ended = [row for row in found.rows if row.scores]
    expected = material.verdict.get("seeds") or ()
    for row in found.rows:
        lost = [f"{count} {status}" for status, count in row.statuses.items() if status not in ENDED]
        if lost and row.scores:
            said.append(
                f"{row.name}: of {sum(row.statuses.values())} runs {' and '.join(lost)}; its mean is over the "
                f"{len(row.scores)} that came to an end, and flatters it."
            )
        elif lost:
            said.append(f"{row.name}: no run has come to an end ({', '.join(lost)}).")
        elif not row.scores:
            said.append(f"{row.name}: there is no run yet.")
        elif len(expected) > len(row.scores):
            said.append(f"{row.name}: {len(row.scores)} of {len(expected)} seeds have come to an end so far.")
    spent = [
        statistics.Arm(row.name, tuple(row.scores), row.training_seconds, row.tuning_seconds, row.trials)
        for row in ended
    ]
    said += [f"{sentence[0].upper()}{sentence[1:]}." for sentence in statistics.unequal(spent)]
    said += _clocks(material)
    if ended and max(len(row.scores) for row in ended) == 1:
        said.append("One seed an arm: nothing is known of what another seed would change.")
    if not material.verdict and ended:
        said.append(
            "How the values of each arm were chosen is not recorded: a difference may be one of tuning. "
            "scripts/verdict.py tunes all alike."
        )
        choices = Counter(run.choices.get("optimizer") for arm in material.arms for run in arm.runs[:1])
        if several := [str(name) for name, count in choices.items() if count > 1]:
            said.append(
                f"Several settings of {' and '.join(several)} are compared: the best of many is flattered by having "
                "been picked."
            )
    for arm in material.arms:
        if edges := arm.choice.get("at_edge"):
            ends = (str(edge).rpartition(" ") for edge in edges)  # "lr high"
            where = " and ".join(f"{key} (the {end}est of all tried)" for key, _, end in ends)
            said.append(f"{arm.name}: best at the edge in {where}: more trials tell, or a wider range.")
    if len({machine(run) for arm in material.arms for run in arm.runs if run.summary} - {""}) > 1:
        said.append("The runs were not all made on the same machine: seconds do not compare.")
    return said + material.remarks


def _clocks(material: Material) -> list[str]:
    """A sentence where runs did not keep, by their own clocks, the paces that their time was shared out by."""
    ratios = {}
    for arm in material.arms:
        clocks = [run.summary.get("seconds") or {} for run in arm.runs]
        kept = [one for one in clocks if one.get("measured") and one.get("training")]
        if kept:
            ratios[arm.name] = sum(one["measured"] for one in kept) / sum(one["training"] for one in kept)
    if not ratios or max(ratios.values()) <= ALIKE * min(ratios.values()):
        return []
    slow, fast = (choose(ratios, key=ratios.__getitem__) for choose in (max, min))
    return [
        "Training time is steps times the step time that was measured beforehand, side by side. By the runs' own "
        f"clocks it was {ratios[fast]:.2f} ({fast}) to {ratios[slow]:.2f} ({slow}) times that: other work, or runs "
        "beside each other, slowed some more than others."
    ]


def rates(material: Material) -> tuple[dict[str, dict[float, float]], str]:
    """What each learning rate gave, by optimizer, and of what it is: trials of the first rung, or a sweep's own runs.

    Args:
        material: that was read.

    Returns:
        By optimizer {rate: value}, NaN where a run did not come to an end, and a sentence; ({}, "") where no optimizer
        has three rates. Of several trials of one rate the best counts, of several seeds the mean.
    """
    best = max if material.higher else min
    found: dict[str, dict[float, list[float]]] = {}
    trials = any(arm.trials for arm in material.arms)
    for arm in material.arms:
        for trial in arm.trials:
            rate = learning_rate(trial.overrides)
            if trial.rung == 0 and rate is not None:
                found.setdefault(arm.name, {}).setdefault(rate, []).append(trial.value)
        for run in [] if trials else arm.runs:
            rate = number(run, "optimizer.lr")
            value = run_score(run, material.metric)
            if rate is not None and rate > 0:
                own = found.setdefault(run.choices.get("optimizer", "?"), {})
                own.setdefault(rate, []).append(math.nan if value is None else value)
    several = {name: own for name, own in found.items() if len(own) > 2}
    shown: dict[str, dict[float, float]] = {}
    for name, rated in several.items():
        kept = {rate: [value for value in values if not math.isnan(value)] for rate, values in sorted(rated.items())}
        shown[name] = {
            rate: (best(values) if trials else plain.fmean(values)) if values else math.nan
            for rate, values in kept.items()
        }
    several_keys = any(len(trial.overrides) > 1 for arm in material.arms for trial in arm.trials)
    how = f"trials of the first rung{', other values drawn anew for each' if several_keys else ''}"
    how = how if trials else "runs of this sweep, means over seeds"
    return shown, how if shown else ""


def learning_rate(overrides: Mapping[str, Any]) -> float | None:
    """The rate among a trial's values; None if there is none above 0.

    Args:
        overrides: by key.
    """
    for key, value in overrides.items():
        if key.rpartition(".")[2] == "lr" and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value) if value > 0 else None
    return None


def octaves(found: Mapping[float, float], higher: bool, near: float = NEAR) -> float:
    """See `analysis.statistics.octaves_within`; NaN where no run came to an end.

    Args:
        found: what each rate gave.
        higher: more is better.
        near: what is near the best.
    """
    known = any(math.isfinite(value) for value in found.values())
    return statistics.octaves_within(found, higher, near) if known else math.nan
