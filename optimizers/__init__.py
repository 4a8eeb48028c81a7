"""Curvature-aware optimizers. Imports torch alone: ``from optimizers import AdaFisher`` works in any script."""

from .adafisher import AdaFisher, AdaFisherW
from .adahessian import AdaHessian
from .averaging import EMA, ScheduleFree
from .base import Coverage, CurvatureOptimizer, build_optimizer, consolidate, unwrap
from .exact import ExactNaturalGradient
from .fishleg import FishLeg
from .kronecker import EKFAC, KFAC, KPSVD, Deflation, KFACCorrected, Lanczos
from .likelihoods import Bernoulli, Categorical, Gaussian, LearnedGaussian, Likelihood
from .newton_muon import NewtonMuon
from .step_length import Graft, Normalized
from .two_level import TwoLevelKFAC
from .wrapper import Wrapper, innermost

__all__ = [
    "EKFAC",
    "EMA",
    "KFAC",
    "KPSVD",
    "AdaFisher",
    "AdaFisherW",
    "AdaHessian",
    "Bernoulli",
    "Categorical",
    "Coverage",
    "CurvatureOptimizer",
    "Deflation",
    "ExactNaturalGradient",
    "FishLeg",
    "Gaussian",
    "Graft",
    "KFACCorrected",
    "Lanczos",
    "LearnedGaussian",
    "Likelihood",
    "NewtonMuon",
    "Normalized",
    "ScheduleFree",
    "TwoLevelKFAC",
    "Wrapper",
    "build_optimizer",
    "consolidate",
    "innermost",
    "unwrap",
]
