"""Kronecker factors of a model on some data, as the optimizers here see them, without a step being taken.

``observe`` is where every analysis gets the factors of a model on a batch from: the engine of ``optimizers`` records
what flows through the layers, finds whose gradient is whose, draws the labels and makes A and G of it. Nothing of that
is done a second time here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from optimizers import Likelihood
from optimizers.curvature.approximations import Approximation
from optimizers.curvature.kronecker import KroneckerFactors, Options
from optimizers.curvature.layers import AffineLayer, Flow, Layer
from optimizers.curvature.samples import Samples
from optimizers.exact import SampledFisher

Labels = Literal["sampled", "empirical", "exact"]
Sharing = Literal["expand", "reduce"]
Mode = Literal["train", "eval"]

#: What titles say of the labels that output gradients are of.
LABELS: dict[str, str] = {
    "sampled": "labels sampled from the model (Monte Carlo)",
    "empirical": "true labels (empirical Fisher)",
    "exact": "expectation over all labels (exact Fisher)",
}


@dataclass(frozen=True)
class View:
    """How a model is looked at: the options of ``observe``, as there."""

    labels: Labels = "sampled"
    sharing: Sharing = "expand"
    layers: str | None = None
    mode: Mode = "train"
    max_dim: int | None = None
    seed: int = 0
    dtype: torch.dtype | None = torch.float64


@dataclass(frozen=True)
class LayerFactors:
    """What a batch leaves of one layer.

    Attributes:
        name: the layer's name in the model.
        kind: its type, such as ``Conv2d``.
        A: second moments of its inputs, ``[groups, columns, columns]``, the bias's entry last; of a factor wider than
            was asked for its diagonal, ``[groups, columns]``. With the sharing ``expand`` a mean over examples and
            positions.
        G: second moments of its output gradients, ``[groups, d_out, d_out]`` or ``[groups, d_out]``, of the
            per-example loss: a sum over positions, a mean over examples.
        gradient: of the loss by the parameter matrix, ``[groups, d_out, columns]``.
        size: the norm of that matrix.
        samples: the gradients of single examples as they flowed, scaled by one over the root of their number; None:
            not asked for.
    """

    name: str
    kind: str
    A: Tensor
    G: Tensor
    gradient: Tensor
    size: float
    samples: Samples | None = None

    @property
    def full(self) -> bool:
        """Whether both factors are whole matrices."""
        return self.A.dim() == 3 and self.G.dim() == 3


@dataclass(frozen=True)
class Observation:
    """A model's factors on some data.

    Attributes:
        layers: by name, in the model's order.
        left_out: why trainable parameters have no factors here, by name.
        loss: the mean over the batches.
        examples: how many there were.
        labels: see ``observe``.
        sharing: see ``observe``.
        mode: see ``observe``.
    """

    layers: dict[str, LayerFactors]
    left_out: dict[str, str]
    loss: float
    examples: int
    labels: Labels
    sharing: Sharing
    mode: Mode


class FactorObserver(SampledFisher):
    """K-FAC's blocks, fed by the engine and never inverted: an optimizer that looks and takes no step.

    Args:
        model: the whole module.
        likelihood: of its outputs.
        labels: see ``observe``.
        sharing: see ``observe``.
        max_dim: a wider factor is its diagonal; None: none is.
        keep_samples: whether single examples' gradients are kept, too.
        skip: regular expression of layers that are not looked at; None: all are.
        seed: of sampled labels.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        *,
        labels: Labels,
        sharing: Sharing,
        max_dim: int | None,
        keep_samples: bool,
        skip: str | None,
        seed: int,
    ) -> None:
        self.options = Options(sharing=sharing, max_factor_dim=max_dim)
        self.keep_samples = keep_samples
        super().__init__(model, likelihood=likelihood, fisher=labels, skip=skip, seed=seed, kl_clip=None)

    def affine_block(self, layer: AffineLayer) -> Approximation:
        """See NaturalGradient."""
        return KroneckerFactors(layer, self.options)

    def _block(self, layer: Layer) -> Approximation | None:
        return super()._block(layer) if isinstance(layer, AffineLayer) else None

    def _observe(self, flow: Flow) -> None:
        super()._observe(flow)
        if self.keep_samples:
            self.samples[flow.layer.name].accumulate(flow.scaled(1 / self._scale))

    @torch.no_grad()
    def gather(self) -> dict[str, KroneckerFactors]:
        """Make factors of all backward passes since the last call; the blocks that have some, by layer name."""
        self._update_curvature()
        if self.keep_samples:
            seen = [samples for samples in self.samples.values() if samples.observed]
            self._renew_samples(Samples.estimate_all(seen, *self._scaling()))
        self._reset()
        return {n: b for n, b in self.blocks.items() if isinstance(b, KroneckerFactors) and b.factors}

    def left_out(self) -> dict[str, str]:
        """Why trainable parameters have no factors, by the name of the parameter or of the layer."""
        return {n: why for n, why in self._uncovered.items() if why != "skipped"} | self._reasons


def chosen(model: nn.Module, layers: str | None) -> list[str]:
    """Names of the modules in whose name a regular expression is found, those without parameters of their own left out.

    Args:
        model: the whole module.
        layers: the expression; None: all.

    Raises:
        ValueError: it is no regular expression, or is found in no name.
    """
    named = [n for n, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    try:
        found = [n for n in named if layers is None or re.search(layers, n)]
    except re.error as error:
        raise ValueError(f"layers must be a regular expression, got {layers!r} ({error})") from error
    if not found:
        raise ValueError(f"layers: {layers!r} is found in the name of no layer; there are {', '.join(named)}")
    return found


def observe(
    model: nn.Module,
    likelihood: Likelihood,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    labels: Labels = "sampled",
    sharing: Sharing = "expand",
    layers: str | None = None,
    mode: Mode = "train",
    max_dim: int | None = None,
    samples: bool = False,
    seed: int = 0,
    dtype: torch.dtype | None = torch.float64,
) -> Observation:
    """Kronecker factors of a model's layers on some batches, taken together as one.

    Works on a copy: neither weights nor running statistics nor gradients of the model change, nor do torch's random
    numbers.

    Args:
        model: any module; Linear, convolutions (transposed and grouped ones, too) and attention's projections have
            factors.
        likelihood: of its outputs.
        batches: (inputs, targets), at least one.
        labels: output gradients are of labels ``sampled`` from the model's predictions (Monte Carlo, one an
            observation), of the data's true ones (``empirical``: AdaFisher's), or ``exact``, an expectation over all
            of them (a backward pass an output).
        sharing: positions of a shared weight are examples of their own (``expand``), or averaged (inputs) and summed
            (gradients) first (``reduce``).
        layers: regular expression that is found in the names of the layers to look at; None: all.
        mode: ``train``: as while training, BatchNorm by the batch's statistics and dropout on; ``eval``: by running
            statistics and off.
        max_dim: a wider factor is its diagonal; None: none is.
        samples: keep the gradients of single examples, too.
        seed: of sampled labels and of dropout.
        dtype: that all is computed in; None: the model's.

    Returns:
        The factors, in the layers' order.

    Raises:
        ValueError: there are no batches, or ``layers`` is found in no name.
    """
    shown = list(batches)
    if not shown:
        raise ValueError("batches must hold at least one batch")
    twin = copy.deepcopy(model) if dtype is None else copy.deepcopy(model).to(dtype)
    twin.requires_grad_(True).zero_grad()
    twin.train(mode == "train")
    twin.training = True  # the whole alone: the engine looks at passes of training
    names = chosen(twin, layers)
    others = [n for n, _ in twin.named_modules() if n not in set(names)]
    skip = "^(?:" + "|".join(map(re.escape, others)) + ")$" if layers is not None and others else None
    observer = FactorObserver(
        twin, likelihood, labels=labels, sharing=sharing, max_dim=max_dim, keep_samples=samples, skip=skip, seed=seed
    )
    device = next(twin.parameters()).device
    examples, total = sum(len(inputs) for inputs, _ in shown), 0.0
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(seed)
            for inputs, targets in shown:
                outputs = twin(_placed(inputs, device, dtype))
                targets = _placed(targets, device, dtype)
                loss = likelihood.nll(outputs, targets) * (len(inputs) / examples)
                observer.backward(loss, outputs, targets=targets)
                total += float(loss.detach())
        blocks = observer.gather()
    finally:
        observer.close()
    found = {name: _layer(block, observer.samples[name] if samples else None) for name, block in blocks.items()}
    return Observation(found, observer.left_out(), total, examples, labels, sharing, mode)


def _placed(tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


def _layer(block: KroneckerFactors, samples: Samples | None) -> LayerFactors:
    layer = block.layer
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters]
    gradient = block.to_matrix(grads).detach().clone()
    size = float(block.to_matrix([p.detach() for p in layer.parameters]).double().norm())
    kind = type(layer.module).__name__
    return LayerFactors(layer.name, kind, block.factors["A"], block.factors["G"], gradient, size, samples)


def taken(batches: Iterable[tuple[Tensor, Tensor]], examples: int) -> list[tuple[Tensor, Tensor]]:
    """The first so many examples of some batches, the last batch cut.

    Args:
        batches: (inputs, targets).
        examples: how many, at least 1; all, where there are fewer.

    Raises:
        ValueError: ``examples`` is below 1.
    """
    if examples < 1:
        raise ValueError(f"examples must be at least 1, got {examples}")
    kept: list[tuple[Tensor, Tensor]] = []
    left = examples
    for inputs, targets in batches:
        kept.append((inputs[:left], targets[:left]))
        left -= len(inputs)
        if left <= 0:
            break
    return kept


def halves(batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Two disjoint sets of examples, every other one each, batch by batch: for products without a bias.

    Args:
        batches: (inputs, targets); of an odd number of examples the last one is left out.
    """
    even = [(x[: len(x) // 2 * 2], y[: len(y) // 2 * 2]) for x, y in batches if len(y) > 1]
    return [(x[::2], y[::2]) for x, y in even], [(x[1::2], y[1::2]) for x, y in even]
