"""The rate and the momentum of a step at which the quadratic model of the loss is least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..base import rate
from ..curvature.quadratic import fisher_products, minimizer
from .lengths import LengthRule
from .moves import Moves
from .replay import Replay
from .stacks import inner, reader


@dataclass
class Plan:
    """What a step is made of.

    Attributes:
        coefficients: of its direction and of its past, ``[2]``.
        length: ``dᵀ (F + damping) d`` of the step d, with the exact Fisher matrix of the batch.
        trust: the rate that is best for the direction alone; None: not asked for.
    """

    coefficients: Tensor
    length: Tensor
    trust: Tensor | None


def plan(
    moves: Moves,
    model: nn.Module,
    replay: Replay,
    rule: LengthRule,
    *,
    auto_lr: bool,
    auto_momentum: bool,
    judges: bool,
) -> Plan:
    """Find rate and momentum by the exact quadratic model, and let the rule make factors of the length that it gives.

    Args:
        moves: the step under way.
        model: the whole module.
        replay: its calls.
        rule: for the length.
        auto_lr: whether the rate is to be found.
        auto_momentum: whether the momentum is.
        judges: whether lambda is to be judged by this step.
    """

    def own_momentum(p: Tensor) -> float:
        """What multiplies a parameter's past beside the coefficient that is found for it."""
        group = moves.optimizer._group_of(p)
        return 1.0 if auto_momentum or group is None else float(group["momentum"])

    directions, groups = moves.directions, moves.groups
    # The rate that is found is that of the whole step: what is left for schedules of the groups' to multiply.
    whole = max((rate(group) for group in groups), key=float) or 1.0 if auto_lr else 1.0
    rates = {p: rate(group) / whole for group in groups for p in group["params"]}
    past = {p: moves.momentum_of(p) * (rates[p] * own_momentum(p)) for p in directions}
    pair = [{p: v * rates[p] for p, v in directions.items()}, past]
    if judges and any(group["weight_decay"] for group in groups):
        decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
        pair.append({p: p.detach() * (rates[p] * decays[p]) for p in directions})
    matrix = fisher_products(model, replay.inputs, replay.shown, replay.likelihood, pair)
    stacks = [moves.stacked(reader(own)) for own in pair]
    dampings = [moves.optimizer._dampings(stack.blocks) for stack in moves.optimizer._stacks]
    for i, left in enumerate(stacks):
        for j, right in enumerate(stacks):
            shares = [(shift * inner(a, b)).sum() for shift, a, b in zip(dampings, left, right, strict=True)]
            matrix[i, j] += torch.stack(shares).sum().double()
    grads = {p: p.grad for p in directions if p.grad is not None}
    slopes = [torch.stack([(g * own[p]).sum().double() for p, g in grads.items()]).sum() for own in pair[:2]]
    free = [float("nan") if auto else 1.0 for auto in (auto_lr, auto_momentum)]
    fixed = torch.tensor(free, dtype=torch.float64).to(matrix.device)
    found = minimizer(matrix[:2, :2], torch.stack(slopes), fixed)
    trust = None
    if judges:
        shares = [(g * pair[0][p]).sum().double() * rates[p] for p, g in grads.items()]
        trust = torch.stack(shares).sum() / matrix[0, 0]
    matrix = matrix * whole**2
    taken = torch.ones_like(matrix[0])
    taken[:2] = found
    for scale in rule.prepare_known(moves, found @ matrix[:2, :2] @ found):
        taken[:2] = found * scale
    return Plan(found, taken @ matrix @ taken, trust)
