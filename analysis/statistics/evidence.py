"""Who is likely best, whether a target is met beyond chance, how wide good values are, and what was unequal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from analysis.sensitivity import NEAR, Extent, near_best
from analysis.statistics.intervals import Values, check_draws, checked

#: Shares by which budgets may differ before a comparison says so.
UNEQUAL = 0.05


def probability_best(
    scores: Mapping[str, Mapping[int, float]], higher: bool, draws: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """How likely each optimizer has the best mean, given its runs over the seeds that all have.

    The model: scores of a seed are a draw of a normal distribution over all optimizers, with any correlations and any
    spread of each. The means then have a multivariate t posterior with ``seeds - 1`` degrees of freedom around what
    was measured, scaled by the covariance of the scores over seeds (the prior of Geisser and Cornfield 1963). Of two
    optimizers, one's probability is 1 less the p of the one-sided paired t test. A bootstrap of three seeds would be
    certain of whoever is ahead on all three; this is not, unless one is ahead by the very same on every seed.

    Its prior is flat: where optimizers truly differ by far less than runs scatter, the leader of many is right less
    often than it says (twelve that differ by 0.3 of a run's standard deviation, five seeds: 29 % where it says 49 %);
    of two it is right as often as it says. "Likely best" is no test: that is ``paired_t`` with ``holm``.

    Args:
        scores: of each optimizer, one a seed.
        higher: more is better.
        draws: of the posterior; the result is good to ``0.5 / sqrt(draws)``.
        seed: of the draws.

    Returns:
        Probabilities in the order given; their sum is 1, and optimizers whose scores are equal share theirs.

    Raises:
        ValueError: no optimizer, fewer than two common seeds, a score that is not finite, or no draws.
    """
    check_draws(draws)
    if not scores:
        raise ValueError("scores: there is no optimizer")
    seeds = sorted(set.intersection(*(set(own) for own in scores.values())))
    if len(seeds) < 2:
        raise ValueError(
            f"who is best needs two seeds or more that all have, and {seeds[0] if seeds else 'none'} is common to "
            f"{', '.join(scores)}: run all with the same seeds"
        )
    table = np.stack([checked([own[s] for s in seeds], f"scores of {name}") for name, own in scores.items()], axis=1)
    table = table if higher else -table
    n = len(seeds)
    mean = table.mean(0)
    generator = np.random.default_rng(seed)
    normal = generator.standard_normal((draws, n))
    means = mean + normal @ (table - mean) / np.sqrt(n * generator.chisquare(n - 1, (draws, 1)))  # [draws, optimizers]
    slack = 1e-12 * np.abs(table).max()  # equal columns may differ by rounding
    best = means >= means.max(1, keepdims=True) - slack
    shares = (best / best.sum(1, keepdims=True)).mean(0)
    return dict(zip(scores, shares.tolist(), strict=True))


def octaves_within(values: Mapping[float, float], higher: bool, near: float = NEAR) -> float:
    """In how many factors of two around the best one a value, say the learning rate, is near the best.

    Args:
        values: what each value of the grid gave; NaN or infinite where a run did not come to an end.
        higher: more is better.
        near: how much worse than the best still counts; see ``analysis.sensitivity.near_best``.

    Raises:
        ValueError: nothing came to an end, or the grid has a value that is not above zero.
    """
    grid = sorted(values)
    if any(not value > 0 for value in grid):
        raise ValueError(f"a grid in octaves has values above zero alone, got {grid}")
    low, best, high = near_best([values[x] if math.isfinite(values[x]) else None for x in grid], higher, near)
    return Extent(grid[low], grid[best], grid[high], (low == 0, high == len(grid) - 1)).octaves


@dataclass(frozen=True)
class Acceptance:
    """Whether runs meet a target by more than chance.

    Attributes:
        accepted: whether the evidence is at least the margin.
        mean: of the runs.
        evidence: ``gain * sqrt(runs)``, where the gain is how much better than the target the mean is.
        margin: what is asked for.
        runs: how many there are.
        needed: how many with this mean would do; None where the mean is no better than the target.
    """

    accepted: bool
    mean: float
    evidence: float
    margin: float
    runs: int
    needed: int | None


def accepted(values: Values, target: float, margin: float, higher: bool) -> Acceptance:
    """The rule of the NanoGPT speedrun's track of optimizers: ``(target - mean) * sqrt(n) >= margin`` for losses.

    With a margin of z standard deviations of a run, chance alone passes a method that just misses with the probability
    of a normal deviate beyond z: there 0.004 for a standard deviation of 0.0013, 3.1 of them, 1 in 1000.

    Args:
        values: the last ones, one a run; all that were made.
        target: to be met.
        margin: 0 or more, in units of the values.
        higher: more is better; otherwise less is.

    Raises:
        ValueError: no values, one that is not finite, or a margin below zero.
    """
    found = checked(values)
    checked([target], "target")
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin must be zero or more, got {margin}")
    mean = float(found.mean())
    gain = mean - target if higher else target - mean
    evidence = gain * math.sqrt(len(found))
    needed = max(1, math.ceil((margin / gain) ** 2 * (1 - 1e-12))) if gain > 0 else None
    return Acceptance(evidence >= margin * (1 - 1e-12), mean, evidence, margin, len(found), needed)


@dataclass(frozen=True)
class Arm:
    """What a comparison spent on one of its optimizers.

    Attributes:
        name: the optimizer.
        seeds: of the runs that are compared.
        training_seconds: of one of these runs, their mean.
        tuning_seconds: of all trials together.
        trials: how many sets of values were tried.
    """

    name: str
    seeds: tuple[int, ...]
    training_seconds: float
    tuning_seconds: float
    trials: int


def unequal(arms: Iterable[Arm]) -> list[str]:
    """A sentence for each thing of which one optimizer got over 5 % more than another; none where all is fair.

    Args:
        arms: those that are compared.

    Raises:
        ValueError: a number is negative, NaN or infinite.
    """
    arms = list(arms)
    quantities: dict[str, tuple[Callable[[Arm], float], Callable[[float], str]]] = {
        "training": (lambda arm: arm.training_seconds, lambda x: f"{x:.3g} s a run"),
        "numbers of seeds": (lambda arm: len(arm.seeds), lambda x: f"{x:g}"),
        "tuning": (lambda arm: arm.tuning_seconds, lambda x: f"{x:.3g} s"),
        "numbers of trials": (lambda arm: arm.trials, lambda x: f"{x:g}"),
    }
    said = []
    for quantity, (of, written) in quantities.items():
        for arm in arms:
            if not 0 <= of(arm) < math.inf:
                raise ValueError(f"{quantity} of {arm.name} must be zero or more, got {of(arm)}")
        least, most = min(arms, key=of, default=None), max(arms, key=of, default=None)
        if least and most and of(most) > (1 + UNEQUAL) * of(least) * (1 + 1e-12):
            more = f" ({100 * (of(most) / of(least) - 1):.0f} % more)" if of(least) else ""
            verb = "is" if quantity in ("training", "tuning") else "are"
            said.append(
                f"{quantity} {verb} unequal: {most.name} had {written(of(most))}, "
                f"{least.name} {written(of(least))}{more}"
            )
    if len({len(arm.seeds) for arm in arms}) == 1 and len({frozenset(arm.seeds) for arm in arms}) > 1:
        told = ", ".join(f"{arm.name} has {' '.join(map(str, arm.seeds))}" for arm in arms)
        said.append(f"seeds differ: {told}; paired comparisons take the common ones alone")
    return said
