"""The exact Fisher matrix of a batch, kept as the gradients of its examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base import adopted
from ..curvature.approximations import Approximation
from ..curvature.layers import Layer
from ..curvature.samples import Observations, Samples
from ..natural_gradient import NaturalGradient


class SampledFisher(NaturalGradient):
    """The engine of the methods that multiply with the exact Fisher matrix, all layers together.

    Attributes:
        samples: by layer name; all of the same observations. The next update replaces them: they are not averaged.
    """

    _bound = NaturalGradient._bound | {"samples", "_observations"}

    def _attach(self) -> None:
        self.samples: dict[str, Samples] = {}
        self._observations = Observations()
        super()._attach()

    def _block(self, layer: Layer) -> Approximation | None:
        self.samples[layer.name] = Samples(layer, self._observations)
        return super()._block(layer)

    def _renew_samples(self, found: dict[str, dict[str, Tensor]]) -> None:
        """Take over a step's samples, all or none of them; a layer that was not seen has none."""
        for name, samples in self.samples.items():
            samples.factors = found.get(name, {})

    def _reset(self) -> None:
        super()._reset()
        self._observations.reset()
        for samples in self.samples.values():
            samples.reset()

    def _damping(self, layer: Layer) -> float:
        """Lambda of a layer as a number, whatever ``damping_unit`` is."""
        damping = self._lambda(layer)
        if self.damping_unit == "absolute":
            return damping
        units = self._unit(self.blocks[layer.name])
        return damping * float(units.clamp(min=torch.finfo(units.dtype).tiny).mean())

    def _curvature(self) -> dict[str, Any]:
        """See NaturalGradient; also the samples in use, whose shapes are those of the last update's batch."""
        curvature = super()._curvature()
        curvature["samples"] = {name: dict(samples.factors) for name, samples in self.samples.items()}
        curvature["layers"] = {n: f for n, f in curvature["layers"].items() if not isinstance(self.blocks[n], Samples)}
        return curvature

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        for name, samples in self.samples.items():
            samples.factors = adopted(saved["samples"].get(name, {}), samples.layer.parameters[0])
