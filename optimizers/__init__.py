"""Curvature-aware optimizers. Imports torch alone: ``from optimizers import AdaFisher`` works in any script."""

import sys
from importlib.util import find_spec

if sys.argv[:1] == ["-m"] and find_spec("torch") is None:
    sys.exit("error: torch is not installed, and python -m optimizers needs it: pip install -r requirements.txt")

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
