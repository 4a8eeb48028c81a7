"""What the samples of the exact Fisher matrix see of stacked tensors, and how long steps are by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..exact import SampledFisher
from ..natural_gradient import KLClip, Moves, Stack, reader
from .spaces import dots, plus


def shares(stack: Stack, tensor: Tensor) -> Sequence[Tensor]:
    """Each layer's part of what is stacked."""
    return tensor.chunk(len(stack.blocks)) if len(stack.blocks) > 1 else (tensor,)


class SampledMetric(SampledFisher):
    """Products of the stacks' tensors with ``Sᵀ``, with F = S Sᵀ, and with each other, layer by layer.

    Attributes:
        _shifts: L, the damping of each layer of the stacks.
        _seen: ``Sᵀ d`` by layer of the directions d; None: not to be known.
    """

    _shifts: Tensor
    _seen: Tensor | None

    def _images(self, tensors: list[Tensor]) -> Tensor:
        """``Sᵀ d`` by layer, ``[layers, m]``; of a layer without samples zeros."""
        pairs = zip(self._stacks, tensors, strict=True)
        return torch.stack([row for stack, tensor in pairs for row in self._images_in(stack, tensor)])

    def _images_in(self, stack: Stack, tensor: Tensor) -> list[Tensor]:
        """The same of a stack's layers."""
        found = []
        for block, part in zip(stack.blocks, shares(stack, tensor), strict=True):
            samples = self.samples[block.layer.name]
            found.append(samples.dots_with(block, part) if samples.factors else self._unseen(part))
        return found

    def _unseen(self, like: Tensor) -> Tensor:
        """``Sᵀ d`` of a layer without samples."""
        return like.new_zeros(next(len(t) for samples in self.samples.values() for t in samples.factors.values()))

    def _settings(self, name: str) -> list[Any]:
        """A hyper-parameter of each layer of the stacks."""
        return [self._group(block.layer)[name] for stack in self._stacks for block in stack.blocks]

    def _of_layers(self, name: str, like: Tensor) -> Tensor:
        """The same as a column ``[layers, 1]`` in double precision."""
        values = self._settings(name)
        if any(isinstance(value, Tensor) for value in values):
            values = [torch.as_tensor(v, dtype=torch.float64, device=like.device) for v in values]
            return torch.stack(values).view(-1, 1)
        return torch.tensor(values, dtype=torch.float64, device=like.device).view(-1, 1)

    def _by_stack(self, numbers: Tensor) -> Sequence[Tensor]:
        """Numbers of the layers, stack by stack."""
        return numbers.split([len(stack.blocks) for stack in self._stacks])

    def _inner(self, left: list[Tensor], right: list[Tensor]) -> Tensor:
        """Inner products, layer by layer."""
        triples = zip(self._stacks, left, right, strict=True)
        return torch.cat([dots(len(stack.blocks), a, b) for stack, a, b in triples]).double()


class SampledClip(KLClip):
    """The KL clip of directions v of which ``(F + L) v`` is not the gradient, but what the samples see of v is known.

    Attributes:
        moving: ``Sᵀ m`` by layer, m the sum of directions; None: not to be known.
    """

    moving: Tensor | None = None

    def prepare(self, moves: Moves) -> None:
        """See KLClip."""
        metric = moves.optimizer
        assert isinstance(metric, SampledMetric)
        if metric._seen is None:
            super().prepare(moves)
            return
        seen, steps = metric._seen, list(moves.solved)
        whole = not self.of_direction and not moves.must_multiply()
        if whole:
            past, betas = moves.stacked(moves.momentum_of), metric._of_layers("momentum", seen)
            if metric._updated_at == metric.steps or self.moving is None or self.moving.shape != seen.shape:
                self.moving = metric._images(past)
            triples = zip(steps, past, metric._by_stack(betas), strict=True)
            steps = [plus(v.to(seen.dtype), m.to(seen.dtype), beta) for v, m, beta in triples]
            seen = betas * self.moving + seen
        elif not self.of_direction:
            steps = moves.steps()
            seen = metric._images(steps)
        lrs = metric._of_layers("lr", seen)
        squares = metric._inner(steps, steps)
        self.scales, self.squares = {}, []
        shares = torch.ones_like(lrs)
        for kl_clip in {group["kl_clip"] for group in moves.groups} - {None}:
            mine = torch.tensor([c == kl_clip for c in metric._settings("kl_clip")], device=seen.device).unsqueeze(1)
            lr = lrs * mine
            total = (lr * seen.double()).sum(0).square().sum() + (lr[:, 0].square() * metric._shifts * squares).sum()
            scale = (self.kappa(kl_clip, metric.steps) / total).sqrt().clamp(max=1.0).to(seen.dtype)
            self.scales[kl_clip] = scale
            shares = torch.where(mine, scale.to(shares.dtype), shares)
        self.moving = (shares * seen).to(seen.dtype) if whole else None

    def length(self, moves: Moves, steps: dict[Tensor, Tensor]) -> Tensor:
        """See LengthRule. With the samples' F, as in the clip."""
        metric = moves.optimizer
        assert isinstance(metric, SampledMetric)
        if metric._seen is None:
            return super().length(moves, steps)
        moved = moves.stacked(reader(steps))
        if self.moving is None or moves.decays_apart():
            seen = metric._images(moved)
        else:
            seen = metric._of_layers("lr", metric._seen) * self.moving
        return seen.double().sum(0).square().sum() + (metric._shifts * metric._inner(moved, moved)).sum()

    def shortened(self, share: Tensor) -> None:
        """See LengthRule."""
        super().shortened(share)
        self.moving = None if self.moving is None else self.moving * share
