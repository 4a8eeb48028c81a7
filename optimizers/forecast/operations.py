"""The operations that code asks torch for, recorded while it runs on tensors without data."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

#: By operation; torch has no formula of the attention that it takes on processors.
FORMULAS = dict(flop_registry)
for _direction in ("", "_backward"):
    _alike = getattr(aten, f"_scaled_dot_product_flash_attention{_direction}")
    FORMULAS[getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{_direction}")] = flop_registry[_alike]

#: Makers of indices and marks, which are small and decide what code does: these have data.
MADE = {aten.arange.default, aten.arange.start, aten.arange.start_step}

#: Questions whose answer, True, is the exception: whether anything failed, is masked, is missing.
EXCEPTIONS = {aten.any.default, aten.any.dim, aten.any.dims}

#: Multiplications and additions of solves with [..., n, n], in n^2 a column.
SOLVES = {"linalg_solve_triangular": 1.0, "triangular_solve": 1.0, "cholesky_solve": 2.0}

#: Multiplications and additions of decompositions of [..., n, n], in n^3.
CUBIC = {
    "linalg_cholesky_ex": 1 / 3, "cholesky_inverse": 2 / 3, "_linalg_eigh": 9.0, "linalg_qr": 4 / 3,
    "geqrf": 4 / 3, "linalg_householder_product": 4 / 3, "linalg_inv_ex": 2.0, "_linalg_svd": 20.0,
    "linalg_eigvalsh": 4.0, "linalg_lu_factor_ex": 2 / 3, "_linalg_solve_ex": 2 / 3,
}  # fmt: skip


@dataclass(frozen=True)
class Like:
    """A tensor among an operation's arguments, without its data.

    Attributes:
        size: its shape.
        stride: its strides.
        dtype: its dtype.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of entries."""
        return torch.Size(self.size).numel()

    @property
    def bytes(self) -> int:
        """What these entries take."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Operation:
    """One call of one of torch's operations.

    Attributes:
        function: the operation.
        arguments: by position; tensors are ``Like``, lists are tuples.
        named: by name, in pairs.
        results: shapes of what it returns.
    """

    function: Any
    arguments: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]
    results: tuple[Like, ...]

    @property
    def name(self) -> str:
        """Without its namespace and overload, such as ``mm``."""
        return str(self.function._opname)

    def likes(self) -> list[Like]:
        """All tensors among the arguments."""
        return list(_likes((self.arguments, tuple(value for _, value in self.named))))

    def flops(self) -> float:
        """Multiplications and additions, of products, convolutions and decompositions; 0 of anything else."""
        if (count := FORMULAS.get(self.function.overloadpacket)) is not None:
            given = [_sized(value) for value in self.arguments]
            made = [torch.empty(like.size, device="meta") for like in self.results]
            with contextlib.suppress(TypeError, ValueError, IndexError, AttributeError):
                return float(count(*given, **{k: _sized(v) for k, v in self.named}, out_val=made[0] if made else None))
        likes = self.likes()
        if self.name in CUBIC and likes and len(likes[0].size) >= 2:
            *many, n, m = likes[0].size
            return CUBIC[self.name] * torch.Size(many).numel() * max(n, m) * min(n, m) ** 2
        if self.name in SOLVES and len(likes) > 1:
            first, second = likes[:2]
            matrix, columns = (first, second) if self.name == "linalg_solve_triangular" else (second, first)
            return SOLVES[self.name] * columns.numel * max(matrix.size[-2:])
        return 0.0

    def bytes(self) -> int:
        """What is read and written."""
        return sum(like.bytes for like in self.likes()) + sum(like.bytes for like in self.results)


def _likes(value: Any) -> Iterator[Like]:
    if isinstance(value, Like):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _likes(item)


def _sized(value: Any) -> Any:
    """An argument as the registry of formulas takes it."""
    if isinstance(value, Like):
        return torch.empty(value.size, device="meta", dtype=value.dtype)
    return [_sized(item) for item in value] if isinstance(value, tuple) else value


def _described(value: Any) -> Any:
    """An argument without data, hashable."""
    if isinstance(value, Tensor):
        return Like(tuple(value.shape), tuple(value.stride()), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(_described(item) for item in value)
    return None if isinstance(value, torch.Generator) else value


class Recording(TorchDispatchMode):
    """While active on top of a fake mode, counts operations, and answers what the code asks of data there is none of.

    Code that looks at numbers is told that all is well: what it asks of *all* entries holds, what it asks of *any* does
    not, numbers are 1, nothing is nonzero, and entries are different. Indices that it makes itself are real.

    Args:
        counting: whether operations are counted at all.

    Attributes:
        counts: how often each operation was called.
    """

    def __init__(self, counting: bool = True) -> None:
        super().__init__()
        self.counting = counting
        self.counts: Counter[Operation] = Counter()

    def taken(self) -> Counter[Operation]:
        """What was counted since the last time."""
        found, self.counts = self.counts, Counter()
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        named = dict(kwargs or {})
        given = list(_tensors_of(args)) + list(_tensors_of(tuple(named.values())))
        real = bool(given) and not any(isinstance(t, FakeTensor) for t in given) and func is not aten.lift_fresh.default
        if real or func in MADE or (func is aten.ones.default and named.get("dtype") is torch.bool):
            with _disable_current_modes():
                return func(*args, **named)
        if func in (aten._local_scalar_dense.default, aten.item.default):
            return _answer(args[0])
        if func is aten.nonzero.default:
            return args[0].new_empty((0, args[0].dim()), dtype=torch.int64)
        if func is aten._unique2.default:  # all of them are different
            flat = args[0].flatten()
            return flat, torch.empty_like(args[0], dtype=torch.int64), flat.new_empty((0,), dtype=torch.int64)
        if func in (aten.equal.default, aten.allclose.default):
            return True
        if named.get("generator") is not None:  # which belongs to a device, and the tensors here to none
            named["generator"] = None
        found = func(*args, **named)
        if self.counting and func.namespace == "aten":
            results = tuple(_described(t) for t in _tensors_of((found,)))
            described = tuple((key, value) for key, value in ((k, _described(v)) for k, v in named.items()))
            self.counts[Operation(func, _described(args), described, results)] += 1
        if func in EXCEPTIONS and isinstance(found, Tensor):
            found.exception = True  # type: ignore[attr-defined]
        return found


def _tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_of(item)


def _answer(tensor: Tensor) -> bool | int | float:
    """What code is told of a number."""
    constant = getattr(tensor, "constant", None)
    if constant is not None:
        with _disable_current_modes():
            return constant.item()
    if tensor.dtype is torch.bool:
        return not getattr(tensor, "exception", False)
    return 1.0 if tensor.is_floating_point() else 0
