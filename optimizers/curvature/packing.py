"""Matrices without what is said twice: a symmetric or triangular ``[n, d, d]`` in little more than half of it.

Bands of rows travel from their first entry to the diagonal's block, which is whole: a copy a band, and no index.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Size, Tensor

#: How much of a tensor has to be known: all; of matrices, the lower triangle, which the upper one mirrors, or beside
#: which there are zeros; or the upper one, likewise.
Form = Literal["full", "symmetric", "lower", "upper"]

#: Bands of a matrix, and rows of a band at least: copies of less cost more than what they leave out.
BANDS, ROWS = 16, 32


def _bands(d: int, form: Form) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of each band, the columns of it that are kept, and those that are not."""
    rows = max(ROWS, -(-d // BANDS))
    for start in range(0, d, rows):
        stop = min(start + rows, d)
        if form == "upper":
            yield slice(start, stop), slice(start, d), slice(0, start)
        else:
            yield slice(start, stop), slice(0, stop), slice(stop, d)


def packed_size(shape: tuple[int, ...] | Size, form: Form) -> int:
    """How many numbers ``pack_`` makes of a tensor.

    Args:
        shape: the tensor's.
        form: see ``Form``.
    """
    if form == "full":
        return Size(shape).numel()
    sizes = ((rows.stop - rows.start) * (kept.stop - kept.start) for rows, kept, _ in _bands(shape[-1], form))
    return shape[0] * sum(sizes)


def _parts(tensor: Tensor, packed: Tensor, form: Form) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    offset, n = 0, len(tensor)
    for rows, kept, rest in _bands(tensor.shape[-1], form):
        height, width = rows.stop - rows.start, kept.stop - kept.start
        yield rows, kept, rest, packed[offset : offset + n * height * width].view(n, height, width)
        offset += n * height * width


def pack_(packed: Tensor, tensor: Tensor, form: Form) -> Tensor:
    """Write a tensor's numbers into a vector, those that another one tells left out.

    Args:
        packed: of ``packed_size``; filled.
        tensor: ``[n, d, d]`` where the form is not ``full``.
        form: see ``Form``.
    """
    if form == "full":
        packed.view(tensor.shape).copy_(tensor)
    else:
        for rows, kept, _, part in _parts(tensor, packed, form):
            part.copy_(tensor[:, rows, kept])
    return packed


def unpack_(tensor: Tensor, packed: Tensor, form: Form) -> Tensor:
    """Inverse of ``pack_``, in place.

    Args:
        tensor: to be filled.
        packed: what ``pack_`` made of another one of this shape.
        form: see ``Form``.
    """
    if form == "full":
        return tensor.copy_(packed.view(tensor.shape))
    for rows, kept, rest, part in _parts(tensor, packed, form):
        tensor[:, rows, kept] = part
        if form == "symmetric":
            tensor[:, : rows.start, rows] = part[..., : rows.start].mT
        else:
            tensor[:, rows, rest] = 0
    return tensor


def mirror_(tensor: Tensor) -> Tensor:
    """Make a matrix exactly as symmetric as ``unpack_`` makes it of what ``pack_`` has left of it, in place."""
    for rows, kept, _ in _bands(tensor.shape[-1], "symmetric"):
        tensor[:, : rows.start, rows] = tensor[:, rows, kept][..., : rows.start].mT
    return tensor
