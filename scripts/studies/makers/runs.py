"""Of runs that were kept: their table, their curves, and grids over learning rate and damping."""

from __future__ import annotations

import json
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.figure import Figure

from analysis import compare, sensitivity
from training.errors import UserError


@contextmanager
def unpacked(path: Path) -> Iterator[list[compare.LoadedRun]]:
    """The runs of an archive, while they are needed.

    Args:
        path: of the archive.

    Yields:
        All of them.
    """
    with tempfile.TemporaryDirectory() as place, tarfile.open(path) as archive:
        archive.extractall(place, filter="data")
        yield [compare.read_run(folder) for folder in compare.find_runs([place])]


def _grids(path: Path, metric: str) -> tuple[list[sensitivity.Grid], str]:
    """Grids over the usual two keys."""
    with unpacked(path) as runs:
        return sensitivity.grids(runs, *sensitivity.KEYS, metric), metric


def _heat_maps(path: Path, metric: str) -> Figure:
    found, _ = _grids(path, metric)
    share = f"{100 * sensitivity.NEAR:g} {'points' if found[0].higher else '%'} of the best"
    return sensitivity.plot(found, metric, title=f"framed is what is within {share}")


@contextmanager
def _compared(path: Path, words: str) -> Iterator[tuple[compare.Comparison, list[str]]]:
    """A comparison by ``METRIC: COLUMN, COLUMN``, and the columns, of which ``epoch 5`` is one.

    ``METRIC to LABEL until VALUE: ...`` is to this group, and takes the time until this value. Published curves by
    group, where there are some, lie beside the archive, NAME_published.json.

    Yields:
        Both.

    Raises:
        UserError: the metric is said otherwise.
    """
    said, _, columns = words.partition(": ")
    asked = re.fullmatch(r"(\S+)(?: to (.+?))?(?: until (\S+))?", said)
    if not asked:
        raise UserError(f"runs: a metric, then perhaps 'to LABEL' and 'until VALUE', not {said!r}")
    metric, unit, until = asked.groups()
    published = path.with_name(path.name.replace(".tar.xz", "_published.json"))
    curves = json.loads(published.read_text(encoding="utf-8")) if published.exists() else {}
    with unpacked(path) as runs:
        groups, remarks = compare.group_runs(runs)
        yield compare.Comparison(
            groups,
            metric,
            target=compare.Target(metric, float(until)) if until else None,
            epochs=[int(epoch) for epoch in re.findall(r"\bepoch (\d+)", columns)],
            baseline=compare.match(groups, unit, "runs") if unit else None,
            references={key: compare.Reference("curves", it) for key, it in curves.items()},
            remarks=remarks,
        ), columns.split(", ")


def _runs(path: Path, words: str) -> str:
    with _compared(path, words) as (comparison, columns):
        return compare.to_table(comparison, columns)


def _curves(path: Path, words: str) -> Figure:
    with _compared(path, words) as (comparison, _):
        return compare.plot(comparison)


TABLES: dict[str, Callable[[Path, str], str]] = {
    "runs": _runs,
    "sensitivity": lambda path, words: sensitivity.to_markdown(*_grids(path, words)),
}
PICTURES: dict[str, Callable[[Path, str], Figure]] = {"runs": _curves, "sensitivity": _heat_maps}
