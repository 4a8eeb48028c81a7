"""Which optimizer is better on a problem: intervals, paired differences, who is likely best, times to a target.

Definitions, the same wherever the numbers stand:

- Two optimizers are compared over the seeds that both have: a seed is the same initial weights and the same batches,
  so differences vary less than scores do.
- A run that did not reach a target has the time infinity; a score that is no finite number is refused, not averaged.
- With few seeds the t interval is the one to show: it keeps its level where runs scatter about normally, and the
  bootstrap's does not (of 95 % intervals of five normal values, BCa's cover 83 to 84 %).
"""

from analysis.statistics.evidence import Acceptance, Arm, accepted, octaves_within, probability_best, unequal
from analysis.statistics.intervals import (
    Difference,
    Interval,
    bootstrap_interval,
    holm,
    median_time,
    paired_bootstrap,
    paired_t,
    t_interval,
)
from analysis.statistics.profiles import algoperf_score, expected_best, performance_profile

__all__ = [
    "Acceptance",
    "Arm",
    "Difference",
    "Interval",
    "accepted",
    "algoperf_score",
    "bootstrap_interval",
    "expected_best",
    "holm",
    "median_time",
    "octaves_within",
    "paired_bootstrap",
    "paired_t",
    "performance_profile",
    "probability_best",
    "t_interval",
    "unequal",
]
