"""What a step and an evaluation take: several configurations on one machine, their steps interleaved.

A budget of seconds becomes one of steps by it, so that what else a machine does while runs are trained changes nothing
of what they learn. A few steps of each take turns, so that whatever disturbs them disturbs all alike; they make up
blocks, a block being a whole round of an optimizer's intervals, so that curvature is paid for in its share.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from optimizers.forecast import held, interval
from training import seed_everything
from training.errors import UserError
from training.loop import distributed, rng
from training.runs import step
from training.runs.folder import RunFolder
from training.runs.record import RunConfig
from training.runs.run import Run
from training.settings.loading import build_parts
from training.settings.schema import build, build_optimizers, build_scalars, build_schedule, refusals

#: Steps that are not measured, at least: kernels are chosen, curvature is estimated more often than later.
WARM = 20
#: Steps of a block, at least and at most.
BLOCK = (10, 100)
#: Blocks of each configuration, at least and at most.
ROUNDS = (3, 9)
#: Seconds of a turn, about: long beside what caches lose to the others' turns, short beside what disturbs a machine.
TURN = 0.5


@dataclass(frozen=True)
class Pace:
    """What a configuration takes.

    Attributes:
        seconds: of a training step: data, forward and backward pass, update. Of a block that is made of each turn's
            median over the blocks.
        low: of the fastest block.
        high: of the slowest block.
        evaluation: seconds of an evaluation on the validation set.
        steps_per_epoch: optimizer steps a pass over the training set.
        state: bytes that the optimizer keeps between steps.
        monitor: the validation metric that the run is judged by, "val/...".
    """

    seconds: float
    low: float
    high: float
    evaluation: float
    steps_per_epoch: float
    state: int
    monitor: str


@dataclass
class _Going:
    """A run whose steps are taken a few at a time; `blocks` has the seconds of each block's turns."""

    run: Run
    clip_norm: float | None
    block: int
    batches: Iterator[tuple[Tensor, Tensor]] = field(init=False)
    turns: list[int] = field(default_factory=list)
    blocks: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.run.model.train()
        self.batches = self.run.batches()

    def divide(self, seconds: float) -> None:
        """Divide a block into turns, by what a step takes."""
        count = min(self.block, max(1, round(self.block * seconds / TURN)))
        self.turns = [self.block * (i + 1) // count - self.block * i // count for i in range(count)]

    def go(self, steps: int) -> float:
        """Take steps; their seconds."""
        began = time.perf_counter()
        for _ in range(steps):
            step.take(self.run, self.batches, self.clip_norm)
            self.run.advance(0)
        self.run.window.reset()
        if self.run.world.device.type == "cuda":
            torch.cuda.synchronize(self.run.world.device)
        return time.perf_counter() - began

    @property
    def pace(self) -> tuple[float, float, float]:
        """Seconds of a step, in the fastest block, and in the slowest."""
        usual = sum(statistics.median(turn) for turn in zip(*self.blocks, strict=True))
        whole = [sum(block) for block in self.blocks]
        return usual / self.block, min(usual, *whole) / self.block, max(usual, *whole) / self.block


def measure(
    configs: Mapping[str, RunConfig],
    *,
    seconds: float = 60.0,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Pace]:
    """Measure what steps of several configurations take, side by side. Nothing is written.

    Args:
        configs: checked configurations, by name.
        seconds: to spend on steps, in all; no fewer than three blocks of each are measured, whatever they take.
        threads: of torch meanwhile; None: those it has.
        tell: hears a line a round.

    Raises:
        UserError: a configuration is refused, or its first steps fail, with its name.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        going = {name: _built(name, config) for name, config in configs.items()}
        for name, one in going.items():
            warm = max(WARM, one.block)
            one.divide(_tried(name, one, warm) / warm)
        looks = {name: _evaluation(one.run) for name, one in going.items()}
        began = time.perf_counter()
        for count in range(ROUNDS[1]):
            if count >= ROUNDS[0] and time.perf_counter() - began > seconds * (1 - 1 / (count + 1)):
                break
            for one in going.values():
                one.blocks.append([])
            for name, steps in _order(going, backwards=not count % 2):
                going[name].blocks[-1].append(_tried(name, going[name], steps))
            tell(f"steps measured side by side: round {count + 1}")
        return {
            name: Pace(
                *one.pace, looks[name],
                one.run.budget.steps_per_epoch, sum(held(one.run.optimizer).values()), one.run.monitor,
            )
            for name, one in going.items()
        }  # fmt: skip
    finally:
        torch.set_num_threads(before)


def averaged(found: Sequence[Mapping[str, Pace]]) -> dict[str, Pace]:
    """The paces that several processes measured at the same time, each of the same configurations.

    Args:
        found: by process.

    Returns:
        Means of seconds and evaluations, the fastest block of all and the slowest.
    """
    return {
        name: replace(
            first,
            seconds=statistics.fmean(one[name].seconds for one in found),
            low=min(one[name].low for one in found),
            high=max(one[name].high for one in found),
            evaluation=statistics.fmean(one[name].evaluation for one in found),
        )
        for name, first in found[0].items()
    }


def _order(going: Mapping[str, _Going], *, backwards: bool) -> list[tuple[str, int]]:
    """Whose turn it is and for how many steps, each one's turns spread over the round.

    Every other round is taken backwards: what grows warmer or slower meanwhile does so for all.
    """
    turns = [
        ((place + 0.5) / len(one.turns), -index if backwards else index, name, steps)
        for index, (name, one) in enumerate(going.items())
        for place, steps in enumerate(one.turns)
    ]
    return [(name, steps) for _, _, name, steps in sorted(turns)]


def _built(name: str, config: RunConfig) -> _Going:
    """What train.py would build, in this process."""
    values = config.values
    with refusals("trainer", values["trainer"]), distributed.session(values["trainer"]["device"]) as world:
        seed_everything(values["seed"])
        trainer = build(values["trainer"], "trainer")
        data, task, model = build_parts(values, world)
        optimizer = build_optimizers(values, model, likelihood=task.likelihood, seed=values["seed"])
        schedule, scalars = build_schedule(values["scheduler"]), build_scalars(values["schedules"])
        trainer.check(data, task, world, model=model, optimizer=optimizer, schedule=schedule, scalars=scalars)
        folder = RunFolder(Path(values["paths"]["runs"]) / name)
        run = trainer.assemble(model, optimizer, data, task, schedule, scalars, world, folder)
    return _Going(run, trainer.clip_norm, min(max(interval(run.optimizer), BLOCK[0]), BLOCK[1]))


def _tried(name: str, one: _Going, steps: int) -> float:
    with rng.deterministic(True):
        try:
            return one.go(steps)
        except (RuntimeError, ArithmeticError) as error:
            raise UserError(f"{name}: its first steps fail ({' '.join(str(error).split())[:200]})") from error


def _evaluation(run: Run) -> float:
    """Seconds of an evaluation; that of a small part where the whole would take long."""
    loader = run.data.val
    count = len(loader)
    if not count:
        return 0.0
    few = min(count, 20)
    began = time.perf_counter()
    run.model.eval()
    with torch.no_grad():
        for inputs, _ in islice(loader.epoch(0), few):
            with run.precision.autocast():
                run.model(inputs.to(run.world.device))
    run.model.train()
    return (time.perf_counter() - began) * count / few
