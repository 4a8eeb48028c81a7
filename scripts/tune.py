"""Tune optimizers fairly: equal seconds for each, short trials first, the better ones again and longer.

    python scripts/tune.py optimizers=[sgd,kfac] model=resnet20 dataset=cifar10 budget=30m final=3m workers=2
    python scripts/tune.py optimizers=[adamw,soap] experiment=digits_mlp trials=16

What is tried is in configs/hparams_search/OPTIMIZER.yaml. Trial 0 is the optimizer as it is configured. Every trial has
a schedule of its own length; what it is worth is its validation metric at the end. The runs are a sweep of train.py,
multirun/NAME: launched again, the tuning goes on where it was. What is not named below goes to train.py as it is:
workers=2 trains two at a time, threads=1 each on one thread, hydra/launcher=slurm on a cluster.

    optimizers=[...]  files of configs/optimizer (default: sgd, adam, kfac)
    budget=TIME       training seconds for each optimizer, by what its steps are measured to take: 90s, 30m, 2h. Without
                      it, trials are as many for all, and the last ones as long as the command says (trainer.max_...)
    final=TIME        with a budget: how long a run is that the values are wanted for (default: what it is enough for)
    trials=8          of the first rung; of a budget there may be more
    rungs=2           how many times the better ones are trained again, and longer, the first time included; 1: all
                      trials are as long as the last (default of a budget: what it is enough for)
    eta=3             how much longer, and fewer, trials are from one rung to the next
    sampler=halton    halton | sobol: points spread evenly, the same for all | tpe: where results lead (pip install
                      optuna)
    seed=0            of the points, and of all runs
    metric=...        of the validation set, which decides (default: that which chooses the best weights)
    name=NAME         of the sweep (default: tuning_MODEL_DATASET)
    spaces=FOLDER     of search spaces of your own, OPTIMIZER.yaml, in place of those of the clone
    --config-dir DIR  of configurations of your own, as train.py takes it
    preset=NAME       of the presets that are written: into configs/preset/NAME where that is a study, and else into the
                      sweep's folder (default: tuned, there)
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

from analysis import pace, tuning
from analysis.pace import Pace
from analysis.tuning import Arm, Choice, Outcome, Plan, Rungs, Space, Trial
from scripts import Parser
from scripts.studies.sweeping import Sweeping
from training.command.cluster import read_time
from training.command.workers import threads_of
from training.errors import UserError, did_you_mean
from training.loop.signals import Interrupted
from training.runs.folder import atomic_file, shortened
from training.runs.record import RunConfig, as_lists
from training.settings.composition import CONFIG_FOLDER, compose
from training.settings.sweeps import taken_out

OWN = (
    "optimizers", "budget", "final", "trials", "rungs", "eta", "sampler", "seed", "metric", "name", "spaces", "preset",
)  # fmt: skip
#: What a sweep's command says that no run has.
LAUNCH = ("workers", "threads")
#: What every trial has unless the command says otherwise: no pictures, and the test set is not looked at.
COMMON = ("trainer.test=false", "callbacks=none")


@dataclass
class Choices:
    """What the command line says; see this file's beginning."""

    given: dict[str, str] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    folder: str | None = None
    default: ClassVar[str] = "[sgd,adam,kfac]"

    @property
    def flags(self) -> tuple[str, ...]:
        """Those of train.py."""
        return ("--config-dir", self.folder) if self.folder else ()

    @property
    def search(self) -> list[str]:
        """The same for a composition."""
        return [f"hydra.searchpath=['file://{Path(self.folder).resolve()}']"] if self.folder else []

    @property
    def optimizers(self) -> list[str]:
        """The optimizers, which exist."""
        names = [name for name in self.given.get("optimizers", self.default).strip("[]").split(",") if name]
        places = [CONFIG_FOLDER, *([Path(self.folder)] if self.folder else [])]
        known = sorted(path.stem for place in places for path in (place / "optimizer").glob("*.yaml"))
        for name in names:
            if name not in known:
                raise UserError(f"optimizers has no {name!r}{did_you_mean(name, known)}")
        if not names:
            raise UserError("optimizers is empty: give some, optimizers=[sgd,kfac]")
        return list(dict.fromkeys(names))

    def whole(self, key: str, default: int | None, least: int) -> int | None:
        """A whole number that was given, or the default."""
        text = self.given.get(key)
        if text is None:
            return default
        if not text.isdigit() or int(text) < least:
            raise UserError(f"{key} must be a whole number of at least {least}, got {text or 'nothing'}")
        return int(text)

    @property
    def eta(self) -> float:
        """By which rungs grow."""
        try:
            return float(self.given.get("eta", 3))
        except ValueError as error:
            raise UserError(f"eta must be a number above 1, got {self.given['eta']}") from error

    def time(self, key: str) -> float | None:
        """Seconds that were given; None without."""
        if key not in self.given:
            return None
        try:
            return float(read_time(self.given[key]))
        except UserError as error:
            raise UserError(str(error).replace("time=", f"{key}=", 1)) from error


Chosen = TypeVar("Chosen", bound=Choices)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv`: the arguments, None for those of the process."""
    try:
        _tune(parsed(argv, Choices, OWN, __doc__ or "")[0])
    except (ValueError, UserError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    except Interrupted as stop:
        sys.stderr.write(f"{stop}\n")
        return stop.exit_code
    return 0


def _tune(choices: Choices) -> None:
    seed = choices.whole("seed", 0, 0) or 0
    names = choices.optimizers
    given = [*COMMON, *choices.rest, f"seed={seed}"]
    shared = [text for text in given if text.partition("=")[0] not in LAUNCH and not text.startswith("hydra")]
    runs = {name: compose([*choices.search, f"optimizer={name}", *shared]) for name in names}
    first = runs[names[0]]
    sweep = choices.given.get("name") or "_".join(["tuning", *first.parts[1:]])
    folder = Path(first.values["paths"]["sweeps"]).joinpath(*map(shortened, Path(sweep).parts))
    spaces = Path(choices.given["spaces"]) if "spaces" in choices.given else None
    arms = {name: arm_of(name, run, Space.load(name, spaces)) for name, run in runs.items()}
    budget = choices.time("budget")
    if budget is None:
        arms, rungs, unit = _counted(choices, runs, arms)
    else:
        arms, rungs, unit = _timed(choices, runs, arms, budget, folder)
    plan = Plan(
        folder=folder,
        rungs=rungs,
        metric=choices.given.get("metric"),
        sampler=choices.given.get("sampler", "halton"),
        seed=seed,
        unit=unit,
        common=tuple(shared),
    )
    counted_in = "s" if budget else "final runs"
    print("\n".join([f"tuning {', '.join(names)} in {folder}:", *tuning.plan_lines(arms, rungs, counted_in)]))
    sweeping = Sweeping(sweep, folder, tuple(given), choices.flags)
    found = tuning.tune(arms, plan, sweeping.run, tell=_tell, begin=_begin)
    metric = plan.metric or next((o.metric for n in names for o in tuning.Book(folder).of(n) if o.metric), "value")
    table = tuning.markdown(found, metric, counted_in)
    with atomic_file(folder / "tuning.md") as file:
        file.write(table.encode())
    print("\n" + table)
    for line in [*tuning.advice(arms, found), *_presets(choices.given.get("preset"), folder, arms, found, rungs)]:
        print(line)


def arm_of(name: str, run: RunConfig, space: Space) -> Arm:
    """An optimizer as the command configures it."""
    own: dict[str, Any] = as_lists(run.values["optimizer"])
    for key, value in space.requires.items():
        if own.get(key) != value:
            raise UserError(
                f"{space.file.name} has ranges for optimizer.{key}={value}, got {own.get(key)}: write some for that "
                f"into FOLDER/{space.file.name}, and give spaces=FOLDER"
            )
    start = {key.name: own[key.name.lstrip("+")] for key in space.keys if key.name.lstrip("+") in own}
    return Arm((f"optimizer={name}",), space, start=start)


def _counted(choices: Choices, runs: dict[str, RunConfig], arms: dict[str, Arm]) -> tuple[dict[str, Arm], Rungs, str]:
    """As many trials for each arm, the last as long as its command says; what is counted are final runs."""
    if "final" in choices.given:
        raise UserError("final is for a budget of time: give budget=30m, or trainer.max_steps=... without final")
    lengths = {}
    for name, run in runs.items():
        trainer = run.values["trainer"]
        unit = next((key for key in ("steps", "epochs") if trainer[f"max_{key}"] is not None), None)
        if unit is None:
            raise UserError("trainer.max_time is no length of trials: give budget=30m final=TIME, or trainer.max_steps")
        lengths[name] = (unit, float(trainer[f"max_{unit}"]))
    units = {unit for unit, _ in lengths.values()}
    if len(units) > 1:
        raise UserError("some optimizers have a budget of steps and some one of epochs: give trainer.max_steps")
    rungs = Rungs.counted(choices.whole("trials", 8, 1) or 8, 1.0, choices.whole("rungs", 2, 1) or 2, choices.eta)
    return {name: replace(arm, pace=1 / lengths[name][1]) for name, arm in arms.items()}, rungs, units.pop()


def _timed(
    choices: Choices, runs: dict[str, RunConfig], arms: dict[str, Arm], budget: float, folder: Path
) -> tuple[dict[str, Arm], Rungs, str]:
    """So many seconds for each arm, by what its steps are measured to take, unless they were at an earlier launch."""
    rungs = Rungs.within(
        budget, choices.time("final"), choices.whole("trials", 8, 1) or 8, choices.eta, choices.whole("rungs", None, 1)
    )
    paces = tuning.Book(folder).paces()
    if paces.keys() != arms.keys():
        _, shares = taken_out(choices.rest, multirun=True)
        paces = {name: one.seconds for name, one in measured(runs, shares.threads, workers=shares.workers).items()}
    return {name: replace(arm, pace=paces[name]) for name, arm in arms.items()}, rungs, "steps"


def measured(
    runs: Mapping[str, RunConfig], threads: int | None, seconds: float = 60.0, workers: int = 1
) -> dict[str, Pace]:
    """What steps take where so many runs are beside each other: cores and caches that are shared slow all of them.

    It is measured in processes of their own: workers are forked of this one, which must have run nothing before.

    Args:
        runs: a configuration for each arm.
        threads: of torch in each run; None: this process's, shared out among the workers.
        seconds: see `pace.measure`.
        workers: runs at a time.
    """
    beside = f", {workers} at a time" if workers > 1 else ""
    print(f"measuring what a step takes, of {len(runs)} optimizers side by side{beside}", flush=True)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        share = threads or threads_of(workers)
        asked = [pool.submit(pace.measure, runs, seconds=seconds, threads=share) for _ in range(workers)]
        return pace.averaged([one.result() for one in asked])


def _begin(trials: Sequence[Trial]) -> None:
    rungs = sorted({trial.rung + 1 for trial in trials})
    arms = {trial.arm: sum(one.arm == trial.arm for one in trials) for trial in trials}
    each = ", ".join(f"{count} of {name}" for name, count in arms.items())
    print(f"\n{len(trials)} trials (rung {' and '.join(map(str, rungs))}): {each}")


def _tell(outcomes: Sequence[Outcome]) -> None:
    for arm in dict.fromkeys(one.trial.arm for one in outcomes):
        mine = [one for one in outcomes if one.trial.arm == arm]
        best = min(mine, key=Outcome.order)
        lost = sum(one.lost for one in mine)
        what = "none came to an end" if best.lost else f"best {best.metric} {best.value:.4g}, trial {best.trial.trial}"
        print(f"{arm}: {what}{f', {lost} lost' if lost and not best.lost else ''}")


def _presets(name: str | None, folder: Path, arms: dict[str, Arm], found: dict[str, Choice], rungs: Rungs) -> list[str]:
    """Write what was chosen as files that train.py takes; the lines that say how."""
    study = name is not None and (CONFIG_FOLDER / "study" / f"{name}.yaml").is_file()
    place = (CONFIG_FOLDER if study else folder) / "preset" / (name or "tuned")
    written = [arm for arm, choice in found.items() if choice.value is not None]
    for arm in written:
        path = place / f"{arm}.yaml"
        if study and path.exists():
            raise UserError(f"{path} is there already, and is left as it is: delete it, or give another preset=NAME")
        choice = found[arm]
        about = f"{arm}: the best of {choice.trials} trials, by the validation set ({sum(rungs.counts)} were planned)."
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(tuning.preset(arms[arm], choice, about).encode())
    if not written:
        return []
    use = f"of study={name}" if study else f"python train.py --config-dir {folder} preset={place.name}/{written[0]} ..."
    return [f"{place}: {', '.join(f'{arm}.yaml' for arm in written)}; {use}"]


def parsed(
    argv: Sequence[str] | None, kind: type[Chosen], own: Sequence[str], description: str, flags: Sequence[str] = ()
) -> tuple[Chosen, set[str]]:
    """A command line of KEY=VALUE.

    Args:
        argv: the arguments, None for those of the process.
        kind: what is made of them.
        own: keys that are the command's; what is not goes to train.py.
        description: of the command, for --help.
        flags: that it takes besides.

    Returns:
        What was given, and which of the flags.

    Raises:
        UserError: an argument has another form.
    """
    parser = Parser(description)
    parser.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help="see above")
    parser.add_argument("--config-dir", metavar="DIR", help="see above")
    for flag in flags:
        parser.add_argument(f"--{flag}", action="store_true", help="see above")
    words = [*(sys.argv[1:] if argv is None else argv)]
    pairs = [index for index, word in enumerate(words) if word == "--config-dir"]
    moved = [word for index in pairs for word in words[index : index + 2]]  # in front: the rest is to be in one piece
    moved += [word for word in words if word.removeprefix("--") in flags and word.startswith("--")]
    rest = [word for index, word in enumerate(words) if not {index, index - 1} & {*pairs} and word not in moved]
    options = parser.parse_args([*moved, *rest])
    choices = kind(folder=options.config_dir)
    for text in options.arguments:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text} is no KEY=VALUE (see --help)")
        if key == "optimizer":
            raise UserError(f"{text}: give optimizers=[{value}], of which there may be several")
        if key in own:
            choices.given[key] = value
        else:
            choices.rest.append(text)
    return choices, {flag for flag in flags if getattr(options, flag)}


if __name__ == "__main__":
    sys.exit(main())
