"""Rate, momentum and damping that a step finds by itself: by a model of the loss, and by what it has changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from ..base import CURVATURE, rate
from ..curvature import communication
from ..curvature.quadratic import fisher_products, minimizer
from ..likelihoods import Likelihood
from .fisher import Once
from .lengths import LengthRule
from .moves import Moves
from .replay import Replay
from .stacks import inner, reader, sum_of_products
from .steps import NaturalSteps


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


class RegulatedSteps(NaturalSteps):
    """Steps that plan themselves before they are taken, and are judged and shortened after. Arguments as of the base.

    Attributes:
        likelihood: of the model's outputs; to be there before ``_attach``, as are the next three.
        auto_lr: whether the rate is found, in each step.
        auto_momentum: whether the momentum is.
        auto_damping: whether lambda is adapted to what steps have changed.
    """

    likelihood: Likelihood | None
    auto_lr: bool
    auto_momentum: bool
    auto_damping: bool
    _say: Once

    _bound = NaturalSteps._bound | {"_replay"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._planned: Plan | None = None  # where lr or momentum is "auto"

    def _attach(self) -> None:
        super()._attach()
        self._replay: Replay | None = None
        if self._always_looks or self.auto_damping:
            assert self.model is not None and self.likelihood is not None
            self._replay = Replay(self.model, self.likelihood, lambda: not self._unobserved and self._looks())

    @property
    def _is_auto(self) -> bool:
        return self.auto_lr or self.auto_momentum

    @property
    def _always_looks(self) -> bool:
        """Whether each step asks the model again."""
        return self._length.is_measured or self._is_auto

    @property
    def needs_targets(self) -> bool:
        """Whether ``backward`` must be told the targets of a loss that does not state them itself."""
        return self.auto_damping

    def _judges(self) -> bool:
        """Whether this step tells something about lambda."""
        return self._adapted is not None and self._adapted.due(self.steps)

    def _looks(self) -> bool:
        return self._always_looks or self._judges()

    def _reset(self) -> None:
        super()._reset()
        if self._replay is not None:
            self._replay.reset()

    def _skip(self) -> None:
        under_way = None if self._replay is None else self._replay.under_way()
        super()._skip()
        if self._replay is not None and under_way is not None:
            self._replay.inputs.go_on(under_way)

    def _prepare(self, moves: Moves) -> None:
        if not self._is_auto:
            super()._prepare(moves)
            return
        self._check_shown()
        assert self.model is not None and self._replay is not None
        self._planned = None
        if not self._directions:
            self._length.prepare_known(moves, None)
            return
        self._planned = plan(
            moves, self.model, self._replay, self._length,
            auto_lr=self.auto_lr, auto_momentum=self.auto_momentum, judges=self._judges(),
        )  # fmt: skip
        for p in self._directions:
            self._directions[p] = self._directions[p] * self._planned.coefficients[0].to(self._directions[p].dtype)

    def _past_share(self, beta: float) -> Tensor | None:
        if self._planned is None:
            return None
        return self._planned.coefficients[1] * (1.0 if self.auto_momentum else beta)

    def _look_back(self) -> None:
        """Judge lambda by the step that was taken, and shorten it to the KL divergence that it is found to have.

        Both are of all ranks' examples, and of one forward pass: where steps are shortened, lambda is judged by the
        step before it is.
        """
        measures = self._length.is_measured and self._length.radius(self.defaults, self.steps) is not None
        judges = self._judges() and bool(self._stacks)
        if not (measures or judges):
            return
        self._check_shown()
        assert self._replay is not None
        with record_function(CURVATURE):
            means = self._replay.compare(divergence=measures, loss=judges)
            if communication.world_size() > 1:
                tensors = list(means.values())
                communication.average_(tensors, torch.ones(len(tensors), device=tensors[0].device))
            if judges:
                self._judge(means["before"], means["after"])
            if measures:
                self._keep_within(means["divergence"])

    def _judge(self, before: Tensor, after: Tensor) -> None:
        """Adapt lambda to what the step that was taken has changed in the loss, beside what was to be expected."""
        assert self._adapted is not None and self._replay is not None
        steps = self._last_steps()
        slopes = [sum_of_products(p.grad, step) for p, step in steps.items() if p.grad is not None]
        predicted = torch.stack(slopes).sum() + self._squared_length(steps).to(slopes[0]) / 2
        stated = torch.stack(self._replay.stated).sum()  # micro-batches' shares of one loss
        trust = None if self._planned is None else self._planned.trust
        trust = predicted.new_tensor(float("inf")) if trust is None else trust
        tensors = (before, after, predicted, trust, stated, torch.stack(self._replay.losses).mean())
        now, then, expected, best, given, own = torch.stack([t.double().cpu() for t in tensors]).tolist()
        given = -given if all(group["maximize"] for group in self.param_groups) else given
        if abs(given - own) > 0.02 * abs(own):
            self._say(
                f"the loss is {given:.4g} where the likelihood's is {own:.4g}, and damping='auto' compares what steps "
                "change in the likelihood's with the gradient of the loss: train on likelihood.nll(outputs, targets)"
            )
        self._adapted.judge(now, then, expected, 4 * self._replay.rounding(), best)

    def _squared_length(self, steps: dict[Tensor, Tensor]) -> Tensor:
        """``dᵀ (F + damping) d`` of the last step d of the layers with curvature.

        With F that of the batch where lr or momentum is ``"auto"``, else that of the inverses in use.
        """
        if not self._is_auto:
            return self._length.length(Moves(self, self._directions), steps)
        return next(iter(steps.values())).new_zeros(()) if self._planned is None else self._planned.length

    def _check_shown(self) -> None:
        """Raise RuntimeError if what the model returned is not known of each of its calls."""
        assert self._replay is not None
        asked = "lr or momentum 'auto'" if self._is_auto else "damping='auto'"
        asked = "kl_of='measured'" if self._length.is_measured else asked
        self._replay.check(asked, "in each step" if self._always_looks else "in some steps")

    def close(self) -> None:
        """See CurvatureOptimizer."""
        super().close()
        if self._replay is not None:
            self._replay.close()

    def diagnostics(self) -> dict[str, float]:
        """Adds, where they are ``"auto"``, rate and momentum of the last step, as multiples of what the groups have.

        Also lambda (in ``damping_unit``) and the last ratio of a loss's change to the expected.
        """
        found = super().diagnostics()
        if self._adapted is not None:
            known = {"damping": self._adapted.value, "reduction_ratio": self._adapted.ratio}
            found |= {f"curvature/{name}": value for name, value in known.items() if value is not None}
        if self._planned is None:
            return found
        asked = ((self.auto_lr, "rate"), (self.auto_momentum, "momentum"))
        pairs = zip(asked, self._planned.coefficients.tolist(), strict=True)
        return found | {f"curvature/{name}": value for (auto, name), value in pairs if auto}
