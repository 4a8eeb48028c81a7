"""The exact natural gradient, and what other methods take of it."""

from .optimizer import ExactNaturalGradient
from .sampled import SampledFisher

__all__ = ["ExactNaturalGradient", "SampledFisher"]
