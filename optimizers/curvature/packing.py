"""Matrices without what is said twice: a symmetric or triangular ``[n, d, d]`` in a little more than half of it.

The two triangles on the diagonal of ``[[P, .], [Q, R]]`` fit into one rectangle, the transposed R above P, and Q is a
second one (as LAPACK's rectangular full packed format has it): a few copies of whole blocks, and no index.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

#: How much of a tensor has to be known: all; of matrices, the lower triangle, which the upper one mirrors or is zero.
Form = Literal["full", "symmetric", "lower"]


def _rectangle(shape: tuple[int, ...] | torch.Size) -> tuple[int, int, int]:
    """Sizes of P, of R, and the width of the rectangle that holds both."""
    second = shape[-1] // 2
    first = shape[-1] - second
    return first, second, first + (first == second)


def packed_size(shape: tuple[int, ...] | torch.Size, form: Form) -> int:
    """How many numbers ``pack`` makes of a tensor.

    Args:
        shape: the tensor's.
        form: see ``Form``.
    """
    if form == "full":
        return torch.Size(shape).numel()
    first, second, width = _rectangle(shape)
    return shape[0] * first * (width + second)


def pack(tensor: Tensor, form: Form) -> Tensor:
    """A tensor's numbers as a vector, those that another one tells left out.

    Args:
        tensor: ``[n, d, d]`` where the form is not ``full``.
        form: see ``Form``.
    """
    if form == "full":
        return tensor.reshape(-1)
    first, second, width = _rectangle(tensor.shape)
    rectangle = tensor.new_zeros(len(tensor), first, width)
    rectangle[..., :first] = tensor[:, :first, :first].tril()
    rectangle[:, :second, 1 : 1 + second] += tensor[:, first:, first:].mT.triu()
    return torch.cat([rectangle.reshape(-1), tensor[:, first:, :first].reshape(-1)])


def unpack_(tensor: Tensor, packed: Tensor, form: Form) -> Tensor:
    """Inverse of ``pack``, in place.

    Args:
        tensor: to be filled.
        packed: what ``pack`` made of another one of this shape.
        form: see ``Form``.
    """
    if form == "full":
        return tensor.copy_(packed.view_as(tensor))
    n = len(tensor)
    first, second, width = _rectangle(tensor.shape)
    rectangle, below = packed.split([n * first * width, n * first * second])
    rectangle, below = rectangle.view(n, first, width), below.view(n, second, first)
    upper = rectangle[:, :second, 1 : 1 + second]
    tensor[:, :first, :first] = rectangle[..., :first].tril()
    tensor[:, first:, :first] = below
    tensor[:, first:, first:] = upper.triu().mT
    if form == "lower":
        tensor[:, :first, first:] = 0
    else:
        tensor[:, :first, :first] += rectangle[..., :first].tril(-1).mT
        tensor[:, :first, first:] = below.mT
        tensor[:, first:, first:] += upper.triu(1)
    return tensor
