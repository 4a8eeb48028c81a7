"""Random directions, as long as the weights that they change: filter by filter.

A network of ReLUs and BatchNorm is the same function when one layer's weights are multiplied and the next one's are
divided, so that a step of one length is nothing to one network and much to another. Directions whose filters are as
long as the network's own make surfaces of different networks comparable.

Source: Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018 (arXiv 1712.09913), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from analysis.landscape.plane import Weights
from training.show.snapshots import state

Unit = Literal["filter", "layer", "none"]
Vectors = Literal["ignore", "scale"]


def random_direction(
    model: nn.Module, seed: int = 0, normalise: Unit = "filter", vectors: Vectors = "ignore"
) -> dict[str, Tensor]:
    """A Gaussian direction in the space of a model's trainable weights, normalised.

    Args:
        model: at the point where the direction begins; it is not changed.
        seed: of the draws; they do not depend on the model's device.
        normalise: what gets the length of its counterpart in the model: each ``filter`` (one output's weights: a filter
            of a convolution, a row of a linear layer, a row of an embedding), each ``layer`` (whole tensor), or
            ``none``: the draws as they are.
        vectors: biases, and weights of norms, which have no filters: ``ignore`` leaves them where they are, as the
            paper does; ``scale`` gives each its own length.

    Returns:
        By the names of `training.show.snapshots.state`, in float32 or float64.

    Raises:
        ValueError: for a value that there is none of.
    """
    for name, value, choices in (("normalise", normalise, Unit), ("vectors", vectors, Vectors)):
        if value not in get_args(choices):
            raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
    generator = torch.Generator().manual_seed(seed)
    weights, _ = state(model)
    drawn = {n: torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w.dtype) for n, w in weights.items()}
    complex_ones = {name for name, p in model.named_parameters() if p.is_complex()}
    groups = _transposed(model)
    for name, weight in weights.items():
        whole = weight.dim() - (name in complex_ones) < 2
        if whole and vectors == "ignore":
            drawn[name].zero_()
        elif normalise == "filter" and not whole and name in groups:
            _match(_outputs_first(drawn[name], groups[name]), _outputs_first(weight, groups[name]), lead=2)
        elif normalise != "none":
            _match(drawn[name], weight, lead=int(normalise == "filter" and not whole))
    return drawn


def lengths(weights: Weights) -> float:
    """The Euclidean length of weights, or of a direction."""
    return math.sqrt(sum(float(w.double().square().sum()) for w in weights.values()))


def _match(direction: Tensor, weight: Tensor, lead: int) -> None:
    """Give each part, by its place in the first ``lead`` dimensions, the length of its counterpart, which may be 0."""
    inner = tuple(range(lead, weight.dim()))
    here, there = (torch.linalg.vector_norm(t.double(), dim=inner, keepdim=True) for t in (direction, weight))
    direction.mul_(torch.where(here > 0, there / here, 0.0))


def _outputs_first(tensor: Tensor, groups: int) -> Tensor:
    """``[inputs, outputs of a group, ...]``, a transposed convolution's, as ``[groups, outputs, inputs, ...]``."""
    return tensor.unflatten(0, (groups, -1)).transpose(1, 2)


def _transposed(model: nn.Module) -> Mapping[str, int]:
    """The weights whose outputs are not their first dimension, those of transposed convolutions, and their groups."""
    places = {module.weight: module.groups for module in model.modules() if isinstance(module, _ConvTransposeNd)}
    return {name: places[p] for name, p in model.named_parameters() if p in places}
