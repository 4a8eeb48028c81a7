"""What the console says at the end of a sweep; of one run, the Console logger says it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

BAD = ("failed", "diverged")


def duration(seconds: float, digits: int = 1) -> str:
    """Seconds in words: "5.0 s", "3:20", "2:03:20".

    Args:
        seconds: how many.
        digits: behind the point, below a minute.
    """
    if seconds < 60:
        return f"{seconds:.{digits}f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(*parts: Any) -> None:
    """Print lines and tables to the terminal; lines as they are (no markup, no wrapping of paths)."""
    # A file has no width: enough for the names of a sweep's runs.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def sweep_table(rows: Sequence[tuple[str, Mapping[str, Any]]], monitor: str) -> Table:
    """One line a job of a sweep, with the metrics of its best weights.

    Args:
        rows: a job's name and its summary.
        monitor: the metric that chooses the best weights.
    """
    table = Table(title=f"{len(rows)} runs; metrics of each run's best weights by {monitor}", title_justify="left")
    test = f"test/{monitor.split('/')[-1]}"
    table.add_column("run", overflow="fold")
    table.add_column("status", no_wrap=True)
    for name in (monitor, test, "training s"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, summary in rows:
        best, seconds = summary.get("best") or {}, summary.get("seconds") or {}
        status = str(summary.get("status", "unfinished")).replace("_", " ")
        shown = [_figure(name, best.get(name)) for name in (monitor, test)]
        table.add_row(label, status, *shown, f"{seconds['training']:.1f}" if "training" in seconds else "")
    return table


def outcome(label: str, summary: Mapping[str, Any]) -> str:
    """One line about a run that has ended.

    Args:
        label: the run's name.
        summary: as in ``summary.json``.
    """
    monitor, best, seconds = summary.get("monitor"), summary.get("best") or {}, summary.get("seconds") or {}
    parts = [str(summary.get("status", "unfinished")).replace("_", " ")]
    parts += [f"{monitor} {_figure(monitor, best[monitor])}"] if monitor and monitor in best else []
    parts += [f"{seconds['training']:.1f} s"] if "training" in seconds else []
    return f"{label}: {', '.join(parts)}"


def failure_lines(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """One line for each job that failed: its name and the last line of its error."""
    return [
        f"{label}: {(str(summary.get('error') or '').strip().splitlines() or ['no reason was recorded'])[-1]}"
        for label, summary in rows
        if summary.get("status") in BAD
    ]


def _figure(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{100 * value:.2f} %" if name.endswith("accuracy") else f"{value:.4g}"
