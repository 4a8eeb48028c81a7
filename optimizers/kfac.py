"""KFAC and EKFAC: the Fisher matrix as one Kronecker product a layer.

Sources: Martens & Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015
(arXiv 1503.05671); Grosse & Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers", ICML 2016
(arXiv 1602.01407); George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis",
NeurIPS 2018 (arXiv 1806.03884); Eschenhagen et al., "Kronecker-Factored Approximate Curvature for Modern Neural Network
Architectures", NeurIPS 2023 (arXiv 2311.00636).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from .base import Params
from .checks import check_choice, check_range
from .curvature.approximations import Approximation
from .curvature.kronecker import EigenFactors, KroneckerFactors, Options
from .curvature.layers import AffineLayer
from .likelihoods import Likelihood
from .natural_gradient import Auto, Fisher, KLOf, KLUnit, NaturalGradient

SOLVE_DTYPES: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}


def check_options(damping_mode: str, sharing: str, max_factor_dim: int | None, solve_dtype: str) -> torch.dtype | None:
    """Check what all Kronecker methods share; returns the dtype of the solve."""
    check_choice("damping_mode", damping_mode, ("factored", "tikhonov"))
    check_choice("sharing", sharing, ("expand", "reduce"))
    check_choice("solve_dtype", solve_dtype, tuple(SOLVE_DTYPES))
    if max_factor_dim is not None:
        check_range("max_factor_dim", max_factor_dim, 1)
    return SOLVE_DTYPES[solve_dtype]


class KFAC(NaturalGradient):
    """K-FAC: ``F ~ A (x) G``, the second moments of a layer's inputs and of its output gradients.

    The arguments of the engine (``lr`` to ``seed``) are described in NaturalGradient.

    Args:
        model: the whole module.
        params: parameters or groups; default all.
        lr: learning rate (alpha); ``auto``: see NaturalGradient.
        momentum: decay of the sum of past directions; ``auto``: see NaturalGradient.
        damping: lambda; ``auto``: see NaturalGradient.
        damping_unit: lambda is ``absolute``, or in units of the mean eigenvalue of each ``layer``.
        damping_mode: ``factored``: ``(A + pi sqrt(lambda) I) (x) (G + sqrt(lambda) / pi I)``, two matrix products a
            solve; ``tikhonov``: ``A (x) G + lambda I`` in the eigenbasis, four.
        pi: split the factored damping by ``pi² = (tr A / dim A) / (tr G / dim G)``; false: evenly.
        kl_clip: kappa; None: off.
        kl_of: what kappa bounds: the ``step`` that is taken, the step as ``measured``, or its new ``direction`` alone.
        kl_unit: kappa is of an ``observation``, each ``variable`` that it predicts, or the ``root`` of their number.
        kl_warmup: steps over which the radius ``sqrt(kl_clip)`` grows to its length; 0: none.
        fisher: sampled, empirical or exact.
        batch_fraction: share of the batch that statistics are taken on.
        decay: weight of the past in the averages (rho).
        update_every: steps between updates of the factors (T_cov).
        early_updates: update and invert more often at first: after 1, 3, 7, 15, ... steps, up to the intervals.
        refresh_every: steps between inversions (T_inv).
        sharing: ``expand`` (each position of a shared weight an example of its own; for convolutions K-FAC's own
            spatial homogeneity) or ``reduce``.
        max_factor_dim: a wider factor is kept as its diagonal; None: none is. 8192 leaves those of ResNets (4608) and
            Swin-L (6145) whole, and is where one alone takes 256 MiB and seconds a refresh; a vocabulary is wider.
        solve_dtype: of the products with the inverses; ``bfloat16`` where the processor multiplies it faster.
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
        batch_fraction: float = 1.0,
        decay: float = 0.95,
        update_every: int = 10,
        early_updates: bool = True,
        refresh_every: int = 10,
        sharing: Literal["expand", "reduce"] = "expand",
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
        options = Options(damping_mode, pi, sharing, max_factor_dim, dtype)
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
        return KroneckerFactors(layer, self.options)


class EKFAC(NaturalGradient):
    """EKFAC: K-FAC's eigenbasis with the exact second moments of the gradient in it; damped by Tikhonov.

    Where a factor has seen fewer examples than it is wide, its null space has no basis of its own, and moments taken
    there later depend on the one that rounding chose: such runs repeat themselves, but no other machine's digits, nor
    those of another number of processes. ``basis="eigh"`` chooses anew at each refresh, so that moments taken in the
    same step have no part in it.

    Args:
        model: the whole module.
        params: parameters or groups; default all.
        lr: learning rate; ``auto``: see NaturalGradient.
        momentum: decay of the sum of past directions; ``auto``: see NaturalGradient.
        damping: epsilon in the paper, added to the moments; ``auto``: see NaturalGradient.
        damping_unit: lambda is ``absolute``, or in units of the mean eigenvalue of each ``layer``.
        kl_clip: kappa; None: off.
        kl_of: what kappa bounds: the ``step`` that is taken, the step as ``measured``, or its new ``direction`` alone.
        kl_unit: kappa is of an ``observation``, each ``variable`` that it predicts, or the ``root`` of their number.
        kl_warmup: steps over which the radius ``sqrt(kl_clip)`` grows to its length; 0: none.
        fisher: sampled, empirical or exact.
        batch_fraction: share of the batch that statistics are taken on.
        decay: weight of the past in the averages.
        update_every: steps between updates of the factors and of the moments.
        early_updates: update and invert more often at first: after 1, 3, 7, 15, ... steps, up to the intervals.
        refresh_every: steps between renewals of the bases.
        basis: how a basis is renewed: ``iterate``: by one step of orthogonal iteration, ``QR(A U)``, from the last one,
            and by a decomposition (``eigh``) at the start and where it has lost its factor; ``eigh``: always by one.
        rank: a factor that is more than twice as wide has the eigenvectors of so many of its largest eigenvalues in
            its basis, and some completion of them, which takes fewer operations, for an approximation that is coarser
            where the other eigenvalues are not small beside the damping; None: all have all.
        sharing: see KFAC; of the factors, and of the gradient whose moments are taken.
        max_factor_dim: a wider factor has the identity for its eigenbasis; None: none has.
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

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        lr: Auto = 0.1,
        momentum: Auto = 0.9,
        damping: Auto = 3e-3,
        damping_unit: Literal["absolute", "layer"] = "absolute",
        kl_clip: float | None = 1e-3,
        kl_of: KLOf = "step",
        kl_unit: KLUnit = "root",
        kl_warmup: int = 0,
        fisher: Fisher = "sampled",
        batch_fraction: float = 1.0,
        decay: float = 0.95,
        update_every: int = 10,
        early_updates: bool = True,
        refresh_every: int = 100,
        basis: Literal["iterate", "eigh"] = "iterate",
        rank: int | None = 128,
        sharing: Literal["expand", "reduce"] = "expand",
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
        dtype = check_options("tikhonov", sharing, max_factor_dim, solve_dtype)
        check_choice("basis", basis, ("iterate", "eigh"))
        if rank is not None:
            check_range("rank", rank, 1)
        options = Options(
            "tikhonov", sharing=sharing, max_factor_dim=max_factor_dim, solve_dtype=dtype, rank=rank, basis=basis
        )
        self._decompositions = 0  # up to the last time that a state was restored
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
        return EigenFactors(layer, self.options)

    # -- state ---------------------------------------------------------------------------------------------------------

    def _decomposed(self) -> int:
        blocks = [block for block in self.blocks.values() if isinstance(block, EigenFactors)]
        return self._decompositions + sum(block.decompositions for block in blocks)

    def diagnostics(self) -> dict[str, float]:
        """Adds how often a factor's basis was made by a full decomposition."""
        return super().diagnostics() | {"curvature/decompositions": float(self._decomposed())}

    def _curvature(self) -> dict[str, Any]:
        """See NaturalGradient; also the count of decompositions."""
        saved = super()._curvature()
        return saved | {"counters": saved["counters"] | {"decompositions": self._decomposed()}}

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        self._decompositions = int(saved["counters"].get("decompositions", 0))
        for block in self.blocks.values():
            if isinstance(block, EigenFactors):
                block.decompositions = 0
