"""Which parameters have a length together, and these lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Units:
    """Which parameters have a length together.

    Args:
        params: in their order.
        places: the unit of each, int64 ``[len(params)]``.
        count: of units.
    """

    def __init__(self, params: list[Tensor], places: Tensor, count: int) -> None:
        self.params, self.count = params, count
        self._places, self._where = places, [(p.device, p.dtype) for p in params]
        self._roots: Tensor | None = None

    def are_of(self, params: list[Tensor]) -> bool:
        """Whether these are the same parameters, and where they were."""
        same = len(params) == len(self.params) and all(p is q for p, q in zip(params, self.params, strict=True))
        return same and self._where == [(p.device, p.dtype) for p in params]

    def norms(self, tensors: list[Tensor]) -> Tensor:
        """Norms of the units of tensors as many as there are parameters, ``[count]``."""
        squares = norms(tensors).to(self._places.device).square()
        return squares.new_zeros(self.count).index_add(0, self._places, squares).sqrt()

    def roots(self, scales: Sequence[float | Tensor] | None = None) -> Tensor:
        """Square roots of the numbers of parameters, each parameter's as often as its scale says, ``[count]``."""
        if scales is None and self._roots is not None:
            return self._roots
        dtype = torch.float64 if any(dtype == torch.float64 for _, dtype in self._where) else torch.float32
        sizes = torch.tensor([float(p.numel()) for p in self.params], dtype=dtype)
        if scales is not None:
            sizes = sizes * torch.tensor([float(s) for s in scales], dtype=dtype).square()
        sizes = sizes.to(self._places.device, non_blocking=True)
        found = sizes.new_zeros(self.count).index_add(0, self._places, sizes).sqrt()
        if scales is None:
            self._roots = found
        return found

    def spread(self, values: Tensor) -> list[Tensor]:
        """Values of units, for each parameter, where it is."""
        each = values[self._places].unbind()
        return [value.to(p.device) for value, p in zip(each, self.params, strict=True)]


def norms(tensors: list[Tensor]) -> Tensor:
    """Norms of tensors, ``[len(tensors)]``, in float32 at least."""
    if not tensors:
        return torch.zeros(0)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    found = torch._foreach_norm(tensors, 2, dtype=dtype)
    return torch.stack([n.to(tensors[0].device) for n in found])
