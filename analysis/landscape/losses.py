"""What a model loses at a point: weights are put into it in place, BatchNorm is seen to, a fixed set is evaluated."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from analysis.landscape.fused import Fused
from analysis.landscape.plane import Plane, Weights
from analysis.landscape.ways import Way
from data.base import BatchLoader
from optimizers.averaging import batch_norms, recalibrate
from training.loop import rng
from training.loop.precision import DTYPES, Precision
from training.runs.evaluation import evaluate
from training.show.snapshots import put, state
from training.tasks.task import Task

Statistics = Literal["estimated", "fixed"]
Format = Literal["fp32", "bf16"]
#: Where to evaluate: coordinates in the plane, or the numbers of a way and of one of its snapshots.
Point = tuple[Literal["plane"], tuple[float, ...]] | tuple[Literal["snapshot"], tuple[int, int]]


class Examples:
    """A few examples that stay the same, as a loader of them.

    Args:
        batches: inputs and targets.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.batches = list(batches)
        self.num_examples = sum(len(targets) for _, targets in self.batches)
        if not self.num_examples:
            raise ValueError("examples must be at least one, and the set has none")

    @classmethod
    def first(cls, loader: BatchLoader, count: int, batch_size: int = 100) -> Examples:
        """The first examples that a loader serves, in batches of another size.

        Those of a training set are what training sees in its first epoch: shuffled and, where the data set augments,
        augmented; they are the same whenever they are asked for.

        Args:
            loader: of any split.
            count: how many, or all if it has fewer.
            batch_size: of the new batches, for speed alone.

        Raises:
            ValueError: count is below 1, or the loader has no examples.
        """
        if count < 1:
            raise ValueError(f"examples must be at least 1, got {count}")
        taken: list[tuple[Tensor, Tensor]] = []
        for inputs, targets in loader.epoch(0):
            room = count - sum(len(t) for _, t in taken)
            taken.append((inputs[:room], targets[:room]))
            if room <= len(targets):
                break
        if not taken:
            raise ValueError("examples must be at least one, and the set has none")
        inputs, targets = (torch.cat(parts) for parts in zip(*taken, strict=True))
        return cls(list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True)))

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `data.BatchLoader`."""
        return iter(self.batches[start:])


class Ground:
    """A model over the points of a plane, and over the snapshots of ways.

    Args:
        model: at the point whose buffers, such as BatchNorm's statistics, are the plane's. It is borrowed: `restored`
            gives it back as it was.
        task: says what is measured.
        examples: on which.
        plane: a line or a plane.
        ways: whose snapshots can be evaluated, in full, not only where they are projected to.
        statistics: of BatchNorm: ``estimated`` anew at each point, plain means over `calibrate` examples; or ``fixed``:
            in the plane those of the model, at a snapshot those that the run had there.
        calibrate: examples that statistics are estimated on, the first of `examples`; whole batches are taken.
        precision: ``fp32``, or ``bf16`` for the forward passes.

    Raises:
        ValueError: for a value out of its range, or snapshots of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        examples: Examples,
        plane: Plane,
        ways: Sequence[Way] = (),
        statistics: Statistics = "estimated",
        calibrate: int = 500,
        precision: Format = "fp32",
    ) -> None:
        if precision not in get_args(Format):
            raise ValueError(f"precision must be one of {', '.join(get_args(Format))}, got {precision!r}")
        if statistics not in get_args(Statistics):
            raise ValueError(f"batch_norm must be one of {', '.join(get_args(Statistics))}, got {statistics!r}")
        if calibrate < 1:
            raise ValueError(f"calibrate must be at least 1, got {calibrate}")
        self.model, self.task, self.examples, self.plane = model, task, examples, plane
        self.ways, self.statistics, self.calibrate = tuple(ways), statistics, calibrate
        weights, self._buffers = state(model)
        for name, tensor in plane.origin.items():
            if name not in weights or weights[name].shape != tensor.shape:
                raise ValueError(f"runs must have the model that is evaluated, which has no {name} of this shape")
        self._names = list(plane.origin)
        self.precision = precision
        # The layout of images in which convolutions on the CPU are fastest, too.
        self._precision = Precision(precision, next(model.parameters()).device, channels_last=True)
        self._origin = self._placed(plane.origin)
        self._directions = [self._placed({n: d[n] for n in self._names if n in d}) for d in plane.directions]

    def _placed(self, weights: Weights) -> dict[str, Tensor]:
        """Weights in the formats and on the device of the model's parameters, once for all points."""
        own = dict(self.model.named_parameters())
        pairs = {name: torch.view_as_complex(w) if own[name].is_complex() else w for name, w in weights.items()}
        return {name: w.to(own[name].device, own[name].dtype) for name, w in pairs.items()}

    @property
    def has_batch_norm(self) -> bool:
        """Whether there are statistics to speak of."""
        return bool(batch_norms(self.model))

    @property
    def _shown(self) -> list[Tensor]:
        """The batches that statistics are estimated on."""
        size = len(self.examples.batches[0][1])
        return [inputs for inputs, _ in self.examples.batches[: -(-self.calibrate // size)]]

    @property
    def calibrated(self) -> int:
        """How many examples statistics are estimated on."""
        return sum(map(len, self._shown))

    @torch.no_grad()
    def measure(self, point: Point) -> dict[str, float]:
        """The task's metrics at a point; the model stays there."""
        kind, place = point
        if kind == "plane":
            self._go(place)
            put(self.model, {}, self._buffers)
        else:
            way = self.ways[int(place[0])]
            snapshot = next(way.source.chosen([way.indices[int(place[1])]]))
            put(self.model, snapshot.weights, snapshot.buffers)
        if self.statistics == "estimated" and self.has_batch_norm:
            recalibrate(self.model, enumerate(self._shown), lambda part: self._show(*part))
        if self._fused is None:
            return evaluate(self.model, self.examples, self.task, self._precision)
        self._fused.refresh()
        return evaluate(self._fused.model, self.examples, self.task, self._precision)

    @cached_property
    def _fused(self) -> Fused | None:
        """The model as it is evaluated, where that is faster and the same."""
        inputs = self._precision.prepare(self.examples.batches[0][0])
        with rng.observed(self.model, inputs.device):
            try:
                return Fused(self.model, inputs, DTYPES[self.precision])
            except ValueError:
                return None

    def __getstate__(self) -> dict[str, Any]:
        """All but what a process makes for itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_fused"}

    def _show(self, part: int, inputs: Tensor) -> None:
        self.task.calibrate(self.model, inputs, self._precision, part)

    def _go(self, coordinates: Sequence[float]) -> None:
        """Put the weights at coordinates into the model, by the same operations as `Plane.at`."""
        own = dict(self.model.named_parameters())
        torch._foreach_copy_([own[name].data for name in self._names], [self._origin[name] for name in self._names])
        for x, direction in zip(coordinates, self._directions, strict=True):
            torch._foreach_add_([own[name].data for name in direction], list(direction.values()), alpha=float(x))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """After the block the model has the weights, buffers and modes that it had before, bit for bit."""
        before = {name: tensor.detach().clone() for name, tensor in _tensors(self.model).items()}
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in _tensors(self.model).items():
                    tensor.copy_(before[name])
            for module, mode in modes:
                module.training = mode

    def fingerprint(self, points: Sequence[Point]) -> str:
        """Sixteen hexadecimal digits of all that the values at some points depend on, but for the machine."""
        found = hashlib.sha256()
        facts: list[Any] = [self.statistics, self.calibrate, self.precision]
        facts += [type(self.task).__name__, repr(self.model), list(points)]
        found.update(repr(facts).encode())
        tensors = [*self._origin.values(), *(t for d in self._directions for t in d.values())]
        tensors += [*self._buffers.values(), *(t for batch in self.examples.batches for t in batch)]
        frozen = [p for name, p in self.model.named_parameters() if name not in self._origin]
        for tensor in (*tensors, *frozen):
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for way in self.ways:
            found.update(f"{way.indices} {way.source.digest()}".encode())
        return found.hexdigest()[:16]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
