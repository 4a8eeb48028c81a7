"""KFAC and EKFAC: the Fisher matrix as one Kronecker product a layer.

Sources: Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015
(arXiv 1503.05671); Grosse & Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers", ICML 2016
(arXiv 1602.01407); George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis",
NeurIPS 2018 (arXiv 1806.03884); Eschenhagen et al., "Kronecker-Factored Approximate Curvature for Modern Neural Network
Architectures", NeurIPS 2023 (arXiv 2311.00636).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import nn

from ..base import Params, with_fixed
from ..checks import check_choice, check_range
from ..curvature.approximations import Approximation
from ..curvature.kronecker import EigenFactors, KroneckerFactors
from ..curvature.layers import AffineLayer
from .method import KroneckerMethod


class KFAC(KroneckerMethod):
    """K-FAC: ``F ~ A (x) G``, the second moments of a layer's inputs and of its output gradients."""

    def affine_block(self, layer: AffineLayer) -> Approximation:
        """See NaturalGradient."""
        return KroneckerFactors(layer, self.options)


class EKFAC(KroneckerMethod):
    """EKFAC: K-FAC's eigenbasis with the exact second moments of the gradient in it; damped by Tikhonov.

    Where a factor has seen fewer examples than it is wide, its null space has no basis of its own, and moments taken
    there later depend on the one that rounding chose: such runs repeat themselves, but no other machine's digits, nor
    those of another number of processes. ``basis="eigh"`` chooses anew at each refresh, so that moments taken in the
    same step have no part in it.

    Args:
        damping: epsilon in the paper, added to the moments; see NaturalGradient for ``"auto"``.
        update_every: steps between updates of the factors and of the moments.
        refresh_every: steps between renewals of the bases.
        basis: how a basis is renewed: ``iterate``: by one step of orthogonal iteration, ``QR(A U)``, from the last one,
            and by a decomposition (``eigh``) at the start and where it has lost its factor; ``eigh``: always by one.
        rank: a factor that is more than twice as wide has the eigenvectors of so many of its largest eigenvalues in
            its basis, and some completion of them, which takes fewer operations, for an approximation that is coarser
            where the other eigenvalues are not small beside the damping; None: all have all.
        sharing: see KFAC; of the factors, and of the gradient whose moments are taken.
        max_factor_dim: a wider factor has the identity for its eigenbasis; None: none has.
    """

    fixed: ClassVar[Mapping[str, Any]] = {"damping_mode": "tikhonov", "pi": True}

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        refresh_every: int = 100,
        basis: Literal["iterate", "eigh"] = "iterate",
        rank: int | None = 128,
        **shared: Any,
    ) -> None:
        check_choice("basis", basis, ("iterate", "eigh"))
        if rank is not None:
            check_range("rank", rank, 1)
        self.options = replace(self.options, rank=rank, basis=basis)
        super().__init__(model, params, refresh_every=refresh_every, **with_fixed(EKFAC, self, shared))

    def affine_block(self, layer: AffineLayer) -> Approximation:
        """See NaturalGradient."""
        return EigenFactors(layer, self.options)

    # -- state ---------------------------------------------------------------------------------------------------------

    def diagnostics(self) -> dict[str, float]:
        """Adds how often a factor's basis was made by a full decomposition."""
        return super().diagnostics() | {"curvature/decompositions": float(self._counts.decomposed)}

    def _curvature(self) -> dict[str, Any]:
        """See NaturalGradient; also the count of decompositions."""
        saved = super()._curvature()
        return saved | {"counters": saved["counters"] | {"decompositions": self._counts.decomposed}}
