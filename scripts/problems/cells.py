"""What is run: an optimizer on a problem with a seed, and what such a run is known by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from scripts.problems import catalogue
from scripts.problems.catalogue import CONFIGS, Problem
from training.runs.record import RunConfig
from training.settings.composition import compose

DATA = "datasets"  # what stands for the folder of the data sets, wherever it is
SEEDS = (0, 1, 2)
#: Of the default learning rate: what each optimizer is tried at to see how far from its best the default is.
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        problem: what is learned.
        optimizer: its name in the table.
        seed: of everything random.
        factor: of the default learning rate.
        config: the whole configuration.
    """

    problem: Problem
    optimizer: str
    seed: int
    factor: float
    config: RunConfig

    @property
    def key(self) -> str:
        """What this very run is known by: all that has a part in what comes of it."""
        return f"{self.problem.name} {self.optimizer} {self.config.job_id}"

    def __str__(self) -> str:
        """In a line of progress."""
        rate = "" if self.factor == 1 else f", rate x {self.factor:g}"
        return f"{self.problem.name} {self.optimizer}, seed {self.seed}{rate}"


@cache
def problem_config(name: str) -> RunConfig:
    """The configuration of a problem, with the data in the folder ``DATA``."""
    problem = catalogue.PROBLEMS[name]
    return compose(
        [
            f"hydra.searchpath=['file://{CONFIGS}']", f"paths.data={DATA}", "name=cell", "logger=quiet",
            "callbacks=none", "trainer.device=cpu", "trainer.max_epochs=null", f"trainer.max_steps={problem.steps}",
            "trainer.eval_every_epochs=null", f"trainer.eval_every_steps={problem.steps}",
            "trainer.checkpoint_every_epochs=null", *problem.overrides,
        ]
    )  # fmt: skip


@cache
def optimizer_node(name: str, options: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of an optimizer.

    Args:
        name: in the table.
        options: other values than the defaults, ``key=value`` each.

    Raises:
        UserError: a value is refused.
    """
    return compose([f"optimizer={name}", *(f"optimizer.{option}" for option in options)]).values["optimizer"]


def options_of(name: str, given: Sequence[str]) -> tuple[str, ...]:
    """Those of the options on the command line that are for one optimizer.

    Args:
        name: in the table.
        given: ``option=value`` for all that have the option, or ``optimizer.option=value`` for one.
    """
    known = optimizer_node(name)
    kept = []
    for text in given:
        key, _, value = text.partition("=")
        owner, _, option = key.rpartition(".")
        if owner == name or (not owner and option in known):
            kept.append(f"{option}={value}")
    return tuple(kept)


def cell(problem: Problem, optimizer: str, seed: int, factor: float = 1.0, options: Sequence[str] = ()) -> Cell:
    """One run of an optimizer on a problem.

    Args:
        problem: one of ``PROBLEMS``, or like them.
        optimizer: its name in the table.
        seed: of everything random.
        factor: of its learning rate.
        options: see ``options_of``.
    """
    base = problem_config(problem.name)
    node = dict(optimizer_node(optimizer, options_of(optimizer, options)))
    if factor != 1 and node["lr"] != "auto":
        node["lr"] = float(f"{factor * node['lr']:.6g}")
    values = {**base.values, "optimizer": node, "seed": seed}
    return Cell(problem, optimizer, seed, factor, RunConfig(values, {**base.choices, "optimizer": optimizer}))
