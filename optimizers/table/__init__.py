"""What there is to choose from: every optimizer with what it needs, keeps and runs on, measured where it can be.

What a class can be asked for (its signature, its coverage of layers, its blocks) is asked, what it does is tried out on
small nets, and only names and papers are written down, in ``CATALOGUE``. Optimizers whose class is not there (a package
is not installed) have no row.
"""

from .catalogue import CATALOGUE, Entry, Target, present
from .measured import Row, measure, needs, rows
from .printed import TITLES, limits, markdown, text

__all__ = [
    "CATALOGUE",
    "TITLES",
    "Entry",
    "Row",
    "Target",
    "limits",
    "markdown",
    "measure",
    "needs",
    "present",
    "rows",
    "text",
]
