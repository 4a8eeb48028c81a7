"""Rules for the length of steps whose direction is any optimizer's."""

from .graft import Graft
from .normalized import Normalized
from .rule import StepLength, own

__all__ = ["Graft", "Normalized", "StepLength", "own"]
