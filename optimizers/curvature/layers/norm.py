"""Norms: BatchNorm, GroupNorm, LayerNorm and RMSNorm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer import ElementwiseLayer, ImageRows, Layer
from .registry import adapts


class NormLayer(ElementwiseLayer):
    """BatchNorm, GroupNorm, LayerNorm, RMSNorm: ``y = weight * x_hat + bias``. The input, prepared, is ``x_hat``.

    It is recomputed from the input on the steps that need it; it cannot be had from the output, which later in-place
    operations may overwrite and a zero weight erases.
    """

    def __init__(self, name: str, module: nn.Module, normalize: Callable[[Any, Tensor], Tensor], by_channel: bool):
        super().__init__(name, module)
        self._normalize = normalize
        self._by_channel = by_channel

    def leading(self, x: Tensor, g: Tensor) -> int:
        """See Layer."""
        return 1 if self._by_channel else g.dim() - self.parameters[0].dim()

    def prepared(self, x: Tensor) -> Tensor:
        """See Layer."""
        return self._normalize(self.module, x)

    def arranged(self, x: Tensor, g: Tensor, axis: int, parts: tuple[int, int, int]) -> list[tuple[Tensor, Tensor]]:
        """See Layer."""
        return (ImageRows if self._by_channel else Layer).arranged(self, x, g, axis, parts)  # type: ignore[arg-type]

    def square_sums(self, calls: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """See ElementwiseLayer."""
        terms = [self._terms(x, g) for x, g in calls]
        return [sum(parts[1:], start=parts[0]).square().sum(0) for parts in zip(*terms, strict=True)]

    def kept(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """See Layer. The rows themselves, which are short."""
        return (self.rows(x, g),)

    def total(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """See Layer."""
        return [term.sum(0) for term in self._terms(x, g)]

    def rows(self, x: Tensor, g: Tensor) -> Tensor:
        """See Layer."""
        return torch.cat([term.flatten(1) for term in self._terms(x, g)], dim=1)

    def example_rows(self, x: Tensor, g: Tensor) -> Tensor:
        """See Layer."""
        return self.rows(x, g)

    def _terms(self, x: Tensor, g: Tensor) -> list[Tensor]:
        """Each parameter's gradient by example. Dimensions not the first nor the parameter's are shared."""
        own = self.parameters[0].dim()
        shared = range(2, g.dim()) if self._by_channel else range(1, g.dim() - own)

        def per_example(values: Tensor) -> Tensor:
            return values.sum(list(shared)) if len(shared) else values

        terms = [per_example(x * g)]
        return [*terms, per_example(g)] if self.has_bias else terms


def _batch_norm(module: Any, x: Tensor) -> Tensor:
    if module.training or module.running_mean is None:
        return F.batch_norm(x, None, None, training=True, eps=module.eps)
    return F.batch_norm(x, module.running_mean, module.running_var, training=False, eps=module.eps)


def _norm(normalize: Callable[[Any, Tensor], Tensor], by_channel: bool) -> Callable[[str, nn.Module], NormLayer | None]:
    """An adapter of the norms that have a weight."""

    def adapter(name: str, module: nn.Module) -> NormLayer | None:
        return None if getattr(module, "weight", None) is None else NormLayer(name, module, normalize, by_channel)

    return adapter


adapts(
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    operations={
        F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training"),
        torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training"),
    },
)(_norm(_batch_norm, by_channel=True))
adapts(
    nn.GroupNorm,
    operations=dict.fromkeys((F.group_norm, torch.group_norm), ("input", "num_groups", "weight")),
)(_norm(lambda m, x: F.group_norm(x, m.num_groups, eps=m.eps), by_channel=True))
adapts(
    nn.LayerNorm,
    operations=dict.fromkeys((F.layer_norm, torch.layer_norm), ("input", "normalized_shape", "weight")),
)(_norm(lambda m, x: F.layer_norm(x, m.normalized_shape, eps=m.eps), by_channel=False))
adapts(
    nn.RMSNorm,
    operations=dict.fromkeys((F.rms_norm, torch.rms_norm), ("input", "normalized_shape", "weight")),
)(_norm(lambda m, x: F.rms_norm(x, m.normalized_shape, eps=m.eps), by_channel=False))
