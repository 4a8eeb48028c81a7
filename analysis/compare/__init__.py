"""Several runs side by side: one picture and one table, with a line for all runs that differ by their seed alone.

Definitions, the same for every run:

- A training metric has one value an epoch, the mean over its steps (`metrics.jsonl` holds means over a few steps each),
  which stands at the epoch's end. A validation metric has one value an evaluation.
- A target is reached at the first of these values that is at least as good; what counts are the training seconds until
  then, or infinity. Over seeds this is a median, everything else a mean and a sample standard deviation.
"""

from analysis.compare.figures import plot
from analysis.compare.groups import Group, choice, group_runs, match
from analysis.compare.measures import Comparison, Reference, Row, Spread, Target, higher_is_better, rows
from analysis.compare.runs import Curve, LoadedRun, find_runs, read_run
from analysis.compare.tables import Sheet, notes, sheets, to_csv, to_markdown, to_table

__all__ = [
    "Comparison",
    "Curve",
    "Group",
    "LoadedRun",
    "Reference",
    "Row",
    "Sheet",
    "Spread",
    "Target",
    "choice",
    "find_runs",
    "group_runs",
    "higher_is_better",
    "match",
    "notes",
    "plot",
    "read_run",
    "rows",
    "sheets",
    "to_csv",
    "to_markdown",
    "to_table",
]
