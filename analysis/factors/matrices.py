"""Numbers of one factor, a symmetric matrix without negative eigenvalues: its spectrum, and what its diagonal says.

A factor comes as ``[groups, d, d]`` (or ``[d, d]``): of a grouped convolution it is the block-diagonal matrix of its
groups. All is computed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def spectrum(matrix: Tensor) -> Tensor:
    """Eigenvalues of each group, the largest first.

    Args:
        matrix: symmetric, ``[..., d, d]``.

    Returns:
        ``[..., d]``, float64.
    """
    return torch.linalg.eigvalsh(matrix.double()).flip(-1)


def resolution(eigenvalues: Tensor, precision: torch.dtype = torch.float64) -> float:
    """Below this an eigenvalue cannot be told from zero: ``d eps`` times the largest one.

    Args:
        eigenvalues: ``[..., d]``.
        precision: that the matrix was computed in.
    """
    return max(float(eigenvalues.max()), 0.0) * eigenvalues.shape[-1] * torch.finfo(precision).eps


def rank(eigenvalues: Tensor, precision: torch.dtype = torch.float64) -> int:
    """How many eigenvalues are above ``resolution``.

    Args:
        eigenvalues: ``[..., d]``.
        precision: that the matrix was computed in.
    """
    return int((eigenvalues > resolution(eigenvalues, precision)).sum())


def condition(eigenvalues: Tensor, damping: float = 0.0, precision: torch.dtype = torch.float64) -> float:
    """``(largest + damping) / (smallest + damping)``; infinite where the smallest cannot be told from zero.

    Args:
        eigenvalues: ``[..., d]``.
        damping: added to each.
        precision: that the matrix was computed in.
    """
    low, high = float(eigenvalues.min()), float(eigenvalues.max())
    low = low if low > resolution(eigenvalues, precision) else 0.0
    return (high + damping) / (low + damping) if low + damping > 0 else math.inf


def participation(eigenvalues: Tensor) -> float:
    """``(sum)² / sum of squares``: how many equal eigenvalues would have this trace and Frobenius norm.

    Args:
        eigenvalues: ``[..., d]``.

    Returns:
        From 1 to the number of eigenvalues; 0 where all are zero.
    """
    largest = float(eigenvalues.abs().max())
    if largest == 0:
        return 0.0
    scaled = eigenvalues.double() / largest  # squares of tiny ones would be zeros
    return float(scaled.sum()) ** 2 / float(scaled.square().sum())


def dimension(eigenvalues: Tensor, damping: float) -> float:
    """The effective dimension ``sum of v / (v + damping)`` (MacKay 1992): directions that damping leaves as they are.

    Args:
        eigenvalues: of any shape; negative ones, of rounding, count as zeros.
        damping: above 0.
    """
    values = eigenvalues.clamp(min=0)
    return float((values / (values + damping)).sum())


def dominance(matrix: Tensor) -> Tensor:
    """``|m_ii| / sum of |m_ij| over j != i``, one a row: a row above 1 is diagonally dominant.

    Infinite in a row without anything else; not a number in one of zeros alone.

    Args:
        matrix: ``[..., d, d]``.

    Returns:
        ``[... * d]``.
    """
    size = matrix.double().abs()
    diagonal = size.diagonal(dim1=-2, dim2=-1)
    return (diagonal / (size - torch.diag_embed(diagonal)).sum(-1)).flatten()


def diagonal_share(matrix: Tensor) -> float:
    """The diagonal's share of the squared Frobenius norm, 0 to 1; not a number for a matrix of zeros.

    Args:
        matrix: ``[..., d, d]``.
    """
    largest = float(matrix.abs().max())
    if largest == 0:
        return math.nan
    scaled = matrix.double() / largest
    return float(scaled.diagonal(dim1=-2, dim2=-1).square().sum()) / float(scaled.square().sum())


def drift(before: Tensor, now: Tensor) -> float:
    """``|now - before| / |now|`` in the Frobenius norm: how far a factor has moved, in its own length.

    Args:
        before: ``[..., d, d]``.
        now: of the same shape; of zeros: not a number.
    """
    size = float(now.double().norm())
    return float((now.double() - before.double()).norm()) / size if size > 0 else math.nan


@dataclass(frozen=True)
class Discs:
    """Gershgorin's discs (1931): every eigenvalue lies in one of those about ``m_ii`` with radius ``sum of |m_ij|``.

    Attributes:
        centres: the diagonal, ``[... * d]``.
        radii: sums of the other entries' sizes by row, ``[... * d]``.
    """

    centres: Tensor
    radii: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Discs:
        """The discs of a matrix ``[..., d, d]``."""
        double = matrix.double()
        centres = double.diagonal(dim1=-2, dim2=-1).clone()
        return cls(centres.flatten(), (double.abs().sum(-1) - centres.abs()).flatten())

    @property
    def bounds(self) -> tuple[float, float]:
        """What no eigenvalue of a symmetric matrix is below, and what none is above."""
        return float((self.centres - self.radii).min()), float((self.centres + self.radii).max())

    def contain(self, eigenvalues: Tensor) -> Tensor:
        """Which real numbers lie in some disc, up to the rounding of an eigenvalue.

        Args:
            eigenvalues: ``[n]``.

        Returns:
            Bool, ``[n]``.
        """
        scale = float((self.centres.abs() + self.radii).max())
        slack = len(self.centres) * torch.finfo(torch.float64).eps * scale
        distance = (eigenvalues.double().unsqueeze(1) - self.centres).abs()
        return (distance <= self.radii + slack).any(1)


def fourier(matrix: Tensor) -> Tensor:
    """Sizes of the two-dimensional Fourier transform, the zero frequency in the middle.

    Args:
        matrix: ``[..., d, d]``.

    Returns:
        ``[..., d, d]``, float64.
    """
    return torch.fft.fftshift(torch.fft.fft2(matrix.double()), dim=(-2, -1)).abs()


def ridge_share(matrix: Tensor) -> float:
    """Share of the Fourier field's energy that is at the frequencies ``(k, -k)``, 0 to 1.

    That ridge is what a matrix has that depends on ``i - j`` (modulo d) alone: a multiple of the identity lies on it,
    evenly, and a constant matrix, in its middle point. Of a matrix of zeros: not a number.

    Args:
        matrix: ``[..., d, d]``.
    """
    largest = float(matrix.abs().max())
    if largest == 0:
        return math.nan
    energy = torch.fft.fft2(matrix.double() / largest).abs().square()
    index = torch.arange(energy.shape[-1])
    return float(energy[..., index, -index].sum()) / float(energy.sum())
