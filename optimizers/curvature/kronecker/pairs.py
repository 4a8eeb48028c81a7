"""The nearest sums of Kronecker products, fitted to the samples of all ranks: KPSVD, Deflation, Lanczos."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import communication
from ..approximations import Approximation
from ..layers import AffineLayer, Flow
from ..rearranged import Pairs, Terms, compress_many, leading_pairs_many, location_mask
from .invertible import Invertible
from .options import Factors, Options
from .two_terms import TwoTerms


class KroneckerPairs(TwoTerms):
    """The best sum of ``terms`` Kronecker products in Frobenius norm (Koroko et al. 2022): KPSVD, Deflation, Lanczos.

    Factors are ``A, G`` of the first pair and ``C, D`` of the second: ``F ~ G (x) A + D (x) C``. Averages over steps
    are of the sums themselves, brought back to as many terms: averaging factors one by one would be neither linear nor
    blind to the signs of a pair.
    """

    gathers = True
    corrected = False

    def __init__(self, layer: AffineLayer, options: Options) -> None:
        super().__init__(layer, options)
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._grid: tuple[int, int] | None = (1, 1)  # None: of several calls, which lie on no grid together

    def accumulate(self, flow: Flow) -> None:
        """See Approximation."""
        self._kept.append(self._samples(flow))
        self._grid = (1, 1) if self.options.sharing == "reduce" else flow.grid()
        self._shared = self._grid != (1, 1)

    @property
    def observed(self) -> bool:
        """See Approximation."""
        return bool(self._kept)

    def reset(self) -> None:
        """See Approximation."""
        self._kept.clear()

    def _statistics(self, flow: Flow) -> list[tuple[str, Tensor]]:
        raise NotImplementedError("pairs are fitted to samples, which no sum stands for")

    @classmethod
    def estimate_all(
        cls, blocks: Sequence[Approximation], gradient_scale: float, examples: int
    ) -> dict[str, dict[str, Tensor]]:
        """See Approximation. All layers in one fit, over the samples of all ranks."""
        assert all(isinstance(block, KroneckerPairs) for block in blocks)
        members: list[KroneckerPairs] = list(blocks)  # type: ignore[arg-type]
        samples = [block._gathered(gradient_scale, examples) for block in members]
        options = members[0].options
        masks = [
            None
            if options.radius is None or block._grid is None
            else location_mask(*block._grid, options.radius).to(a.device)
            for block, (a, _) in zip(members, samples, strict=True)
        ]
        starts = [block.factors.get("G") for block in members]
        fits = leading_pairs_many(
            samples,
            cls.terms - cls.corrected,
            solver=options.solver,
            corrected=cls.corrected,
            masks=masks,
            starts=starts,
        )
        return {
            block.layer.name: block._named(pairs, a, g)
            for block, pairs, (a, g) in zip(members, fits, samples, strict=True)
        }

    def _gathered(self, gradient_scale: float, examples: int) -> tuple[Tensor, Tensor]:
        """Inputs and output gradients of this step's examples on all ranks; F is their mean."""
        if self._kept:
            a = torch.cat([a for a, _ in self._kept], dim=1)
            g = torch.cat([g for _, g in self._kept], dim=1) * gradient_scale
            g = g if g.shape[1] == examples else g * (g.shape[1] / examples) ** 0.5
        else:
            weight = self.layer.parameters[0]
            a = torch.zeros(self.layer.groups, 0, 1, self.layer.columns, dtype=self._dtype, device=weight.device)
            g = torch.zeros(self.layer.groups, 0, 1, self.layer.d_out, dtype=self._dtype, device=weight.device)
        self._kept.clear()
        a, g = communication.gather([a, g])
        return a, g

    def _named(self, pairs: Pairs, a: Tensor, g: Tensor) -> Factors:
        return {
            key: t for names, pair in zip(self.keys, pairs, strict=True) for key, t in zip(names, pair, strict=True)
        }

    def estimate(self, gradient_scale: float, examples: int) -> Factors:
        """See Approximation."""
        return self.estimate_all([self], gradient_scale, examples)[self.layer.name]

    @classmethod
    def average_all(cls, blocks: Sequence[Invertible], new: Sequence[Factors], keep: Sequence[float]) -> None:
        """See Invertible. The averages of all layers are recompressed in one go."""
        averaged: list[tuple[KroneckerPairs, Terms]] = []
        for block, estimate, share in zip(blocks, new, keep, strict=True):
            assert isinstance(block, KroneckerPairs)
            if block.factors and share > 0:
                averaged.append((block, block._averaged_terms(estimate, share)))
            else:
                block.factors = estimate
        for (block, terms), pairs in zip(
            averaged, compress_many([terms for _, terms in averaged], cls.terms - cls.corrected), strict=True
        ):
            block.factors = block._recompressed(pairs, terms)

    def _averaged_terms(self, new: Factors, keep: float) -> Terms:
        """Lefts, rights and weights of ``keep * factors + (1 - keep) * new``."""
        both = ((self.factors, keep), (new, 1 - keep))
        lefts = [factors[a] for factors, _ in both for a, _ in self.keys]
        rights = [factors[g] for factors, _ in both for _, g in self.keys]
        return lefts, rights, [weight for _, weight in both for _ in self.keys]

    def _recompressed(self, pairs: Pairs, terms: Terms) -> Factors:
        return self._named(pairs, terms[0][0], terms[1][0])


class BestKronecker(KroneckerPairs):
    """KPSVD: the nearest single Kronecker product."""

    terms = 1
