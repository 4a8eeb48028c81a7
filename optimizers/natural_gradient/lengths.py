"""The interface of rules for the length of steps along natural gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..curvature.layers import Layer
from .moves import Moves
from .stacks import reader


class LengthRule:
    """How long steps are. This one leaves them as long as rate, momentum and direction make them.

    A step asks ``prepare`` when its directions are known, and multiplies by each layer's ``factor``. A rule keeps what
    it needs of the past by itself; what is in ``memory`` is part of the optimizer's state.

    Attributes:
        variables: how many an observation of the model's outputs holds; 0 until outputs were seen.
    """

    variables: int = 0

    @property
    def of_direction(self) -> bool:
        """Whether factors are of the new directions alone, and not of the past ones that momentum adds."""
        return False

    @property
    def is_measured(self) -> bool:
        """Whether the KL divergence of a step is measured once it was taken, and the step shortened to ``radius``."""
        return False

    def prepare(self, moves: Moves) -> None:
        """Look at a step before it is taken.

        Args:
            moves: its directions and what they are made of.
        """

    def prepare_known(self, moves: Moves, length: Tensor | None) -> list[Tensor]:
        """The same where ``dᵀ (F + damping) d`` of the whole step d is known from elsewhere.

        Args:
            moves: the step.
            length: this number; None: nothing moves.

        Returns:
            The factors that were found.
        """
        return []

    def factor(self, layer: Layer, group: dict[str, Any]) -> Tensor | None:
        """What the step of a layer is multiplied by; None: nothing.

        Args:
            layer: with curvature.
            group: of its weight.
        """
        return None

    def smallest(self) -> float:
        """The smallest factor of the last step; 1 where there was none."""
        return 1.0

    def radius(self, group: dict[str, Any], steps: int) -> float | None:
        """What twice the KL divergence of an observation may be in a step of this group; None: anything.

        Args:
            group: of parameters.
            steps: taken before this one.
        """
        return None

    def length(self, moves: Moves, steps: dict[Tensor, Tensor]) -> Tensor:
        """``dᵀ (F + damping) d`` of the last step d of the layers with curvature, with the F of the inverses in use.

        Args:
            moves: what stacks there are.
            steps: by parameter, what was added to it.
        """
        return torch.stack(moves.squared(moves.stacked(reader(steps)))).sum()

    def shortened(self, share: Tensor) -> None:
        """The last step was brought to a share of its length."""

    def memory(self, groups: int) -> Tensor:
        """What is remembered of the last step, a number for each of so many groups; -1: nothing."""
        return torch.full((groups,), -1.0)

    def restore(self, memory: Tensor) -> None:
        """Take over what ``memory`` returned."""


class OfRule:
    """An attribute of an optimizer that is its length rule's."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        return self if optimizer is None else getattr(optimizer._length, self._name)

    def __set__(self, optimizer: Any, value: Any) -> None:
        setattr(optimizer._length, self._name, value)
