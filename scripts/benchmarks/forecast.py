"""What is forecast of a step and of a state before training, against what is then measured.

    python scripts/benchmarks/forecast.py
    python scripts/benchmarks/forecast.py --results try.jsonl --problems gpt --optimizers kfac muon

Each optimizer of the table, with the values of its file: first the forecast, on one batch; then training, beside SGD,
block by block. Seconds are those of the processor, which other programs on the machine do not take, with one thread.
An optimizer with intervals begins each of its blocks with a step that gathers curvature (every other one without a
refresh, where these have an interval of their own), one of another package goes through a whole round of its steps.
What is in the file of results is not done again; what would take longer to measure than --longest says, by its
forecast, is not measured. The page is written beside the file; what stands in it from "## Notes" on stays.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

import torch
from torch import Tensor, nn

from analysis import pages
from models import build_model
from optimizers import CurvatureOptimizer, Likelihood
from optimizers.forecast import Forecast, Prices, forecast, held, round_of
from optimizers.packaged import Package
from optimizers.table import CATALOGUE, present
from scripts.benchmark import Arm, make_optimizer
from training.loop.heap import keep_freed
from training.names import TARGET
from training.settings.composing import compose
from training.settings.schema import build, locate
from training.show import heart
from training.tasks.stand_ins import stand_in

#: Model, facts of its data, and what the page calls it.
PROBLEMS: dict[str, tuple[list[str], dict[str, int], str]] = {
    "resnet20": (
        ["model=resnet20"],
        {"in_channels": 3, "image_size": 16, "num_classes": 10, "batch_size": 32},
        "ResNet-20, colour images of 16 × 16, batches of 32",
    ),
    "autoencoder": (
        ["model=autoencoder_curves"],
        {"in_channels": 1, "image_size": 28, "num_classes": 10, "batch_size": 256},
        "the auto-encoder of CURVES (784-400-200-100-50-25-6 and back), batches of 256",
    ),
    "gpt": (
        ["model=gpt1_mini", "model.layers=2", "model.width=128"],
        {"sequence": 64, "vocabulary": 1000, "batch_size": 16, "in_channels": 1, "image_size": 8, "num_classes": 10},
        "a GPT of two layers, width 128, 1,000 tokens, 16 texts of 64",
    ),
    "resnet18": (
        ["model=resnet18"],
        {"in_channels": 1, "image_size": 8, "num_classes": 10, "batch_size": 32},
        "ResNet-18, images as of `digits` (8 × 8), batches of 32",
    ),
}

#: Of a step's times, what stands for them: other programs share caches and cores, and only ever slow steps down.
QUANTILE = 0.25

#: What a forecast may be off by.
WITHIN = 0.15

RESULTS = ROOT / "docs" / "results" / "forecast.jsonl"
HEAD = """# What training takes, known beforehand

`python train.py debug=summary ...` and `python -m models NAME optimizer=...` print what a model and an optimizer will
hold and take, before anything is trained.

    python train.py debug=summary optimizer=kfac model=resnet18
    python -m models resnet18 optimizer=kfac batch_size=128 image_size=32 num_classes=10

**State** is exact. The optimizer's own code takes two steps with tensors that have shapes and no data (torch's fake
tensors), so that whatever its options, its groups and what goes around it make it keep is seen; nothing is worked out
by formulas that could go stale. What numbers alone decide is named apart: of the optimizers here, the odd part of a
second pair that is antisymmetric (`deflation`, `kfac_corrected`, `lanczos`, layers whose weights are shared over
positions). Gradients, parameters, buffers and what a forward pass keeps for the backward pass are lines of their own.

**Cost** is a forecast for this machine. A forward and a backward pass are timed. Where steps are short (some of each
kind three seconds, by a guess, with a state of up to 512 MiB), a copy of the model takes a few: ordinary ones, those
that gather curvature and those that work it out anew, weighed by `update_every` and `refresh_every`. So what the system
does for a step counts as it will in training, which no single operation shows. Where steps are longer, those without
data say which operations each kind asks for, and with which shapes; these are priced by calling each a few times, the
costliest first, for two seconds in all. Large products are timed at smaller shapes and scaled by their multiply-adds,
large decompositions and solves at two sizes, whose times are taken to be a n³ + b n². What is not foreseen there: how
long iterations go on, what is repaired, and steps that only `damping=auto` takes; nor, in either case, updates that
come early.

## Forecast against measured

Made by `python scripts/benchmarks/forecast.py` and, of its lines in `forecast.jsonl`, by `make results`: each optimizer
with the values of its file, first the forecast, then training beside SGD (with momentum), whose step is the unit of the
ratios. Seconds are those of the processor, of one thread, the lower quartile of the steps that were measured. In bold:
off by more than {within:.0%}.
"""


@dataclass
class Problem:
    """A model with data that are made up.

    Attributes:
        model: in training mode.
        likelihood: of its outputs.
        batches: inputs and targets.
    """

    model: nn.Module
    likelihood: Likelihood
    batches: list[tuple[Tensor, Tensor]]


def problem_of(name: str) -> Problem:
    """One of ``PROBLEMS``, always the same."""
    overrides, facts, _ = PROBLEMS[name]
    torch.manual_seed(0)
    config = compose(overrides).values
    asks = inspect.signature(locate(config["model"][TARGET], "model")).parameters
    drawn = [stand_in(asks, facts, seed) for seed in range(4)]
    task, told, *_ = drawn[0]
    model = build(config["model"], "model", through=build_model, facts=told)
    return Problem(model.train(), task.likelihood, [(x, y) for _, _, x, y in drawn])


def predicted(entry: str, problem: Problem, prices: Prices) -> Forecast:
    """The forecast of one optimizer."""
    make = partial(make_optimizer, entry, likelihood=problem.likelihood)
    inputs, targets = problem.batches[0]
    return forecast(problem.model, make, inputs, targets, problem.likelihood.nll, prices=prices)


def arm_of(entry: str, name: str) -> Arm:
    """An optimizer with a model of its own."""
    problem = problem_of(name)
    optimizer = make_optimizer(entry, problem.model, problem.likelihood)
    return Arm(entry, problem.model, optimizer, problem.likelihood, problem.batches, clock="cpu", quantile=QUANTILE)


def measured(entry: str, name: str, rounds: int) -> tuple[float, float, dict[str, int]]:
    """Seconds of an average step, of SGD's beside it, and bytes of the state after two steps."""
    arms = [arm_of("torch.optim.SGD:momentum=0.9", name), arm_of(entry, name)]
    unit, arm = arms
    for one in arms:
        one.step()
        one.step()
    state = held(arm.optimizer)
    apart = isinstance(arm.optimizer, CurvatureOptimizer)
    length = 1 if apart else round_of(arm.optimizer)
    whole: list[float] = []
    for index in range(rounds):
        for one in arms if index % 2 else arms[::-1]:
            if one is unit or apart:
                one.block(4)
            else:
                whole.append(sum(sum(one.step()) for _ in range(max(length, 4))) / max(length, 4))
    seconds = arm.seconds() if apart else sorted(whole)[int(QUANTILE * (len(whole) - 1))]
    return seconds, unit.seconds(), state


def lasting(found: Forecast, rounds: int, round_length: int) -> float:
    """Seconds that measuring will take, by the forecast."""
    update, refresh = (found.parts.get(part, 0.0) * found.intervals.get(part, 1) for part in ("update", "refresh"))
    usual = (found.passes or 0.0) + found.parts["step"]
    if not found.intervals:
        return (2 + rounds * max(round_length, 4)) * usual
    return (2 + 4 * rounds) * usual + (2 + rounds) * update + (2 + (rounds + 1) // 2) * refresh


def row_of(entry: str, name: str, rounds: int, longest: float) -> dict[str, Any]:
    """One line of the results; what was measured is None where it would have taken too long."""
    problem = problem_of(name)
    began = time.process_time()
    found = predicted(entry, problem, Prices(time.process_time))
    row: dict[str, Any] = {
        "problem": name, "optimizer": entry, "forecast_s": time.process_time() - began,
        "predicted_ratio": found.ratio, "measured_ratio": None, "predicted_ms": 1e3 * found.step, "measured_ms": None,
        "predicted_passes_ms": 1e3 * (found.passes or 0.0), "measured_sgd_ms": None,
        "tried": found.tried, "parts_ms": {part: 1e3 * value for part, value in found.parts.items()},
        "predicted_state": found.state, "optional_state": found.optional, "measured_state": None,
    }  # fmt: skip
    length = round_of(make_optimizer(entry, problem.model, problem.likelihood))
    few = next((n for n in (rounds, 2) if n <= rounds and lasting(found, n, length) <= longest), None)
    row["measuring_s"] = lasting(found, few or 2, length)
    if few is not None:
        seconds, unit, state = measured(entry, name, few)
        row |= {"measured_ratio": seconds / unit, "measured_ms": 1e3 * seconds, "measured_sgd_ms": 1e3 * unit}
        row["measured_state"] = state
    return row


def known(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Results so far; the last of each problem and optimizer."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.strip()]
    return {(row["problem"], row["optimizer"]): row for row in rows}


def off(row: dict[str, Any]) -> float:
    """How far a forecast of cost is from what was measured, as a share of that."""
    return float(row["predicted_ratio"] / row["measured_ratio"] - 1)


def same(row: dict[str, Any]) -> bool:
    """Whether the state is what was forecast, to the byte."""
    return bool(row["predicted_state"] == row["measured_state"])


def allowed(row: dict[str, Any]) -> bool:
    """Whether the state is larger than forecast, by no more than numbers were said to decide on."""
    return 0 < sum(row["measured_state"].values()) - sum(row["predicted_state"].values()) <= row["optional_state"]


def percent(share: float) -> str:
    """With a sign; bold where it is too much."""
    text = f"{share:+.0%}"
    return text if abs(share) <= WITHIN else f"**{text}**"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line of Markdown for each optimizer on one problem."""
    titles = [
        "`optimizer=`", "ratio, forecast", "measured", "off by", "ms, forecast", "measured", "state, B", "measured"
    ]  # fmt: skip
    body = [[
        f"`{row['optimizer']}`", f"{row['predicted_ratio']:.2f}",
        *([f"{row['measured_ratio']:.2f}", percent(off(row))] if row["measured_ratio"] else ["", ""]),
        f"{row['predicted_ms']:.0f}", f"{row['measured_ms']:.0f}" if row["measured_ratio"] else "",
        f"{sum(row['predicted_state'].values()):,}",
        f"{sum(row['measured_state'].values()):,}" if row["measured_ratio"] else "",
    ] for row in rows]  # fmt: skip
    return pages.table(titles, body)


def holds(rows: Sequence[dict[str, Any]], naming: bool = False) -> str:
    """In how many pairs a forecast holds, of those that were measured.

    Args:
        rows: of the file of results.
        naming: also the problems.
    """
    done = [row for row in rows if row["measured_ratio"]]
    bad = sorted((row for row in done if abs(off(row)) > WITHIN), key=lambda row: -abs(off(row)))
    named = [f"`{row['optimizer']}` {'on ' + row['problem'] + ' ' if naming else ''}{off(row):+.0%}" for row in bad]
    errors = sorted(abs(off(row)) for row in done)
    text = f"Cost within {WITHIN:.0%}: {len(done) - len(bad)} of {len(done)}"
    text += f" (not: {', '.join(named)})" if bad else ""
    text += f"; half of them are off by at most {errors[len(errors) // 2]:.0%}. " if errors else ". "
    text += f"State equal to the byte: {sum(map(same, done))} of {len(done)}"
    more = [f"`{row['optimizer']}`" for row in done if not same(row) and allowed(row)]
    return text + (f" (larger, by no more than was said that numbers decide: {', '.join(more)})." if more else ".")


def page(rows: dict[tuple[str, str], dict[str, Any]], notes: str = "") -> str:
    """What a forecast is, a table for each problem, and in which of them it holds.

    Args:
        rows: of the file of results.
        notes: what comes at the end.
    """
    order = [name for name in CATALOGUE if any(name == optimizer for _, optimizer in rows)]
    parts = [HEAD.format(within=WITHIN)]
    for name, (_, _, title) in PROBLEMS.items():
        mine = [row for (problem, _), row in rows.items() if problem == name]
        mine.sort(key=lambda row: [*order, row["optimizer"]].index(row["optimizer"]))
        if not mine:
            continue
        long = [f"`{row['optimizer']}` ({row['measuring_s']:.0f} s)" for row in mine if not row["measured_ratio"]]
        said = f" Not measured, since it would have taken too long: {', '.join(long)}." if long else ""
        missing = [f"`{entry}`" for entry in order if (name, entry) not in rows]
        said += f" Not run: {', '.join(missing)}." if missing else ""
        parts.append("\n".join([f"### {title[0].upper()}{title[1:]}", "", holds(mine) + said, "", table(mine)]))
    everything = list(rows.values())
    took = sorted(row["forecast_s"] for row in everything) or [0.0]
    parts.append(
        "## What holds\n\n"
        f"Over all problems. {holds(everything, naming=True)} "
        f"A forecast took {took[len(took) // 2]:.1f} s in the median, {took[-1]:.1f} s at most.\n"
    )
    return "\n".join([*parts, notes] if notes else parts)


def write(path: Path) -> Path:
    """Write the page of what is in the file of results, beside it.

    Args:
        path: of the file.
    """
    return pages.write_page(path.with_suffix(".md"), lambda notes: page(known(path), notes))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [name for name, _, target in present() if not isinstance(target, Package)]
    parser.add_argument("--results", type=Path, default=RESULTS, help="a line of JSON for each problem and optimizer")
    parser.add_argument("--problems", nargs="*", choices=[*PROBLEMS], default=[*PROBLEMS], help="all")
    parser.add_argument("--optimizers", nargs="*", default=every, help="files of configs/optimizer, with options: all")
    parser.add_argument("--rounds", type=int, default=4, help="blocks of steps that are measured (4)")
    parser.add_argument("--longest", type=float, default=60, help="seconds that measuring one of them may take (60)")
    parser.add_argument("--again", action="store_true", help="also what is in the file")
    options = parser.parse_args(argv)
    rows = known(options.results)
    torch.set_num_threads(1)
    keep_freed()
    warnings.simplefilter("ignore")
    for name in options.problems:
        for entry in options.optimizers:
            if (name, entry) in rows and not options.again:
                continue
            row = row_of(entry, name, options.rounds, options.longest)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            said = "not measured"
            if row["measured_ratio"]:
                state = "equal" if same(row) else "OTHER"
                said = f"measured {row['measured_ratio']:6.2f}  {off(row):+6.1%}  state {state}"
            print(
                f"{name:12} {entry:16} forecast {row['predicted_ratio']:6.2f}  {said}  ({row['forecast_s']:.1f} s)",
                flush=True,
            )
    print(write(options.results))
    return 0


if __name__ == "__main__":
    with heart.working("forecasts against measurements"):
        sys.exit(main())
