"""Sums of Kronecker products brought back to fewer terms: how curvature in pairs is averaged over steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .algebra import Pairs, scaled
from .gram import closed_form
from .kinds import leading_order, pair_signs

Terms = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[float]]  # lefts, rights and weights of a sum of products

# Entries whose products are summed in their own precision.
_CHUNK = 32768


def compress(lefts: Sequence[Tensor], rights: Sequence[Tensor], weights: Sequence[float], rank: int) -> Pairs:
    """The best sum of ``rank`` Kronecker products for ``sum_i weights_i right_i (x) left_i``, a handful of terms.

    This averages curvature over steps: ``rho * old + (1 - rho) * new``, both sums of Kronecker products, is one of
    twice the terms. Only their inner products enter the decomposition. Scale and signs are those of ``leading_pairs``,
    and the first pair of positive semi-definite terms is positive semi-definite.

    A term whose left factor is antisymmetric, exactly, is taken to be antisymmetric in both factors; all others are
    taken to be symmetric. The two kinds are orthogonal, and are decomposed apart, so that each pair combines terms of
    one kind only and is of that kind as exactly as they are.

    Args:
        lefts: matrices ``[groups, d, d]``.
        rights: matrices ``[groups, o, o]``.
        weights: one a term.
        rank: how many pairs.

    Returns:
        ``rank`` pairs (left ``[groups, d, d]``, right ``[groups, o, o]``), the leading one first; zero beyond the
        rank of the sum.

    Raises:
        ValueError: no terms, lists of different lengths, or a rank below 1.
    """
    return compress_many([(lefts, rights, weights)], rank)[0]


@torch.no_grad()
def compress_many(layers: Sequence[Terms], rank: int) -> list[Pairs]:
    """``compress`` of several layers; the small problems of those with equally many terms are solved in one batch.

    Args:
        layers: lefts, rights and weights of each layer.
        rank: see ``compress``.

    Returns:
        The pairs of each layer.

    Raises:
        ValueError: no terms, lists of different lengths, or a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    alike: dict[tuple[int, torch.device], list[int]] = {}
    for index, (lefts, rights, weights) in enumerate(layers):
        if not lefts or not len(lefts) == len(rights) == len(weights):
            raise ValueError(
                f"lefts, rights and weights must be as many as there are terms, "
                f"got {len(lefts)}, {len(rights)} and {len(weights)}"
            )
        alike.setdefault((len(lefts), lefts[0].device), []).append(index)
    found: dict[int, Pairs] = {}
    for indices in alike.values():
        found.update(zip(indices, _compressed([layers[i] for i in indices], rank), strict=True))
    return [found[index] for index in range(len(layers))]


def _compressed(layers: list[Terms], rank: int) -> list[Pairs]:
    """``compress_many`` of layers with equally many terms."""
    all_lefts = [lefts for lefts, _, _ in layers]
    left_gram, right_gram = _inner_products(all_lefts), _inner_products([rights for _, rights, _ in layers])
    traces = torch.cat([_per_term([x.diagonal(dim1=1, dim2=2).sum(-1) for x in lefts]) for lefts in all_lefts]).double()
    groups = [len(lefts[0]) for lefts in all_lefts]
    rows = [list(weights) for (_, _, weights), n in zip(layers, groups, strict=True) for _ in range(n)]
    weights = left_gram.new_tensor(rows)
    other = torch.cat([_antisymmetric(lefts) for lefts in all_lefts])
    mixed = bool(other.any())
    if not mixed:
        _, left_c, right_c = closed_form(left_gram, right_gram, weights.diag_embed(), traces, rank)
        kinds = torch.ones_like(left_c[..., 0])
    else:
        cores = torch.cat([(weights * ~other).diag_embed(), (weights * other).diag_embed()])
        sigma, left_c, right_c = closed_form(
            left_gram.repeat(2, 1, 1), right_gram.repeat(2, 1, 1), cores, traces.repeat(2, 1), rank
        )
        order = leading_order(sigma[: len(other)], sigma[len(other) :], rank)
        chosen = order.unsqueeze(-1).expand(-1, -1, weights.shape[1])
        left_c, right_c = (torch.cat(c.chunk(2), dim=1).gather(1, chosen) for c in (left_c, right_c))
        kinds = torch.where(order < rank, 1.0, -1.0)
    found = []
    split = (part.split(groups) for part in (left_c, right_c, kinds))
    for (lefts, rights, _), x, y, kind in zip(layers, *split, strict=True):
        pairs = list(zip(_weighted_sums(lefts, x), _weighted_sums(rights, y), strict=True))
        if mixed:  # traces have settled the signs of symmetric pairs only
            signs = [pair_signs(left, kind[:, k]) for k, (left, _) in enumerate(pairs)]
            pairs = [(scaled(left, s), scaled(right, s)) for (left, right), s in zip(pairs, signs, strict=True)]
        found.append(pairs)
    return found


def _antisymmetric(matrices: Sequence[Tensor]) -> Tensor:
    """Which of some ``[groups, n, n]`` matrices are exactly antisymmetric: ``[groups, number of them]``."""
    found = _per_term([(matrix.diagonal(dim1=1, dim2=2) == 0).all(1) for matrix in matrices])
    if bool(found.any()):  # hardly ever for another reason
        found = _per_term([(matrix == -matrix.mT).all(2).all(1) for matrix in matrices])
    return found


def _inner_products(layers: Sequence[Sequence[Tensor]]) -> Tensor:
    """``[sum of groups, k, k]`` of k terms ``[groups, n, n]`` a layer, the long sums in double precision."""
    k = len(layers[0])
    rows, columns = torch.triu_indices(k, k, device=layers[0][0].device)
    places = list(zip(rows.tolist(), columns.tolist(), strict=True))
    sums = []
    for terms in layers:
        if _plain(terms[0]):
            chunks = zip(*(x.reshape(-1).split(_CHUNK) for x in terms), strict=True)
            parts = torch.stack([torch.dot(chunk[i], chunk[j]) for chunk in chunks for i, j in places])
            sums.append(parts.double().view(1, -1, len(places)).sum(1))
        else:
            sums.append(_per_term([(terms[i] * terms[j]).sum(2) for i, j in places]).double().sum(2))
    upper = torch.cat(sums)
    gram = upper.new_empty(len(upper), k, k)
    gram[:, rows, columns] = gram[:, columns, rows] = upper
    return gram


def _weighted_sums(terms: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """``sum_k weights_jk terms_k`` of ``[groups, j, k]`` weights, an entry and its mirror image treated alike."""
    if not _plain(terms[0]):
        columns = weights.to(terms[0].dtype)[..., None, None]
        return [
            torch.stack([x * columns[:, j, k] for k, x in enumerate(terms)]).sum(0) for j in range(weights.shape[1])
        ]
    sums = []
    for row in weights[0].tolist():
        total = terms[0] * row[0]
        for term, weight in zip(terms[1:], row[1:], strict=True):
            total.add_(term, alpha=weight)
        sums.append(total)
    return sums


def _plain(term: Tensor) -> bool:
    """Whether numbers are quicker than tensors of a number each group: for one group, where reading them is free."""
    return len(term) == 1 and term.device.type == "cpu"


def _per_term(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values), dim=1)
