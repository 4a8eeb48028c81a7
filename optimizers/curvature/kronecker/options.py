"""What all blocks of an optimizer share, and what went wrong in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Factors = dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """What all blocks of an optimizer share.

    Attributes:
        damping_mode: ``factored``: ``(G + sqrt(lambda) / pi I) (x) (A + pi sqrt(lambda) I)``; ``tikhonov``:
            ``G (x) A + lambda I``.
        pi: split the factored damping by the factors' mean eigenvalues (Martens & Grosse 2015, 6.3); else evenly.
        sharing: positions of a shared weight are ``expand``: examples of their own, or ``reduce``: averaged (inputs)
            and summed (gradients) first (Eschenhagen et al. 2023).
        max_factor_dim: a factor wider than this is kept as its diagonal.
        solve_dtype: of the products with the inverse; None: the statistics'.
        solver: how leading pairs are found, see ``rearranged``.
        radius: farthest positions, along either axis, whose products count; None: all pairs.
        rank: eigenvalues of the second term that its inverse keeps on either side, the largest, or eigenvectors that a
            wide factor's basis has; None: all.
        floor: least value of ``1 + s t`` in a two-term inverse.
        basis: eigenbases follow their factors by one step of orthogonal iteration a refresh, or are made anew.
    """

    damping_mode: Literal["factored", "tikhonov"] = "factored"
    pi: bool = True
    sharing: Literal["expand", "reduce"] = "expand"
    max_factor_dim: int | None = None
    solve_dtype: torch.dtype | None = None
    solver: Literal["gram", "power", "lanczos"] = "gram"
    radius: int | None = None
    rank: int | None = None
    floor: float = 0.1
    basis: Literal["iterate", "eigh"] = "eigh"


@dataclass
class Counts:
    """What went wrong and was mended, and what it took.

    Attributes:
        repaired: matrices that had to be.
        floored: eigenvalues (a tensor: reading it would wait).
        decomposed: factors that were decomposed in full for an eigenbasis.
    """

    repaired: int = 0
    floored: Tensor | int = 0
    decomposed: int = 0
