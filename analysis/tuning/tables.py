"""What a tuning says: its plan, what became of it, what to do about a value at the edge, and presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from analysis import pages
from analysis.tuning.rungs import Rungs
from analysis.tuning.search import Arm, Choice
from analysis.tuning.space import SPACES, written


def plan_lines(arms: Mapping[str, Arm], rungs: Rungs, unit: str) -> list[str]:
    """The plan in words, a line a rung and a line an arm.

    Args:
        arms: by name.
        rungs: how the budget of each is divided.
        unit: of rungs' lengths: s | steps | epochs.
    """
    lines = [f"an arm has {_amount(rungs.total, unit)}:"]
    for number, (count, length) in enumerate(zip(rungs.counts, rungs.lengths, strict=True), 1):
        last = number == len(rungs.counts)
        note = ", a final run each" if last and rungs.full else ", shorter than a final run" if last else ""
        lines.append(f"  rung {number}: {count} of {_amount(length, unit)}{note}")
    for name, arm in arms.items():
        pace = f", {arm.pace:.3g} s a step" if unit == "s" else ""
        lines.append(f"  {name}{pace}: {', '.join(key.name.lstrip('+') for key in arm.space.keys)}")
    return lines


def markdown(choices: Mapping[str, Choice], metric: str, unit: str) -> str:
    """A table with a line an arm.

    Args:
        choices: by arm.
        metric: that decided.
        unit: of what trials were charged.
    """
    head = ["arm", "chosen", metric, "val/loss", "trials", "lost", f"charged ({unit})", "at the edge"]
    rows = [[name, *_cells(choice)] for name, choice in choices.items()]
    return pages.table(head, rows, left=(0, 1, len(head) - 1))


def _cells(choice: Choice) -> list[str]:
    values = " ".join(f"{key.lstrip('+')}={written(value)}" for key, value in choice.values.items())
    if choice.value is None:
        return ["**nothing came to an end**", "", "", str(choice.trials), str(choice.lost), f"{choice.charged:.4g}", ""]
    return [
        values if choice.overrides else f"as configured: {values}",
        f"{choice.value:.4g}",
        "" if choice.val_loss is None else f"{choice.val_loss:.4g}",
        str(choice.trials),
        str(choice.lost),
        f"{choice.charged:.4g}",
        ", ".join(choice.at_edge),
    ]  # fmt: skip


def advice(arms: Mapping[str, Arm], choices: Mapping[str, Choice]) -> list[str]:
    """A sentence for each arm with a value at the edge of what was tried, and for each without a result."""
    lines = []
    for name, choice in choices.items():
        space = arms[name].space
        if choice.value is None:
            why = f" ({choice.error})" if choice.error else ""
            lines.append(f"{name}: none of {choice.trials} trials came to an end{why}; it stays as it is configured.")
        elif choice.at_edge:
            ends = ", ".join(f"{key} (the {'largest' if end == 'high' else 'least'} of all tried)" for key, end in
                             (text.rsplit(" ", 1) for text in choice.at_edge))  # fmt: skip
            file = f"configs/hparams_search/{space.file.name}" if space.file.parent == SPACES else str(space.file)
            lines.append(
                f"{name}: best at the edge in {ends}: more trials tell, or a wider range in {file} (or in a file of "
                "that name in a folder of your own, spaces=FOLDER)."
            )
    return lines


def preset(arm: Arm, choice: Choice, about: str) -> str:
    """The text of a preset, `preset/STUDY/OPTIMIZER.yaml`, with the chosen values.

    Args:
        arm: that was tuned.
        choice: what it came to.
        about: a line on how.
    """
    lines = [f"{name.lstrip('+')}: {_yaml(value)}" for name, value in choice.values.items()]
    return "\n".join(["# @package optimizer", f"# {about}", *lines]) + "\n"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _amount(value: float, unit: str) -> str:
    return f"{value:.4g} {unit}"
