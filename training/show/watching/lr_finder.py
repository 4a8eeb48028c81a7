"""A range test: the learning rate grows until the loss diverges; a good one lies below where it was lowest.

Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017 (arXiv 1506.01186). The schedule is
``training.schedules.range_test``; here is what looks on, ends the test, and says what it has seen.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from optimizers import consolidate
from optimizers.curvature.communication import average_
from training.errors import UserError
from training.runs.folder import atomic_file
from training.runs.run import Callback, Run
from training.show.curves import COLOURS, GREY, canvas, dress, name_of_run
from training.show.pictures import check_resolution
from training.tasks.task import Task, Turn

log = logging.getLogger(__name__)

#: Weight of the past in the average that is watched while the rate grows.
KEEP = 0.8
#: Width of the smoothing of the whole curve, in shares of its length; it is centred, so that it lags behind nothing.
WIDTH = 0.02
#: A fall of the loss by less than this share of its first value is none.
FALL = 0.02


@dataclass(frozen=True)
class Finding:
    """What a range test has shown.

    Attributes:
        rates: learning rates, ascending.
        losses: of the batch before the step with each.
        smoothed: losses, smoothed over neighbours on either side.
        lowest: index of the lowest smoothed loss.
        steepest: index up to there at which the loss falls fastest per factor of the rate; None: it did not fall.
        diverged: whether the test ended because the loss did.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    lowest: int
    steepest: int | None
    diverged: bool

    @property
    def suggestion(self) -> float | None:
        """The mean of two rules, on the logarithmic scale, to two digits; None if the loss did not fall.

        The rate at which it fell fastest, which is too low for an optimizer that needs but a few steps, and a tenth of
        that at which it was lowest, which is too high where a loss that has diverged falls again.
        """
        if self.steepest is None:
            return None
        return float(f"{math.sqrt(self.rates[self.steepest] * self.rates[self.lowest] / 10):.2g}")

    def sentence(self, key: str = "optimizer.lr") -> str:
        """What to make of it.

        Args:
            key: the option that is to be set.
        """
        first, last = self.rates[0], self.rates[-1]
        end = f"diverged at {last:.2g}" if self.diverged else f"had not diverged at {last:.2g}, the last one"
        if self.suggestion is None:
            return (
                f"range test: the loss fell at none of the rates from {first:.2g} to {last:.2g}, and {end}: "
                "try others (scheduler.start_factor, scheduler.end_factor)"
            )
        fastest, lowest = (f"{self.rates[i]:.2g}" for i in (self.steepest or 0, self.lowest))
        return (
            f"range test: try {key}={self.suggestion:g}: the loss fell fastest at {fastest}, was lowest at {lowest} "
            f"and {end}"
        )


def examine(rates: Sequence[float], losses: Sequence[float], diverged: bool) -> Finding:
    """Look for the rate at which the loss falls fastest.

    Args:
        rates: ascending, each larger by the same factor.
        losses: one a rate, of the batch *before* the step with it; from the first that is not finite on, none counts.
        diverged: whether the test ended because the loss did.

    Raises:
        ValueError: there are fewer than three to look at.
    """
    finite = np.isfinite(np.asarray(losses, dtype=float))
    count = len(finite) if finite.all() else int(np.argmin(finite))
    if count < 3:
        raise ValueError(f"losses must be finite for three steps at least, and were for {count}")
    y = np.asarray(losses, dtype=float)[:count]
    # A loss tells of the step before it, which had the rate before it.
    x = np.concatenate([[rates[0]], np.asarray(rates, dtype=float)[: count - 1]])
    x[0] = x[1] ** 2 / x[2]
    smoothed = _smoothed(y, max(WIDTH * count, 1.0))
    lowest = int(np.argmin(smoothed))
    slopes = np.gradient(smoothed, np.log(x))[: lowest + 1]
    fell = smoothed[0] - smoothed[lowest] > FALL * abs(smoothed[0])
    return Finding(x, y, smoothed, lowest, int(np.argmin(slopes)) if fell else None, diverged)


def _smoothed(values: np.ndarray, width: float) -> np.ndarray:
    """Means over neighbours with the weights of a normal curve, of which what reaches beyond the ends is left out."""
    places = np.arange(len(values))
    weights = np.exp(-0.5 * ((places[:, None] - places[None, :]) / width) ** 2)
    return (weights @ values) / weights.sum(1)


def plot(finding: Finding, title: str) -> Figure:
    """The loss over the rate, with what was found.

    Args:
        finding: what to draw.
        title: of the picture.
    """
    figure = canvas(6.4, 4.2, title)
    axes = figure.subplots()
    axes.plot(finding.rates, finding.losses, color=COLOURS["train"], linewidth=0.8, alpha=0.35, label="of the batch")
    axes.plot(finding.rates, finding.smoothed, color=COLOURS["train"], linewidth=1.8, label="smoothed")
    if finding.steepest is not None:
        place = finding.rates[finding.steepest], finding.smoothed[finding.steepest]
        axes.plot(*place, "o", color=COLOURS["val"], markersize=8, label=f"falls fastest: {place[0]:.2g}")
        axes.axvline(finding.suggestion or 0, color=COLOURS["test"], label=f"suggested: {finding.suggestion:g}")
    place = finding.rates[finding.lowest], finding.smoothed[finding.lowest]
    axes.plot(*place, "o", mfc="none", mec=GREY, mew=1.5, markersize=9, label=f"lowest: {place[0]:.2g}")
    dress(axes, "learning rate", "training loss")
    axes.set_xscale("log")
    axes.set_xlim(finding.rates[0], finding.rates[-1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, first = float(finding.smoothed.min()), float(finding.smoothed[0])
    span = max(first - low, 0.1 * abs(first), 1e-12)
    axes.set_ylim(low - 0.1 * span, min(float(finding.losses.max()), first + 1.2 * span) + 0.05 * span)
    axes.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none", fontsize="small")
    return figure


class LRFinder(Callback):
    """Ends a run whose rate grows when its loss diverges; ``lr_finder.png`` and a sentence say which rate is good.

    Weights and the optimizer's state are then what they were at the start, and the end is not evaluated: nothing that
    a test has spoilt is left.

    Args:
        diverged: the test ends when the smoothed loss is so many times as far above its lowest as its first was.
        dpi: resolution of the picture.

    Raises:
        ValueError: for a value out of its range.
    """

    def __init__(self, diverged: float = 2.0, dpi: int = 120) -> None:
        if not 1 < diverged < math.inf:
            raise ValueError(f"diverged must be above 1, got {diverged}")
        check_resolution(dpi)
        self.limit, self.dpi = diverged, dpi
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._diverged = False
        self._average, self._first, self._lowest = 0.0, math.inf, math.inf
        self._start: dict[str, Any] | None = None

    def check(self, task: Task) -> None:
        """See Callback.

        Raises:
            UserError: there is no one loss to look at.
        """
        if not task.whole:
            raise UserError(
                f"debug=lr_finder looks at one loss, and a {task.name} has two players' that oppose each other: "
                "choose their rates by what samples look like"
            )

    def on_fit_start(self, run: Run) -> None:
        """See Callback."""
        run.unexamined = True
        if self._start is None:
            consolidate(run.optimizer)
            state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
            self._start = copy.deepcopy(state)

    def on_gradients(self, run: Run, turn: Turn, losses: Sequence[torch.Tensor]) -> None:
        """See Callback."""
        loss = torch.stack([one.detach().double().cpu() for one in losses]).mean()
        average_([loss])
        self.rates.append(float(run.optimizer.param_groups[0]["lr"]))
        self.losses.append(float(loss))

    def on_step(self, run: Run) -> None:
        """See Callback."""
        count, loss = len(self.losses), self.losses[-1]
        self._average = KEEP * self._average + (1 - KEEP) * loss
        smoothed = self._average / (1 - KEEP**count)
        if count <= 5:  # of a few batches, so that one does not decide
            self._first = smoothed
        self._lowest = min(self._lowest, smoothed)
        fall = max(self._first - self._lowest, 0.1 * abs(self._first))
        self._diverged = not smoothed <= self._lowest + self.limit * fall
        if self._diverged:
            run.stop(f"the loss has diverged at a learning rate of {self.rates[-1]:.3g}, as it was to")
        if self._diverged or run.done:
            self._restore(run)

    def _restore(self, run: Run) -> None:
        assert self._start is not None
        run.model.load_state_dict(self._start["model"])
        run.optimizer.load_state_dict(self._start["optimizer"])
        self._start = None  # not to be in the last checkpoint
        run.window.reset()  # of losses that may be none
        run.window_steps = 0

    def on_fit_end(self, run: Run, summary: dict[str, Any]) -> None:
        """See Callback."""
        try:
            finding = examine(self.rates, self.losses, self._diverged)
        except ValueError:
            summary["remark"] = (
                f"range test: the loss was not finite after {len(self.losses)} steps, at {self.rates[-1]:.2g}: "
                "start from a lower rate (scheduler.start_factor)"
            )
            return
        # Rates are multiples of what the optimizer was given, which it may call otherwise ("auto" is 1).
        summary["remark"] = finding.sentence()
        summary["lr_finder"] = {"lr": finding.suggestion, "lowest": float(finding.rates[finding.lowest])}
        log.info("%s", summary["remark"])
        if run.world.is_main:
            with atomic_file(run.folder.path / "lr_finder.png") as file:
                plot(finding, name_of_run(run.folder.path)).savefig(file, format="png", dpi=self.dpi)

    def state_dict(self) -> dict[str, Any]:
        """See Callback."""
        watched = torch.tensor([self._average, self._first, self._lowest], dtype=torch.float64)
        record = torch.tensor([self.rates, self.losses], dtype=torch.float64)
        return {"record": record, "watched": watched, "diverged": self._diverged, "start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Callback."""
        self.rates, self.losses = state["record"].tolist()
        self._average, self._first, self._lowest = state["watched"].tolist()
        self._diverged, self._start = state["diverged"], state["start"]
