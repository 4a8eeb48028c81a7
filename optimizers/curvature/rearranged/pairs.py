"""The leading pairs of layers' Fisher blocks: settings checked, layers brought together, each solved in its form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .algebra import Pairs, Triple, irregular_matrix, scaled
from .forms import FORMS, cheapest_form, operator_of
from .gram import closed_pairs
from .kinds import merged_kinds, mirrored, pair_signs
from .operators import Operator
from .solvers import lanczos, power

SOLVERS = ("gram", "power", "lanczos")


def leading_pairs(
    a: Tensor,
    g: Tensor,
    rank: int,
    *,
    solver: str = "gram",
    corrected: bool = False,
    mask: Tensor | None = None,
    start: Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 200,
    krylov: int = 20,
    form: str | None = None,
) -> Pairs:
    """The leading Kronecker pairs of one layer's Fisher block: ``F ~ sum_k right_k (x) left_k``.

    A pair carries ``sqrt(sigma)`` in either factor. Both are symmetric or, from the second pair on (of a corrected
    block, from the first), both antisymmetric, exactly, entry by entry. A symmetric left factor's trace is not
    negative; that makes both factors of the first pair positive semi-definite wherever F is. Of an antisymmetric left
    factor, the largest entry is above the diagonal. The first pair of a block that is not corrected is the best
    symmetric one; only a mask can make F so indefinite that an antisymmetric one were better. Samples that hold fewer
    than ``rank`` pairs (one example, a dead layer) fill up with zeros, and statistics that are not finite give NaN:
    neither is an error.

    Args:
        a: inputs ``[groups, m, T, d]``.
        g: gradients of the per-example loss by the outputs, ``[groups, m, T, o]``.
        rank: how many pairs.
        solver: ``gram`` (the cheapest form; Lanczos where it is not closed), ``lanczos`` (always), or ``power``, the
            published iteration on matrices.
        corrected: of ``F - G (x) A`` instead, with the K-FAC factors of these very samples: KFAC-corrected's residual.
        mask: which pairs of positions count, boolean and symmetric ``[T, T]``; None for all. See ``location_mask``.
        start: a positive semi-definite right factor for iterations to start from, ``[o, o]`` or ``[groups, o, o]``;
            None for the identity. Where pairs may be indefinite, a little of a fixed irregular matrix is mixed in.
        tolerance: iterations end when the error of every wanted triple is this small against its singular value. It is
            estimated by the residual, divided by what parts the triple from the next, as far as that can be told.
        max_iterations: of the power iteration, a pair; of Lanczos, in all. The best so far is returned then.
        krylov: vectors that Lanczos keeps on either side before it restarts.
        form: one of ``FORMS``; None for the cheapest.

    Returns:
        ``rank`` pairs (left ``[groups, d, d]``, right ``[groups, o, o]``), the leading one first.

    Raises:
        ValueError: a setting out of its range, or tensors that do not fit together.
    """
    return leading_pairs_many(
        [(a, g)],
        rank,
        solver=solver,
        corrected=corrected,
        masks=[mask],
        starts=[start],
        tolerance=tolerance,
        max_iterations=max_iterations,
        krylov=krylov,
        form=form,
    )[0]


@torch.no_grad()
def leading_pairs_many(
    layers: Sequence[tuple[Tensor, Tensor]],
    rank: int,
    *,
    solver: str = "gram",
    corrected: bool = False,
    masks: Sequence[Tensor | None] | None = None,
    starts: Sequence[Tensor | None] | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 200,
    krylov: int = 20,
    form: str | None = None,
) -> list[Pairs]:
    """``leading_pairs`` of several layers; their small closed-form problems are solved in one batch.

    Args:
        layers: ``(a, g)`` of each layer.
        rank: see ``leading_pairs``.
        solver: see ``leading_pairs``.
        corrected: see ``leading_pairs``.
        masks: one a layer.
        starts: one a layer.
        tolerance: see ``leading_pairs``.
        max_iterations: see ``leading_pairs``.
        krylov: see ``leading_pairs``.
        form: see ``leading_pairs``.

    Returns:
        The pairs of each layer.

    Raises:
        ValueError: a setting out of its range, or tensors that do not fit together.
    """
    _check_settings(rank, solver, tolerance, max_iterations, krylov, form)
    masks = masks if masks is not None else [None] * len(layers)
    starts = starts if starts is not None else [None] * len(layers)
    solve: Callable[..., list[Triple]] = partial(lanczos, krylov=krylov) if solver != "power" else power
    solve = partial(solve, tolerance=tolerance, max_iterations=max_iterations)
    found: dict[int, Pairs] = {}
    batches: dict[tuple[Any, ...], list[int]] = {}
    for index, ((a, g), mask, start) in enumerate(zip(layers, masks, starts, strict=True)):
        _check_sample(a, g, mask, start, form)
        m, t, d, o = *a.shape[1:], g.shape[-1]
        chosen = form or cheapest_form(m, t, d, o, masked=mask is not None, solver=solver)
        # Small problems gain by company: those of one position, whose size is m alone.
        together = chosen == "closed" or (chosen == "coefficients" and t == 1 and mask is None)
        batches.setdefault((chosen, m, a.device) if together else (chosen, index), []).append(index)
    for (chosen, *_), indices in batches.items():
        members, mask = [layers[i] for i in indices], masks[indices[0]]
        if chosen == "closed":
            pairs = closed_pairs(members, [masks[i] for i in indices], rank, corrected)
        else:
            given = [
                (torch.eye(g.shape[-1]) if start is None else start).to(g).expand(len(g), *2 * g.shape[-1:])
                for (_, g), start in zip(members, (starts[i] for i in indices), strict=True)
            ]
            pairs = _iterated_pairs(chosen, members, mask, given, rank, corrected, solve)
        found.update(zip(indices, pairs, strict=True))
    return [found[index] for index in range(len(layers))]


def _check_settings(
    rank: int, solver: str, tolerance: float, max_iterations: int, krylov: int, form: str | None
) -> None:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if tolerance <= 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    if krylov < rank + 2:
        raise ValueError(f"krylov must be at least rank + 2 = {rank + 2}, got {krylov}")
    if form not in (None, *FORMS):
        raise ValueError(f"form must be one of {', '.join(FORMS)} or None, got {form!r}")
    if form == "closed" and solver != "gram":
        raise ValueError(f"form 'closed' is the gram solver's, got solver {solver!r}")


def _check_sample(a: Tensor, g: Tensor, mask: Tensor | None, start: Tensor | None, form: str | None) -> None:
    if a.dim() != 4 or not a.numel():
        raise ValueError(f"a must be [groups, m, T, d] and not empty, got {tuple(a.shape)}")
    if g.dim() != 4 or g.shape[:3] != a.shape[:3] or not g.numel():
        raise ValueError(f"g must be [groups, m, T, o] with the groups, m and T of a, got {tuple(g.shape)}")
    t, o = a.shape[2], g.shape[-1]
    if mask is not None and mask.shape != (t, t):
        raise ValueError(f"mask must be [T, T] = {(t, t)}, got {tuple(mask.shape)}")
    if start is not None and start.shape[-2:] != (o, o):
        raise ValueError(f"start must end in [o, o] = {(o, o)}, got {tuple(start.shape)}")
    if form == "closed" and t != 1:
        raise ValueError(f"form 'closed' is for one position, got T = {t}")
    if form == "gradients" and mask is not None:
        raise ValueError("form 'gradients' sums over all positions, so it takes no mask")


def _iterated_pairs(
    form: str,
    layers: list[tuple[Tensor, Tensor]],
    mask: Tensor | None,
    starts: list[Tensor],
    rank: int,
    corrected: bool,
    solve: Callable[..., list[Triple]],
) -> list[Pairs]:
    """The leading pairs of layers that share an operator (of one layer, but for ``coefficients``)."""
    # Gradients shrink by many orders of magnitude in training, and Z holds their fourth powers.
    sizes = [g.abs().amax((1, 2, 3), keepdim=True) for _, g in layers]
    sizes = [torch.where(size == 0, 1, size) for size in sizes]
    operator = operator_of(form, [(a, g / size) for (a, g), size in zip(layers, sizes, strict=True)], mask)
    if corrected:
        operator.deflate(*operator.kfac())
    triples = solve(operator, rank, starts)
    a, g = layers[0]
    if a.shape[2] > 1 and min(a.shape[-1], g.shape[-1]) > 1 and (corrected or rank > 1):
        rivals = torch.stack([sigma for sigma, _, _ in triples], dim=1)
        settled = 0 if corrected else 1
        irregular = [irregular_matrix(start, -1) for start in starts]
        others = solve(operator.antisymmetric(), rank - settled, irregular, rivals)
        ranked = merged_kinds(triples, others, settled)
    else:
        ranked = [(triple, torch.ones_like(triple[0])) for triple in triples]
    pairs = [_pair(operator, triple, kinds, sizes) for triple, kinds in ranked]
    return [list(of_layer) for of_layer in zip(*pairs, strict=True)]


def _pair(operator: Operator, triple: Triple, kinds: Tensor, sizes: list[Tensor]) -> Pairs:
    """A triple's matrices, one (left, right) a layer of the operator."""
    sigma, u, v = triple
    pairs = []
    for size, root, kind, left, right in zip(
        sizes,
        sigma.sqrt().split([len(size) for size in sizes]),
        kinds.split([len(size) for size in sizes]),
        operator.left_matrices(u),
        operator.right_matrices(v),
        strict=True,
    ):
        left, right = mirrored(left, kind), mirrored(right, kind)
        factor = root * size.flatten() * pair_signs(left, kind)
        pairs.append((scaled(left, factor), scaled(right, factor)))
    return pairs
