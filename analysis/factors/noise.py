"""The AdaFisher study's perturbation: what noise off the diagonal does to a factor (arXiv 2405.16397, section 3.1).

``M^ = M + E`` with ``e_ij ~ N(0, sigma²)`` off the diagonal and 0 on it, and the signal-to-noise ratio

    SNR = 10 log10( sum_i |M_ii|² / sum_{j > i} |M^_ij|² )    in decibels.

E is symmetric here, so that eigenvalues stay real. The denominator has the factor's own entries off the diagonal in it,
not the noise alone: without any noise the ratio is finite already, and no noise brings it above that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.factors.matrices import spectrum


def snr(matrix: Tensor, noisy: Tensor) -> float:
    """The study's ratio in decibels; infinite where nothing is off the diagonal.

    Args:
        matrix: M, ``[..., d, d]``.
        noisy: M^, of that shape; M itself for the ratio without noise.
    """
    signal = float(_diagonal(matrix).square().sum())
    upper = float(noisy.double().triu(1).square().sum())
    if upper == 0:
        return math.inf if signal > 0 else math.nan
    return 10 * math.log10(signal / upper) if signal > 0 else -math.inf


def sigma_for(matrix: Tensor, decibels: float) -> float:
    """The standard deviation whose expected ``sum of |M^_ij|²`` makes a given ratio.

    Args:
        matrix: M, ``[..., d, d]``, of two rows or more.
        decibels: the ratio.

    Raises:
        ValueError: the ratio is above that of the matrix without noise.
    """
    wanted = float(_diagonal(matrix).square().sum()) / 10 ** (decibels / 10)
    missing = wanted - float(matrix.double().triu(1).square().sum())
    if missing < 0:
        raise ValueError(
            f"an SNR of {decibels:g} dB is above the {snr(matrix, matrix):.2f} dB that this factor has without any "
            "noise: ask for less"
        )
    pairs = matrix.numel() / matrix.shape[-1] * (matrix.shape[-1] - 1) / 2
    return math.sqrt(missing / pairs)


def unit(matrix: Tensor) -> float:
    """The root mean square of the diagonal: what relative noise is measured in.

    Args:
        matrix: ``[..., d, d]``.
    """
    return float(_diagonal(matrix).square().mean().sqrt())


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.double().diagonal(dim1=-2, dim2=-1)


def perturbed(matrix: Tensor, sigma: float, seed: int = 0) -> Tensor:
    """``M + E`` in float64, E symmetric and zero on the diagonal.

    Args:
        matrix: M, ``[..., d, d]``.
        sigma: of the entries off the diagonal; at least 0.
        seed: of E: the same seed gives the same E but for its scale.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(matrix.shape, generator=generator, dtype=torch.float64).triu(1) * sigma
    return matrix.double() + (noise + noise.mT).to(matrix.device)


@dataclass(frozen=True)
class Perturbation:
    """What noise of one strength does to the eigenvalues of a factor.

    Attributes:
        sigma: of the noise.
        snr: the study's ratio in decibels.
        matrix: M^.
        eigenvalues: of M^, ``[..., d]``, the largest first.
        change: ``|v^ - v|`` over ``|v|``, both as vectors, the largest first.
        reach: the spectral norm of E, which no eigenvalue moves farther than (Weyl 1912).
        negative: how many eigenvalues are below zero.
    """

    sigma: float
    snr: float
    matrix: Tensor
    eigenvalues: Tensor
    change: float
    reach: float
    negative: int

    @classmethod
    def of(cls, matrix: Tensor, sigma: float, seed: int = 0) -> Perturbation:
        """Perturb a matrix.

        Args:
            matrix: M, ``[..., d, d]``.
            sigma: see ``perturbed``.
            seed: see ``perturbed``.
        """
        noisy = perturbed(matrix, sigma, seed)
        before, after = spectrum(matrix), spectrum(noisy)
        size = float(before.norm())
        change = float((after - before).norm()) / size if size > 0 else math.nan
        reach = float(spectrum(noisy - matrix.double()).abs().max())
        tiny = -after.shape[-1] * torch.finfo(torch.float64).eps * float(after.abs().max())
        return cls(sigma, snr(matrix, noisy), noisy, after, change, reach, int((after < tiny).sum()))
