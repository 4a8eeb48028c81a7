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

from typing import Any, ClassVar, Literal

from torch import nn

from .base import Params
from .checks import check_choice, check_range
from .curvature.approximations import Approximation
from .curvature.kronecker import (
    BestKronecker,
    CorrectedFactors,
    KroneckerFactors,
    KroneckerPairs,
    Options,
)
from .curvature.layers import AffineLayer
from .kfac import check_options
from .likelihoods import Likelihood
from .natural_gradient import Auto, Fisher, KLOf, KLUnit, NaturalGradient

Solver = Literal["gram", "power", "lanczos"]


class KPSVD(NaturalGradient):
    """KPSVD: ``F ~ G (x) A``, the nearest Kronecker product in Frobenius norm. Both factors are positive semi-definite.

    Args:
        model: the whole module.
        params: parameters or groups; default all.
        lr: learning rate; ``auto``: see NaturalGradient.
        momentum: decay of the sum of past directions; ``auto``: see NaturalGradient.
        damping: lambda; ``auto``: see NaturalGradient.
        damping_unit: lambda is ``absolute``, or in units of the mean eigenvalue of each ``layer``.
        damping_mode: see KFAC; the two-term methods know ``factored`` only. The published damping, lambda added to each
            factor, is ``pi=False`` with lambda squared.
        pi: see KFAC.
        kl_clip: kappa; None: off.
        kl_of: what kappa bounds: the ``step`` that is taken, the step as ``measured``, or its new ``direction`` alone.
        kl_unit: kappa is of an ``observation``, each ``variable`` that it predicts, or the ``root`` of their number.
        kl_warmup: steps over which the radius ``sqrt(kl_clip)`` grows to its length; 0: none.
        fisher: sampled, empirical or exact.
        batch_fraction: share of the batch that statistics are taken on.
        decay: weight of the past in the averages.
        update_every: steps between fits (T_cov).
        refresh_every: steps between inversions (T_inv).
        solver: ``gram``: closed form where no weight is shared over positions, else a Lanczos process in the cheapest
            representation; ``power``: the published power iteration, pair by pair; ``lanczos``: Lanczos always.
            None: the method's own (``lanczos`` for Lanczos, ``gram`` for the others).
        sharing: ``expand``: the gradient as it is, all pairs of positions in it; ``reduce``: see KFAC.
        radius: leave out pairs of positions farther apart than this along either axis of the image; None: none.
        rank: of the second term's eigenvalues, the inverse keeps so many of the largest on either side, in layers more
            than twice as wide; None: all. A whole eigenbasis costs several K-FAC inverses.
        max_factor_dim: a layer with a wider factor falls back to K-FAC with that factor's diagonal; None: none does.
        solve_dtype: see KFAC.
        weight_decay: L2 coefficient, added to the preconditioned gradient.
        fallback_lr: first-order step of the parameters without curvature.
        skip: regular expression of layers to leave to the fallback.
        likelihood: of the model's outputs; needed unless ``fisher="empirical"``.
        seed: of the sampled targets.
        loss_reduction: how the loss sums over examples; matters for ``fisher="empirical"`` only.
        decoupled_decay: as in AdamW: ``theta *= 1 - lr weight_decay``, apart from the preconditioned gradient.
        flags: torch's; see CurvatureOptimizer.

    Raises:
        ValueError: for a hyper-parameter out of its range.
    """

    block: ClassVar[type[KroneckerPairs]] = BestKronecker
    default_solver: ClassVar[Solver] = "gram"

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        lr: Auto = 0.1,
        momentum: Auto = 0.9,
        damping: Auto = 3e-3,
        damping_unit: Literal["absolute", "layer"] = "absolute",
        damping_mode: Literal["factored", "tikhonov"] = "factored",
        pi: bool = True,
        kl_clip: float | None = 1e-3,
        kl_of: KLOf = "step",
        kl_unit: KLUnit = "root",
        kl_warmup: int = 0,
        fisher: Fisher = "sampled",
        batch_fraction: float = 0.25,
        decay: float = 0.95,
        update_every: int = 10,
        early_updates: bool = True,
        refresh_every: int = 10,
        solver: Solver | None = None,
        sharing: Literal["expand", "reduce"] = "expand",
        radius: int | None = None,
        rank: int | None = 128,
        max_factor_dim: int | None = 8192,
        solve_dtype: Literal["float32", "bfloat16"] = "float32",
        weight_decay: float = 0.0,
        fallback_lr: float = 1e-3,
        skip: str | None = None,
        likelihood: Likelihood | None = None,
        seed: int = 0,
        loss_reduction: Literal["mean", "sum"] = "mean",
        decoupled_decay: bool = False,
        **flags: Any,
    ) -> None:
        dtype = check_options(damping_mode, sharing, max_factor_dim, solve_dtype)
        solver = solver or self.default_solver
        check_choice("solver", solver, ("gram", "power", "lanczos"))
        if radius is not None:
            check_range("radius", radius, 0)
        if rank is not None:
            check_range("rank", rank, 1)
        if damping_mode == "tikhonov" and self.block.terms > 1:
            raise ValueError("damping_mode must be 'factored' for a sum of two products: lambda I would be a third")
        options = Options(damping_mode, pi, sharing, max_factor_dim, dtype, solver, radius, rank)
        super().__init__(
            model, params, lr=lr, momentum=momentum, damping=damping, damping_unit=damping_unit,
            kl_clip=kl_clip, kl_of=kl_of, kl_unit=kl_unit, kl_warmup=kl_warmup, fisher=fisher,
            batch_fraction=batch_fraction, decay=decay, update_every=update_every,
            early_updates=early_updates, refresh_every=refresh_every,
            weight_decay=weight_decay, fallback_lr=fallback_lr, skip=skip, options=options, likelihood=likelihood,
            seed=seed, loss_reduction=loss_reduction, decoupled_decay=decoupled_decay, flags=flags,
        )  # fmt: skip

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
