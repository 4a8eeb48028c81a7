"""What a step of training will take and hold with an optimizer, beside what it takes with SGD."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from ..base import Coverage
from .prices import Prices, added
from .rehearsal import Loss, Make, Rehearsal, looked, rehearse
from .trial import TIMES, tried

#: Examples by which it is found out whose rows are whose, seconds that passes are timed for, and times at most.
EXAMPLES, PATIENCE, PASSES = 8, 1.5, 6

#: Seconds, as far as they can be guessed, and bytes of state up to which steps are taken by a copy rather than priced.
SHORT, ROOM = 3.0, 2**29


@dataclass
class Forecast:
    """What is to be expected of training.

    Attributes:
        parameters: bytes of the model's parameters.
        buffers: bytes of its buffers.
        gradients: bytes of the gradients of those that are trained.
        saved: bytes that a forward pass keeps for the backward pass.
        state: bytes of what the optimizer keeps, by what it is.
        optional: bytes that come to the state where numbers ask for them.
        passes: seconds of a forward and a backward pass, measured; None on other devices than processors, where the
            other seconds are not known, either.
        parts: seconds of the optimizer's own work in an average step: in every ``step``, and the shares of curvature's
            ``update`` and ``refresh``.
        intervals: steps between two of these.
        sgd: seconds of SGD's own work in a step (with momentum).
        coverage: which layers have curvature; None for an optimizer that keeps none.
        calls: how many calls of torch's operations an average step makes beyond the passes.
        tried: whether a copy of the model took steps, which were timed; else operations were priced.
    """

    parameters: int
    buffers: int
    gradients: int
    saved: int
    state: dict[str, int]
    optional: int
    passes: float | None
    intervals: dict[str, int]
    coverage: Coverage | None = None
    parts: dict[str, float] = field(default_factory=dict)
    sgd: float = 0.0
    calls: float = 0.0
    tried: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> float:
        """Seconds of an average step; not a number where they are not known."""
        return math.nan if self.passes is None else self.passes + sum(self.parts.values())

    @property
    def ratio(self) -> float:
        """Of a step to SGD's; not a number where they are not known."""
        return math.nan if self.passes is None else self.step / (self.passes + self.sgd)

    @property
    def held(self) -> int:
        """Bytes of the optimizer's state."""
        return sum(self.state.values())


def forecast(
    model: nn.Module,
    make: Make,
    inputs: Tensor,
    targets: Tensor,
    loss: Loss,
    *,
    prices: Prices | None = None,
    passes: float | None = None,
) -> Forecast:
    """Find out, before training, what steps with an optimizer hold and take.

    State is what the optimizer's own code keeps of tensors without data, so exact. Seconds are those of a forward and a
    backward pass, which are timed on a copy of the model, and of the optimizer's work beyond them: where that is short,
    of a few steps of the copy, which are timed, and else of the operations that it asks for, each timed on this machine
    (``Prices``). They are of a whole training, with the work of every ``update_every`` and ``refresh_every`` steps by
    its share and without updates that come early. What only data decide (how long an iteration goes on, what is
    repaired) is not foreseen where operations are priced: see ``Recording``.

    Args:
        model: as it would be trained; it is left as it is.
        make: builds the optimizer of a model: ``lambda model: KFAC(model, likelihood=Categorical())``.
        inputs: a batch.
        targets: its targets.
        loss: of outputs and targets, a scalar, such as ``F.cross_entropy``.
        prices: of operations on this machine; default: found out here, for two seconds.
        passes: seconds of a forward and a backward pass, where they are known; then operations are priced.

    Raises:
        RuntimeError: the optimizer does what cannot be done without data.
    """
    on_processor = all(p.device.type == "cpu" for p in model.parameters())
    with torch.random.fork_rng(devices=[]):
        twin = copy.deepcopy(model).train()
        few = max(2, min(EXAMPLES, len(inputs)))
        rows = looked(twin, make, inputs[:few], targets[:few], loss)
        shown = rehearse(twin, make, inputs, targets, loss, rows, timed=on_processor)
        if not on_processor:  # whose operations run side by side with what asks for them
            return priced(shown, None, None, None, model)
        plain = rehearse(twin, _sgd, inputs, targets, loss)
        prices = Prices() if prices is None else prices
        if passes is not None:
            return priced(shown, plain, passes, prices, model)
        before = timed_passes(twin, inputs, targets, loss, prices.clock)
        if _guessed(shown, statistics.median(before), prices) < SHORT and sum(shown.state.values()) < ROOM:
            found = priced(shown, None, None, None, model)
            _try(found, shown, twin, make, (inputs, targets, loss, prices.clock))
        else:
            found = priced(shown, plain, None, prices, model)
        after = timed_passes(twin, inputs, targets, loss, prices.clock)  # what else the machine does may have changed
    passes = statistics.median(before + after)
    if found.tried:  # these were whole steps
        found.passes = min(passes, found.sgd, found.parts["step"])
        found.sgd, found.parts["step"] = found.sgd - found.passes, found.parts["step"] - found.passes
    else:
        found.passes = passes
    return found


def _sgd(model: nn.Module) -> SGD:
    """The optimizer whose step is the unit; at no rate, it leaves its model as it is."""
    return SGD(model.parameters(), lr=0.0, momentum=0.9)


def _guessed(shown: Rehearsal, passes: float, prices: Prices) -> float:
    """About how many seconds a trial of the steps would take (see ``tried``)."""
    parts = {name: prices.guessed(added(pairs)) * shown.intervals.get(name, 1) for name, pairs in shown.parts.items()}
    kinds = 1 + len(shown.intervals)
    length = 1 if shown.intervals else max(len(shown.parts["step"]) - 1, 1)  # of a round
    steps = 2 + TIMES * (kinds if shown.intervals else length)
    due = (2 + TIMES) * (parts.get("update", 0.0) * max(kinds - 1, 1) + parts.get("refresh", 0.0))
    return steps * (passes + parts["step"]) + due


def _try(found: Forecast, shown: Rehearsal, twin: nn.Module, make: Make, given: Any) -> None:
    """Fill in seconds, of whole steps of copies; SGD's before and after, since the machine may do other things, too."""
    unit = [tried(twin, _sgd, *given)["step"]]
    found.parts = tried(copy.deepcopy(twin), make, *given)
    unit.append(tried(twin, _sgd, *given)["step"])
    found.sgd, found.tried = statistics.fmean(unit), True
    found.calls = sum(sum(added(pairs).values()) for pairs in shown.parts.values())


def priced(
    shown: Rehearsal, plain: Rehearsal | None, passes: float | None, prices: Prices | None, model: nn.Module
) -> Forecast:
    """What steps hold and take that were rehearsed.

    Args:
        shown: with the optimizer in question.
        plain: with SGD; None: nothing is known of seconds.
        passes: seconds of a forward and a backward pass.
        prices: of operations.
        model: of both.
    """
    params = list(model.parameters())
    found = Forecast(
        parameters=sum(p.numel() * p.element_size() for p in params),
        buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
        gradients=sum(p.numel() * p.element_size() for p in params if p.requires_grad),
        saved=shown.saved, state=shown.state, optional=shown.optional, passes=passes,
        intervals=shown.intervals, coverage=shown.coverage,
    )  # fmt: skip
    if plain is None or prices is None:
        return found
    parts = {name: added(pairs) for name, pairs in shown.parts.items()}
    unit = added(plain.parts["step"])
    prices.learn(added((counts, 1.0) for counts in (*parts.values(), unit)))
    found.parts = {name: prices.total(counts) for name, counts in parts.items()}
    found.sgd = prices.total(unit)
    found.calls = sum(sum(counts.values()) for counts in parts.values())
    return found


def timed_passes(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, clock: Callable[[], float]
) -> list[float]:
    """Seconds of forward and backward passes, after one that does not count.

    Args:
        model: in training mode; its buffers change, its gradients are dropped.
        inputs: a batch.
        targets: its targets.
        loss: of outputs and targets, a scalar.
        clock: seconds so far.
    """
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 2 or (time.perf_counter() - began < PATIENCE and len(times) <= PASSES):
        model.zero_grad()
        start = clock()
        loss(model(inputs), targets).backward()
        times.append(clock() - start)
    model.zero_grad()
    return times[1:]
