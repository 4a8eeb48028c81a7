"""One trial and what became of it, and the file that keeps them: what is decided is a function of that file alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from analysis.compare import higher_is_better
from training.errors import UserError
from training.runs.folder import Record, atomic_file, plain

#: In the folder of a tuning: what it was asked to do, and a line a trial.
PLAN, TRIALS = "tuning.json", "trials.jsonl"
#: How a trial ends that says what its values are worth.
ENDED = ("finished", "stopped_early")
#: How one ends that says that they are worth nothing.
LOST = ("diverged", "failed")


@dataclass(frozen=True)
class Trial:
    """A run that is to be made.

    Attributes:
        arm: name of the arm.
        rung: number of the rung, from 0; one more than there are is what fills the budget.
        trial: number of its point: 0 is the arm as it is configured.
        length: of its budget, in steps or epochs.
        values: by key of the space; none for trial 0.
        overrides: all that its command has beyond what is common to all trials.
    """

    arm: str
    rung: int
    trial: int
    length: float
    values: dict[str, Any]
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """What its run is called: kfac_rung-1_trial-3, rungs counted from 1."""
        return f"{self.arm}_rung-{self.rung + 1}_trial-{self.trial}"

    @property
    def key(self) -> tuple[str, int, int]:
        """What no two trials of a tuning share."""
        return self.arm, self.rung, self.trial


@dataclass(frozen=True)
class Outcome:
    """What became of a trial, a line of `trials.jsonl`.

    Attributes:
        trial: it.
        status: finished | stopped_early | diverged | failed.
        metric: of the validation set, which decides; "" if it was not told.
        value: of the metric at the end of the schedule; None where there is none.
        val_loss: the validation loss there.
        done: how much of its length was trained: steps, or epochs.
        charged: what that takes by the arm's pace.
        seconds: training seconds that were measured.
        folder: of the run, from the tuning's; "" if it was not told.
        error: why it failed; "" otherwise.
    """

    trial: Trial
    status: str
    metric: str
    value: float | None
    val_loss: float | None
    done: float
    charged: float
    seconds: float
    folder: str = ""
    error: str = ""

    @property
    def lost(self) -> bool:
        """Whether it is worse than any that has a value."""
        return self.status not in ENDED or self.value is None

    @property
    def stillborn(self) -> bool:
        """Whether it failed before its first step."""
        return self.status == "failed" and self.done == 0

    @classmethod
    def of(cls, trial: Trial, summary: Mapping[str, Any], unit: str, pace: float, metric: str | None) -> Outcome:
        """The outcome of a run.

        The value is that of the last evaluation, at the end of the schedule that the trial was given: the best one
        would favour luck, frequent evaluations, and rates that are too high for the end. Nothing of the test set is
        read.

        Args:
            trial: that was run.
            summary: of its run, with its `folder` if that is known.
            unit: steps | epochs, what its length is counted in.
            pace: what one of these is charged.
            metric: of the validation set; None: that which chooses the run's best weights.

        Raises:
            UserError: the run has not come to an end, or its metric is none of the validation set.
        """
        status = str(summary.get("status"))
        if status not in (*ENDED, *LOST):
            raise UserError(
                f"a trial of {trial.arm} has not come to an end ({status.replace('_', ' ')}): launched again, the same "
                "command goes on"
            )
        metric = str(metric or summary.get("monitor") or "")
        if metric and not metric.startswith("val/"):
            raise UserError(f"the validation set alone decides, got {metric}: give metric=val/...")
        final = summary.get("final") or {}
        seconds = (summary.get("seconds") or {}).get("training")
        done = float(summary.get(unit) or 0.0)
        return cls(
            trial, status, metric, _number(final.get(metric)), _number(final.get("val/loss")), done, done * pace,
            _number(seconds) or 0.0, str(summary.get("folder") or ""), str(summary.get("error") or ""),
        )  # fmt: skip

    @property
    def badness(self) -> float:
        """The value, so that less is better; infinite if it is lost."""
        if self.lost or self.value is None:
            return math.inf
        return -self.value if higher_is_better(self.metric) else self.value

    def order(self) -> tuple[float, float, int]:
        """Sorts outcomes of a rung, the best first: by value, then by validation loss, then by number."""
        return self.badness, math.inf if self.val_loss is None else self.val_loss, self.trial.trial

    def to_line(self) -> bytes:
        """The line of `trials.jsonl`."""
        own = {name: value for name, value in asdict(self).items() if name != "trial"}
        return json.dumps(plain(asdict(self.trial) | own), allow_nan=False).encode() + b"\n"

    @classmethod
    def from_line(cls, line: str) -> Outcome:
        """What a line says; KeyError, TypeError or ValueError if it is none."""
        read = json.loads(line)
        trial = {name: read.pop(name) for name in Trial.__dataclass_fields__}
        return cls(trial=Trial(**trial | {"overrides": tuple(trial["overrides"])}), **read)


class Book:
    """The outcomes of a tuning, in its folder. A line that was cut off by a power cut is forgotten, and made again.

    Args:
        folder: of the tuning, which is made if it is missing.

    Raises:
        UserError: it cannot be read or written, or is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._outcomes = folder, dict[tuple[str, int, int], Outcome]()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = (folder / TRIALS).read_text(encoding="utf-8") if (folder / TRIALS).exists() else ""
        except OSError as error:
            raise UserError(f"{folder} cannot be read or written ({error.strerror}): give another name") from error
        for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
            try:
                outcome = Outcome.from_line(line)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{folder / TRIALS}: line {number} is damaged: delete it, and launch again") from error
            self._outcomes[outcome.trial.key] = outcome

    def paces(self) -> dict[str, float]:
        """What a step of each arm took when the tuning began; {} before that, or if it cannot be read."""
        try:
            return {str(k): float(v) for k, v in json.loads((self.folder / PLAN).read_bytes())["paces"].items()}
        except (OSError, KeyError, TypeError, ValueError, AttributeError):
            return {}

    def settle(self, plan: Mapping[str, Any], paces: Mapping[str, float]) -> dict[str, float]:
        """Keep what is asked for beside the outcomes; a folder that was asked for something else is refused.

        Args:
            plan: all that decides which trials there are, but the paces.
            paces: seconds a step of each arm, as measured now.

        Returns:
            The paces that were measured when the tuning began, which it goes on with.

        Raises:
            UserError: the folder holds another tuning.
        """
        path, now = self.folder / PLAN, json.loads(json.dumps(plan))
        if path.exists():
            try:
                read = json.loads(path.read_text(encoding="utf-8"))
                before, kept = read["plan"], {str(name): float(pace) for name, pace in read["paces"].items()}
            except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{path} is damaged: give another name, or delete the folder") from error
            if (key := _differing(before, now)) is not None:
                raise UserError(
                    f"{self.folder} holds a tuning that differs in {key}: give another name, or what it was begun with"
                )
            return kept
        with atomic_file(path) as file:
            file.write((json.dumps({"plan": now, "paces": dict(paces)}, indent=1) + "\n").encode())
        return dict(paces)

    def of(self, arm: str) -> list[Outcome]:
        """The outcomes of an arm, as they came."""
        return [outcome for key, outcome in self._outcomes.items() if key[0] == arm]

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Write down what became of trials.

        Raises:
            WriteError: that cannot be written.
        """
        path = self.folder / TRIALS
        whole = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
        record = Record(path, whole)
        try:
            record.append(b"".join(outcome.to_line() for outcome in outcomes))
            record.sync()
        finally:
            record.close()
        self._outcomes |= {outcome.trial.key: outcome for outcome in outcomes}


def _differing(before: Any, now: Any, name: str = "") -> str | None:
    """The dotted name of the first value that two plans do not share."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return None if before == now else name or "its plan"
    keys: Iterable[str] = dict.fromkeys([*before, *now])
    found = (_differing(before.get(key), now.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
    return next((key for key in found if key), None)


def _number(value: Any) -> float | None:
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fine else None
