"""Fewest steps to a target: which runs it takes to find them, and what those that there are say.

Nothing runs here. A method's rate is chosen by runs of one length with one seed, then the fewest steps by bisection
over a ladder, with other seeds. What is to be run next follows from what has been run, so that a search that was cut
off goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from analysis.statistics import Acceptance, accepted
from training.errors import UserError

#: Whose runs say what is asked of all.
REFERENCE = "adamw"
#: Between two rates that are tried, and how many powers of it to either side of the default at most.
FACTOR, WIDEST = 4.0, 3
#: Steps of the runs that rates are chosen by, and that the reference is to need.
SHORT = 200
#: What may be the fewest steps.
STEPS = (50, 75, 100, 150, 200, 250, 300, 400)
#: Seeds: that rates are chosen with, that steps are judged with, that the target and the margin come of.
TUNING, SEEDS, SPREAD = 0, (1, 2, 3), tuple(range(10, 18))
#: Standard deviations of a run that make the margin: chance alone passes what just misses 1 time in 1000.
DEVIATIONS = 3.1
#: Margins by which a first seed that is above the target speaks for all three.
CLEAR = 1.0


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        optimizer: its name in the table.
        power: of ``FACTOR``, which the default rate is times.
        steps: that the schedule spans.
        seed: of everything random.
    """

    optimizer: str
    power: int
    steps: int
    seed: int

    def __str__(self) -> str:
        """In a line of progress."""
        rate = "" if self.power == 0 else f", rate x {FACTOR**self.power:g}"
        return f"{self.optimizer}, {self.steps} steps, seed {self.seed}{rate}"


@dataclass
class Line:
    """What came of a job: a line of the results.

    Attributes:
        optimizer: the job's.
        power: the job's.
        steps: the job's.
        seed: the job's.
        lr: the rate.
        rest: rate of what the optimizer leaves to Adam; None: it leaves nothing.
        problem: what the configuration without the optimizer is known by.
        config: what the optimizer's values but for the rates are known by.
        status: finished | diverged | broken off | failed.
        value: last loss on the validation set, per token; None unless finished.
        cpu: seconds of the processor a step, of training alone.
        forward: forward passes a step, in whole batches.
        backward: backward passes a step, in whole batches.
        wall: seconds of everything.
        error: why it did not finish.
        commit: of the code; with a + where files differed from it.
    """

    optimizer: str
    power: int
    steps: int
    seed: int
    lr: float
    rest: float | None
    problem: str
    config: str
    status: str
    value: float | None = None
    cpu: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    wall: float = 0.0
    error: str | None = None
    commit: str | None = None

    @property
    def job(self) -> Job:
        """What was to be run."""
        return Job(self.optimizer, self.power, self.steps, self.seed)


@dataclass(frozen=True)
class Goal:
    """What is asked of all, and the reference's runs that it comes of.

    Attributes:
        target: loss that a mean is to be below.
        margin: by so much over the root of the number of runs.
        mean: of the reference's runs of ``SHORT`` steps.
        deviation: of one of them.
    """

    target: float
    margin: float
    mean: float
    deviation: float


@dataclass(frozen=True)
class Found:
    """What is known of a method.

    Attributes:
        steps: the fewest that meet the goal; None: not even the most do.
        verdict: of the runs at these steps, or at the most; None: one of them did not come to an end.
        runs: these.
    """

    steps: int | None
    verdict: Acceptance | None
    runs: tuple[Line, ...]


class Book:
    """Runs that there are.

    Args:
        lines: in the order of the file. Those count that are of one problem, and of one optimizer's values.
        problem: it; None: that of the last run of the reference.
        configs: the values, by optimizer; None: those of each one's last run.
    """

    def __init__(
        self, lines: Iterable[Line], problem: str | None = None, configs: dict[str, str] | None = None
    ) -> None:
        lines = list(lines)
        if problem is None:
            problem = next((line.problem for line in reversed(lines) if line.optimizer == REFERENCE), None)
        lines = [line for line in lines if line.problem == problem]
        if configs is None:
            configs = {line.optimizer: line.config for line in lines}
        self._lines = {
            line.job: line
            for line in lines
            if line.config == configs.get(line.optimizer) and line.status != "failed" and line.rest is None
        }
        self._failed = {line.job: line for line in lines if line.status == "failed"}
        if self.rest is not None:
            self._lines |= {
                line.job: line
                for line in lines
                if line.rest == self.rest and line.config == configs.get(line.optimizer) and line.status != "failed"
            }

    def __len__(self) -> int:
        """How many runs count."""
        return len(self._lines)

    def __contains__(self, job: object) -> bool:
        """Whether a run is there."""
        return job in self._lines

    def rates(self, name: str) -> list[Line]:
        """The runs that an optimizer's rate is chosen by, by rate."""
        lines = [it for it in self._lines.values() if (it.optimizer, it.steps, it.seed) == (name, SHORT, TUNING)]
        return sorted(lines, key=lambda line: line.power)

    def power(self, name: str) -> int | None:
        """Which rate an optimizer is at its best with; None: not all are tried yet, or none trains."""
        missing, best = self._rates(name)
        return None if missing else best

    @property
    def rest(self) -> float | None:
        """The rate of what others leave to Adam, the reference's best; None: it is not known yet."""
        power = self.power(REFERENCE)
        return None if power is None else self._lines[Job(REFERENCE, power, SHORT, TUNING)].lr

    def goal(self) -> Goal | None:
        """What is asked of all; None: the reference's runs are missing."""
        power = self.power(REFERENCE)
        jobs = [Job(REFERENCE, power, SHORT, seed) for seed in SPREAD] if power is not None else []
        values = [line.value for job in jobs if (line := self._lines.get(job)) and line.value is not None]
        if not jobs or len(values) < len(jobs):
            return None
        mean, deviation = fmean(values), stdev(values)
        margin = _up(DEVIATIONS * deviation, 3)
        return Goal(_up(mean + margin, 2), margin, mean, deviation)

    def found(self, name: str) -> Found | None:
        """What is known of an optimizer; None: not enough."""
        missing, known = self._search(name)
        return None if missing else known

    def cpu(self, name: str) -> float | None:
        """Seconds of the processor a step of an optimizer: the median of its runs; None: there is none."""
        seconds = [line.cpu for line in self._lines.values() if line.optimizer == name and line.value is not None]
        return median(seconds) if seconds else None

    def passes(self, name: str) -> tuple[float, float] | None:
        """Forward and backward passes a step, of the runs that rates are chosen by; None: there is none."""
        lines = [line for line in self.rates(name) if line.value is not None]
        if not lines:
            return None
        return fmean(line.forward for line in lines), fmean(line.backward for line in lines)

    def failures(self, name: str) -> list[Line]:
        """Runs of an optimizer that ended in an error."""
        return [line for job, line in self._failed.items() if job.optimizer == name and job not in self._lines]

    def due(self, names: Sequence[str]) -> list[Job]:
        """What is to be run next; nothing: all is known.

        Args:
            names: of the optimizers.

        Raises:
            UserError: the reference does not train, or one of its runs that the target comes of did not end.
        """
        jobs, power = self._rates(REFERENCE)
        if jobs:
            return jobs
        if power is None:
            raise UserError(f"{REFERENCE} trains at no rate, and what is asked of all comes of it")
        jobs = [job for seed in SPREAD if (job := Job(REFERENCE, power, SHORT, seed)) not in self]
        if jobs:
            return jobs
        if self.goal() is None:
            raise UserError(f"a run of {REFERENCE} that the target comes of did not come to an end")
        for name in names:
            jobs += self._rates(name)[0] or self._search(name)[0]
        return jobs

    def _rates(self, name: str) -> tuple[list[Job], int | None]:
        """The runs that a rate needs yet, and where it is best so far."""
        low, high = -1, 1
        while True:
            jobs = [Job(name, power, SHORT, TUNING) for power in range(low, high + 1)]
            if missing := [job for job in jobs if job not in self]:
                return missing, None
            values = {job.power: value for job in jobs if (value := self._lines[job].value) is not None}
            best = min(values, key=lambda power: values[power]) if values else None
            if (best is None or best == low) and low > -WIDEST:
                low -= 1
            elif best == high < WIDEST:
                high += 1
            else:
                return [], best

    def _search(self, name: str) -> tuple[list[Job], Found | None]:
        """The runs that the fewest steps need yet, and what they are."""
        power, goal = self.power(name), self.goal()
        if power is None or goal is None:
            return [], None
        low, high = -1, len(STEPS)  # too few, and enough
        best: Found | None = None
        last: Found | None = None
        while high - low > 1:
            place = (low + high) // 2
            missing, verdict, runs = self._judged(name, power, STEPS[place], goal)
            if missing:
                return missing, None
            if verdict is not None and verdict.accepted:
                high, best = place, Found(STEPS[place], verdict, runs)
            else:
                low, last = place, Found(None, verdict, runs)
        return [], best or last

    def _judged(
        self, name: str, power: int, steps: int, goal: Goal
    ) -> tuple[list[Job], Acceptance | None, tuple[Line, ...]]:
        """What is missing to judge so many steps; else the verdict, None where a run did not end, and the runs."""
        jobs = [Job(name, power, steps, seed) for seed in SEEDS]
        first, *_ = jobs
        if first not in self:
            return [first], None, ()
        value = self._lines[first].value
        if value is None or value > goal.target + CLEAR * goal.margin:
            jobs = [first]
        if missing := [job for job in jobs if job not in self]:
            return missing, None, ()
        runs = tuple(self._lines[job] for job in jobs)
        values = [line.value for line in runs if line.value is not None]
        if len(values) < len(runs):
            return [], None, runs
        return [], accepted(values, goal.target, goal.margin, higher=False), runs


def _up(value: float, digits: int) -> float:
    """A number rounded up."""
    return math.ceil(round(value * 10**digits, 6)) / 10**digits
