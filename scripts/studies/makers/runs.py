"""Of runs that were kept: their table, their curves, and grids over learning rate and damping."""

from __future__ import annotations

import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.figure import Figure

from analysis import compare, sensitivity


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
    """A comparison by ``METRIC: COLUMN, COLUMN``, and the columns, of which ``epoch 5`` is one."""
    metric, _, columns = words.partition(": ")
    with unpacked(path) as runs:
        groups, remarks = compare.group_runs(runs)
        epochs = [int(epoch) for epoch in re.findall(r"\bepoch (\d+)", columns)]
        yield compare.Comparison(groups, metric, epochs=epochs, remarks=remarks), columns.split(", ")


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
