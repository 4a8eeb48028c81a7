"""EKFAC's eigenfactors: K-FAC's eigenbases, and the gradient's second moments in them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import linalg
from ..layers import AffineLayer, Flow
from ..linalg import product as _product
from ..spectra import Spectrum
from .factored import DECOMPOSED
from .kfac import KroneckerFactors
from .options import Counts, Factors, Options

#: A basis is made anew where more than this share of ``|M Q|²`` has come off the diagonal of ``Qᵀ M Q``.
DRIFTED = 0.5


class EigenFactors(KroneckerFactors):
    """EKFAC (George et al. 2018): K-FAC's eigenbases, and in them the exact second moments ``S`` of the gradient.

    ``F ~ (U_G (x) U_A) diag(S) (U_G (x) U_A)ᵀ`` with ``S = mean_i (U_Gᵀ V_i U_A)²``, which no other diagonal betters in
    Frobenius norm, whatever the orthogonal bases. Theirs are those of the eigenvectors, or what one step of orthogonal
    iteration a refresh has made of earlier ones; a factor more than twice as wide as ``rank`` has the eigenvectors of
    its ``rank`` largest eigenvalues and some completion of these. When a refresh moves the basis, the average S moves
    along: the new diagonal of the old approximation is ``(P_G∘P_G) S (P_A∘P_A)ᵀ`` with ``P`` the products of old and
    new bases.

    Of several ranks, one keeps factors and moments; the bases are everywhere, as each takes its moments in them.
    """

    inverts_on_update = True
    everywhere = ("U_A", "U_G")

    def __init__(self, layer: AffineLayer, options: Options) -> None:
        super().__init__(layer, options)
        self._kept: list[Flow] = []
        kept = options.rank
        self._ranks = {key: dim if kept is None or 2 * kept >= dim else kept for key, dim in self.dims.items()}

    def accumulate(self, flow: Flow) -> None:
        """See Approximation."""
        super().accumulate(flow)
        self._kept.append(flow)

    def reset(self) -> None:
        """See Approximation."""
        super().reset()
        self._kept.clear()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See Approximation."""
        shapes = super().shapes()
        bases = {}
        for key, dim in self.dims.items():
            if self.full[key]:
                width = dim if self._ranks[key] == dim else 2 * self._ranks[key]
                bases[f"U_{key}"] = (self.layer.groups, dim, width)
        return shapes | bases | {"S": self._matrix}

    def zeros(self) -> Factors:
        """See Approximation."""
        return {key: value for key, value in super().zeros().items() if key in ("A", "G")}

    def rebase(self, counts: Counts) -> None:
        """See Invertible."""
        for key in ("A", "G"):
            if not self.full[key]:
                continue
            old = self.factors.get(f"U_{key}")
            new = self._renewed(key, old, counts)
            if not bool(new.isfinite().all()):
                counts.repaired += 1
                return  # the old basis will do
            self.factors[f"U_{key}"] = new
            if old is not None and "S" in self.factors:
                mixing = linalg.overlaps(new, old).square_()
                s = self.factors["S"]
                self.factors["S"] = _product(mixing, s) if key == "G" else _product(s, mixing.mT)

    def mean_eigenvalue(self, factors: Factors) -> Tensor:
        """See Invertible."""
        return self._present_moments(factors).mean((1, 2))

    def _present_moments(self, factors: Factors) -> Tensor:
        """S; NaN, of which no inverse comes, while a factor has defeated its decomposition and there is no basis."""
        if "S" in factors:
            return factors["S"]
        return factors["A"].new_full((len(factors["A"]), *self._matrix[1:]), torch.nan)

    def spectrum(self, factors: Factors, cache: Factors, damping: Tensor) -> Spectrum | None:
        """See Approximation."""
        return Spectrum(factors["S"], damping.view(-1, 1, 1))

    def _renewed(self, key: str, old: Tensor | None, counts: Counts) -> Tensor:
        """The basis that follows the last one, or, where there is none or it has lost its factor, a fresh one."""
        factor = self.factors[key]
        if old is not None and self.options.basis == "iterate":
            new, off = linalg.iterated(factor, old)
            if bool((off < DRIFTED).all() & new.isfinite().all()):
                return new
        counts.decomposed += 1
        return linalg.eigenbasis(factor, self._ranks[key])

    def basis(self, key: str) -> Tensor:
        """U_A or U_G as a matrix ``[groups, d, d]``."""
        if (basis := self.factors.get(f"U_{key}")) is not None:
            return linalg.as_matrix(basis).contiguous()  # what torch.kron asks of one of its two
        return torch.eye(self.dims[key]).to(self.factors["S"]).expand(self.layer.groups, -1, -1)

    def moments(self, gradient_scale: float, examples: int) -> Factors:
        """See Invertible: this step's S, in the present basis."""
        if any(self.full[key] and f"U_{key}" not in self.factors for key in self.full):
            return {}
        total = torch.zeros(self._matrix, dtype=self._dtype, device=self.layer.parameters[0].device)
        for flow in self._kept:
            a, g = (self._in_basis(key, t) for key, t in zip(("A", "G"), self._samples(flow), strict=True))
            if a.shape[2] == 1:
                total += _product(g.squeeze(2).square().mT, a.squeeze(2).square())
            else:
                for some_a, some_g in zip(a.split(8, dim=1), g.split(8, dim=1), strict=True):
                    total += (some_g.mT @ some_a).square().sum(1)
        return {"S": total * (gradient_scale**2 / examples)}

    def _in_basis(self, key: str, rows: Tensor) -> Tensor:
        """``[groups, batch, shared, d]`` in the present basis."""
        if not self.full[key]:
            return rows
        return linalg.turned(rows.flatten(1, 2), self.factors[f"U_{key}"]).reshape(rows.shape)

    def _blocks(self, factors: Factors) -> list[Tensor]:
        dense = []
        for u_g, u_a, s in zip(self.basis("G"), self.basis("A"), factors["S"], strict=True):
            basis = torch.kron(u_g, u_a)
            dense.append((basis * s.flatten()) @ basis.mT)
        return dense

    def invert(self, factors: Factors, damping: Tensor, counts: Counts, last: Factors | None = None) -> Factors:
        """See Invertible. The damping is Tikhonov's: S is a diagonal."""
        bases = self._in_solve_dtype({k: v for k, v in factors.items() if k.startswith("U_")})
        return bases | {"W": 1 / (self._present_moments(factors) + damping.view(-1, 1, 1))}

    def solve(self, cache: Factors, matrix: Tensor) -> Tensor:
        """See Invertible."""
        rotated = self._turned(cache, matrix, back=False)
        return self._turned(cache, rotated * cache["W"], back=True).to(matrix.dtype)

    def squared(self, factors: Factors, cache: Factors, damping: Tensor, matrix: Tensor) -> Tensor:
        """See Invertible."""
        rotated = self._turned(cache, matrix.to(self._dtype), back=False)
        return (rotated.square() / cache["W"]).flatten(1).sum(1)

    @staticmethod
    def _turned(cache: Factors, matrix: Tensor, back: bool) -> Tensor:
        """A stacked gradient in the bases, or back from them."""
        for key, left in (("G", True), ("A", False)):
            if (basis := cache.get(f"U_{key}")) is not None:
                matrix = linalg.turned(matrix.to(basis.dtype), basis, left=left, back=back)
        return matrix

    def cost(self) -> float:
        """See Approximation."""
        steps = 0.0
        for key, d in self.dims.items():
            if not self.full[key]:
                continue
            rank = self._ranks[key]
            # Images, their orthonormal factor, and its products with the old basis; or a decomposition.
            iterated = 2 * d * d * rank + 4 * d * rank * rank + 4 * d * d * min(rank, d)
            steps += iterated if self.options.basis == "iterate" else DECOMPOSED * d**3
        return self.layer.groups * (steps + 4 * self.dims["A"] * self.dims["G"] * sum(self._ranks.values()))

    def cache_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See Invertible."""
        moments: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"W": (self._matrix, self._dtype)}
        dtype = self.options.solve_dtype
        if dtype is None:  # the bases serve as they are
            return moments
        return moments | {k: (shape, dtype) for k, shape in self.shapes().items() if k.startswith("U_")}
