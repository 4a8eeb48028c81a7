"""What steps do, seen while training: scalars of curvature and of updates, layer by layer; the run stays the same.

Names of the scalars are ``curvature.NAME/LAYER``, a group of charts a name in TensorBoard, and for the whole model
``curvature/NAME``. They are an event of their own in metrics.jsonl, ``curvature``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optimizers import CurvatureOptimizer, innermost
from optimizers.base import real
from optimizers.curvature.communication import average_
from training.loop import rng
from training.runs.folder import atomic_file
from training.runs.run import Callback, Run
from training.show.pictures import check_resolution
from training.tasks.players import members, unobserved
from training.tasks.task import Turn

log = logging.getLogger(__name__)

#: The name of a layer that is the model itself.
ROOT = "(root)"


def layers_of(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, str]:
    """The layer of each of the parameters that an optimizer trains, in the model's order.

    A layer is what has curvature as one; of what has none, a module's own parameters.

    Args:
        model: the bare module.
        optimizer: any.
    """
    mine = {p for group in optimizer.param_groups for p in group["params"]}
    found = {p: n or ROOT for n, m in model.named_modules() for p in m.parameters(recurse=False) if p in mine}
    blocks = getattr(innermost(optimizer), "blocks", None) or {}
    blocks = {p: name or ROOT for name, block in blocks.items() for p in block.layer.parameters if p in mine}
    return {p: blocks.get(p, name) for p, name in found.items()}


@dataclass(frozen=True)
class Products:
    """Inner products of a gradient g, an update u and weights w, of some parameters together.

    Attributes:
        gu: ``g · u``.
        gg: ``g · g``.
        uu: ``u · u``.
        ww: ``w · w``, w being the weights before the update.
    """

    gu: float
    gg: float
    uu: float
    ww: float

    @classmethod
    def sum(cls, many: Sequence[Products]) -> Products:
        """Those of parameters apart, added."""
        return cls(*(math.fsum(column) for column in zip(*((p.gu, p.gg, p.uu, p.ww) for p in many), strict=True)))

    @property
    def angle(self) -> float:
        """Degrees between the update and the steepest descent, ``-g``; NaN where either is zero."""
        lengths = math.sqrt(self.gg) * math.sqrt(self.uu)
        return math.degrees(math.acos(min(max(-self.gu / lengths, -1.0), 1.0))) if lengths > 0 else math.nan

    @property
    def update_ratio(self) -> float:
        """``|u| / |w|``; NaN for weights of zero."""
        return math.sqrt(self.uu / self.ww) if self.ww > 0 else math.nan


def products(grads: Sequence[Tensor], updates: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Products]:
    """Inner products of each parameter, in single precision at least: one wait for the device.

    Args:
        grads: one a parameter.
        updates: of the same shapes.
        weights: of the same shapes, before the update.
    """
    rows = []
    for triple in zip(grads, updates, weights, strict=True):
        g, u, w = (t.reshape(-1) for t in (_wide(t) for t in triple))
        rows.append(torch.stack([torch.dot(g, u), torch.dot(g, g), torch.dot(u, u), torch.dot(w, w)]))
    return [Products(*row.tolist()) for row in torch.stack(rows).cpu()] if rows else []


def _wide(tensor: Tensor) -> Tensor:
    (tensor,) = real([tensor])
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


@dataclass
class _Update:
    """One optimizer's update, before it is made."""

    name: str
    optimizer: Optimizer
    layers: dict[Tensor, str]
    params: list[Tensor]
    before: list[Tensor]
    grads: list[Tensor]
    losses: list[Tensor]


@dataclass
class _Batch:
    """A batch of training, and the random numbers of its forward pass."""

    inputs: Tensor
    targets: Tensor
    state: dict[str, Any] = field(repr=False)


class CurvatureDiagnostics(Callback):
    """Scalars of every layer to the loggers every so many steps, and ``curvature.png`` at the end.

    Of any optimizer: the angle between the update and the steepest descent, the update's length over the weights', and
    what the loss of the batch falls by, measured by another forward pass with the same dropout masks, beside what the
    gradient predicts (``-g·u``). Of one that keeps curvature, what it can tell of each layer (see
    ``optimizers.CurvatureOptimizer.layer_diagnostics``) and what the quadratic model of its damped curvature predicts
    (``-g·u - uᵀ(F + damping)u / 2``). Weights, state, random numbers and buffers are left as they are.

    Args:
        every: steps between two looks; the first step is looked at, too.
        measure: whether the loss is measured again after the step, which takes a forward pass.
        dpi: resolution of the picture.

    Raises:
        ValueError: for a value out of its range.
    """

    def __init__(self, every: int = 100, measure: bool = True, dpi: int = 120) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        check_resolution(dpi)
        self.every, self.measure, self.dpi = every, measure, dpi
        self._updates: list[_Update] = []
        self._batches: list[_Batch] = []

    def on_fit_start(self, run: Run) -> None:
        """See Callback."""
        for name, optimizer in members(run.optimizer).items():
            if not isinstance(innermost(optimizer), CurvatureOptimizer):
                whose = f"{type(innermost(optimizer)).__name__}{f', which trains the {name},' if name else ''}"
                log.info("%s keeps no curvature to tell of: there are angles, ratios and decreases alone.", whose)
        if not self._measures(run):
            why = "two players share no loss" if self.measure else "measure=false"
            log.info("what steps change in the loss is not measured: %s.", why)

    def _measures(self, run: Run) -> bool:
        return self.measure and run.task.whole

    def _due(self, run: Run) -> bool:
        """Whether the step under way is looked at."""
        return run.step == 0 or (run.step + 1) % self.every == 0

    def on_batch(self, run: Run, turn: Turn, inputs: Tensor, targets: Tensor) -> None:
        """See Callback."""
        if self._due(run) and self._measures(run):
            self._batches.append(_Batch(inputs, targets, rng.get_state(run.world.device)))

    def on_gradients(self, run: Run, turn: Turn, losses: Sequence[Tensor]) -> None:
        """See Callback."""
        if not self._due(run):
            return
        run.phases.mark("update")
        with run.clock.count("other"), torch.no_grad():
            layers = layers_of(run.model, turn.optimizer)
            params = [p for p in layers if p.grad is not None and not p.grad.is_sparse]
            name = next((name for name, one in members(run.optimizer).items() if one is turn.optimizer), "")
            grads = [p.grad.clone() for p in params if p.grad is not None]
            before = [p.detach().clone() for p in params]
            self._updates.append(_Update(name, turn.optimizer, layers, params, before, grads, list(losses)))
        run.phases.mark("")

    def on_step(self, run: Run) -> None:
        """See Callback."""
        if not self._updates:
            return
        with run.clock.count("other"), torch.no_grad():
            values: dict[str, float] = {}
            for update in self._updates:
                values |= _told(update)
            if self._batches:
                values["curvature/decrease"] = self._decrease(run, self._updates[0])
            self._updates.clear()
            self._batches.clear()
            run.emit("curvature", {k: v for k, v in values.items() if math.isfinite(v)}, remember=False)

    def _decrease(self, run: Run, update: _Update) -> float:
        """What the loss of the step's batches has fallen by: of all ranks, with the numbers drawn then."""
        device, now = run.world.device, rng.get_state(run.world.device)
        after = []
        try:
            with _untouched(run.model), unobserved(update.optimizer):
                for batch in self._batches:
                    rng.set_state(batch.state, device)
                    with run.precision.autocast():
                        outputs = run.model(run.precision.prepare(batch.inputs))
                        after.append(run.task.loss(outputs, batch.targets))
        finally:
            rng.set_state(now, device)
        means = [torch.stack(losses).double().mean() for losses in (_plain(update.losses), _plain(after))]
        average_(means)
        return float(means[0] - means[1])

    def on_fit_end(self, run: Run, summary: dict[str, Any]) -> None:
        """See Callback."""
        if not run.world.is_main or not run.folder.metrics_file.exists():
            return
        from training.show.watching.curvature import plot_curvature  # see CurvePlots

        figure = plot_curvature(run.folder.metrics_file)
        if figure is not None:
            with atomic_file(run.folder.path / "curvature.png") as file:
                figure.savefig(file, format="png", dpi=self.dpi)

    def close(self) -> None:
        """See Callback."""
        self._updates.clear()
        self._batches.clear()


def _plain(losses: Sequence[Tensor]) -> list[Tensor]:
    """Losses on the CPU, where there is double precision on any machine that trains."""
    return [loss.detach().float().cpu() if loss.dtype != torch.float64 else loss.detach().cpu() for loss in losses]


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Within it, passes in training mode leave no trace in buffers."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


def _told(update: _Update) -> dict[str, float]:
    """What an update, which has been made, and its optimizer tell, by name."""
    moved = [p.detach() - before for p, before in zip(update.params, update.before, strict=True)]
    found: dict[str, list[Products]] = {}
    for p, own in zip(update.params, products(update.grads, moved, update.before), strict=True):
        found.setdefault(update.layers[p], []).append(own)
    layers = {name: Products.sum(many) for name, many in found.items()}
    prefix = f"{update.name}/" if update.name else ""
    values: dict[str, float] = {}
    if layers:
        whole = Products.sum(list(layers.values()))
        values |= {f"{prefix}curvature/angle": whole.angle, f"{prefix}curvature/update_ratio": whole.update_ratio}
        values[f"{prefix}curvature/decrease_linear"] = -whole.gu
        quadratic = _asked(update.optimizer, "quadratic", dict(zip(update.params, moved, strict=True)))
        if quadratic is not None:
            values[f"{prefix}curvature/decrease_quadratic"] = -whole.gu - quadratic / 2
    told = {name or ROOT: row for name, row in (_asked(update.optimizer, "layer_diagnostics") or {}).items()}
    for name, own in layers.items():
        row = {"angle": own.angle, "update_ratio": own.update_ratio} | told.get(name, {})
        values |= {f"curvature.{key}/{name}": value for key, value in row.items()}
    return values


def _asked(optimizer: Optimizer, method: str, *arguments: Any) -> Any:
    """What an optimizer answers, inside all wrappers; None if it knows no such question."""
    own = getattr(innermost(optimizer), method, None)
    return None if own is None else own(*arguments)
