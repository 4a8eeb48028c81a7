"""The methods whose approximations are compared: each an optimizer of this project, as it is, on one batch.

Momentum, decay of weights, clips of length and averages over steps are off, and the rate is 1: what one step changes is
then the method's direction, and what its state holds is its approximation of this batch's Fisher matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from optimizers import (
    EKFAC,
    KFAC,
    KPSVD,
    AdaFisher,
    Deflation,
    ExactNaturalGradient,
    FishLeg,
    KFACCorrected,
    Lanczos,
    Likelihood,
    TwoLevelKFAC,
)
from optimizers.natural_gradient import Fisher, NaturalGradient

Build = Callable[[nn.Module, Sequence[nn.Parameter], "Settings"], torch.optim.Optimizer]


@dataclass(frozen=True)
class Settings:
    """What all methods have in common.

    Attributes:
        likelihood: of the model's outputs.
        damping: lambda, absolute.
        fisher: ``exact``: the likelihood's own, a pass an output; ``sampled``: one draw of targets an example, the same
            for all methods; ``empirical``: the targets of the data. AdaFisher takes the latter whatever this says, as
            it sees no other gradient, and FishLeg samples.
        seed: of what is drawn.
        fraction: of the batch that natural gradients are made on.
        updates: of FishLeg's learned inverse, on halves of the batch.
        aux_lr: FishLeg's rate of learning it.
    """

    likelihood: Likelihood
    damping: float = 1e-2
    fisher: Fisher = "exact"
    seed: int = 0
    fraction: float = 1.0
    updates: int = 200
    aux_lr: float = 1e-3

    @property
    def loss_reduction(self) -> Literal["mean", "sum"]:
        """How the likelihood's loss sums over examples."""
        return "sum" if self.likelihood.reduction == "sum" else "mean"


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        name: on the command line.
        label: in figures and tables.
        build: the optimizer, for a model and some of its parameters.
        shared: whether it differs from another one only where positions share a weight.
        learned: whether it takes many updates before there is anything to see.
    """

    name: str
    label: str
    build: Build
    shared: bool = False
    learned: bool = False


def _natural(kind: Callable[..., NaturalGradient], **options: Any) -> Build:
    def build(model: nn.Module, params: Sequence[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
        return natural(kind, model, params, settings, **options)

    return build


def natural(
    kind: Callable[..., NaturalGradient],
    model: nn.Module,
    params: Sequence[nn.Parameter],
    settings: Settings,
    **options: Any,
) -> NaturalGradient:
    """A natural gradient of one batch, without anything that changes its direction or its length.

    Args:
        kind: the class.
        model: the whole module.
        params: of it, those that count.
        settings: see there.
        options: of the class.
    """
    return kind(
        model, list(params), lr=1.0, momentum=0.0, damping=settings.damping, kl_clip=None, fisher=settings.fisher,
        batch_fraction=settings.fraction, update_every=1, likelihood=settings.likelihood, seed=settings.seed,
        loss_reduction=settings.loss_reduction, **options,
    )  # fmt: skip


def _adafisher(normalize: Literal["minmax", "none"]) -> Build:
    def build(model: nn.Module, params: Sequence[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
        return AdaFisher(
            model, list(params), lr=1.0, momentum=0.0, damping=settings.damping, update_every=1, max_update=None,
            normalize=normalize, loss_reduction=settings.loss_reduction,
        )  # fmt: skip

    return build


def _fishleg(model: nn.Module, params: Sequence[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    return FishLeg(
        model, list(params), lr=1.0, momentum=0.0, weight_decay=0.0, damping=settings.damping, max_update=None,
        aux_every=1, aux_lr=settings.aux_lr, likelihood=settings.likelihood, seed=settings.seed,
    )  # fmt: skip


def _gradient(model: nn.Module, params: Sequence[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


#: EKFAC in the basis of the parameters themselves is the natural gradient by the exact diagonal.
METHODS = {
    method.name: method
    for method in (
        Method("gradient", "gradient", _gradient),
        Method("diagonal", "exact diagonal", _natural(EKFAC, max_factor_dim=1)),
        Method("adafisher", "AdaFisher", _adafisher("minmax")),
        Method("adafisher_raw", "AdaFisher, not normalised", _adafisher("none")),
        Method("kfac", "K-FAC (expand)", _natural(KFAC)),
        Method("kfac_tikhonov", "K-FAC, Tikhonov", _natural(KFAC, damping_mode="tikhonov")),
        Method("kfac_reduce", "K-FAC (reduce)", _natural(KFAC, sharing="reduce"), shared=True),
        Method("ekfac", "EKFAC", _natural(EKFAC)),
        Method("kpsvd", "KPSVD", _natural(KPSVD)),
        Method("kpsvd_tikhonov", "KPSVD, Tikhonov", _natural(KPSVD, damping_mode="tikhonov")),
        Method("deflation", "Deflation", _natural(Deflation)),
        Method("kfac_corrected", "KFAC-corrected", _natural(KFACCorrected)),
        Method("lanczos", "Lanczos", _natural(Lanczos)),
        Method("fishleg", "FishLeg", _fishleg, learned=True),
        Method("two_level", "two-level K-FAC", _natural(TwoLevelKFAC)),
        Method("block", "exact blocks", _natural(ExactNaturalGradient, blocks="layer")),
    )
}

#: The name of the line of what a run's own optimizer has in its state: averages over steps, at its own settings.
OWN = "own"


def label(method: str) -> str:
    """What figures and tables call a method.

    Args:
        method: its name.
    """
    if method == OWN:
        return "the run's own average"
    return METHODS[method].label if method in METHODS else method
