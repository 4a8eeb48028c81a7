"""The nearest sums of Kronecker products, fitted to the samples of all ranks: KPSVD, Deflation, Lanczos."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import communication
from ..approximations import Approximation, absent
from ..layers import AffineLayer, Flow
from ..rearranged import Pairs, Terms, compress_many, leading_pairs_many, location_mask
from .invertible import Invertible
from .options import Factors, Options
from .two_terms import TwoTerms

#: Operations of a fit for each entry of the factors, about.
FIT = 2000.0

#: In the place of the sides of a grid, where positions lie on none.
SCATTERED = 2**30


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
        kept = [tensor for block in members for tensor in block._rows(gradient_scale, examples)]
        owners = [block.owner for block in members for _ in range(2) if block.owner is not None]
        gathered = iter(communication.gather_to(kept, owners) if owners else communication.gather(kept))
        options = members[0].options
        if options.radius is not None:
            cls._share_grids(members)
        found: dict[str, Factors] = {}
        mine, samples, masks = [], [], []
        for block, a, g in zip(members, gathered, gathered, strict=True):
            found[block.layer.name] = {k: absent(shape, block._dtype) for k, shape in block.shapes().items()}
            if a is not None and g is not None:
                mine.append(block)
                samples.append((a, g))
                masks.append(block._mask(options.radius, a.device))
        starts = [block.factors.get("G") for block in mine]
        fits = leading_pairs_many(
            samples,
            cls.terms - cls.corrected,
            solver=options.solver,
            corrected=cls.corrected,
            masks=masks,
            starts=starts,
        )
        for block, pairs, (a, g) in zip(mine, fits, samples, strict=True):
            found[block.layer.name] = block._named(pairs, a, g)
        return found

    def _mask(self, radius: int | None, device: torch.device) -> Tensor | None:
        """Which pairs of positions count; None: all."""
        return None if radius is None or self._grid is None else location_mask(*self._grid, radius).to(device)

    @staticmethod
    def _share_grids(members: Sequence[KroneckerPairs]) -> None:
        """Tell ranks without examples of a layer how its positions lie."""
        weight = members[0].layer.parameters[0]
        own = [[SCATTERED, SCATTERED] if block._grid is None else list(block._grid) for block in members]
        for block, (rows, columns) in zip(members, communication.largest(own, weight.device), strict=True):
            block._grid = None if rows == SCATTERED else (rows, columns)

    def _rows(self, gradient_scale: float, examples: int) -> tuple[Tensor, Tensor]:
        """Inputs and output gradients of this step's examples; F is their mean over all ranks."""
        if self._kept:
            a = torch.cat([a for a, _ in self._kept], dim=1)
            g = torch.cat([g for _, g in self._kept], dim=1) * gradient_scale
            g = g if g.shape[1] == examples else g * (g.shape[1] / examples) ** 0.5
        else:
            weight = self.layer.parameters[0]
            a = torch.zeros(self.layer.groups, 0, 1, self.layer.columns, dtype=self._dtype, device=weight.device)
            g = torch.zeros(self.layer.groups, 0, 1, self.layer.d_out, dtype=self._dtype, device=weight.device)
        self._kept.clear()
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

    def cost(self) -> float:
        """See Approximation. Of the fit, whose length data tell, a guess."""
        return super().cost() + FIT * self.layer.groups * sum(d * d for d in self.dims.values())

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
