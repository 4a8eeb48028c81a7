"""What the console says at the end of a sweep; of one run, the Console logger says it."""

from __future__ import annotations

import math
import os
import re
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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


def rest(began: float, done: int, due: int) -> str:
    """What is left of a sweep, from how long its runs have taken so far: ", about 12:30 left"; "" below a minute.

    Args:
        began: when the first of them did, by ``time.monotonic``.
        done: how many have ended.
        due: how many there are.
    """
    seconds = (time.monotonic() - began) * (due - done) / done
    return f", about {duration(seconds)} left" if seconds >= 60 else ""


class Terminal(Console):
    """A console whose reader may go, `head` or a lost connection: what is said after that is lost, and not the run."""

    def on_broken_pipe(self) -> None:
        """Say no more where nobody listens; standard error, if it is another place, hears of it."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        with suppress(OSError):
            sys.stderr.write("Nobody reads what is printed any more: the run goes on, and train.log has the rest.\n")


def say(*parts: Any) -> None:
    """Print lines and tables to the terminal; lines as they are (no markup, no wrapping of paths)."""
    # A file has no width: enough for the names of a sweep's runs.
    console = Terminal(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


_brief: list[bool] = []


@contextmanager
def in_brief() -> Iterator[None]:
    """Within it, runs are told of in a line each, by whoever has them run."""
    _brief.append(True)
    try:
        yield
    finally:
        _brief.pop()


def brief() -> bool:
    """Whether it is so."""
    return bool(_brief)


def sweep_table(rows: Sequence[tuple[str, Mapping[str, Any]]], monitor: str) -> Table:
    """What became of the jobs of a sweep, by the metrics of their best weights, the best first.

    Jobs that differ in their seed alone share a line: mean ± standard deviation over seeds.

    Args:
        rows: a job's name and its summary.
        monitor: the metric that chooses the best weights.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for label, summary in rows:
        groups.setdefault(re.sub(r"(^|_)seed-\d+", "", label).strip("_") or "all", []).append(summary)
    if len(groups) == len(rows):
        groups = {label: [summary] for label, summary in rows}
    several = any(len(found) > 1 for found in groups.values())
    title = f"{len(rows)} runs, best weights by {monitor}" + (", mean ± std over seeds" if several else "")
    table = Table(title=title, title_justify="left")
    test = f"test/{monitor.split('/')[-1]}"
    table.add_column("run", overflow="fold")
    table.add_column("status")
    for name in (monitor, test, "training s"):
        table.add_column(name, justify="right", no_wrap=True)
    sign = -1 if monitor.endswith("accuracy") else 1

    def rank(found: Sequence[Mapping[str, Any]]) -> float:
        values = _values(found, monitor)
        return sign * statistics.fmean(values) if values else math.inf

    ranked = sorted(groups.items(), key=lambda item: rank(item[1]))
    for place, (label, found) in enumerate(ranked):
        wins = place == 0 and len(ranked) > 1 and rank(found) < math.inf
        cells = [_spread(name, _values(found, name)) for name in (monitor, test)]
        seconds = [(one.get("seconds") or {}).get("training") for one in found]
        took = [value for value in seconds if value is not None]
        table.add_row(
            label, _statuses(found), f"* {cells[0]}" if wins else cells[0], cells[1],
            f"{statistics.fmean(took):.1f}" if took else "",
        )  # fmt: skip
    if len(ranked) > 1 and rank(ranked[0][1]) < math.inf:
        table.caption, table.caption_justify = "* the best", "left"
    return table


def _values(found: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    values = [(summary.get("best") or {}).get(name) for summary in found]
    return [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]


def _statuses(found: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(str(summary.get("status", "unfinished")).replace("_", " ") for summary in found)
    return ", ".join(status if len(found) == 1 else f"{count} {status}" for status, count in counts.items())


def _spread(name: str, values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = _figure(name, statistics.fmean(values))
    if len(values) == 1:
        return mean
    width = statistics.stdev(values)
    return f"{mean.removesuffix(' %')} ± {_figure(name, width) if '%' in mean else f'{width:.2g}'}"


def outcome(place: str, label: str, summary: Mapping[str, Any], width: int | None = None) -> str:
    """One line about a run of a sweep that has ended. Where it does not fit, the table at the end has the rest.

    Args:
        place: the how-manieth it is.
        label: the run's name.
        summary: as in ``summary.json``.
        width: of the line; None: the terminal's, and of a file any.
    """
    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    monitor, best, seconds = summary.get("monitor"), summary.get("best") or {}, summary.get("seconds") or {}
    parts = [str(summary.get("status", "unfinished")).replace("_", " ")]
    shown = {monitor: monitor, f"test/{monitor.split('/')[-1]}": "test"} if monitor else {}
    parts += [f"{short} {_figure(name, best[name])}" for name, short in shown.items() if name in best]
    parts += [f"{seconds['training']:.1f} s"] if "training" in seconds else []
    lines = [f"{place}  {label}: {', '.join(parts[:count])}" for count in range(len(parts), 0, -1)]
    return next((line for line in lines if len(line) <= width), lines[-1])


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
