"""Two-level K-FAC: K-FAC's blocks, and a coarse correction for what they do not know of each other."""

from .optimizer import TwoLevelKFAC

__all__ = ["TwoLevelKFAC"]
