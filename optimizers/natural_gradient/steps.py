"""The step: directions, their momentum and weight decay, made as long as a rule says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from ..base import CURVATURE, descend, rate, real
from ..curvature.approximations import statistics_dtype
from .inverses import BlockInverses
from .lengths import LengthRule
from .moves import Moves
from .stacks import gradients_of, stacked


class NaturalSteps(BlockInverses):
    """An optimizer that steps along ``(F + damping)^-1 g``; the rest of the parameters by Adam's rule.

    Attributes:
        _length: the rule for the length of steps; to be there before ``_attach``.
    """

    _length: LengthRule

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._directions: dict[Tensor, Tensor] = {}
        self._factors: dict[Tensor, Tensor] = {}  # what the rule makes of this step, by parameter
        self._measured: Tensor | None = None  # what the last step was shortened by

    def _complete(self, group: dict[str, Any]) -> None:
        super()._complete(group)
        group.setdefault("fallback_ratio", float(group["fallback_lr"]) / float(group["lr"]) if group["lr"] else 0.0)

    def _precondition(self) -> None:
        self._renew_inverses()
        with record_function(CURVATURE):
            self._solve()

    def _solve(self) -> None:
        """Directions ``(F + damping)^-1 g`` of all covered parameters, and the factors that are still to come."""
        gradients = [stacked([b.to_matrix(gradients_of(b)) for b in stack.blocks]) for stack in self._stacks]
        directions = self._solve_blocks(gradients)
        for stack, direction in zip(self._stacks, directions, strict=True):
            for block, part in zip(stack.blocks, direction.chunk(len(stack.blocks)), strict=True):
                for p, entry in zip(block.layer.parameters, block.from_matrix(part), strict=True):
                    if p.grad is not None:
                        self._directions[p] = entry
        self._prepare(Moves(self, self._directions, gradients, directions))
        for block in (block for stack in self._stacks for block in stack.blocks):
            if (factor := self._length.factor(block.layer, self._group(block.layer))) is not None:
                self._factors.update(dict.fromkeys(block.layer.parameters, factor))

    def _prepare(self, moves: Moves) -> None:
        """Settle how long the step will be, before it is taken."""
        self._length.prepare(moves)

    def _past_share(self, beta: float) -> Tensor | None:
        """What the past directions of layers with curvature are multiplied by, where it is not momentum."""
        return None

    def _update_parameters(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        lr, beta, decay = rate(group), group["momentum"], group["weight_decay"]
        bare = [(p, g) for p, g in zip(params, grads, strict=True) if p not in self._directions]
        for (p, g), denominator in zip(bare, self._fallback(bare).values(), strict=True):
            # Momentum adds directions up where Adam averages: hence 1 - momentum.
            self._directions[p] = real([g])[0] / denominator * ((1 - beta) * group["fallback_ratio"])
        unclipped = {p for p, _ in bare}
        directions = [self._directions.pop(p) for p in params]
        clipped = self._factors
        one = next(iter(clipped.values()), params[0]).new_ones(())
        scales = [one if p in unclipped else clipped.get(p, one) for p in params]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        given = params
        buffers, params = real(self.state[p]["momentum_buffer"] for p in params), real(params)
        share = self._past_share(beta)
        if share is None:
            torch._foreach_mul_(buffers, beta)
        else:
            shares = [share if p not in unclipped else share.new_tensor(beta) for p in given]
            torch._foreach_mul_(buffers, [t.to(b.dtype) for t, b in zip(shares, buffers, strict=True)])
        if not self._length.of_direction:
            torch._foreach_add_(buffers, directions)
        else:
            torch._foreach_addcmul_(buffers, directions, scales)
        if decay and group["decoupled_decay"]:
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            torch._foreach_add_(buffers, params, alpha=decay)
        if not self._length.of_direction and clipped:
            torch._foreach_mul_(buffers, scales)
        descend(params, buffers, lr)

    def _reset(self) -> None:
        super()._reset()
        self._factors.clear()

    def _keep_within(self, divergence: Tensor) -> None:
        """Shorten the step that was taken, if it is too long."""
        radius = self._length.radius(self.defaults, self.steps)
        assert radius is not None
        scale = (radius / (2 * divergence)).sqrt()
        self._measured = torch.where(scale < 1, scale, torch.ones_like(scale))
        for group in self.param_groups:
            mine = [p for p in group["params"] if p.grad is not None]
            buffers, params = real(self.state[p]["momentum_buffer"] for p in mine), real(mine)
            excess = torch._foreach_mul(buffers, self._measured - 1)
            descend(params, list(excess), rate(group))
            torch._foreach_mul_(buffers, self._measured)
        self._length.shortened(self._measured)

    def _last_steps(self) -> dict[Tensor, Tensor]:
        """By parameter what it was moved by in this step, decay included."""
        found = {}
        for group in self.param_groups:
            lr, decay = rate(group), group["weight_decay"] if group["decoupled_decay"] else 0.0
            for p in group["params"]:
                if p.grad is None:
                    continue
                step = self.state[p]["momentum_buffer"] * -lr
                if decay and (shrunk := lr * decay) != 1:  # p is (1 - shrunk) what it was, and the step
                    step = step - (p - step) * (shrunk / (1 - shrunk))
                found[p] = step
        return found

    # -- state ---------------------------------------------------------------------------------------------------------

    def diagnostics(self) -> dict[str, float]:
        """Adds the last factor nu of the steps' length, the smallest where groups have several."""
        shortened = 1.0 if self._measured is None else float(self._measured)
        return super().diagnostics() | {"curvature/kl_scale": self._length.smallest() * shortened}

    def layer_diagnostics(self) -> dict[str, dict[str, float]]:
        """Adds ``kl_scale`` where a rule has made the last step of a layer longer or shorter."""
        found = super().layer_diagnostics()
        shortened = 1.0 if self._measured is None else float(self._measured)
        for name in found:
            layer = self.blocks[name].layer
            factor = self._length.factor(layer, self._group(layer))
            if factor is not None or self._measured is not None:
                found[name]["kl_scale"] = shortened * (1.0 if factor is None else float(factor))
        return found

    def _curvature(self) -> dict[str, Any]:
        """See BlockInverses; also what the rule for the length remembers."""
        saved = super()._curvature()
        counters = saved.pop("counters") | {"variables": self._length.variables}
        return saved | {"kl_squares": self._length.memory(len(self.param_groups)), "counters": counters}

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        self._directions.clear()
        self._length.variables = int(saved["counters"].get("variables", 0))
        weights = [block.layer.parameters[0] for block in self.blocks.values()]
        if weights and "kl_squares" in saved:
            self._length.restore(saved["kl_squares"].to(weights[0].device, statistics_dtype(weights[0]), copy=True))

    def _initial(self, p: Tensor) -> dict[str, Any]:
        """See CurvatureOptimizer."""
        return {"momentum_buffer": torch.zeros_like(p)} | self._initial_fallback(p)
