"""Who needs the fewest steps of a small GPT to a validation loss: `experiment=speedrun/gpt_small`, all optimizers.

    CURVLAB_DATA=datasets python scripts/studies/speedrun.py
    python scripts/studies/speedrun.py optimizers=[adamw,kfac] results=try.jsonl
    python scripts/studies/speedrun.py report=true

AdamW comes first: its rate, then eight runs of 200 steps, whose mean and spread are the target and the margin. Each
other optimizer is run at its default rate, a quarter and four times that, and beyond where the best is at the edge,
with one seed and 200 steps; what it leaves to Adam has AdamW's rate. Then the fewest steps are found by bisection over
a ladder: the schedule spans them, no run ends early, and they are enough if (target - mean) * sqrt(3) is at least the
margin over three other seeds. A first seed that is far above the target speaks for all three.

Runs that are there are not run again, and each is a line of the results as soon as it is done; a second call goes on.
At the end the page and its picture are written beside the results: FILE.jsonl, FILE.md, FILE.png. What stands in the
page from "## Notes" on stays.

    optimizers=[...]  of the table (python -m optimizers)
    results=...       docs/results/speedrun.jsonl unless given
    data=FOLDER       of the data sets, with wikitext-2/valid.txt in it; $CURVLAB_DATA or datasets unless given
    limit=900         seconds after which a run is broken off, which does not count as an end
    report=false      true: run nothing, write the page of what is there
"""

from __future__ import annotations

import gc
import math
import os
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

from matplotlib.figure import Figure

from analysis.factors import save_figure
from analysis.pages import write_page
from optimizers.table import present
from scripts.problems.arguments import command, given_to
from scripts.problems.cells import DATA
from scripts.problems.meter import Meter
from scripts.problems.outcomes import TimeLimit, append, attempt, commit_of, duration, records
from scripts.problems.tables import markdown
from scripts.studies import ladder
from scripts.studies.ladder import FACTOR, REFERENCE, Book, Job, Line
from training.errors import UserError
from training.runs.record import RunConfig, replace_folder
from training.settings.composition import compose
from training.show import heart

RESULTS = "docs/results/speedrun.jsonl"
EXPERIMENT = "speedrun/gpt_small"
TEXT = "wikitext-2/valid.txt"
#: What the experiment leaves open.
OVERRIDES = (
    f"experiment={EXPERIMENT}", f"paths.data={DATA}", "logger=quiet", "callbacks=none", "trainer.device=cpu",
    "trainer.test=false", "trainer.checkpoint_every_epochs=null", "trainer.keep_checkpoints=1",
)  # fmt: skip
#: Options that are the rate of what an optimizer leaves to Adam or AdamW.
REST = ("fallback_lr", "adamw_lr")


@dataclass
class Choices:
    """``key=value`` on the command line; see this file's beginning."""

    optimizers: list[str] = field(default_factory=lambda: [name for name, _, _ in present()])
    results: str = RESULTS
    data: str = field(default_factory=lambda: os.environ.get("CURVLAB_DATA", DATA))
    limit: float = 900.0
    report: bool = False


@cache
def configured(name: str) -> RunConfig:
    """The experiment with an optimizer at its default values, its data in the folder ``DATA``."""
    return compose([*OVERRIDES, f"optimizer={name}"])


def config_of(job: Job, rest: float | None) -> RunConfig:
    """The configuration of a run.

    Args:
        job: what is run.
        rest: rate of what an optimizer leaves to Adam.
    """
    base = configured(job.optimizer)
    node = dict(base.values["optimizer"])
    node["lr"] = float(f"{FACTOR**job.power * node['lr']:.6g}")
    if rest is not None:
        node |= {key: rest for key in REST if key in node}
    trainer = base.values["trainer"] | {"max_steps": job.steps, "eval_every_steps": job.steps}
    return RunConfig(base.values | {"optimizer": node, "trainer": trainer, "seed": job.seed}, base.choices)


def identities(name: str) -> tuple[str, str]:
    """What the problem and an optimizer's values are known by, but for rates, seeds and steps."""
    base = configured(name)
    node = {key: value for key, value in base.values["optimizer"].items() if key not in REST}
    problem = RunConfig({**base.values, "optimizer": {}}, base.choices)
    return problem.id, RunConfig({**base.values, "optimizer": node}, base.choices).id


def run(job: Job, rest: float | None, data: Path, limit: float) -> Line:
    """Train what a job asks for; nothing of the run folder stays.

    Args:
        job: what to run.
        rest: rate of what an optimizer leaves to Adam.
        data: folder of the data sets.
        limit: seconds after which to break it off.

    Raises:
        Interrupted: a signal asked to stop.
    """
    config = config_of(job, rest)
    node = config.values["optimizer"]
    left = next((node[key] for key in REST if key in node), None)

    def placed(folder: Path) -> RunConfig:
        values = config.values | {
            "dataset": replace_folder(config.values["dataset"], DATA, str(data)),
            "paths": {"data": str(data), "runs": str(folder), "sweeps": str(folder)},
            "callbacks": {
                "meter": {"_target_": f"{Meter.__module__}.Meter"},
                "limit": {"_target_": f"{TimeLimit.__module__}.TimeLimit", "seconds": limit},
            },
        }
        return RunConfig(values, config.choices)

    began = time.perf_counter()
    status, error, summary = attempt(placed)
    meter = {key: round(value, 6) for key, value in summary.get("meter", {}).items()}
    value = summary["final"]["val/loss"] if status == "finished" else None
    return Line(
        job.optimizer, job.power, job.steps, job.seed, node["lr"], left, *identities(job.optimizer), status, value,
        **meter, wall=round(time.perf_counter() - began, 3), error=error, commit=commit_of(summary),
    )  # fmt: skip


def _run_missing(choices: Choices, path: Path, data: Path) -> bool:
    if not (data / TEXT).is_file():
        raise UserError(f"no data: there is no file {TEXT} in {data} (give data=FOLDER)")
    known = {name: identities(name) for name in dict.fromkeys([REFERENCE, *choices.optimizers])}
    problem, configs = known[REFERENCE][0], {name: config for name, (_, config) in known.items()}
    names, began, done = [*choices.optimizers], time.monotonic(), 0
    while True:
        book = Book(records(path, Line), problem, configs)
        jobs = book.due(names)
        if not jobs:
            return len(names) == len(choices.optimizers)
        job = jobs[0]
        with heart.working(f"speedrun: {job}"):
            line = run(job, book.rest, data, choices.limit)
        append(path, line)
        gc.collect()  # of the models that hooks and optimizers refer to in circles
        done += 1
        if line.status == "failed":
            if job.optimizer == REFERENCE:
                raise UserError(f"{job}: {line.error}")
            names = [name for name in names if name != job.optimizer]
        came = f"{line.value:.4f}" if line.value is not None else f"{line.status} ({line.error})"
        known_now = sum(book.found(name) is not None for name in choices.optimizers)
        print(
            f"[run {done}, {known_now} of {len(choices.optimizers)} optimizers done, "
            f"{duration(time.monotonic() - began)}] {job}: {came}, {line.wall:.1f} s",
            flush=True,
        )


# -- the page ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What the page says of an optimizer.

    Attributes:
        name: the optimizer's.
        steps: the fewest; None: not reached.
        mean: loss at these, or at the most.
        cells: of the table, from the steps on.
        price: seconds of the processor to the target; of the most where it was not reached.
    """

    name: str
    steps: int | None
    mean: float
    cells: tuple[str, ...]
    price: float


def rows(book: Book, names: Sequence[str]) -> list[Row]:
    """The ranking: by steps, then by the mean; those that do not reach the target last.

    Args:
        book: the runs.
        names: of the optimizers.
    """
    made, unit = [], book.cpu("sgd") or book.cpu(REFERENCE)
    for name in names:
        known, cpu, passes = book.found(name), book.cpu(name), book.passes(name)
        if known is None or cpu is None or passes is None or not unit:
            continue
        values = [line.value for line in known.runs if line.value is not None]
        verdict = known.verdict
        mean = math.inf if verdict is None else verdict.mean
        loss = f"{mean:.3f}" if verdict else known.runs[0].status
        loss += f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        line = known.runs[0]
        rate = f"{line.lr:g}" + (f", the rest {line.rest:g}" if line.rest is not None else "")
        price = cpu * (known.steps or ladder.STEPS[-1])
        cells = (
            f"**{known.steps}**" if known.steps else f"not in {ladder.STEPS[-1]}", loss,
            f"{verdict.evidence / verdict.margin:.1f}" if verdict and verdict.margin else "",
            f"{rate} (x{FACTOR**line.power:g})", f"{passes[0]:.2f}", f"{passes[1]:.2f}", f"{cpu / unit:.1f}",
            f"{price:.1f}" if known.steps else f"above {price:.1f}",
        )  # fmt: skip
        made.append(Row(name, known.steps, mean, cells, price))
    return sorted(made, key=lambda row: (row.steps or math.inf, row.mean))


def page(book: Book, names: Sequence[str], notes: str = "", picture: str = "") -> str:
    """The page.

    Args:
        book: the runs.
        names: of the optimizers.
        notes: its last section, from ``NOTES`` on.
        picture: file of the picture; "" for none.
    """
    goal, ranking = book.goal(), rows(book, names)
    lines = ["# Fewest steps to a loss", ""]
    if goal is None:
        return "\n".join([*lines, "The runs of AdamW that the target comes of are missing.", "", notes])
    seeds, tried = ", ".join(map(str, ladder.SEEDS)), ", ".join(map(str, ladder.STEPS))
    lines += _wrapped(
        f"Made by `python scripts/studies/speedrun.py`: `experiment={EXPERIMENT}` with every optimizer of the table. "
        "Net, text, batch and target stay, everything of the optimizer may change, the schedule spans the steps, and "
        "no run ends early. So many steps are enough if "
        f"`(target - mean) * sqrt({len(ladder.SEEDS)}) >= margin` for the loss on the validation text over the seeds "
        f"{seeds}. What was tried: {tried} steps, by bisection.",
        f"**Target {goal.target:g}, margin {goal.margin:g}**: {len(ladder.SPREAD)} other runs of AdamW over "
        f"{ladder.SHORT} steps have a mean of {goal.mean:.4f} and a standard deviation of {goal.deviation:.4f}. The "
        f"margin is {ladder.DEVIATIONS:g} of these, so that chance passes what just misses 1 time in 1000, and the "
        "target is the mean and one margin, rounded up, so that AdamW needs about as many steps.",
        "## Ranking",
        "By steps, then by the loss there. *Evidence* is the left side in margins: 1 and more is enough. Where a loss "
        "has no ±, the first of the runs was so far above the target that no others were made. *Passes* are what went "
        "through the net, a step, in whole batches: the rule charges all alike, so that who looks twice is not "
        "charged for it; *a step* (SGD's is 1) and *seconds* to the target are of the processor, and that is what it "
        "takes.",
    )
    titles = [
        "", "optimizer", "steps", "loss", "evidence", "rate (of the default's)", "passes forward", "backward", "a step",
        "seconds",
    ]  # fmt: skip
    places = [str(place) if row.steps else "" for place, row in enumerate(ranking, 1)]
    cells = [[place, _title(row.name), *row.cells] for place, row in zip(places, ranking, strict=True)]
    lines += markdown(titles, cells)
    if picture:
        lines += [f"![steps to the target, and what they take]({picture})", ""]
    absent = [name for name in names if not book.failures(name) and book.due([name])]
    nowhere = [name for name in names if name not in absent and book.rates(name) and book.power(name) is None]
    lines += [f"{name} ended in an error: {book.failures(name)[-1].error}\n" for name in names if book.failures(name)]
    if nowhere:
        lines += _wrapped(f"At none of its rates trains: {', '.join(map(_title, nowhere))}.")
    if absent:
        lines += _wrapped(
            f"Not run yet, or not to the end: {', '.join(map(_title, absent))}. The same command goes on."
        )
    return "\n".join(lines + _rates(book, names)) + (f"\n{notes}" if notes else "")


def _title(name: str) -> str:
    """An optimizer, and which one where a file is of any."""
    examples = {"torch": "torch (NAdam)", "pytorch_optimizer": "pytorch_optimizer (StableAdamW)"}
    return examples.get(name, name)


def _rates(book: Book, names: Sequence[str]) -> list[str]:
    powers = range(-ladder.WIDEST, ladder.WIDEST + 1)
    made = []
    for name in names:
        tried = {line.power: line for line in book.rates(name)}
        values = {power: line.value for power, line in tried.items() if line.value is not None}
        best = min(values, key=lambda power: values[power]) if values else None
        texts = []
        for power in powers:
            text = "" if power not in tried else tried[power].status
            if power in values:
                text = f"**{values[power]:.3f}**" if power == best else f"{values[power]:.3f}"
            texts.append(text)
        if tried:
            made.append([_title(name), *texts])
    lines = _wrapped(
        "## Rates",
        f"The loss after {ladder.SHORT} steps with seed {ladder.TUNING}, at so many times the default rate. What an "
        "optimizer leaves to Adam (embeddings and norms, mostly) has AdamW's best rate.",
    )
    return lines + markdown(["optimizer", *(f"x{FACTOR**power:g}" for power in powers)], made)


def _wrapped(*paragraphs: str) -> list[str]:
    """Paragraphs as lines of a file, an empty one after each."""
    return [line for text in paragraphs for line in (*textwrap.wrap(text, 120, break_on_hyphens=False), "")]


def figure(ranking: Sequence[Row]) -> Figure:
    """Steps to the target, and what they take of the processor.

    Args:
        ranking: in its order.
    """
    drawn = Figure(figsize=(10, 0.8 + 0.26 * len(ranking)), layout="constrained")
    left, right = drawn.subplots(1, 2, sharey=True)
    for place, row in enumerate(ranking):
        reached = row.steps is not None
        colour = "tab:orange" if row.name == REFERENCE else "tab:blue" if reached else "grey"
        style: dict[str, Any] = {"color": colour if reached else "white", "edgecolor": colour}
        left.barh(place, row.steps or ladder.STEPS[-1], hatch="" if reached else "///", **style)
        right.barh(place, row.price, hatch="" if reached else "///", **style)
    left.set_yticks(range(len(ranking)), [_title(row.name) for row in ranking], fontsize="small")
    left.invert_yaxis()
    left.set_xlabel(f"steps to the target (hatched: not in {ladder.STEPS[-1]})")
    right.set_xlabel("seconds of the processor to the target")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 1 if a run ended in an error other than divergence."""
    return command(__doc__, argv, lambda given: _main(given_to(Choices, given)))


def _main(choices: Choices) -> tuple[Path, bool]:
    if not choices.limit > 0:
        raise UserError(f"limit must be above 0, got {choices.limit:g}")
    good = choices.report or _run_missing(choices, Path(choices.results), Path(choices.data))
    return write(choices), good


def write(choices: Choices) -> Path:
    """Write the page of what is in the file of results, beside it, and its picture.

    Args:
        choices: of a command line.
    """
    path = Path(choices.results)
    book = Book(records(path, Line))
    picture = path.with_suffix(".png")
    ranking = rows(book, choices.optimizers)
    if ranking:
        save_figure(figure(ranking), picture)
    drawn = picture.name if ranking else ""
    return write_page(path.with_suffix(".md"), lambda notes: page(book, choices.optimizers, notes, drawn))


if __name__ == "__main__":
    with heart.working("speedrun"):
        sys.exit(main())
