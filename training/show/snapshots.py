"""The file of a run's weights over time: the first in full, then float16 differences, each to what the last one gave.

A snapshot is read back as ``w_k = w_{k-1} + 2^(e - 15) h_k`` with ``h_k`` the float16 of ``2^(15 - e) (θ_k - w_{k-1})``
and ``2^e`` above the tensor's largest difference. Since the difference is to what will be read, not to what was there,
errors do not add up: an entry is off by at most 2^-11 of its own difference and 2^-39 of the tensor's largest one, and
by the rounding of one addition.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from training.errors import UserError
from training.runs.folder import Record

#: Of a run folder.
NAME = "trajectory.snapshots"
FORMAT = "curvlab snapshots 1"
# 2^TOP is the limit of scaled differences; float16 ends a little below 2^16.
TOP = 15
# Smaller exponents would scale beyond float32.
LOWEST = -100
_HEAD = struct.Struct("<Qd")  # step, epoch
_NUMBER = struct.Struct("<I")  # lengths, checksums


@dataclass(frozen=True)
class Snapshot:
    """The model at one step.

    Attributes:
        step: optimizer steps done.
        epoch: passes over the training set.
        weights: trainable parameters by name, in float32 (float64 where the model has it), on the CPU.
        buffers: floating-point buffers by name (statistics of BatchNorm), likewise, exact.
    """

    step: int
    epoch: float
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """What a file of snapshots holds, and where.

    Attributes:
        weights: name, shape and format of each trainable parameter.
        buffers: the same of each floating-point buffer.
    """

    weights: dict[str, tuple[tuple[int, ...], str]]
    buffers: dict[str, tuple[tuple[int, ...], str]]

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """The layout of a model's snapshots."""
        return cls(*({name: (tuple(t.shape), str(t.dtype)[6:]) for name, t in part.items()} for part in state(model)))

    @cached_property
    def counts(self) -> dict[str, int]:
        """Entries of each parameter."""
        return {name: math.prod(shape) for name, (shape, _) in self.weights.items()}

    @cached_property
    def frame(self) -> int:
        """Bytes of a snapshot after the first."""
        scales, halves = 2 * len(self.weights), 2 * sum(self.counts.values())
        return _HEAD.size + scales + halves + self._bytes(self.buffers) + _NUMBER.size

    def head(self) -> bytes:
        """The beginning of the file: the layout itself."""
        text = json.dumps({"format": FORMAT, "weights": self.weights, "buffers": self.buffers}).encode()
        return _NUMBER.pack(len(text)) + text

    @cached_property
    def first(self) -> int:
        """Bytes of the file with the first snapshot alone."""
        full = self._bytes(self.weights) + self._bytes(self.buffers)
        return len(self.head()) + _HEAD.size + full + _NUMBER.size

    def size(self, snapshots: int) -> int:
        """Bytes of a file of so many snapshots, the first included."""
        return self.first + (snapshots - 1) * self.frame

    @staticmethod
    def _bytes(part: Mapping[str, tuple[tuple[int, ...], str]]) -> int:
        return sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in part.values())


def state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a snapshot is taken of: trainable parameters and floating-point buffers by name, copies on the CPU.

    Complex ones are pairs of real numbers. Formats below 32 bits become float32.
    """
    def real(tensor: Tensor) -> Tensor:
        tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        return tensor.to("cpu", torch.float64 if tensor.dtype == torch.float64 else torch.float32, copy=True)

    weights = {name: real(p) for name, p in model.named_parameters() if p.requires_grad}
    buffers = {n: real(b) for n, b in model.named_buffers() if b.is_floating_point() or b.is_complex()}
    return weights, buffers


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None) -> None:
    """Give a model the values of a snapshot, in place; what they do not name stays.

    Args:
        model: whose parameters and buffers have the snapshot's names and shapes.
        weights: by name, as ``state`` gives them.
        buffers: likewise; None: they stay.
    """
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in (*weights.items(), *(buffers or {}).items()):
        place = places[name]
        (torch.view_as_real(place) if place.is_complex() else place).copy_(value)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().numpy().reshape(-1)


def _sealed(content: bytes) -> bytes:
    return content + _NUMBER.pack(zlib.crc32(content))


class Writer:
    """Adds snapshots to a file.

    Args:
        path: of the file.
        model: whose snapshots they are.
        offset: where the last snapshot to believe in ends; 0: a new file, which begins with the next one.

    Raises:
        UserError: what is there is damaged, or of another model.
        WriteError: it cannot be written.
    """

    def __init__(self, path: Path, model: nn.Module, offset: int = 0) -> None:
        self.layout = Layout.of(model)
        self._last: dict[str, Tensor] | None = None
        self.step: int | None = None
        self._record = Record(path, offset)
        try:
            if offset:
                read = Snapshots(path)
                if read.layout != self.layout or read.end != offset:
                    raise UserError(f"{path} holds other snapshots than the run's checkpoint says.")
                last = read[-1]
                self._last, self.step = last.weights, last.step
        except BaseException:
            self._record.close()
            raise

    @property
    def offset(self) -> int:
        """Bytes of the file; all of it is on the disk when this has been read."""
        self._record.sync()
        return self._record.size

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._record.size

    def append(self, model: nn.Module, step: int, epoch: float) -> bool:
        """Add the model as it is; whether its weights are finite, for others are not added.

        Raises:
            WriteError: it cannot be written.
        """
        weights, buffers = state(model)
        if not all(bool(t.isfinite().all()) for t in weights.values()):
            return False
        kept = b"".join(_array(b).tobytes() for b in buffers.values())
        if self._last is None:
            full = b"".join(_array(w).tobytes() for w in weights.values())
            self._record.append(self.layout.head() + _sealed(_HEAD.pack(step, epoch) + full + kept))
            self._last = weights
        else:
            scales, halves = [], []
            for name, weight in weights.items():
                last = self._last[name]
                difference = weight - last
                largest = difference.abs().max() if difference.numel() else difference.new_zeros(())
                scale = max(int(torch.frexp(largest)[1]), LOWEST)
                half = (difference * 2.0 ** (TOP - scale)).half()
                scales.append(scale)
                halves.append(_array(half).tobytes())
                last.add_(half.to(last.dtype) * 2.0 ** (scale - TOP))
            moved = np.array(scales, dtype="<i2").tobytes() + b"".join(halves)
            self._record.append(_sealed(_HEAD.pack(step, epoch) + moved + kept))
        self.step = step
        return True

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        self._record.close()


class Snapshots:
    """A run's snapshots, read from their file as they are asked for: a sequence, of models or of single parameters.

    Half a snapshot at the end, of a run that is under way or was killed, is left out.

    Args:
        path: of the file, or of the run folder that holds it.

    Attributes:
        path: of the file.
        layout: what it holds.
        steps: of the snapshots, in order.
        epochs: likewise.
        end: where the last whole one ends, in bytes.

    Raises:
        UserError: there is none, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path / NAME if path.is_dir() else path
        if not self.path.is_file() or not self.path.stat().st_size:
            raise UserError(f"{path} has no snapshots of its weights ({NAME}): train with callbacks=trajectory.")
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        self.layout, begin = self._read_head()
        self.steps: list[int] = []
        self.epochs: list[float] = []
        self._places: list[int] = []
        self._latest: tuple[int, dict[str, Tensor]] = -1, {}  # asked for last, from which later ones are made
        self.end, length = begin, self.layout.first - len(self.layout.head())
        while self.end + length <= len(self._bytes):
            content = self._bytes[self.end : self.end + length].data
            if zlib.crc32(content[: -_NUMBER.size]) != _NUMBER.unpack(content[-_NUMBER.size :])[0]:
                raise UserError(
                    f"{self.path} is damaged at its snapshot {len(self.steps) + 1}: train the run again, or take the "
                    "file from where it was copied."
                )
            step, epoch = _HEAD.unpack(content[: _HEAD.size])
            self.steps.append(step)
            self.epochs.append(epoch)
            self._places.append(self.end + _HEAD.size)
            self.end, length = self.end + length, self.layout.frame
        if not self.steps:
            raise UserError(f"{self.path} holds no whole snapshot yet: wait for the run to take one.")

    def _read_head(self) -> tuple[Layout, int]:
        try:
            (length,) = _NUMBER.unpack(self._bytes[: _NUMBER.size].data)
            head = json.loads(bytes(self._bytes[_NUMBER.size : _NUMBER.size + length]))
            if head["format"] != FORMAT:
                raise ValueError
            parts = ({n: (tuple(shape), kind) for n, (shape, kind) in head[p].items()} for p in ("weights", "buffers"))
            return Layout(*parts), _NUMBER.size + length
        except (struct.error, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is no file of snapshots, or its beginning is damaged.") from error

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def names(self) -> list[str]:
        """Of the parameters."""
        return list(self.layout.weights)

    def __iter__(self) -> Iterator[Snapshot]:
        return self.chosen(range(len(self)))

    def __getitem__(self, index: int) -> Snapshot:
        return next(self.chosen([range(len(self))[index]]))

    def chosen(self, indices: Sequence[int]) -> Iterator[Snapshot]:
        """Some snapshots, one after the other.

        Args:
            indices: of them; it is quickest in ascending order.

        Yields:
            Each of them.
        """
        for wanted in indices:
            index, last = self._latest if self._latest[0] <= wanted else (-1, {})
            while index < wanted:
                index += 1
                last = {name: self._next(index, name, last.get(name)) for name in self.layout.weights}
            self._latest = index, last
            weights = {name: weight.clone() for name, weight in last.items()}
            yield Snapshot(self.steps[index], self.epochs[index], weights, self._buffers(index))

    def series(self, name: str, indices: Sequence[int] | None = None) -> Tensor:
        """One parameter through the snapshots, ``[snapshots, *shape]``.

        Args:
            name: of the parameter.
            indices: of the snapshots, in ascending order; None: all.
        """
        wanted = range(len(self)) if indices is None else indices
        found, value = [], None
        for index in range(max(wanted) + 1):
            value = self._next(index, name, value)
            if index in wanted:
                found.append(value)
        return torch.stack(found)

    def digest(self) -> str:
        """Sixteen hexadecimal digits of all snapshots."""
        return hashlib.sha256(self._bytes[: self.end].data).hexdigest()[:16]

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Snapshots, (self.path,)

    def _next(self, index: int, name: str, last: Tensor | None) -> Tensor:
        """A parameter at a snapshot, from the one before."""
        shape, kind = self.layout.weights[name]
        names, count = list(self.layout.weights), self.layout.counts[name]
        if last is None:
            sizes = [Layout._bytes({n: self.layout.weights[n]}) for n in names[: names.index(name)]]
            begin = self._places[0] + sum(sizes)
            return self._tensor(begin, count, kind).reshape(shape)
        number = names.index(name)
        scale = int(self._bytes[self._places[index] + 2 * number :][:2].view("<i2")[0])
        before = sum(self.layout.counts[n] for n in names[:number])
        half = self._tensor(self._places[index] + 2 * len(names) + 2 * before, count, "float16").reshape(shape)
        return last + half.to(last.dtype) * 2.0 ** (scale - TOP)

    def _buffers(self, index: int) -> dict[str, Tensor]:
        sizes = {name: Layout._bytes({name: part}) for name, part in self.layout.buffers.items()}
        end = self._places[index + 1] - _HEAD.size if index + 1 < len(self) else self.end
        at = end - _NUMBER.size - sum(sizes.values())
        found = {}
        for name, (shape, kind) in self.layout.buffers.items():
            found[name] = self._tensor(at, math.prod(shape), kind).reshape(shape)
            at += sizes[name]
        return found

    def _tensor(self, begin: int, count: int, kind: str) -> Tensor:
        content = bytes(self._bytes[begin : begin + count * np.dtype(kind).itemsize])
        return torch.from_numpy(np.frombuffer(content, dtype=kind).copy())
