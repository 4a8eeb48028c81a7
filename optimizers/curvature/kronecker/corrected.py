"""KFAC-corrected: K-FAC's product, and a second one for what it misses."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import product as _product
from ..rearranged import Pairs, Terms
from .options import Factors
from .pairs import KroneckerPairs


class CorrectedFactors(KroneckerPairs):
    """KFAC-corrected: K-FAC's product and the nearest Kronecker product to what it misses."""

    corrected = True

    def _named(self, pairs: Pairs, a: Tensor, g: Tensor) -> Factors:
        if len(pairs) == self.terms:
            return super()._named(pairs, a, g)
        rows = a.flatten(1, 2)
        columns = g.flatten(1, 2)
        first = (_product(rows.mT, rows) / max(rows.shape[1], 1), _product(columns.mT, columns) / max(g.shape[1], 1))
        return super()._named([first, *pairs], a, g)

    def _averaged_terms(self, new: Factors, keep: float) -> Terms:
        """K-FAC's factors are averaged as in K-FAC; the correction is the best one to their product.

        It is fitted to ``keep (G (x) A + D (x) C) + (1 - keep) (G' (x) A' + D' (x) C') - G'' (x) A''``, where one dash
        marks the new terms and two the averages.
        """
        lefts, rights, weights = super()._averaged_terms(new, keep)
        means = (torch.lerp(self.factors[k], new[k], 1 - keep) for k in ("A", "G"))
        return [*lefts, next(means)], [*rights, next(means)], [*weights, -1.0]

    def _recompressed(self, pairs: Pairs, terms: Terms) -> Factors:
        ((c, d),) = pairs
        return {"A": terms[0][-1], "G": terms[1][-1], "C": c, "D": d}
