"""What a batch leaves of a layer for the exact Fisher matrix: the gradients of single examples, as they flowed.

With ``V_i`` the gradient of observation i by *all* parameters, the Fisher matrix is ``F = S Sᵀ``, S having the columns
``V_i / sqrt(m)``. A layer's share of S is never formed: its inputs and output gradients are kept, and products with S
are passes through the layer (see ``layers``). Blocks of F between layers exist because all layers keep the same
observations in the same order, so that ``Sᵀ d`` is the sum over layers of ``dots(d)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import communication, linalg
from .approximations import Approximation, statistics_dtype
from .layers import AffineLayer, Flow, Layer, LinearLayer
from .spectra import Spectrum

#: A backward pass of a step: the number of its batch, and which pass over that batch it is.
Pass = tuple[int, int]

#: Dimensions of what is kept of an example, at most.
DIMS = 6


@dataclass
class Observations:
    """Which rows a step's samples have, whatever the layer: a layer that a pass did not reach has zeros there.

    Attributes:
        rows: of each pass so far.
    """

    rows: dict[Pass, int] = field(default_factory=dict)

    def reset(self) -> None:
        """A new step begins."""
        self.rows.clear()


class Samples(Approximation):
    """A layer's share of S: ``factors`` are x and g as they flowed, or the rows ``V`` themselves.

    They outlive the step: the product with F is needed until the next update. Rows are kept of norms, where they are
    short, and of a layer that a model calls more than once, whose gradient is the sum over the calls.

    Args:
        layer: the layer's adapter.
        observations: shared by all layers of a model.
    """

    gathers = True

    def __init__(self, layer: Layer, observations: Observations) -> None:
        super().__init__(layer)
        self._observations = observations
        self._kept: dict[Pass, list[tuple[Tensor, ...]]] = {}
        self._sizes = [p.numel() for p in layer.parameters]
        self._prepared = (torch.empty(0), torch.empty(0))  # the inputs in use, and what ``_linear_rows`` makes of them

    @property
    def observed(self) -> bool:
        """See Approximation."""
        return bool(self._kept)

    def reset(self) -> None:
        """See Approximation."""
        self._kept.clear()

    def accumulate(self, flow: Flow) -> None:
        """See Approximation."""
        self._observations.rows[flow.when] = flow.examples
        self._kept.setdefault(flow.when, []).extend(self.layer.kept(x, g) for x, g in flow.calls)

    def _statistics(self, flow: Flow) -> list[tuple[str, Tensor]]:
        raise NotImplementedError("no sum stands for samples")

    @property
    def _dtype(self) -> torch.dtype:
        return statistics_dtype(self.layer.parameters[0])

    def estimate(self, gradient_scale: float, examples: int) -> dict[str, Tensor]:
        """See Approximation."""
        return self.estimate_all([self], gradient_scale, examples)[self.layer.name]

    @classmethod
    def estimate_all(
        cls, blocks: Sequence[Approximation], gradient_scale: float, examples: int
    ) -> dict[str, dict[str, Tensor]]:
        """See Approximation. The samples of all ranks, of the layers that any of them saw."""
        members = [block for block in blocks if isinstance(block, Samples)]
        plans = [[*block._plan(), examples] for block in members]
        if communication.world_size() > 1 and members:
            device = members[0].layer.parameters[0].device
            (ranks,) = communication.gather([torch.tensor(plans, device=device).unsqueeze(1)])
            examples = int(ranks[0, :, -1].sum())
            plans = ranks.amax(1).tolist()
        scale = gradient_scale / examples**0.5
        seen = [(block, plan) for block, plan in zip(members, plans, strict=True) if any(plan[:-1])]
        kept = [block._joined(plan[0] == 1, plan[1 : 1 + DIMS], plan[1 + DIMS : -1], scale) for block, plan in seen]
        gathered = iter(communication.gather([t.unsqueeze(0) for tensors in kept for t in tensors.values()]))
        return {
            block.layer.name: {key: next(gathered).squeeze(0) for key in tensors}
            for (block, _), tensors in zip(seen, kept, strict=True)
        }

    def _plan(self) -> list[int]:
        """Whether rows are kept, and an example's shapes of x and g, padded with zeros: what ranks have to agree on."""
        if not self._kept:
            return [0] * (1 + 2 * DIMS)
        flow = next(iter(self._kept.values()))[0]
        if len(flow) == 1 or any(len(calls) > 1 for calls in self._kept.values()):
            return [1] + [0] * (2 * DIMS)
        return [0] + [size for t in flow for size in (*t.shape[1:], *[0] * DIMS)[:DIMS]]

    def _joined(self, as_rows: bool, x_shape: list[int], g_shape: list[int], scale: float) -> dict[str, Tensor]:
        """The step's passes one behind the other."""
        device = self.layer.parameters[0].device
        shapes = [[sum(self._sizes)]] if as_rows else [[n for n in shape if n] for shape in (x_shape, g_shape)]
        dtypes = [self._dtype] if as_rows else [torch.int32 if self.layer.indexed else self._dtype, self._dtype]
        parts = []
        for when, rows in ({(0, 0): 0} | self._observations.rows).items():
            if when not in self._kept:
                kept = tuple(
                    torch.zeros(rows, *shape, dtype=dtype, device=device)
                    for shape, dtype in zip(shapes, dtypes, strict=True)
                )
            elif as_rows:
                calls = [flow[0] if len(flow) == 1 else self.layer.rows(*flow) for flow in self._kept[when]]
                kept = (torch.stack(calls).sum(0),)
            else:
                (kept,) = self._kept[when]
            parts.append(kept)
        joined = [torch.cat(column) for column in zip(*parts, strict=True)]  # a copy: nothing of the batch is held
        self._kept.clear()
        joined[-1].mul_(scale)
        return {"V": joined[0]} if as_rows else {"x": joined[0], "g": joined[1]}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See Approximation. Those of the last update: before the first one, only a batch could tell."""
        return {key: tuple(t.shape) for key, t in self.factors.items()}

    def diagonal(self, factors: dict[str, Tensor]) -> list[Tensor]:
        """See Approximation."""
        return self.from_matrix(self._rows(factors).square().sum(0, keepdim=True))

    def to_dense(self) -> Tensor:
        """See Approximation."""
        rows = self._rows(self.factors)
        return rows.mT @ rows

    def _rows(self, factors: dict[str, Tensor]) -> Tensor:
        return factors["V"] if "V" in factors else self.layer.rows(factors["x"], factors["g"])

    # -- products with S -----------------------------------------------------------------------------------------------

    def dots(self, tensors: Sequence[Tensor]) -> Tensor:
        """``Sᵀ d``, one number an observation, for d in tensors shaped like the layer's parameters."""
        tensors = [t.to(self._dtype) for t in tensors]
        if "V" in self.factors:
            return self.factors["V"] @ self.layer.vector(tensors)
        return self.layer.dots(self.factors["x"], self.factors["g"], tensors)

    def dots_with(self, block: Any, matrix: Tensor) -> Tensor:
        """``Sᵀ d``, for d in the shape that ``block.from_matrix`` of another block of this layer takes."""
        if (rows := self._linear_rows()) is None:
            return self.dots(block.from_matrix(matrix))
        a, g = rows
        seen = (torch.mm(a, matrix[0].mT.to(a.dtype)) * g).sum(1)
        return seen if len(seen) == len(self.factors["g"]) else seen.view(len(self.factors["g"]), -1).sum(1)

    def combine(self, weights: Tensor) -> list[Tensor]:
        """``S w``, in tensors shaped like the layer's parameters."""
        weights = weights.to(self._dtype)
        if "V" in self.factors:
            return self.from_matrix((weights @ self.factors["V"]).unsqueeze(0))
        return self.layer.combine(self.factors["x"], self.factors["g"], weights)

    def mean_eigenvalue(self, factors: dict[str, Tensor]) -> Tensor:
        """Of the layer's Fisher block, ``[1]``."""
        if "V" in factors:
            return factors["V"].square().sum(1).sum(0, keepdim=True) / sum(self._sizes)
        return self.layer.gram(factors["x"], factors["g"]).trace().view(1).to(self._dtype) / sum(self._sizes)

    def deduct(self, matrix: Tensor, weights: Tensor) -> bool:
        """``M -= S w`` in place, M ``[1, d_out, columns]`` of a linear layer; false, and nothing done, for others."""
        if (rows := self._linear_rows()) is None:
            return False
        a, g = rows
        weights = weights.to(g).view(-1, 1)
        if len(weights) != len(g):  # an example's positions have its weight
            weights = weights.repeat_interleave(len(g) // len(weights), 0)
        matrix[0].addmm_((g * weights).mT, a, alpha=-1)
        return True

    def _linear_rows(self) -> tuple[Tensor, Tensor] | None:
        """``a [rows, columns]`` and ``g [rows, d_out]`` of a linear layer, row by row; None: of others.

        The one that is appended for the bias takes a copy, which is made once for the samples in use.
        """
        if not isinstance(self.layer, LinearLayer) or "V" in self.factors:
            return None
        x, g = self.factors["x"], self.factors["g"]
        if self._prepared[0] is not x:
            self._prepared = x, self.layer.inputs(x).flatten(0, 2)
        return self._prepared[1], g.flatten(0, 1)

    def prepared_bytes(self) -> int:
        """What is kept beside ``factors``."""
        x, a = self._prepared
        return a.numel() * a.element_size() if a.data_ptr() != x.data_ptr() else 0

    def gram(self) -> Tensor:
        """This layer's share of ``Sᵀ S``, in float64 whatever the samples are: its square root matters, too."""
        if "V" in self.factors:
            rows = self.factors["V"].double()
            return rows @ rows.mT
        return self.layer.gram(self.factors["x"], self.factors["g"])

    def spectrum(self, factors: dict[str, Tensor], cache: dict[str, Tensor], damping: Tensor) -> Spectrum | None:
        """See Approximation. Those of ``Sᵀ S``, and zero in the directions that no sample has."""
        width = sum(self._sizes)
        values = linalg.eigvalsh(self.gram().unsqueeze(0))[0].clamp(min=0)[-width:]
        counts = torch.ones_like(values)
        if (rest := width - len(values)) > 0:
            values, counts = torch.cat([values, values.new_zeros(1)]), torch.cat([counts, counts.new_full((1,), rest)])
        return Spectrum(values, damping.to(values), counts=counts)

    def norms(self) -> tuple[Tensor, Tensor] | None:
        """Largest eigenvalues of K-FAC's factors A and G, by group; None where a layer has none."""
        if "V" in self.factors or not isinstance(self.layer, AffineLayer):
            return None
        a, g = self.layer.inputs(self.factors["x"]).flatten(1, 2), self.layer.gradients(self.factors["g"]).flatten(1, 2)
        return _largest(a) / a.shape[1], _largest(g)

    def to_matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like the layer's parameters as one row."""
        return self.layer.vector(tensors).unsqueeze(0)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """Inverse of ``to_matrix``."""
        return self.layer.tensors(matrix[0])


def _largest(rows: Tensor) -> Tensor:
    """Largest eigenvalue of ``sum_i rows_i rows_iᵀ``, ``[groups, n, d]`` to ``[groups]``."""
    rows = rows.double()
    product = rows.mT @ rows if rows.shape[1] > rows.shape[2] else rows @ rows.mT
    return torch.linalg.eigvalsh(product)[:, -1]
