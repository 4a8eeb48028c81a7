"""The exact natural gradient, by the Woodbury identity on the gradients of single examples.

Sources: Ren & Goldfarb, "Efficient Subsampled Gauss-Newton and Natural Gradient Methods for Training Neural Networks",
2019 (arXiv 1906.02353); Koroko, Anciaux-Sedrakian, Ben Gharbia, Garès, Haddou and Tran, "Efficient approximations of
the Fisher matrix in neural networks using Kronecker product singular value decomposition", 2022 (arXiv 2201.10285).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from ..base import CURVATURE, Params, with_fixed
from ..checks import check_choice
from ..curvature import linalg
from ..curvature.approximations import Approximation, statistics_dtype
from ..curvature.layers import Layer
from ..curvature.samples import Samples
from ..natural_gradient import Auto, Block, Stack, inner
from .sampled import SampledFisher


class ExactNaturalGradient(SampledFisher):
    """``(F + lambda I)^-1 g`` with the Fisher matrix of a mini-batch itself, between layers too.

    With the m observations' gradients in the columns of ``S / sqrt(m)``, here written S, ``F = S Sᵀ`` and

        (F + L)^-1 g = L^-1 (g - S (I + Sᵀ L^-1 S)^-1 Sᵀ L^-1 g),    L the diagonal of the layers' damping,

    so that only a matrix of size m is decomposed (Cholesky, in float64). S is never formed: the samples are the layers'
    inputs and output gradients (``curvature.samples``), which outlive the step, as does the decomposition; both are
    part of the state. F is the Fisher of one batch rather than an average over steps, and small batches make it noisy:
    what the batch does not see is divided by lambda alone. A layer's parameters count as a whole: where one of them is
    frozen, the others take the steps they would if its gradient were zero.

    With ``fisher="sampled"`` and ``"empirical"`` m is the number of observed examples; with ``"exact"``, times the
    number of columns of the likelihood's root.

    Args:
        damping_mode: ``standard``: lambda; ``heuristic``: ``lambda (s_max(A) + s_max(G)) + lambda²``, layer by layer,
            with K-FAC's factors A and G of the same samples. That is how much the ``(A + lambda I) (x) (G + lambda I)``
            of a factored damping adds at most. Layers without such factors (norms, Embedding) have lambda.
        blocks: ``full``: F as it is; ``layer``: its diagonal blocks, a layer each (each layer has a damping of its own
            in either case).
        batch_fraction: share of the batch that F is taken on.
        update_every: steps between updates of the samples and of the decomposition.
    """

    fixed: ClassVar[Mapping[str, Any]] = {"decay": 0.0, "early_updates": False, "refresh_every": 1}
    between_layers = True

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        damping: Auto = 1e-2,
        update_every: int = 1,
        damping_mode: Literal["standard", "heuristic"] = "standard",
        blocks: Literal["full", "layer"] = "full",
        **shared: Any,
    ) -> None:
        check_choice("damping_mode", damping_mode, ("standard", "heuristic"))
        check_choice("blocks", blocks, ("full", "layer"))
        self.damping_mode, self.coupled = damping_mode, blocks == "full"
        self._root = torch.empty(0)  # [1 or layers, m, m]: the Cholesky factors of I + Sᵀ L^-1 S
        self._shifts = torch.empty(0)  # L, one a layer
        shared = with_fixed(ExactNaturalGradient, self, shared)
        super().__init__(model, params, damping=damping, update_every=update_every, **shared)

    def _block(self, layer: Layer) -> Approximation:
        self.samples[layer.name] = Samples(layer, self._observations)
        return self.samples[layer.name]

    def _update_curvature(self) -> bool:
        self._check_passes()
        rejected = self.rejected
        if (found := self._estimates()) and self.rejected == rejected:
            self._renew_samples(found)
            self.updates += 1
        return self._saw

    def _renew_inverses(self) -> None:
        usable = [block for block in self.blocks.values() if block.factors]
        updated = self._updated_at == self.steps
        with record_function(CURVATURE):
            if self._take_damping(usable, updated) or updated:
                self._decompose()
                self._inverted_at = self.steps

    def _decompose(self) -> None:
        """Take the samples' Gram matrix apart."""
        self._stack()
        used = [stack.blocks[0] for stack in self._stacks]
        if not used:
            return
        members: list[Samples] = used  # type: ignore[assignment]
        self._shifts = torch.stack([self._damping_of(samples) for samples in members])
        grams = torch.stack([s.gram() / damping for s, damping in zip(members, self._shifts, strict=True)])
        if self.coupled:
            grams = grams.sum(0, keepdim=True)
        self._root, repaired = linalg.cholesky(linalg.symmetrize(grams), grams.new_ones(len(grams)))
        self._counts.repaired += repaired
        self.refreshes += 1

    def _stack(self) -> None:
        """One stack a layer: their samples differ in shape, and what couples them is no matter of stacks."""
        self._stacks = [Stack([block], {}) for block in self.blocks.values() if block.factors]

    def _damping_of(self, samples: Samples) -> Tensor:
        damping = torch.tensor(self._damping(samples.layer), dtype=torch.float64)
        norms = samples.norms() if self.damping_mode == "heuristic" else None
        if norms is None:
            return damping.to(samples.layer.parameters[0].device)
        a, g = norms
        return (damping * (a + g) + damping**2).amax()

    def _solve_blocks(self, gradients: list[Tensor]) -> list[Tensor]:
        members: list[Samples] = [stack.blocks[0] for stack in self._stacks]  # type: ignore[misc]
        if not members:
            return []
        products = [s.dots(s.from_matrix(g)) for s, g in zip(members, gradients, strict=True)]
        scaled = torch.stack(products).double() / self._shifts.unsqueeze(1)
        if self.coupled:
            scaled = scaled.sum(0, keepdim=True)
        weights = torch.cholesky_solve(scaled.unsqueeze(-1), self._root).squeeze(-1).expand(len(members), -1)
        directions = []
        for s, g, w, damping in zip(members, gradients, weights, self._shifts, strict=True):
            seen = s.to_matrix(s.combine(w))
            directions.append(((g - seen) / damping.to(seen.dtype)).to(g.dtype))
        return directions

    def _dampings(self, blocks: list[Block]) -> Tensor:
        """See NaturalGradient: L, as the decomposition has it."""
        places = {stack.blocks[0].layer.name: index for index, stack in enumerate(self._stacks)}
        shifts = torch.stack([self._shifts[places[block.layer.name]] for block in blocks])
        return shifts.to(statistics_dtype(blocks[0].layer.parameters[0]))

    def _squared(self, tensors: list[Tensor]) -> list[Tensor]:
        """See NaturalGradient. Each layer's share of ``xᵀ (F + L) x``: blocks between layers go half to either."""
        members: list[Samples] = [stack.blocks[0] for stack in self._stacks]  # type: ignore[misc]
        seen = [s.dots(s.from_matrix(x)) for s, x in zip(members, tensors, strict=True)]
        total = torch.stack(seen).sum(0) if self.coupled and seen else None
        shares = []
        for own, x, shift in zip(seen, tensors, self._shifts, strict=True):
            product = torch.dot(own, own if total is None else total)
            shares.append(product.view(1) + shift.to(own.dtype) * inner(x, x))
        return self._by_group(shares)

    def _cache_bytes(self, block: Approximation) -> int:
        return self._root.numel() * self._root.element_size() // max(len(self._stacks), 1) if block.factors else 0

    def _curvature(self) -> dict[str, Any]:
        """See SampledFisher; also the decomposition."""
        return super()._curvature() | {"inverses": {}, "gram": {"root": self._root, "dampings": self._shifts}}

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        self._stack()
        devices = [block.layer.parameters[0].device for block in self.blocks.values()] or [torch.device("cpu")]
        self._root, self._shifts = (saved["gram"][key].to(devices[0], copy=True) for key in ("root", "dampings"))
