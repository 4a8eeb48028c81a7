"""Symmetric and antisymmetric pairs: which of both lead, whose sign is whose, and what makes them exactly so."""

from __future__ import annotations

import torch
from torch import Tensor

from .algebra import Triple

# Symmetric pairs go before antisymmetric ones whose singular value is greater by no more than this.
_TIE = 1e-6

# Columns of a block of a symmetric product; of its blocks, those below the diagonal are copied.
BLOCK = 256


def leading_order(symmetric: Tensor, antisymmetric: Tensor, rank: int, settled: int = 0) -> Tensor:
    """Which ``[groups, rank]`` of the singular values ``[groups, k]`` of both kinds, side by side, lead.

    Args:
        symmetric: descending.
        antisymmetric: descending.
        rank: how many.
        settled: how many of the symmetric ones come first, whatever their size.
    """
    keys = torch.cat([symmetric, antisymmetric * (1 - _TIE)], dim=1)
    keys[:, :settled] = torch.inf
    return keys.argsort(dim=1, descending=True, stable=True)[:, :rank]


def merged_kinds(symmetric: list[Triple], antisymmetric: list[Triple], settled: int) -> list[tuple[Triple, Tensor]]:
    """The leading triples of both kinds, as many as there are symmetric ones, and the kind of each, ``[groups]``."""
    triples, rank = symmetric + antisymmetric, len(symmetric)
    sigmas = [torch.stack([triple[0] for triple in some], dim=1) for some in (symmetric, antisymmetric)]
    merged = []
    for chosen in leading_order(sigmas[0], sigmas[1], rank, settled).T.tolist():
        parts = zip(*[[part[group] for part in triples[j]] for group, j in enumerate(chosen)], strict=True)
        sigma, u, v = (torch.stack(part) for part in parts)
        merged.append(((sigma, u, v), sigma.new_tensor([1 if j < rank else -1 for j in chosen])))
    return merged


def pair_signs(left: Tensor, kinds: Tensor) -> Tensor:
    """The sign of each group's pair: of the left factor's trace, or of its largest entry above the diagonal."""
    signs = torch.where(left.diagonal(dim1=1, dim2=2).sum(-1) < 0, -1, 1)
    if bool((kinds < 0).any()):
        largest = left.flatten(1).argmax(1)  # of an antisymmetric matrix also the largest in size
        below = largest // left.shape[-1] > largest % left.shape[-1]
        signs = torch.where(kinds < 0, torch.where(below, -1, 1), signs)
    return signs


def mirrored(matrix: Tensor, kinds: Tensor | None = None) -> Tensor:
    """A matrix, given above its diagonal and around it, made exactly symmetric or of ``kinds [groups]``, in place."""
    kind = None if kinds is None else kinds.to(matrix).view(-1, 1, 1)
    n = matrix.shape[-1]
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        square, below = matrix[:, start:stop, start:stop], matrix[:, stop:, start:stop]
        mirror = square.mT if kind is None else kind * square.mT
        square.copy_(square.add(mirror).mul_(0.5))
        below.copy_(matrix[:, start:stop, stop:].mT)
        if kind is not None:
            below.mul_(kind)
    return matrix
