"""What is forecast of a step and of a state before training, against what is then measured.

    python scripts/benchmarks/forecast.py --results FILE.jsonl
    python scripts/benchmarks/forecast.py --results FILE.jsonl --problems gpt --optimizers kfac muon
    python scripts/benchmarks/forecast.py --results FILE.jsonl --markdown > docs/results/forecast.md

Each optimizer of the table, with the values of its file: first the forecast, on one batch; then training, beside SGD,
block by block. Seconds are those of the processor, which other programs on the machine do not take, with one thread.
An optimizer with intervals begins each of its blocks with a step that gathers curvature (every other one without a
refresh, where these have an interval of their own), one of another package goes through a whole round of its steps.
What is in the file of results is not done again.
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

from models import build_model
from optimizers import CurvatureOptimizer, Likelihood
from optimizers.forecast import Forecast, Prices, forecast, held, round_of
from optimizers.packaged import Package
from optimizers.table import present
from scripts.benchmark import Arm, make_optimizer
from training.names import TARGET
from training.settings.composing import compose
from training.settings.schema import build, locate
from training.show import heart
from training.tasks.stand_ins import stand_in

#: Model, facts of its data, and what the page calls it.
PROBLEMS: dict[str, tuple[list[str], dict[str, int], str]] = {
    "resnet18": (
        ["model=resnet18"],
        {"in_channels": 1, "image_size": 8, "num_classes": 10, "batch_size": 32},
        "ResNet-18, images as of `digits` (8 × 8), batches of 32",
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
}

#: Of a step's times, what stands for them: other programs share caches and cores, and only ever slow steps down.
QUANTILE = 0.25

#: What a forecast may be off by.
WITHIN = 0.15


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


def row_of(entry: str, name: str, rounds: int) -> dict[str, Any]:
    """One line of the results."""
    problem = problem_of(name)
    began = time.process_time()
    found = predicted(entry, problem, Prices(time.process_time))
    spent = time.process_time() - began
    seconds, unit, state = measured(entry, name, rounds)
    return {
        "problem": name, "optimizer": entry, "forecast_s": spent,
        "predicted_ratio": found.ratio, "measured_ratio": seconds / unit,
        "predicted_ms": 1e3 * found.step, "measured_ms": 1e3 * seconds,
        "predicted_passes_ms": 1e3 * (found.passes or 0.0), "measured_sgd_ms": 1e3 * unit,
        "parts_ms": {part: 1e3 * value for part, value in found.parts.items()},
        "predicted_state": found.state, "measured_state": state,
    }  # fmt: skip


def known(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Results so far; the last of each problem and optimizer."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.strip()]
    return {(row["problem"], row["optimizer"]): row for row in rows}


def off(row: dict[str, Any]) -> float:
    """How far a forecast of cost is from what was measured, as a share of that."""
    return float(row["predicted_ratio"] / row["measured_ratio"] - 1)


def markdown(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Tables of all problems, and in a sentence each what holds."""
    parts = []
    for name, (_, _, title) in PROBLEMS.items():
        mine = [row for (problem, _), row in rows.items() if problem == name]
        if not mine:
            continue
        good = sum(abs(off(row)) <= WITHIN for row in mine)
        same = sum(row["predicted_state"] == row["measured_state"] for row in mine)
        lines = [
            f"## {title[0].upper()}{title[1:]}", "",
            f"Cost within {WITHIN:.0%}: {good} of {len(mine)}. State equal to the byte: {same} of {len(mine)}.", "",
            "| `optimizer=` | ratio, forecast | measured | off by | ms, forecast | measured | state, B | measured |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]  # fmt: skip
        for row in mine:
            error = f"{off(row):+.0%}"
            error = error if abs(off(row)) <= WITHIN else f"**{error}**"
            lines.append(
                f"| `{row['optimizer']}` | {row['predicted_ratio']:.2f} | {row['measured_ratio']:.2f} | {error} "
                f"| {row['predicted_ms']:.0f} | {row['measured_ms']:.0f} "
                f"| {sum(row['predicted_state'].values()):,} | {sum(row['measured_state'].values()):,} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [name for name, _, target in present() if not isinstance(target, Package)]
    parser.add_argument("--results", type=Path, required=True, help="a line of JSON for each problem and optimizer")
    parser.add_argument("--problems", nargs="*", choices=[*PROBLEMS], default=[*PROBLEMS], help="all")
    parser.add_argument("--optimizers", nargs="*", default=every, help="files of configs/optimizer, with options: all")
    parser.add_argument("--rounds", type=int, default=4, help="blocks of steps that are measured (4)")
    parser.add_argument("--again", action="store_true", help="also what is in the file")
    parser.add_argument("--markdown", action="store_true", help="print the tables of what is in the file, and no more")
    options = parser.parse_args(argv)
    rows = known(options.results)
    if options.markdown:
        print(markdown(rows))
        return 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in options.problems:
        for entry in options.optimizers:
            if (name, entry) in rows and not options.again:
                continue
            row = row_of(entry, name, options.rounds)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            same = "equal" if row["predicted_state"] == row["measured_state"] else "OTHER"
            print(
                f"{name:12} {entry:16} forecast {row['predicted_ratio']:6.2f}  measured {row['measured_ratio']:6.2f}  "
                f"{off(row):+6.1%}  state {same}  ({row['forecast_s']:.1f} s)", flush=True,
            )  # fmt: skip
    return 0


if __name__ == "__main__":
    with heart.working("forecasts against measurements"):
        sys.exit(main())
