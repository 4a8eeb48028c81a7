"""The tuning of optimizers, fair by construction: equal seconds an arm, each trial with a schedule of its own.

An arm (an optimizer with its search space) is tuned by successive halving: many short trials, of which the better ones
are trained again, anew and for longer, until the last ones are as long as a final run. What decides is the validation
set. Which trials are run and what is chosen are functions of the trials that have ended, which are in a file: whenever
a tuning is cut off, it goes on to the same choice.
"""

from analysis.tuning.driver import Plan, Run, tune
from analysis.tuning.rungs import Rungs
from analysis.tuning.search import Arm, Choice, Search
from analysis.tuning.space import SPACES, Space
from analysis.tuning.tables import advice, markdown, plan_lines, preset
from analysis.tuning.trials import Book, Outcome, Trial

__all__ = [
    "SPACES",
    "Arm",
    "Book",
    "Choice",
    "Outcome",
    "Plan",
    "Run",
    "Rungs",
    "Search",
    "Space",
    "Trial",
    "advice",
    "markdown",
    "plan_lines",
    "preset",
    "tune",
]
