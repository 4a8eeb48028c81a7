"""What pictures show of one factor: an image of its entries, its discs, and both under noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from analysis.factors import matrices, noise

#: Decades below the largest entry that images tell apart.
DECADES = 4.0
#: Of a wider matrix an image has so many rows and columns, means of what falls into each.
PIXELS = 144


def image(matrix: Tensor) -> Tensor:
    """The sizes of a matrix's entries, in decades below the largest: from ``-DECADES`` to 0.

    Args:
        matrix: ``[d, d]``, or ``[groups, d, d]``, of which the first is taken.

    Returns:
        ``[p, p]``, float64, p no more than ``PIXELS``.
    """
    size = (matrix[0] if matrix.dim() == 3 else matrix).double().abs()
    largest = float(size.max())
    shown = (size / (largest or 1.0)).clamp(min=10**-DECADES).log10()
    if len(shown) <= PIXELS:
        return shown
    return F.adaptive_avg_pool2d(shown[None, None], (PIXELS, PIXELS))[0, 0]


@dataclass(frozen=True)
class Noisy:
    """A factor with noise of one strength off its diagonal.

    Attributes:
        strength: of the noise, in units of the diagonal's root mean square.
        snr: the study's ratio in decibels.
        eigenvalues: ``[..., d]``, the largest first.
    """

    strength: float
    snr: float
    eigenvalues: Tensor


@dataclass(frozen=True)
class Seen:
    """One factor as pictures show it.

    Attributes:
        discs: Gershgorin's, whose centres are the diagonal.
        snr: without any noise.
        noisy: under noise, one a strength.
        field: image of its Fourier field.
        noisy_field: of that under the strongest noise.
    """

    discs: matrices.Discs
    snr: float
    noisy: tuple[Noisy, ...]
    field: Tensor
    noisy_field: Tensor

    @classmethod
    def of(cls, matrix: Tensor, strengths: Sequence[float], seed: int) -> Seen:
        """Look at a factor.

        Args:
            matrix: ``[groups, d, d]``.
            strengths: of the noise, in units of the diagonal's root mean square.
            seed: of the noise.
        """
        found = {s: noise.Perturbation.of(matrix, s * noise.unit(matrix), seed) for s in strengths}
        return cls(
            matrices.Discs.of(matrix), noise.snr(matrix, matrix),
            tuple(Noisy(strength, it.snr, it.eigenvalues) for strength, it in found.items()),
            image(matrices.fourier(matrix)), image(matrices.fourier(found[max(strengths)].matrix)),
        )  # fmt: skip
