"""KPSVD, Deflation, Lanczos and KFAC-corrected: Kronecker products nearest to the Fisher matrix, by SVD.

Source: Koroko, Anciaux-Sedrakian, Ben Gharbia, Garès, Haddou and Tran, "Efficient approximations of the Fisher matrix
in neural networks using Kronecker product singular value decomposition", 2022 (arXiv 2201.10285), after Van Loan &
Pitsianis, "Approximation with Kronecker products", 1993. The leading singular pairs of the rearranged block
``Z(F) = mean_i sum_{t,t'} vec(a_it a_it'ᵀ) vec(g_it g_it'ᵀ)ᵀ`` give the sums of Kronecker products nearest to F.

Three things differ from the published code on purpose, and are tested: the second term keeps its signs (it is
indefinite, and the inverse of its absolute value is no inverse), statistics are renewed, and the leading pairs come in
closed form from Gram matrices of the samples; the published power iteration and Lanczos process are ``solver=power``
and ``solver=lanczos``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import nn

from ..base import Params
from ..checks import check_choice, check_range
from ..curvature.approximations import Approximation
from ..curvature.kronecker import BestKronecker, CorrectedFactors, KroneckerFactors, KroneckerPairs
from ..curvature.layers import AffineLayer
from .method import KroneckerMethod

Solver = Literal["gram", "power", "lanczos"]


class KPSVD(KroneckerMethod):
    """KPSVD: ``F ~ G (x) A``, the nearest Kronecker product in Frobenius norm. Both factors are positive semi-definite.

    Args:
        damping_mode: see KFAC; the two-term methods know ``factored`` only. The published damping, lambda added to each
            factor, is ``pi=False`` with lambda squared.
        update_every: steps between fits (T_cov).
        solver: ``gram``: closed form where no weight is shared over positions, else a Lanczos process in the cheapest
            representation; ``power``: the published power iteration, pair by pair; ``lanczos``: Lanczos always.
            None: the method's own (``lanczos`` for Lanczos, ``gram`` for the others).
        sharing: ``expand``: the gradient as it is, all pairs of positions in it; ``reduce``: see KFAC.
        radius: leave out pairs of positions farther apart than this along either axis of the image; None: none.
        rank: of the second term's eigenvalues, the inverse keeps so many of the largest on either side, in layers more
            than twice as wide; None: all. A whole eigenbasis costs several K-FAC inverses.
        max_factor_dim: a layer with a wider factor falls back to K-FAC with that factor's diagonal; None: none does.
    """

    block: ClassVar[type[KroneckerPairs]] = BestKronecker
    default_solver: ClassVar[Solver] = "gram"

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        batch_fraction: float = 0.25,
        solver: Solver | None = None,
        radius: int | None = None,
        rank: int | None = 128,
        **shared: Any,
    ) -> None:
        solver = solver or self.default_solver
        check_choice("solver", solver, ("gram", "power", "lanczos"))
        if radius is not None:
            check_range("radius", radius, 0)
        if rank is not None:
            check_range("rank", rank, 1)
        self.options = replace(self.options, solver=solver, radius=radius, rank=rank)
        super().__init__(model, params, batch_fraction=batch_fraction, **shared)

    def _check_options(self) -> None:
        if self.options.damping_mode == "tikhonov" and self.block.terms > 1:
            raise ValueError("damping_mode must be 'factored' for a sum of two products: lambda I would be a third")

    def affine_block(self, layer: AffineLayer) -> Approximation:
        """See NaturalGradient."""
        wide = max(layer.columns, layer.d_out) > (self.options.max_factor_dim or float("inf"))
        return KroneckerFactors(layer, self.options) if wide else self.block(layer, self.options)


class Deflation(KPSVD):
    """The nearest sum of two Kronecker products: KPSVD, and the same again of what it leaves. Arguments as of KPSVD."""

    block = KroneckerPairs


class KFACCorrected(KPSVD):
    """K-FAC plus the nearest Kronecker product to what it leaves. Arguments as of KPSVD."""

    block = CorrectedFactors


class Lanczos(KPSVD):
    """The nearest sum of two Kronecker products, by a Golub-Kahan-Lanczos process. Arguments as of KPSVD.

    Deflation and Lanczos approximate the same sum; they differ in how they find it.
    """

    block = KroneckerPairs
    default_solver = "lanczos"
