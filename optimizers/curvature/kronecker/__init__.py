"""Kronecker approximations of a layer's Fisher block: how they are estimated, averaged, damped and inverted.

- ``options``: what all blocks of an optimizer share;
- ``invertible``: the protocol, an average over steps and a damped solve on stacks;
- ``factored``: a product ``G (x) A`` and its damped solve, which most approximations share;
- ``kfac``: K-FAC's factors; ``eigenfactors``: EKFAC's, in their eigenbases;
- ``two_terms``: a sum of two products and its inverse; ``pairs``: the nearest such sum; ``corrected``: K-FAC's product
  and the nearest one to what it misses;
- ``diagonal``: the exact diagonal, of norms and Embedding.

A further approximation is a subclass of ``Kronecker`` (or of one of the others) with ``_statistics``, what a backward
pass adds to a step's sums, and ``estimate``, the factors that the sums make; an optimizer returns it from
``affine_block``.
"""

from .corrected import CorrectedFactors
from .diagonal import ExactDiagonal
from .eigenfactors import EigenFactors
from .factored import Kronecker
from .invertible import Invertible
from .kfac import KroneckerFactors
from .options import Counts, Factors, Options
from .pairs import BestKronecker, KroneckerPairs
from .two_terms import TwoTerms

__all__ = [
    "BestKronecker",
    "CorrectedFactors",
    "Counts",
    "EigenFactors",
    "ExactDiagonal",
    "Factors",
    "Invertible",
    "Kronecker",
    "KroneckerFactors",
    "KroneckerPairs",
    "Options",
    "TwoTerms",
]
