"""Which optimizer for this problem: all tuned with the same seconds, the winners trained on fresh seeds, one page.

    python scripts/verdict.py model=mlp dataset=digits optimizers=[sgd,adamw,kfac] budget=10m workers=2
    python scripts/verdict.py model=resnet20 dataset=cifar10 optimizers=[sgd,adamw,adafisher,kfac,muon] budget=6h
    python scripts/verdict.py model=mlp dataset=digits budget=10m --plan          # what it would do, and for how long

1. Steps are measured, interleaved on this machine, and the budget of time becomes each optimizer's steps.
2. Each is tuned within the same training seconds: short trials of points in configs/hparams_search, the better ones
   again and longer, each with a schedule of its own length. The validation set decides; the test set is not looked at.
3. The winners are trained on fresh seeds, all for the same training seconds.
4. The verdict, with its uncertainty, is printed and written: multirun/NAME/report/index.html.

Launched again, the same command goes on where it was, with another number of workers too: every run's threads and steps
are settled at the first launch. What is not named below goes to train.py as it is.

    optimizers=[...]  files of configs/optimizer (default: sgd, adamw, adafisher, kfac, shampoo, muon)
    budget=TIME       wall-clock time of the whole on this machine: 90s, 10m, 6h (default: 10m)
    trials=8          of each optimizer, at least; a budget may allow more
    seeds=5           final runs of each optimizer, seeds 1 to 5
    tuning=0.5        share of the training seconds that goes to tuning
    workers=1         runs at a time
    threads=N         of each run (default: the cores, shared out among the workers at the first launch)
    sampler=halton    halton | sobol | tpe, see scripts/tune.py
    spaces=FOLDER     of search spaces of your own
    name=NAME         of the folder (default: verdict_MODEL_DATASET)
    target=VALUE      of the metric, whose time is told (default: what half of the optimizers reach)
    --plan            print the plan and stop
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

from analysis import compare, report, tuning
from analysis.tuning import Arm, Outcome, Plan, Space, Trial
from analysis.tuning.rungs import TRIALS
from analysis.verdict import LOOKS, Division, State, divide, steps_of
from scripts import tune
from scripts.studies.sweeping import Sweeping
from training.command.workers import threads_of
from training.errors import UserError
from training.loop.signals import Interrupted
from training.runs.folder import shortened
from training.runs.record import RunConfig
from training.settings.composition import compose

#: Seconds of the whole, unless it is said.
BUDGET = 600.0
OWN = (
    "optimizers", "budget", "trials", "seeds", "tuning", "workers", "threads", "sampler", "spaces", "name", "target",
    "seed",
)  # fmt: skip
#: Of the seconds of a budget, what goes to measuring steps, and the most that does.
MEASURING, MEASURED = 0.05, 120.0
#: What trials have: they are looked at when they have ended, and not on the test set.
UNSEEN = ("trainer.test=false", "callbacks=none", "logger=quiet")
#: What all runs have: checkpoints by the clock, for going on; evaluations by steps.
ALL = ("trainer.eval_every_epochs=null", "trainer.checkpoint_every_epochs=null", "trainer.checkpoint_every_minutes=2")


@dataclass
class Choices(tune.Choices):
    """What the command line says; see this file's beginning."""

    default: ClassVar[str] = "[sgd,adamw,adafisher,kfac,shampoo,muon]"

    def share(self, key: str, default: float) -> float:
        """A number that was given, or the default."""
        try:
            return float(self.given.get(key, default))
        except ValueError as error:
            raise UserError(f"{key} must be a number such as {default:g}, got {self.given[key]}") from error

    @property
    def launching(self) -> list[str]:
        """What is for the command that launches runs, and for none of them."""
        return [text for text in self.rest if text.startswith("hydra")]

    @property
    def shared(self) -> list[str]:
        """What all runs have."""
        return [*(text for text in self.rest if not text.startswith("hydra")), *ALL]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv`: the arguments, None for those of the process."""
    try:
        choices, flags = tune.parsed(argv, Choices, OWN, __doc__ or "", ["plan"])
        given = [*choices.rest, *(f"{key}={value}" for key, value in choices.given.items())]
        _verdict(choices, shlex.join(["python", "scripts/verdict.py", *given]), "plan" in flags)
    except (ValueError, UserError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    except Interrupted as stop:
        sys.stderr.write(f"{stop}\n")
        return stop.exit_code
    return 0


def _verdict(choices: Choices, command: str, planning: bool) -> None:
    for text in choices.rest:
        if text.startswith("trainer.max_"):
            raise UserError(f"{text}: the budget of time says how many steps each optimizer has; give budget=10m")
    if "seed" in choices.given:
        raise UserError("seed: seeds=N says how many fresh seeds there are, 1 to N; tuning has seed 0")
    names = choices.optimizers
    if len(names) < 2:
        raise UserError("optimizers must be at least two: one alone is no comparison")
    workers = choices.whole("workers", 1, 1) or 1
    runs = {
        name: compose([*choices.search, f"optimizer={name}", *choices.shared, "trainer.max_steps=1000"])
        for name in names
    }
    first = runs[names[0]]
    name = choices.given.get("name") or "_".join(["verdict", *first.parts[1:]])
    folder = Path(first.values["paths"]["sweeps"]).joinpath(*map(shortened, Path(name).parts))
    spaces = Path(choices.given["spaces"]) if "spaces" in choices.given else None
    arms = {one: tune.arm_of(one, run, Space.load(one, spaces)) for one, run in runs.items()}
    asked: dict[str, Any] = {
        "optimizers": names,
        "budget": choices.time("budget") or BUDGET,
        "trials": choices.whole("trials", TRIALS, 1),
        "seeds": [*range(1, (choices.whole("seeds", 5, 2) or 5) + 1)],
        "share": choices.share("tuning", 0.5),
        "sampler": choices.given.get("sampler", "halton"),
        "runs": sorted([*choices.shared, *choices.flags[1:]]),
    }
    state = State.open(folder, asked, command, choices.whole("threads", None, 1) or threads_of(workers))
    if "target" in choices.given:
        state.target = choices.share("target", 0.0)
    began = time.monotonic()
    _measure(state, runs, workers)
    division = _divide(state, workers)
    print("\n".join(plan_lines(state, division, workers)), flush=True)
    if planning:
        return
    state.save()
    progress = Progress(began, len(arms) * (division.rungs.total + len(asked["seeds"]) * division.final))
    launching = (*choices.launching, f"workers={workers}", f"threads={state.threads}")
    trials = Sweeping(
        f"{name}/trials", folder / "trials", (*choices.shared, *UNSEEN, "seed=0", *launching), choices.flags
    )
    _tune(state, division, arms, trials, progress)
    final = Sweeping(f"{name}/final", folder / "final", (*choices.shared, *launching), choices.flags)
    _train(state, division, arms, final, progress)
    found = report.read(folder)
    page = report.write(found)
    print("\n" + "\n".join(report.sentences(found)))
    print(f"\n{page}")


# -- the four parts ----------------------------------------------------------------------------------------------------


def _measure(state: State, runs: Mapping[str, RunConfig], workers: int) -> None:
    """What a step of each arm takes, unless an earlier launch has measured it."""
    if state.paces:
        return
    seconds = min(MEASURING * state.asked["budget"], MEASURED)
    state.paces = tune.measured(runs, state.threads, seconds, workers)
    monitors = {one.monitor for one in state.paces.values()}
    if len(monitors) > 1:
        raise UserError(f"the optimizers are judged by {' and '.join(sorted(monitors))}: give trainer.monitor")
    state.metric = monitors.pop()
    state.higher = compare.higher_is_better(state.metric)


def _divide(state: State, workers: int) -> Division:
    """What each arm may spend, as an earlier launch has settled it or by this one."""
    if state.tuning:
        kept = state.tuning
        rungs = tuning.Rungs(tuple(kept["lengths"]), tuple(kept["counts"]), kept["full"])
        final, beside = state.final["seconds"], state.tuning["beside"]
        per_arm = state.tuning["seconds"] + final * len(state.asked["seeds"])
        return Division(state.tuning["seconds"], final, rungs, beside, (per_arm * len(state.paces) + beside) / workers)
    division = divide(
        state.asked["budget"], state.paces, trials=state.asked["trials"], seeds=len(state.asked["seeds"]),
        share=state.asked["share"], workers=workers, spent=min(MEASURING * state.asked["budget"], MEASURED),
    )  # fmt: skip
    state.tuning = {"seconds": division.tuning, "beside": division.beside, **asdict(division.rungs)}
    steps = {name: steps_of(division.final, one) for name, one in state.paces.items()}
    state.final = {"seconds": division.final, "steps": steps}
    return division


def _tune(state: State, division: Division, arms: Mapping[str, Arm], sweeping: Sweeping, progress: Progress) -> None:
    plan = Plan(
        folder=state.folder, rungs=division.rungs, metric=state.metric, sampler=state.asked["sampler"],
        common=tuple(state.asked["runs"]),
    )  # fmt: skip
    paced = {name: Arm(arm.overrides, arm.space, state.paces[name].seconds, arm.start) for name, arm in arms.items()}
    progress.done = sum(one.charged for name in arms for one in tuning.Book(state.folder).of(name))

    def begin(trials: Sequence[Trial]) -> None:
        rungs = sorted({trial.rung + 1 for trial in trials})
        seconds = sum(trial.length * state.paces[trial.arm].seconds for trial in trials)
        print(f"\ntuning, rung {' and '.join(map(str, rungs))}: {len(trials)} trials, {clock(seconds)} of training; "
              f"{progress}", flush=True)  # fmt: skip

    def tell(outcomes: Sequence[Outcome]) -> None:
        progress.add(sum(one.charged for one in outcomes))

    found = tuning.tune(paced, plan, sweeping.run, tell=tell, begin=begin)
    state.choices = {name: asdict(choice) for name, choice in found.items()}
    state.save()
    print("\n" + tuning.markdown(found, state.metric, "s"))
    for line in tuning.advice(arms, found):
        print(line)


def _train(state: State, division: Division, arms: Mapping[str, Arm], sweeping: Sweeping, progress: Progress) -> None:
    rows = []
    for seed in state.asked["seeds"]:  # one seed of all arms after the other: what is cut off compares them all
        for name, arm in arms.items():
            steps = state.final["steps"][name]
            name_of = f"{name}_seed-{seed}:"
            looks = f"trainer.eval_every_steps={max(1, math.ceil(steps / LOOKS))}"
            budget = f"trainer.max_steps={steps}"
            rows.append([name_of, *arm.overrides, *state.choices[name]["overrides"], budget, looks, f"seed={seed}"])
    seconds = division.final * len(rows)
    progress.done = len(arms) * division.rungs.total
    print(f"\nfinal runs: {len(rows)}, {clock(seconds)} of training; {progress}", flush=True)
    sweeping.run(rows)


# -- what is said ------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far the whole is.

    Attributes:
        began: when this launch did.
        total: training seconds of all that is to be run.
        done: of what has been.
    """

    began: float
    total: float = 0.0
    done: float = 0.0
    _before: float | None = None

    def add(self, seconds: float) -> None:
        """More has been run."""
        self._before = self.done if self._before is None else self._before
        self.done += seconds

    def __str__(self) -> str:
        """Share and time left, by what this launch has done."""
        share = f"{self.done / self.total:.0%} of the whole done"
        here = self.done - (self.done if self._before is None else self._before)
        if not here:
            return share
        left = (time.monotonic() - self.began) * (self.total - self.done) / here
        return f"{share}, about {clock(left)} left"


def clock(seconds: float) -> str:
    """Seconds, minutes or hours in a word: 45 s, 12 min, 3.5 h."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def plan_lines(state: State, division: Division, workers: int) -> list[str]:
    """The plan, for the terminal."""
    seeds = state.asked["seeds"]
    rungs = ", then ".join(
        f"{count} of {clock(length)}"
        for count, length in zip(division.rungs.counts, division.rungs.lengths, strict=True)
    )
    lines = [
        f"{state.folder}: {len(state.paces)} optimizers, judged by {state.metric}",
        f"tuning    {clock(division.tuning)} of training for each: {rungs} (what is lost early, further points take)",
        f"final     {len(seeds)} seeds ({seeds[0]} to {seeds[-1]}) of {clock(division.final)} for each",
        f"the whole about {clock(division.wall)} with {workers} worker(s) of {state.threads} thread(s)",
        "",
        f"{'optimizer':16} {'ms a step':>10} {'final steps':>12} {'epochs':>8} {'shortest trial':>15}",
    ]
    for name, one in state.paces.items():
        steps = state.final["steps"][name]
        short = steps_of(division.rungs.lengths[0], one)
        lines.append(
            f"{name:16} {1e3 * one.seconds:10.2f} {steps:12,} {steps / one.steps_per_epoch:8.1f} {short:9,} steps"
        )
    return lines


# -- the command line --------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    sys.exit(main())
