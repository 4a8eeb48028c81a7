"""Likelihoods: what a model's outputs say about the targets."""

from .bernoulli import Bernoulli
from .categorical import Categorical
from .gaussian import Gaussian, LearnedGaussian
from .likelihood import Likelihood, Reduction, check_outputs

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "LearnedGaussian",
    "Likelihood",
    "Reduction",
    "check_outputs",
]
