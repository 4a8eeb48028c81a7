"""Layers ``y_t = W a_t + b``: per-example gradients and their inner products, from inputs and output gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer import Layer

#: Numbers that a temporary matrix of per-example gradients or of pairs of positions may hold.
ROOM = 2**24


class AffineLayer(Layer, ABC):
    """A layer ``y_t = W a_t + b``. Subclasses say how ``a`` is cut out of the input."""

    groups: int = 1
    d_in: int
    d_out: int

    @property
    def columns(self) -> int:
        """Width of the parameter matrix: d_in, and one more for the bias."""
        return self.d_in + self.has_bias

    @abstractmethod
    def patches(self, x: Tensor) -> Tensor:
        """``a`` without the bias entry: ``[groups, batch, shared, d_in]``."""

    @abstractmethod
    def gradients(self, g: Tensor) -> Tensor:
        """Output gradients as ``[groups, batch, shared, d_out]``."""

    @abstractmethod
    def input_square_sums(self, x: Tensor) -> tuple[Tensor, int]:
        """Squares of ``a`` summed over examples and positions, ``[groups, columns]``, and how many were summed."""

    @abstractmethod
    def gradient_square_sums(self, g: Tensor) -> Tensor:
        """Squares of ``g`` summed over examples and positions, ``[groups, d_out]``."""

    def rows(self, x: Tensor, g: Tensor) -> Tensor:
        """See Layer."""
        return (self.gradients(g).mT @ self.inputs(x)).transpose(0, 1).flatten(1)

    def gram(self, x: Tensor, g: Tensor) -> Tensor:
        """See Layer. Without shared positions ``(A Aᵀ) * (G Gᵀ)``; else by whichever takes fewer operations."""
        examples, shared = len(g), self.gradients(g[:1]).shape[2]
        if shared == 1:
            a, b = self.inputs(x).squeeze(2).double(), self.gradients(g).squeeze(2).double()
            return ((a @ a.mT) * (b @ b.mT)).sum(0)
        entries = self.columns * self.d_out
        formed = (shared + examples) * entries < examples * shared**2 * (self.columns + self.d_out)
        return self._gram_of_rows(x, g) if formed else self._gram_of_pairs(x, g)

    def _gram_of_rows(self, x: Tensor, g: Tensor) -> Tensor:
        """By forming V, some rows of the parameter matrix at a time, from some examples' inputs at a time."""
        examples, shared = len(g), self.gradients(g[:1]).shape[2]
        width = max(1, ROOM // (examples * self.groups * self.columns))
        some = max(1, ROOM // (shared * self.groups * (self.columns + self.d_out)))
        total = torch.zeros(examples, examples, dtype=torch.float64, device=g.device)
        for start in range(0, self.d_out, width):
            parts = [
                (self.gradients(some_g)[..., start : start + width].mT @ self.inputs(some_x)).transpose(0, 1).flatten(1)
                for some_x, some_g in zip(x.split(some), g.split(some), strict=True)
            ]
            v = torch.cat(parts).double()
            total.addmm_(v, v.mT)
        return total

    def _gram_of_pairs(self, x: Tensor, g: Tensor) -> Tensor:
        """``sum over t, t' of (a_it . a_jt') (g_it . g_jt')``, some examples i at a time."""
        return paired(self.inputs(x).double(), self.gradients(g).double(), lambda a, b: a @ b.mT)

    def grid(self, g: Tensor) -> tuple[int, int]:
        """Height and width of the grid that the shared positions of an output gradient lie on, row by row."""
        return 1, self.gradients(g).shape[2]

    def inputs(self, x: Tensor) -> Tensor:
        """``a`` as ``[groups, batch, shared, columns]``."""
        a = self.patches(x)
        return F.pad(a, (0, 1), value=1.0) if self.has_bias else a

    def to_matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Tensors shaped like the parameters as one ``[groups, d_out, columns]`` matrix."""
        matrix = weight.reshape(self.groups, self.d_out, self.d_in)
        if not self.has_bias:
            return matrix
        assert bias is not None
        return torch.cat([matrix, bias.reshape(self.groups, self.d_out, 1)], dim=-1)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """Inverse of ``to_matrix``: one tensor a parameter, views where possible."""
        weight = matrix[..., : self.d_in].reshape(self.parameters[0].shape)
        return [weight, matrix[..., -1].flatten()] if self.has_bias else [weight]

    def vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """See Layer. That of the matrix."""
        return self.to_matrix(tensors[0], tensors[1] if len(tensors) > 1 else None).flatten()

    def tensors(self, vector: Tensor) -> list[Tensor]:
        """See Layer."""
        return self.from_matrix(vector.view(self.groups, self.d_out, self.columns))

    def _append_count(self, sums: Tensor, count: int) -> tuple[Tensor, int]:
        # The bias entry is 1 everywhere, so its squares add up to the count.
        return (F.pad(sums, (0, 1), value=float(count)) if self.has_bias else sums), count


def paired(a: Tensor, g: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``sum over t, t' of product(a_it, a_jt') (g_it . g_jt')`` for all pairs of examples, of ``[groups, m, t, .]``."""
    groups, examples, shared, _ = g.shape
    some = max(1, ROOM // (groups * examples * shared**2))
    all_a, all_g = a.flatten(1, 2), g.flatten(1, 2)
    parts = []
    for some_a, some_g in zip(a.split(some, 1), g.split(some, 1), strict=True):
        pairs = product(some_a.flatten(1, 2), all_a) * (some_g.flatten(1, 2) @ all_g.mT)
        parts.append(pairs.view(groups, -1, shared, examples, shared).sum((0, 2, 4)))
    return torch.cat(parts)
