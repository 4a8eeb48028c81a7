"""A sum of one or two Kronecker products, and the damped inverse of such a sum."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import linalg
from ..linalg import product as _product
from ..spectra import Spectrum
from .factored import DECOMPOSED, PASSES, Kronecker
from .options import Counts, Factors


class TwoTerms(Kronecker):
    """``F ~ G (x) A + D (x) C``, or the first product alone where there is one term.

    The first product is positive semi-definite, the second need not be: C and D are symmetric or both antisymmetric. A
    subclass says how they are estimated.
    """

    terms = 2
    _shared = True  # until a pass has shown otherwise: whether weights are shared over positions

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Names of the pairs' factors: over inputs, over output gradients."""
        return [("A", "G"), ("C", "D")][: self.terms]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See Approximation."""
        shapes = super().shapes()
        return shapes if self.terms == 1 else shapes | {"C": shapes["A"], "D": shapes["G"]}

    def _blocks(self, factors: Factors) -> list[Tensor]:
        terms = [
            torch.stack([torch.kron(right, left) for right, left in zip(factors[g], factors[a], strict=True)])
            for a, g in self.keys
        ]
        return list(torch.stack(terms).sum(0))

    # -- the two-term inverse ------------------------------------------------------------------------------------------

    def invert(self, factors: Factors, damping: Tensor, counts: Counts, last: Factors | None = None) -> Factors:
        """See Invertible.

        With ``A_d = A + pi sqrt(lambda) I = L_A L_Aᵀ``, ``M_A = L_A^-1 C L_A^-ᵀ = Q_A diag(s) Q_Aᵀ`` and
        ``K_A = L_A^-ᵀ Q_A``, and the same with t for D and G:
        ``(G_d (x) A_d + D (x) C)^-1 = (K_G (x) K_A) diag(1 / (1 + t s)) (K_G (x) K_A)ᵀ``. The second term is
        indefinite, so ``1 + t s`` is floored, signs kept.

        Where C and D are antisymmetric, ``X = M_G (x) M_A`` still has a symmetric square, with eigenvalues
        ``(t s)²``, and ``1 / (1 + X)`` is an even function of X plus X times another: two diagonals and one more
        product on either side.

        With ``rank``, wide layers keep the eigenvalues of largest magnitude alone, found by one step of subspace
        iteration from the last refresh's. What they do for the inverse is then a correction of low rank to
        ``G_d^-1 (x) A_d^-1``.
        """
        if self.terms == 1:
            return super().invert(factors, damping, counts)
        shares = self._shares(factors, damping)
        twisted = self._twisted(factors["C"])
        cache: Factors = {}
        values, odd = {}, {}
        for first, second in (("A", "C"), ("G", "D")):
            lower, repaired = linalg.cholesky(factors[first], shares[first])
            counts.repaired += repaired
            if self._truncated:
                cache |= self._inverse(first, lower)
                start = None if last is None else last[f"K_{first}"].to(lower.dtype)
                found = linalg.leading_pencil(factors[second], lower, self._kept_dims[first], twisted, start)
            else:
                found = linalg.pencil(factors[second], lower, twisted)
            values[first], cache[f"K_{first}"], odd[f"J_{first}"] = found
        even, odd["W_odd"] = self._weights(values, twisted, counts)
        cache["W"] = even - 1 if self._truncated else even
        return self._in_solve_dtype(cache | ({} if twisted is None else odd))

    def _weights(self, values: dict[str, Tensor], twisted: Tensor | None, counts: Counts) -> tuple[Tensor, Tensor]:
        """``1 / (1 + x)`` at the eigenvalues x of the second term: its even and its odd part (the latter over x)."""
        floor = self.options.floor
        product = values["G"].unsqueeze(-1) * values["A"].unsqueeze(-2)
        weights = 1 + product
        counts.floored = counts.floored + (weights < floor).sum()
        weights = 1 / weights.clamp(min=floor)
        if twisted is None:
            return weights, weights
        other = 1 - product
        counts.floored = counts.floored + ((other < floor) & twisted).sum()
        other = 1 / other.clamp(min=floor)
        odd = (weights - other) / (2 * product).clamp(min=torch.finfo(product.dtype).tiny)
        return torch.where(twisted, (weights + other) / 2, weights), torch.where(twisted, odd, 0.0)

    @property
    def _truncated(self) -> bool:
        """Whether a correction of low rank costs less than the whole eigenbasis."""
        rank = self.options.rank
        return rank is not None and max(self.dims.values()) > 2 * rank

    @property
    def _kept_dims(self) -> dict[str, int]:
        rank = self.options.rank if self._truncated else None
        return {key: dim if rank is None else min(dim, rank) for key, dim in self.dims.items()}

    def _twisted(self, second: Tensor) -> Tensor | None:
        """Which of the second pairs are antisymmetric, ``[n, 1, 1]``; None: none is. Waits for the device."""
        if not self._shared:  # sums of a aᵀ are symmetric
            return None
        twisted = ((second + second.mT) == 0).all(-1).all(-1) & (second != 0).any(-1).any(-1)
        return twisted.view(-1, 1, 1) if bool(twisted.any()) else None

    def solve(self, cache: Factors, matrix: Tensor) -> Tensor:
        """See Invertible."""
        if self.terms == 1:
            return super().solve(cache, matrix)
        rotated = self._rotate(matrix, cache["K_A"], cache["K_G"], forward=True)
        result = self._rotate(rotated * cache["W"], cache["K_A"], cache["K_G"], forward=False)
        if "W_odd" in cache:
            result = result + self._rotate(rotated * cache["W_odd"], cache["J_A"], cache["J_G"], forward=False)
        if self._truncated:
            result = result + self._sandwich(cache, matrix)
        return result.to(matrix)

    def squared(self, factors: Factors, cache: Factors, damping: Tensor, matrix: Tensor) -> Tensor:
        """See Invertible. The second term is floored, as in the inverse, but as a whole."""
        if self.terms == 1:
            return super().squared(factors, cache, damping, matrix)
        matrix = matrix.to(self._dtype)
        shares = self._shares(factors, damping)
        left, right = (self._times(factors[key], matrix, key, shares[key]) for key in ("G", "A"))
        first = (left * right).flatten(1).sum(1)
        second = (_product(factors["D"], matrix) * _product(matrix, factors["C"])).flatten(1).sum(1)
        return torch.maximum(first + second, self.options.floor * first)

    def spectrum(self, factors: Factors, cache: Factors, damping: Tensor) -> Spectrum | None:
        """See Approximation. The eigenvalues of a sum of two products are not those of its factors."""
        return super().spectrum(factors, cache, damping) if self.terms == 1 else None

    def floored(self, cache: Factors) -> Tensor | None:
        """See Approximation. Not told of antisymmetric pairs, of which the cache has sums over either sign."""
        if self.terms == 1 or "W_odd" in cache:
            return None
        largest = 1 / self.options.floor - (1 if self._truncated else 0)
        floored = (cache["W"] >= largest * (1 - 8 * torch.finfo(cache["W"].dtype).eps)).sum()
        return floored.to(cache["W"].dtype) / (self.layer.groups * self.dims["A"] * self.dims["G"])

    def mean_eigenvalue(self, factors: Factors) -> Tensor:
        """See Invertible."""
        first = super().mean_eigenvalue(factors)
        return first if self.terms == 1 else first + self._mean(factors, "C") * self._mean(factors, "D")

    def cache_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See Invertible."""
        shapes = super().cache_shapes()
        if self.terms == 1:
            return shapes
        kept, groups, dtype = self._kept_dims, self.layer.groups, self.options.solve_dtype or self._dtype
        bases = {f"K_{key}": ((groups, self.dims[key], kept[key]), dtype) for key in ("A", "G")}
        weights = {"W": ((groups, kept["G"], kept["A"]), self._dtype)}
        return (shapes if self._truncated else {}) | bases | weights

    def optional_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See Invertible: the odd part, where a second pair is antisymmetric."""
        if self.terms == 1:
            return {}
        shapes = self.cache_shapes()
        return {"J_A": shapes["K_A"], "J_G": shapes["K_G"], "W_odd": shapes["W"]}

    def cost(self) -> float:
        """See Approximation."""
        if self.terms == 1:
            return super().cost()
        steps = 0.0
        for key, d in self.dims.items():
            rank = self._kept_dims[key]
            steps += d**3 + (10 * d * d * rank if self._truncated else (DECOMPOSED + 3) * d**3) + PASSES * d * d
        return self.layer.groups * steps
