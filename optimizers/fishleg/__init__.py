"""FishLeg: natural gradient with an inverse Fisher matrix that is learned beside the model."""

from .learned_inverses import LearnedDiagonal, LearnedInverse, LearnedKronecker
from .optimizer import FishLeg

__all__ = ["FishLeg", "LearnedDiagonal", "LearnedInverse", "LearnedKronecker"]
