"""What operations cost on this machine: each is called a few times on numbers of its shapes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .operations import CUBIC, SOLVES, Like, Operation

#: Multiplications and additions, and bytes, from which on an operation is timed at smaller shapes and scaled.
LIMIT_FLOPS, LIMIT_BYTES = 5e8, 5e7

#: Of the budget, what one call may take of a decomposition or a solve, which go the faster, the larger they are: these
#: are timed as large as that allows. Seconds from which on one call is enough.
SHARE, LONG = 1 / 20, 0.05

#: Bytes from which on operands are taken from memory rather than caches: what a step touches once is not in these.
COLD = 2**18

#: What Python does between two calls, in calls that do nothing. Measured on nets of tiny layers, where it is all that
#: counts: from 1 (torch's Adam) to 5 (K-FAC, EKFAC).
BETWEEN = 3.0

#: No dimension is made smaller than this.
SMALL = 64


class Prices:
    """Seconds of operations, timed when first asked for.

    Args:
        clock: seconds so far; ``time.process_time``, with one thread, on a machine that others use.
        budget: seconds to spend on timing; what is left then is priced by what is alike and was timed.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, budget: float = 2.0) -> None:
        self.clock, self.budget = clock, budget
        self.spent = 0.0
        self.timed = 0
        self._known: dict[Operation, float] = {}
        self._ratios: dict[str, list[float]] = {}  # timed over guessed
        self._rate, self._bandwidth, self._call = self._machine()

    def _machine(self) -> tuple[float, float, float]:
        """Multiplications and additions a second, bytes a second, and seconds of a call that does nothing."""
        a = torch.rand(384, 384)
        product = _least(lambda: a @ a, self.clock)
        b = torch.rand(2**21)
        passed = _least(lambda: b.add_(1.0), self.clock)
        view = _least(lambda: a.view(-1), self.clock)
        return 2 * 384**3 / product, 2 * b.numel() * 4 / passed, view

    def guess(self, operation: Operation) -> float:
        """Seconds by arithmetic and memory alone."""
        return self._call + operation.flops() / self._rate + operation.bytes() / self._bandwidth

    def guessed(self, weighted: Mapping[Operation, float]) -> float:
        """Seconds of operations by arithmetic and memory alone, each as often as it is called."""
        return sum(times * (self.guess(operation) + BETWEEN * self._call) for operation, times in weighted.items())

    def learn(self, weighted: Mapping[Operation, float]) -> None:
        """Time operations, those that matter most first, until the budget is spent.

        Args:
            weighted: how often each is called.
        """
        order = sorted(weighted, key=lambda op: -weighted[op] * self.guess(op) if not _is_view(op) else 0.0)
        for operation in order:
            self.seconds(operation)

    def total(self, weighted: Mapping[Operation, float]) -> float:
        """Seconds of operations, each as often as it is called, and of what Python does between them."""
        between = BETWEEN * self._call
        return sum(times * (self.seconds(operation) + between) for operation, times in weighted.items())

    def seconds(self, operation: Operation) -> float:
        """Of one call."""
        if operation in self._known:
            return self._known[operation]
        if _is_view(operation):
            return self._call
        guessed = self.guess(operation)
        if self.spent < self.budget:
            began = self.clock()
            found = self._measured(operation)
            self.spent += self.clock() - began
            if found is not None:
                self.timed += 1
                self._ratios.setdefault(operation.name, []).append(found / guessed)
                self._known[operation] = found
                return found
        alike = self._ratios.get(operation.name)
        return guessed * (statistics.median(alike) if alike else 1.0)

    def _measured(self, operation: Operation) -> float | None:
        small = operation
        while self._long(small) and (smaller := _smaller(small)) is not None:
            small = smaller
        for attempt in (small, operation) if small is not operation else (operation,):
            if attempt.bytes() > 20 * LIMIT_BYTES:
                return None
            try:
                return self._scaled(operation, attempt)
            except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
                continue  # its arguments depend on each other in a way that is not seen here
        return None

    def _long(self, operation: Operation) -> bool:
        """Whether an operation would take too long to be timed."""
        if _blocked(operation):
            return self.guess(operation) > SHARE * self.budget
        return operation.flops() > LIMIT_FLOPS or operation.bytes() > LIMIT_BYTES

    def _scaled(self, operation: Operation, small: Operation) -> float:
        """Seconds of an operation by those of a smaller one.

        Of one that goes through a matrix by blocks, two sizes are timed, and take a n^3 + b n^2 seconds.
        """
        if operation is small:
            return self._call_of(small)
        if not small.flops():
            return self._call_of(small) * operation.bytes() / max(small.bytes(), 1)
        half = _smaller(small) if _blocked(operation) else None
        before = self._call_of(half) if half is not None else 0.0
        found, more = self._call_of(small), operation.flops() / small.flops()
        square = 0.0
        if half is not None and (r := _side(small) / _side(half)) > 1:
            square = min(max((before * small.flops() / half.flops() - found) / (r - 1), 0.0), found)
        return (found - square) * more + square * more * _side(small) / _side(operation)

    def _call_of(self, operation: Operation) -> float:
        """Seconds of a call on made-up numbers."""
        copies = 1 if operation.bytes() < COLD else max(1, min(4, int(2**25 / operation.bytes())))
        made = [_made(operation) for _ in range(copies)]
        turn = iter(range(10**9))

        def call() -> object:
            args, kwargs = made[next(turn) % copies]
            return operation.function(*args, **kwargs)

        with torch.no_grad():
            return _least(call, self.clock)


def _least(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of a call: the median of some, after one that does not count unless it takes long."""
    began = clock()
    call()
    first = clock() - began
    times: list[float] = [first] if first > LONG else []
    while sum(times) + first < 2 * LONG and (len(times) < 3 or (sum(times) < 1e-3 and len(times) < 25)):
        began = clock()
        call()
        times.append(clock() - began)
    return statistics.median(times)


def _blocked(operation: Operation) -> bool:
    """Whether an operation goes through a matrix by blocks, the larger ones at a better pace."""
    return operation.name in CUBIC or operation.name in SOLVES


def _side(operation: Operation) -> int:
    """The side of the matrix that is decomposed, or solved with: the largest of all sides."""
    return max(size for like in operation.likes() for size in like.size[-2:])


def _is_view(operation: Operation) -> bool:
    """Whether an operation looks at its argument in another way, and does nothing."""
    aliases = [a.alias_info for a in operation.function._schema.arguments if a.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _smaller(operation: Operation) -> Operation | None:
    """The operation at half of one of its sizes, wherever that occurs; None if that would be too small."""
    likes = operation.likes()
    batch = likes[0].size[0] if "convolution" in operation.name and likes[0].size else 0
    sizes = [size for like in likes for size in like.size]
    value = batch if batch > 1 else max(sizes, default=0)
    if value < 2 * SMALL and value != batch:
        return None
    half = value // 2
    results = tuple(_halved(like, value, half) for like in operation.results)
    arguments = tuple(_halved(a, value, half) for a in operation.arguments)
    named = tuple((key, _halved(a, value, half)) for key, a in operation.named)
    return Operation(operation.function, arguments, named, results)


def _halved(value: Any, size: int, half: int) -> Any:
    if isinstance(value, Like):
        order = sorted(range(len(value.size)), key=lambda d: -value.stride[d])
        sizes = tuple(half if n == size else n for n in value.size)
        strides, step = [0] * len(sizes), 1
        for d in reversed(order):
            strides[d] = step if value.stride[d] else 0
            step *= sizes[d] if value.stride[d] else 1
        return Like(sizes, tuple(strides), value.dtype)
    if isinstance(value, tuple):
        return tuple(_halved(item, size, half) for item in value)
    return half if type(value) is int and value == size else value


def _made(operation: Operation) -> tuple[list[Any], dict[str, Any]]:
    """Arguments with numbers in them."""
    definite = operation.name in CUBIC or "triangular" in operation.name or "cholesky" in operation.name
    args = [_real(value, definite) for value in operation.arguments]
    return args, {key: _real(value, definite) for key, value in operation.named}


def _real(value: Any, definite: bool) -> Any:
    if isinstance(value, tuple):
        return [_real(item, definite) for item in value]
    if not isinstance(value, Like):
        return value
    order = sorted(range(len(value.size)), key=lambda d: -value.stride[d])
    sizes = [value.size[d] if value.stride[d] else 1 for d in order]
    inverse = [order.index(d) for d in range(len(order))]
    tensor: Tensor
    if value.dtype.is_floating_point or value.dtype.is_complex:
        tensor = torch.rand(sizes, dtype=value.dtype if value.dtype.itemsize > 2 else torch.float32).to(value.dtype)
        if definite and len(sizes) >= 2 and sizes[-1] == sizes[-2]:
            tensor = tensor @ tensor.mT / sizes[-1] + torch.eye(sizes[-1], dtype=tensor.dtype)
    else:
        tensor = torch.zeros(sizes, dtype=value.dtype)
    return tensor.permute(inverse).expand(value.size)


def added(counters: Iterable[tuple[Mapping[Operation, Any], float]]) -> dict[Operation, float]:
    """Counts, each times its weight, in one."""
    found: dict[Operation, float] = {}
    for counts, weight in counters:
        for operation, times in counts.items():
            found[operation] = found.get(operation, 0.0) + weight * times
    return found
