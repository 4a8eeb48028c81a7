"""The leading Kronecker pairs of a Fisher block: singular pairs of its rearrangement, found without ever forming it.

- ``operators``: what the rearranged block Z(F) is, and its products, in three forms; which positions count;
- ``forms``: which form takes the fewest operations;
- ``solvers``: power iteration and Lanczos, over any operator; ``gram``: the closed form of one position a layer;
- ``kinds``: symmetric and antisymmetric pairs;
- ``pairs``: the fit to samples, ``leading_pairs``; ``compression``: of sums of pairs to fewer, ``compress``;
- ``algebra``: pieces that all of these share.
"""

from .algebra import Pairs
from .compression import Terms, compress, compress_many
from .forms import FORMS, cheapest_form
from .operators import ExampleGradients, GramCoefficients, Locations, Operator, location_mask
from .pairs import SOLVERS, leading_pairs, leading_pairs_many

__all__ = [
    "FORMS",
    "SOLVERS",
    "ExampleGradients",
    "GramCoefficients",
    "Locations",
    "Operator",
    "Pairs",
    "Terms",
    "cheapest_form",
    "compress",
    "compress_many",
    "leading_pairs",
    "leading_pairs_many",
    "location_mask",
]
