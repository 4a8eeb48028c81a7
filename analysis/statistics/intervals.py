"""Intervals of means, medians and paired differences, and p values of several comparisons at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Interval:
    """A value and how far from it the truth may lie.

    Attributes:
        low: the lower end; -inf where nothing bounds it.
        middle: what was measured.
        high: the upper end; inf where nothing bounds it.
        level: share of such intervals that hold the truth.
        note: a sentence where the ends are not what they seem, else "".
    """

    low: float
    middle: float
    high: float
    level: float = 0.95
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """What one optimizer has above another, over the seeds that both have.

    Attributes:
        interval: of the mean difference.
        p: probability of a difference at least as large, were there none.
        seeds: the common ones, ascending.
    """

    interval: Interval
    p: float
    seeds: tuple[int, ...]


def checked(values: Values, name: str = "values") -> np.ndarray:
    """Finite numbers, ``[n]`` with n above 0.

    Args:
        values: as they were given.
        name: for the sentence.

    Raises:
        ValueError: there is none, or one is NaN or infinite.
    """
    found = np.asarray(values, dtype=float).ravel()
    if not found.size:
        raise ValueError(f"{name}: there is no number")
    if not np.isfinite(found).all():
        bad = found[~np.isfinite(found)]
        raise ValueError(
            f"{name}: {len(bad)} of {len(found)} {'is' if len(bad) == 1 else 'are'} {bad[0]}, which has no mean: "
            "leave out what did not end, and say how many that were"
        )
    return found


def check_level(level: float) -> None:
    """A sentence for a level outside (0, 1).

    Raises:
        ValueError: it is.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be a share in (0, 1), such as 0.95, got {level}")


def check_draws(draws: int) -> None:
    """A sentence for a number of draws below 1.

    Raises:
        ValueError: it is.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")


def t_interval(values: Values, level: float = 0.95) -> Interval:
    """Student's interval of a mean, exact where values are normal.

    Args:
        values: one a seed. A single one is the middle of an interval without ends.
        level: share of such intervals that hold the mean.

    Raises:
        ValueError: no values, one that is not finite, or a level outside (0, 1).
    """
    check_level(level)
    found = checked(values)
    middle = float(found.mean())
    if len(found) == 1:
        return Interval(-math.inf, middle, math.inf, level, "one value says nothing about its spread")
    if (found == found[0]).all():  # their mean may differ from them by rounding
        return _point(float(found[0]), len(found), level)
    half = float(stats.t.ppf((1 + level) / 2, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found)))
    return Interval(middle - half, middle, middle + half, level)


def _point(value: float, count: int, level: float) -> Interval:
    note = f"all {count} values are equal: the interval has no width, and says nothing about the spread of others"
    return Interval(value, value, value, level, note)


def bootstrap_interval(
    values: Values,
    statistic: Callable[..., Any] = np.mean,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The bootstrap's interval (bias-corrected and accelerated, Efron 1987) of any statistic.

    Resampling a few values underrates their spread: of 95 % intervals of the mean of n normal values, about 83 %
    hold it for n = 5, 90 % for n = 10, 93 % for n = 20. For means of fewer than twenty seeds take ``t_interval``.

    Args:
        values: one a seed. A single one is the middle of an interval without ends.
        statistic: of values; one with an argument ``axis`` is computed for many draws at once.
        level: share of such intervals that would hold the truth, were there many values.
        draws: resamples.
        seed: of the resamples.

    Returns:
        An interval with a note where all values are equal, or where BCa is undefined and percentiles stand instead.

    Raises:
        ValueError: no values, one that is not finite, a level outside (0, 1), or no draws.
    """
    check_level(level)
    check_draws(draws)
    found = checked(values)
    middle = float(statistic(found))
    if len(found) == 1:
        return Interval(-math.inf, middle, math.inf, level, "one value says nothing about its spread")
    if (found == found[0]).all():
        return _point(middle, len(found), level)
    result = _resampled(found, statistic, level, draws, seed)
    return _ends(result, found, statistic, middle, level)


def _resampled(found: np.ndarray, statistic: Callable[..., Any], level: float, draws: int, seed: int) -> Any:
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # the note says it
        return stats.bootstrap((found,), statistic, n_resamples=draws, confidence_level=level, rng=seed)


def _ends(result: Any, found: np.ndarray, statistic: Callable[..., Any], middle: float, level: float) -> Interval:
    low, high = (float(end) for end in result.confidence_interval)
    if math.isfinite(low) and math.isfinite(high):
        return Interval(low, middle, high, level)
    again = stats.bootstrap(
        (found,), statistic, n_resamples=0, bootstrap_result=result, confidence_level=level, method="percentile"
    )
    low, high = (float(end) for end in again.confidence_interval)
    return Interval(low, middle, high, level, "BCa is undefined for these values: the ends are the draws' percentiles")


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[tuple[int, ...], np.ndarray]:
    """The seeds that two optimizers have in common, and the differences of the first to the second, ``[seeds]``.

    Raises:
        ValueError: fewer than two in common, or one of their scores is not finite.
    """
    seeds = tuple(sorted(set(a) & set(b)))
    if len(seeds) < 2:
        raise ValueError(
            f"a paired comparison needs two common seeds or more, and {'none' if not seeds else seeds[0]} is common to "
            f"{sorted(a)} and {sorted(b)}: run both with the same seeds"
        )
    first, second = (checked([scores[seed] for seed in seeds], "scores") for scores in (a, b))
    differences = first - second
    if np.ptp(differences) <= 1e-12 * max(np.abs(first).max(), np.abs(second).max()):  # equal but for rounding
        differences = np.full_like(differences, differences[0])
    return seeds, differences


def paired_t(a: Mapping[int, float], b: Mapping[int, float], level: float = 0.95) -> Difference:
    """The paired t test: the mean of ``a - b`` over common seeds, exact where differences are normal.

    Differences that are all equal and not zero have no t; their p is the exact one of a change of signs, ``2^(1 - n)``
    for n seeds, rather than 0: two seeds that agree by chance prove nothing.

    Args:
        a: a score a seed.
        b: of the other.
        level: of the interval.

    Raises:
        ValueError: fewer than two common seeds, a score that is not finite, or a level outside (0, 1).
    """
    seeds, differences = paired(a, b)
    interval = t_interval(differences, level)
    if interval.note:
        return Difference(interval, _p_of_signs(differences), seeds)
    statistic = interval.middle / (differences.std(ddof=1) / math.sqrt(len(seeds)))
    return Difference(interval, float(2 * stats.t.sf(abs(statistic), len(seeds) - 1)), seeds)


def _p_of_signs(differences: np.ndarray) -> float:
    return 1.0 if differences[0] == 0 else 2.0 ** (1 - len(differences))


def paired_bootstrap(
    a: Mapping[int, float], b: Mapping[int, float], level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Difference:
    """The bootstrap (BCa) of the mean of ``a - b`` over common seeds, for differences that are far from normal.

    Its p is the smallest ``1 - level`` whose interval holds no zero, so the two agree; at least ``1 / draws``. With
    fewer than twenty seeds its intervals are too short (``bootstrap_interval``): take ``paired_t``.

    Args:
        a: a score a seed.
        b: of the other.
        level: of the interval.
        draws: resamples.
        seed: of the resamples.

    Raises:
        ValueError: fewer than two common seeds, a score that is not finite, a level outside (0, 1), or no draws.
    """
    check_level(level)
    check_draws(draws)
    seeds, differences = paired(a, b)
    middle = float(differences.mean())
    if (differences == differences[0]).all():
        return Difference(_point(middle, len(seeds), level), _p_of_signs(differences), seeds)
    result = _resampled(differences, np.mean, level, draws, seed)

    def at(level: float) -> Interval:
        again = stats.bootstrap((differences,), np.mean, n_resamples=0, bootstrap_result=result, confidence_level=level)
        return _ends(again, differences, np.mean, middle, level)

    holds, free = 1 / draws, 1.0
    while free - holds > 0.5 / draws:  # an interval grows with its level
        p = (holds + free) / 2
        interval = at(1 - p)
        holds, free = (p, free) if interval.low <= 0 <= interval.high else (holds, p)
    return Difference(_ends(result, differences, np.mean, middle, level), free, seeds)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """P values of several comparisons, adjusted so that the chance of any false find stays below each (Holm 1979).

    Args:
        p: a value a comparison.

    Returns:
        The adjusted ones in the order given, none below its own and none above 1.

    Raises:
        ValueError: there is none, or one is no probability.
    """
    if not p:
        raise ValueError("p: there is no comparison")
    for name, value in p.items():
        if not 0 <= value <= 1:
            raise ValueError(f"p of {name} must be a probability in [0, 1], got {value}")
    names = sorted(p, key=lambda name: p[name])
    factors = np.arange(len(names), 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(factors * [p[name] for name in names]), 1)
    found = dict(zip(names, adjusted.tolist(), strict=True))
    return {name: found[name] for name in p}


def median_time(times: Values, level: float = 0.95) -> Interval:
    """The median time to a target and its interval between two of the times, whatever their distribution.

    Args:
        times: seconds or steps, one a seed; inf where the target was not reached, which is all that is known of it.
        level: share of such intervals that hold the median, at least. For 95 % six times are needed; of fewer, none
            bounds the median, and the ends are 0 and inf.

    Returns:
        Middle and upper end are inf where that many runs did not reach the target.

    Raises:
        ValueError: no times, one that is NaN or below zero, or a level outside (0, 1).
    """
    check_level(level)
    found = checked_times(times)
    middle = float(np.median(found))
    low, high = (float(end) for end in stats.quantile_test(found, q=0, p=0.5).confidence_interval(level))
    interval = Interval(low, middle, high, level)
    if math.isnan(low) or math.isnan(high):
        note = f"{len(found)} times are too few to bound their median at this level"
        interval = replace(interval, low=0.0, high=math.inf, note=note)
    return interval


def checked_times(times: Values, name: str = "times") -> np.ndarray:
    """Times to a target, ``[n]`` with n above 0; inf where it was not reached.

    Args:
        times: as they were given.
        name: for the sentence.

    Raises:
        ValueError: there is none, or one is NaN or below zero.
    """
    found = np.asarray(times, dtype=float).ravel()
    if not found.size:
        raise ValueError(f"{name}: there is no number")
    if np.isnan(found).any() or (found < 0).any():
        raise ValueError(f"{name} must be zero or more, and inf where the target was not reached, got {found.tolist()}")
    return found
