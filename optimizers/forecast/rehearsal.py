"""Steps of training with tensors that have no data: what is kept, and which operations are asked for."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.optim import Optimizer

from ..base import Coverage, CurvatureOptimizer
from ..curvature.kronecker.two_terms import TwoTerms
from ..wrapper import innermost
from .memory import held
from .operations import Operation, Recording

Counts = Counter[Operation]
Make = Callable[[nn.Module], Optimizer]
Loss = Callable[[Tensor, Tensor], Tensor]

#: Hyper-parameters of other packages' optimizers that say how many steps a round of different ones has.
ROUND = re.compile(r"(_freq|_frequency|_every|_steps|_interval)$")
LONGEST = 20


@dataclass
class Rehearsal:
    """What some steps without data have shown.

    Attributes:
        state: bytes of what the optimizer keeps after two steps, by what it is; see ``held``.
        optional: bytes that come to the state where numbers ask for them (see ``TwoTerms.optional_shapes``).
        saved: bytes that the forward pass keeps for the backward pass, beside parameters.
        passes: operations of a forward and a backward pass without the optimizer.
        parts: operations of an average step beyond those, by the kind of work, each with how often a step does them.
        intervals: steps between two such works.
        coverage: which layers have curvature; None for an optimizer that keeps none.
    """

    state: dict[str, int]
    saved: int
    passes: Counts
    optional: int = 0
    parts: dict[str, list[tuple[Counts, float]]] = field(default_factory=dict)
    intervals: dict[str, int] = field(default_factory=dict)
    coverage: Coverage | None = None


@contextmanager
def _pretending(fake: FakeTensorMode, recording: Recording) -> Iterator[None]:
    with warnings.catch_warnings(), fake, recording:
        warnings.simplefilter("ignore")
        yield


def rehearse(
    model: nn.Module,
    make: Make,
    inputs: Tensor,
    targets: Tensor,
    loss: Loss,
    rows: str = "",
    timed: bool = True,
) -> Rehearsal:
    """Take steps with a copy of a model that has no data.

    Args:
        model: in training mode; it is left as it is.
        make: builds the optimizer of a model.
        inputs: a batch.
        targets: its targets.
        loss: of outputs and targets, a scalar.
        rows: what was found out of whose rows are whose (see ``looked``); "": nothing, or nothing to find out.
        timed: whether the operations of average steps are wanted, too.

    Raises:
        RuntimeError: the optimizer does what cannot be done without data.
    """
    fake, recording = FakeTensorMode(allow_non_fake_inputs=True), Recording(timed)
    with FakeCopyMode(fake):
        twin = copy.deepcopy(model)
    x, y = fake.from_tensor(inputs), fake.from_tensor(targets)

    def step() -> Counts:
        with _pretending(fake, recording):
            optimizer.zero_grad()
            recording.taken()
            take_step(twin, optimizer, x, y, loss)
            return recording.taken()

    saved, plain = _plain(twin, fake, recording, x, y, loss)
    with _pretending(fake, recording):
        optimizer = make(twin)
        inner = innermost(optimizer)
        if rows and isinstance(inner, CurvatureOptimizer) and inner._recorder is not None:
            inner._recorder.restore(rows)
    step()
    step()
    with _pretending(fake, recording):
        found = Rehearsal(held(optimizer), saved, plain)
    if isinstance(inner, CurvatureOptimizer):
        with _pretending(fake, recording):
            found.coverage = inner.coverage() if inner.blocks else None
        blocks = [block for block in inner.blocks.values() if isinstance(block, TwoTerms) and block._shared]
        shapes = [shape for block in blocks for shape in block.optional_shapes().values()]
        found.optional = sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in shapes)
        if timed:
            _of_curvature(found, inner, step)
        inner.close()
    elif timed:
        length = round_of(optimizer)
        found.parts["step"] = [(step(), 1 / length) for _ in range(length)] + [(plain, -1.0)]
    return found


def take_step(model: nn.Module, optimizer: Optimizer, inputs: Tensor, targets: Tensor, loss: Loss) -> None:
    """A step of training, from gradients that are zero.

    Args:
        model: in training mode.
        optimizer: of it.
        inputs: a batch.
        targets: its targets.
        loss: of outputs and targets, a scalar.
    """
    inner = innermost(optimizer)
    outputs = model(inputs)
    value = loss(outputs, targets)
    if isinstance(inner, CurvatureOptimizer):
        optimizer.backward(value, outputs)  # type: ignore[attr-defined]
    else:
        value.backward(create_graph=getattr(type(inner), "needs_graph", False))
    optimizer.step()


def _of_curvature(found: Rehearsal, optimizer: CurvatureOptimizer, step: Callable[[], Counts]) -> None:
    """Add the operations of ordinary steps, of those that gather curvature, and of those that work it out anew."""
    every, refresh = optimizer.update_every, max(optimizer.update_every, getattr(optimizer, "refresh_every", 1))
    ordinary = step()  # the third one: where updates come early, they come after 1, 3, 7 steps
    if every == 1 and refresh == 1:
        found.parts["step"] = [(ordinary, 1.0), (found.passes, -1.0)]
        return
    optimizer.renew()
    renewed = step()
    updated = renewed
    if refresh > every:
        CurvatureOptimizer.renew(optimizer)
        updated = step()
    base = updated if every == 1 else ordinary
    found.parts["step"] = [(base, 1.0), (found.passes, -1.0)]
    if every > 1:
        found.parts["update"] = [(updated, 1 / every), (ordinary, -1 / every)]
        found.intervals["update"] = every
    if refresh > every:
        found.parts["refresh"] = [(renewed, 1 / refresh), (updated, -1 / refresh)]
        found.intervals["refresh"] = refresh


def interval(optimizer: Optimizer) -> int:
    """After how many steps an optimizer does again what it did: the longest interval in its options, at least 1."""
    options = [*optimizer.param_groups, vars(innermost(optimizer))]
    found = [item for option in options for item in option.items()]
    return max([1, *(value for key, value in found if ROUND.search(key) and type(value) is int)])


def round_of(optimizer: Optimizer) -> int:
    """After how many steps an optimizer of another package does again what it did, as far as is looked at."""
    return min(interval(optimizer), LONGEST)


def _plain(
    twin: nn.Module, fake: FakeTensorMode, recording: Recording, x: Tensor, y: Tensor, loss: Loss
) -> tuple[int, Counts]:
    """A forward and a backward pass: bytes that wait for the backward pass, and operations."""
    own = {t.untyped_storage()._cdata for t in (*twin.parameters(), *twin.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with _pretending(fake, recording):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss(twin(x), y)
        value.backward()
        counts = recording.taken()
    for p in twin.parameters():
        p.grad = None
    return sum(kept.values()), counts


def looked(model: nn.Module, make: Make, inputs: Tensor, targets: Tensor, loss: Loss) -> str:
    """What an optimizer finds out of the model in its first pass, which takes data: whose rows are whose.

    Args:
        model: in training mode; it is left as it is.
        make: builds the optimizer of a model.
        inputs: a few examples.
        targets: theirs.
        loss: of outputs and targets, a scalar.
    """
    twin = copy.deepcopy(model)
    optimizer = innermost(make(twin))
    if not isinstance(optimizer, CurvatureOptimizer) or (recorder := optimizer._recorder) is None:
        return ""
    recorder._observe = lambda flow: None  # what flows is not kept: the statistics of wide layers take memory
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = twin(inputs)
            optimizer.backward(loss(outputs, targets), outputs)
        return recorder.state()
    finally:
        optimizer.close()
