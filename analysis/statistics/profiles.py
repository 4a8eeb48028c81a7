"""Several problems or trials at once: performance profiles, AlgoPerf's score, the expected best of k trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.integrate import trapezoid

from analysis.statistics.intervals import Values, checked, checked_times


def _ratios(times: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    """Times as multiples of the shortest of their problem, ``[problems]`` a name; inf where there is no time."""
    if not times:
        raise ValueError("times: there is no optimizer")
    found = {name: checked_times(given, f"times of {name}") for name, given in times.items()}
    counts = {name: len(given) for name, given in found.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"times must be one a problem, in the same order for all, and there are {told}")
    best = np.min(list(found.values()), axis=0)
    if (best == 0).any():
        raise ValueError("times must be above zero: a target that is reached at once has no ratios")
    best[np.isinf(best)] = 1  # nobody's problem: the ratios stay infinite
    return {name: given / best for name, given in found.items()}


def performance_profile(times: Mapping[str, Sequence[float]], taus: Values) -> dict[str, np.ndarray]:
    """Share of problems that each optimizer solves within tau times the shortest time (Dolan and Moré 2002).

    Args:
        times: of each optimizer, one a problem in the same order; inf where the target was not reached. A problem that
            nobody solves counts for nobody, and stays among those that the share is of.
        taus: ratios, ``[n]``.

    Returns:
        Shares, ``[n]``, a name.

    Raises:
        ValueError: no times or taus, times that are NaN or not above zero, or different numbers of problems.
    """
    ratios, limits = _ratios(times), checked(taus, "taus")
    return {name: (own[:, None] <= limits).mean(0) for name, own in ratios.items()}


def algoperf_score(
    times: Mapping[str, Sequence[float]], max_ratio: float = 4.0, points: int | None = None
) -> dict[str, float]:
    """The benchmark score of AlgoPerf (Dahl et al. 2023): the mean height of the profile from ratio 1 to the largest.

    1 is the fastest on every problem; a problem solved in ``max_ratio`` times the best time, or not at all, adds 0.

    Args:
        times: as for ``performance_profile``.
        max_ratio: above 1.
        points: None integrates exactly. The benchmark's own figures are a trapezoidal rule over 100 points, up to 0.005
            off: 100 reproduces them.

    Raises:
        ValueError: times that have no profile, a ratio of 1 or below, or fewer than two points.
    """
    if not 1 < max_ratio < math.inf:
        raise ValueError(f"max_ratio must be a number above 1, got {max_ratio}")
    if points is None:
        ratios = _ratios(times)
        return {
            name: float((max_ratio - np.minimum(own, max_ratio)).mean() / (max_ratio - 1))
            for name, own in ratios.items()
        }
    if points < 2:
        raise ValueError(f"points must be 2 or more, got {points}")
    taus = np.linspace(1, max_ratio, points)
    profiles = performance_profile(times, taus)
    return {name: float(trapezoid(own, taus) / (max_ratio - 1)) for name, own in profiles.items()}


def expected_best(
    values: Values, k_max: int | None = None, higher: bool = True, worst: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What the best of k trials would be: expectation and standard deviation, for k = 1, 2, ... (Dodge et al. 2019).

    The trials are drawn with replacement from those that were made, so the curve ends below the best one of them and
    is biased downwards near its end (Tang et al. 2020): read it up to about half the number of trials.

    Args:
        values: one a trial, each with hyperparameters drawn at random. NaN, inf and -inf are trials that failed; they
            cost a trial and count as the worst of those that ended.
        k_max: the largest k; None: the number of trials.
        higher: more is better.
        worst: what a failed trial counts as instead, such as the accuracy of guessing; no better than any that ended.

    Returns:
        Expectations and standard deviations, ``[k_max]`` each.

    Raises:
        ValueError: no trials, none that ended and no ``worst``, or a ``k_max`` or ``worst`` that cannot be.
    """
    found = np.array(values, dtype=float).ravel()
    if not found.size:
        raise ValueError("values: there is no trial")
    k_max = len(found) if k_max is None else k_max
    if k_max < 1:
        raise ValueError(f"k_max must be 1 or more, got {k_max}")
    ended = np.isfinite(found)
    if worst is None:
        if not ended.any():
            raise ValueError("values: no trial has ended; worst=... says what a failed one counts as")
        worst = float(found[ended].min() if higher else found[ended].max())
    if not math.isfinite(worst):
        raise ValueError(f"worst must be a finite number, got {worst}: infinity has no expectation")
    found[~ended] = worst
    if (found < worst).any() if higher else (found > worst).any():
        raise ValueError(f"worst must be no better than any trial that ended, got {worst} where one has "
                         f"{found.min() if higher else found.max()}")  # fmt: skip
    ordered = np.sort(found) if higher else np.sort(found)[::-1]  # the best one last
    k = np.arange(1, k_max + 1)[:, None]
    reached = (np.arange(len(found) + 1) / len(found)) ** k  # chance that k trials are all among the i worst
    chances = np.diff(reached, axis=1)  # [k_max, n], of each being the best
    mean = chances @ ordered
    variance = (chances * (ordered - mean[:, None]) ** 2).sum(1)
    return mean, np.sqrt(variance)
