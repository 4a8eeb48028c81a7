"""Where trials lie in the unit cube: evenly by a scrambled sequence, or where earlier results lead."""

from __future__ import annotations

import importlib.util
import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from training.errors import UserError

#: Coordinates that are drawn, whatever a space needs of them: so every optimizer's first one is the same sequence.
DIMENSIONS = 8
SAMPLERS = ("halton", "sobol", "tpe")
#: How many trials TPE is asked for at a time, whatever the number of workers: the choice must not depend on that.
BATCH = 4


class Points(Protocol):
    """Gives the points of an arm's trials, by their numbers from 1; 0 is the optimizer as it is configured."""

    def ready(self, told: Mapping[int, float]) -> int:
        """How many points, from the first on, these results allow to be given."""

    def point(self, index: int, told: Mapping[int, float]) -> list[float]:
        """A point, a function of its number and of what `ready` needed alone.

        Args:
            index: of the trial, from 1.
            told: how bad each trial was that has ended, 0 included, by number.
        """


class Spread:
    """Scrambled points of low discrepancy, the same for every optimizer.

    Args:
        kind: halton | sobol.
        seed: of the scrambling.
    """

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.seed = kind, seed
        self._drawn: list[list[float]] = []

    def ready(self, told: Mapping[int, float]) -> int:
        """Any number: nothing is learned of results."""
        return 1 << 20

    def point(self, index: int, told: Mapping[int, float]) -> list[float]:
        """See `Points`."""
        if index > len(self._drawn):
            from scipy.stats import qmc  # a second that a command which is wrong does not wait for

            made = {"halton": qmc.Halton, "sobol": qmc.Sobol}[self.kind](DIMENSIONS, scramble=True, rng=self.seed)
            power = max(5, math.ceil(math.log2(index)))  # of both the first points stay what they are
            drawn = made.random_base2(power) if self.kind == "sobol" else made.random(1 << power)
            self._drawn = drawn.tolist()
        return self._drawn[index - 1]


class Tpe:
    """Optuna's tree-structured Parzen estimator, asked for `BATCH` points at a time and told what became of them.

    What it says is made again from the results alone, which this program records: its journal is for those who look.

    Args:
        dimensions: of the space.
        first: the point of trial 0.
        seed: of the sampler.
        journal: file for Optuna's own tools; None: none is written.

    Raises:
        UserError: Optuna is not installed.
    """

    def __init__(self, dimensions: int, first: list[float], seed: int, journal: Path | None = None) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise UserError("sampler=tpe needs a package that is not installed: pip install optuna, or sampler=halton")
        self.dimensions, self.first, self.seed, self.journal = dimensions, first, seed, journal
        self._batches: list[list[list[float]]] = []

    def ready(self, told: Mapping[int, float]) -> int:
        """Up to the end of the first batch that is not told."""
        batch = next(index for index in range(len(told) + 1) if not self._covered(index).issubset(told))
        return (batch + 1) * BATCH

    def point(self, index: int, told: Mapping[int, float]) -> list[float]:
        """See `Points`."""
        batch = (index - 1) // BATCH
        if batch >= len(self._batches):
            self._batches = self._replay(batch + 1, told)
        return self._batches[batch][(index - 1) % BATCH]

    @staticmethod
    def _covered(batch: int) -> set[int]:
        """The trials that are told when a batch of points has ended; trial 0 with the first."""
        return {0, *range(batch * BATCH + 1, (batch + 1) * BATCH + 1)}

    def _replay(self, count: int, told: Mapping[int, float]) -> list[list[list[float]]]:
        """The first batches: asked and told from the beginning."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(logging.WARNING)
        storage: Any = None
        if self.journal is not None:
            self.journal.unlink(missing_ok=True)
            storage = JournalStorage(JournalFileBackend(str(self.journal)))
        with warnings.catch_warnings():  # trials of a batch are to differ, by what Optuna calls experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=self.seed, n_startup_trials=BATCH + 1, constant_liar=True)
        study = optuna.create_study(storage=storage, sampler=sampler, study_name="tuning", direction="minimize")
        names = [f"u{number}" for number in range(self.dimensions)]
        study.enqueue_trial(dict(zip(names, self.first, strict=True)))
        cube: Any = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in names}
        asked, batches = [study.ask(cube)], []
        for batch in range(count):
            asked += [study.ask(cube) for _ in range(BATCH)]
            batches.append([[min(trial.params[name], 1 - 1e-9) for name in names] for trial in asked[-BATCH:]])
            for number in sorted(self._covered(batch) if batch < count - 1 else ()):
                if number or batch == 0:
                    study.tell(asked[number], told[number])
        return batches


def points(sampler: str, dimensions: int, first: list[float], seed: int, journal: Path | None = None) -> Points:
    """The points of an arm.

    Args:
        sampler: halton | sobol | tpe.
        dimensions: of its space.
        first: the point of trial 0.
        seed: one seed gives the same points.
        journal: where TPE leaves a record for Optuna's own tools.

    Raises:
        UserError: there is no such sampler, or it is not installed; or the space has more than `DIMENSIONS` keys.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler}")
    if dimensions > DIMENSIONS:
        raise UserError(f"a search space may have {DIMENSIONS} keys, got {dimensions}: search those that matter most")
    return Tpe(dimensions, first, seed, journal) if sampler == "tpe" else Spread(sampler, seed)
