"""What an adapter does: what flows through a layer, brought to one shape, and its parameters, to one matrix.

What reaches an adapter has the examples in its leading dimension: ``x [examples, ...]`` and ``g [examples, ...]``, a
pair for each time that a pass came through the layer (see ``Flow``; the recorder finds the examples).

An *affine* layer computes ``y_t = W a_t + b`` at every shared position t (token, pixel, or the only one), so its
curvature factorizes over inputs ``a`` and output gradients ``g``:

- ``inputs(x)``: ``a`` as ``[groups, batch, shared, d_in (+ 1)]``; the last entry is 1 where the layer has a bias;
- ``gradients(g)``: ``[groups, batch, shared, d_out]``;
- ``to_matrix`` / ``from_matrix``: parameters as ``[groups, d_out, d_in (+ 1)]``, row-major, bias last.

``groups`` is 1 but for grouped convolutions, whose Fisher is approximated as block-diagonal over groups.

An *elementwise* layer (norms, Embedding) multiplies or looks up: the exact diagonal of its Fisher is as cheap as a
factor, so that is what it offers: ``square_sums(calls)``.

Every layer's output is linear in its parameters. So what an example's gradient ``V_i`` does to a direction is what the
layer itself does with the direction in place of its parameters: ``<V_i, D> = sum_t g_it . (D a_it)``. On that rest the
products with the gradients of all examples, none of which is formed:

- ``kept(x, g)``: what to keep of a pass, ``[examples, ...]`` each;
- ``dots``, ``combine``, ``gram``: ``<V_i, D>``, ``sum_i w_i V_i`` and ``<V_i, V_j>`` of what was kept;
- ``rows``: the ``V_i`` themselves, flat, in the order of the matrix (affine layers) or of the parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Layer:
    """A module with curvature of its own.

    Args:
        name: the module's name in the model, without any wrapper's prefix.
        module: the module itself.
        keys: names of its weight and of its bias, which may be None.

    Attributes:
        parameters: weight, then bias where the layer has one, as they are now: what they are replaced by later
            (pruning, a parametrization) is not the layer's.
        keys: their names.
    """

    #: Whether what is kept of the input are indices, int32.
    indexed: bool = False

    def __init__(self, name: str, module: nn.Module, keys: tuple[str, str] = ("weight", "bias")) -> None:
        self.name = name
        self.module = module
        self.keys = tuple(key for key in keys if getattr(module, key, None) is not None)
        self.parameters: list[nn.Parameter] = [getattr(module, key) for key in self.keys]
        self.has_bias = len(self.keys) == 2

    # -- rows ----------------------------------------------------------------------------------------------------------

    def leading(self, x: Tensor, g: Tensor) -> int:
        """How many leading dimensions of the output are rows: any of them may be the examples'."""
        raise NotImplementedError

    def prepared(self, x: Tensor) -> Tensor:
        """The input as the adapter takes it: what depends on more than a row is worked out before any is moved."""
        return x

    def arranged(self, x: Tensor, g: Tensor, axis: int, parts: tuple[int, int, int]) -> list[tuple[Tensor, Tensor]]:
        """Calls ``(x, g)`` with the examples in front.

        Args:
            x: input, as ``prepared``.
            g: output gradient.
            axis: which leading dimension the examples are in.
            parts: what it is made of: (rows before, examples, rows after), of which one of the outer two is 1.
        """
        return [(fronted(x, axis, parts), fronted(g, axis, parts))]

    # -- parameters ----------------------------------------------------------------------------------------------------

    def vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like the parameters as one vector, in the order of ``rows``."""
        return torch.cat([t.flatten() for t in tensors])

    def tensors(self, vector: Tensor) -> list[Tensor]:
        """Inverse of ``vector``, views where possible."""
        pieces = vector.split([p.numel() for p in self.parameters])
        return [piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)]

    # -- gradients of single examples ----------------------------------------------------------------------------------

    def kept(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """What a pass leaves: input and output gradient, ``[examples, ...]``; of norms the rows themselves."""
        return x, g

    def respond(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The layer's output with other tensors in place of its parameters."""
        raise NotImplementedError

    def rows(self, x: Tensor, g: Tensor) -> Tensor:
        """``V_i``, one a row."""
        raise NotImplementedError

    def example_rows(self, x: Tensor, g: Tensor) -> Tensor:
        """``V_i`` of a pass, one a row."""
        return self.rows(*self.kept(x, g))

    def dots(self, x: Tensor, g: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """``<V_i, D>`` for every example i, with D in tensors shaped like the parameters."""
        return (self.respond(x, tensors).flatten(1) * g.flatten(1)).sum(1)

    def combine(self, x: Tensor, g: Tensor, weights: Tensor) -> list[Tensor]:
        """``sum_i w_i V_i``, in tensors shaped like the parameters: a weight gradient."""
        with torch.enable_grad():
            leaves = [torch.zeros(p.shape, dtype=g.dtype, device=g.device, requires_grad=True) for p in self.parameters]
            response = self.respond(x, leaves)
        weighted = g * weights.view(-1, *(1,) * (g.dim() - 1))
        return list(torch.autograd.grad(response, leaves, weighted.view_as(response)))

    def total(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """``sum_i V_i``, in tensors shaped like the parameters."""
        kept_x, kept_g = self.kept(x, g)
        return self.combine(kept_x, kept_g, torch.ones(len(g), dtype=g.dtype, device=g.device))

    def gram(self, x: Tensor, g: Tensor) -> Tensor:
        """``<V_i, V_j>`` for all pairs, in float64."""
        raise NotImplementedError


def fronted(tensor: Tensor, axis: int, parts: tuple[int, int, int]) -> Tensor:
    """``[..., before * examples * after, ...]`` as ``[examples, ...]``."""
    if parts[0] == parts[2] == 1:
        return tensor.movedim(axis, 0)
    return tensor.unflatten(axis, parts).movedim(axis + 1, 0)


class ImageRows:
    """For layers whose rows are whole images, in one dimension: further ones go into calls of their own."""

    def arranged(self, x: Tensor, g: Tensor, axis: int, parts: tuple[int, int, int]) -> list[tuple[Tensor, Tensor]]:
        """See Layer."""
        before, examples, after = parts
        if before == after == 1:
            return [(x, g)]
        split = [t.view(before, examples, after, *t.shape[1:]).movedim(1, 0).flatten(1, 2).unbind(1) for t in (x, g)]
        return list(zip(*split, strict=True))


class ElementwiseLayer(Layer, ABC):
    """A layer whose curvature is kept as the exact diagonal of its Fisher block."""

    @abstractmethod
    def square_sums(self, calls: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """For each parameter, its squared per-example gradient summed over examples (the parameter's shape)."""
