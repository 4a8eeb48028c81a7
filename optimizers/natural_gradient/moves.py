"""What layers with curvature are about to move by, and how long that is, before any rule for their length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base import rate
from .inverses import BlockInverses


class Moves:
    """A step that is under way, or has been taken.

    Args:
        optimizer: whose.
        directions: by parameter, without rate and momentum.
        gradients: one stacked tensor ``[n, d_out, columns]`` a stack.
        solved: directions of the same shapes.
    """

    def __init__(
        self,
        optimizer: BlockInverses,
        directions: Mapping[Tensor, Tensor],
        gradients: Sequence[Tensor] = (),
        solved: Sequence[Tensor] = (),
    ) -> None:
        self.optimizer, self.directions, self.gradients, self.solved = optimizer, directions, gradients, solved

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return self.optimizer.param_groups

    def stacked(self, entry: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Something that each parameter has, in the shape of the stacks' gradients."""
        return self.optimizer._stacked(entry)

    def squared(self, tensors: list[Tensor]) -> list[Tensor]:
        """``xᵀ (F + damping) x`` of each group's layers, for x in the shape of the stacks' gradients."""
        return self.optimizer._squared(tensors)

    def by_group(self, numbers: list[Tensor]) -> list[Tensor]:
        """Sums over each group's layers of numbers ``[n]`` a stack."""
        return self.optimizer._by_group(numbers)

    def momentum_of(self, p: Tensor) -> Tensor:
        """The sum of a parameter's past directions; zeros before the first."""
        own = self.optimizer.state[p]
        return own["momentum_buffer"] if "momentum_buffer" in own else torch.zeros_like(p)

    def relative_rates(self) -> dict[Tensor, float | Tensor]:
        """By parameter its rate over that of its layer; a layer's rate of zero counts as one."""
        found: dict[Tensor, float | Tensor] = {}
        for layer in (block.layer for stack in self.optimizer._stacks for block in stack.blocks):
            own = self.optimizer._group(layer)
            for p in layer.parameters:
                group = self.optimizer._group_of(p) or own
                found[p] = 1.0 if group is own or own["lr"] == 0 else rate(group) / rate(own)
        return found

    def steps(self) -> list[Tensor]:
        """What layers would move by, in units of their rates, were there no clip."""
        paces = self.relative_rates()
        return self.stacked(lambda p: self.step_of(p) * paces[p])

    def step_of(self, p: Tensor) -> Tensor:
        """What a covered parameter would move by, without lr, were there no clip."""
        group = self.optimizer._group_of(p)
        if p.grad is None or group is None:
            return torch.zeros_like(p)
        step = self.momentum_of(p) * group["momentum"] + self.directions[p]
        if group["weight_decay"] and not group["decoupled_decay"]:
            step.add_(p, alpha=group["weight_decay"])
        return step

    def must_multiply(self) -> bool:
        """Whether layers move by more or less than directions of theirs: coupled decay; frozen or grouped in part."""
        if any(group["weight_decay"] and not group["decoupled_decay"] for group in self.groups):
            return True
        for layer in (block.layer for stack in self.optimizer._stacks for block in stack.blocks):
            own = self.optimizer._group(layer)
            for p in layer.parameters:
                group = self.optimizer._group_of(p) or own
                if p.grad is None or (group is not own and _pace(group) != _pace(own)):
                    return True
        return False

    def has_moved(self) -> bool:
        """Whether the inverses in use are of another F, or lambda, than those of the last step."""
        return self.optimizer._inverted_at == self.optimizer.steps

    def decays_apart(self) -> bool:
        """Whether a part of the step is weight decay apart from its direction."""
        return any(group["weight_decay"] and group["decoupled_decay"] for group in self.groups)


def _pace(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the parameters of a layer have in common if it moves as a whole."""
    return group["momentum"], group["lr"]
