"""What AdaFisher keeps of a layer's Kronecker factors, and what it drops.

Of ``G (x) A`` it keeps the diagonals H of A and S of G; each is scaled to [0, 1] by its least and its largest entry
(``optimizers.adafisher.minmax``), and the step divides by ``F~ = H' (x) S' + Lambda`` (arXiv 2405.16397, section 3). So
two things are lost: what is off the diagonals, and the diagonals' range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.factors.matrices import diagonal_share
from analysis.factors.observing import LayerFactors
from optimizers.adafisher import minmax


def diagonals(factors: LayerFactors) -> tuple[Tensor, Tensor]:
    """H ``[groups, columns]`` and S ``[groups, d_out]``: the factors' diagonals.

    With true labels and the sharing ``expand`` they are what AdaFisher estimates from the same examples.

    Args:
        factors: of a layer.
    """
    h, s = (m.diagonal(dim1=-2, dim2=-1) if m.dim() == 3 else m for m in (factors.A, factors.G))
    return h, s


def denominator(factors: LayerFactors, damping: float) -> Tensor:
    """``F~ = H' (x) S' + Lambda`` of one update, ``[groups, d_out, columns]``.

    Args:
        factors: of a layer.
        damping: Lambda.
    """
    h, s = (minmax(d) for d in diagonals(factors))
    return s.unsqueeze(-1) * h.unsqueeze(-2) + damping


def spectrum_error(diagonal: Tensor, eigenvalues: Tensor) -> float:
    """``sum of |v - d| / sum of v`` with both sorted: 0 where the diagonal is the spectrum, below 2.

    The sums are equal, and the diagonal's entries lie between the eigenvalues (Schur 1923): it always looks better
    conditioned than the factor is.

    Args:
        diagonal: of the factor, ``[groups, d]``.
        eigenvalues: of it, ``[groups, d]``.
    """
    kept, true = diagonal.double().flatten().sort().values, eigenvalues.flatten().sort().values
    whole = float(true.sum())
    return float((kept - true).abs().sum()) / whole if whole > 0 else math.nan


@dataclass(frozen=True)
class Kept:
    """What is left of one layer's block.

    Attributes:
        frobenius: the diagonal's share of the squared Frobenius norm of ``G (x) A``, 0 to 1: the product of the
            factors' shares. The rest is dropped. (Of the trace all is kept.)
        frobenius_A: of A's.
        frobenius_G: of G's.
        spectrum_A: see ``spectrum_error``.
        spectrum_G: see ``spectrum_error``.
        top: the largest entry of the diagonal of ``G (x) A`` as a share of its largest eigenvalue.
        decades: powers of ten that the diagonal of ``G (x) A`` extends over, entries of zero left out.
        decades_after: those of F~, at most ``log10(1 + 1 / Lambda)``.
        damped: share of the entries of F~ of which Lambda is the larger part.
        cosine: of the angle between the gradient and the gradient divided by F~: 1 is SGD's direction.
    """

    frobenius: float
    frobenius_A: float
    frobenius_G: float
    spectrum_A: float
    spectrum_G: float
    top: float
    decades: float
    decades_after: float
    damped: float
    cosine: float

    @classmethod
    def of(cls, factors: LayerFactors, spectra: tuple[Tensor, Tensor], damping: float) -> Kept:
        """Compare a layer's factors with what AdaFisher makes of them.

        Args:
            factors: whole ones.
            spectra: eigenvalues of A ``[groups, columns]`` and of G ``[groups, d_out]``.
            damping: Lambda.
        """
        h, s = (d.double() for d in diagonals(factors))
        share_a, share_g = diagonal_share(factors.A), diagonal_share(factors.G)
        product = s.unsqueeze(-1) * h.unsqueeze(-2)
        top = float((spectra[0].amax(-1) * spectra[1].amax(-1)).max())
        after = denominator(factors, damping).double()
        gradient = factors.gradient.double()
        turned = gradient / after
        sizes = float(gradient.norm()) * float(turned.norm())
        return cls(
            frobenius=share_a * share_g,
            frobenius_A=share_a,
            frobenius_G=share_g,
            spectrum_A=spectrum_error(h, spectra[0]),
            spectrum_G=spectrum_error(s, spectra[1]),
            top=float(product.max()) / top if top > 0 else math.nan,
            decades=_decades(product),
            decades_after=_decades(after),
            damped=float((after < 2 * damping).double().mean()),
            cosine=float((gradient * turned).sum()) / sizes if sizes > 0 else math.nan,
        )


def _decades(values: Tensor) -> float:
    """Powers of ten between the least and the largest of some numbers that are not zero."""
    positive = values[values > 0]
    if not len(positive):
        return math.nan
    low, high = torch.aminmax(positive)
    return math.log10(float(high)) - math.log10(float(low))
