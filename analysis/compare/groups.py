"""Runs that differ by their seed alone, and what sets one group apart from the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from analysis.compare.runs import Curve, LoadedRun
from training.runs.record import BUDGETS


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
            chosen = choice(run, section)
            if chosen and any(_part(one, section) != _part(mine, section) for one in settings):
                same = [choice(other, section) == chosen for other in runs]
                peers = [one for one, alike in zip(settings, same, strict=True) if alike]
                parts += [] if all(same) else [f"{section}={chosen}"]
            differing = [key for key in inside if len({one.get(key) for one in peers}) > 1 and key in mine]
            parts += [f"{key}={mine[key]}" for key in differing if not (_is_budget(key) and mine[key] == "null")]
        labels.append(" ".join(parts) or f"optimizer={run.choices.get('optimizer', '?')}")
    return [label if labels.count(label) == 1 else f"{label} ({i + 1})" for i, label in enumerate(labels)]


def choice(run: LoadedRun, section: str) -> str | None:
    """The file that a section came from; a player's optimizer is chosen as ``optimizer@generator``.

    Args:
        run: whose configuration it is.
        section: of it, such as ``model``.
    """
    return run.choices.get(section) or run.choices.get(f"optimizer@{section}")


def _part(settings: Mapping[str, str], section: str) -> dict[str, str]:
    return {key: value for key, value in settings.items() if key.partition(".")[0] == section}


def _is_budget(key: str) -> bool:
    return key in [f"trainer.{name}" for name in BUDGETS]
