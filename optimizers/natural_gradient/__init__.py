"""The engine of the methods that step along a natural gradient."""

from .fisher import Fisher, FisherEstimate, Once
from .kl_clip import KLClip, KLOf, KLUnit
from .lengths import LengthRule
from .moves import Moves
from .optimizer import Auto, NaturalGradient
from .owners import Assign
from .stacks import Block, Stack, inner, reader, stacked

__all__ = [
    "Assign",
    "Auto",
    "Block",
    "Fisher",
    "FisherEstimate",
    "KLClip",
    "KLOf",
    "KLUnit",
    "LengthRule",
    "Moves",
    "NaturalGradient",
    "Once",
    "Stack",
    "inner",
    "reader",
    "stacked",
]
