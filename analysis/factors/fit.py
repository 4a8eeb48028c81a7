"""How far a layer's Fisher block is from a Kronecker product: from K-FAC's own one.

With ``F = mean_i vec(V_i) vec(V_i)ᵀ`` no matrix over the layer's parameters is formed: ``<F, G (x) A>`` is the mean of
``<V_i, G V_i A>``, and ``<F, F'>`` that of ``<V_i, V'_j>²``. Of a few examples F has a low rank that the true one has
not, which makes it look farther from a product than it is; so every product here is one of two disjoint halves of the
examples, and its expectation is that of the true matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.factors.observing import LayerFactors
from optimizers.curvature.layers import AffineLayer
from optimizers.curvature.samples import Samples

#: Numbers that single examples' gradients may take at once.
ROOM = 2**24


@dataclass(frozen=True)
class Fit:
    """A Fisher block F beside K-FAC's ``K = G (x) A``, in the Frobenius norm.

    Attributes:
        cosine: ``<F, K> / (|F| |K|)``: 1 where F is that product, up to its scale.
        error: ``|F - K| / |F|``, its scale included.
        best: ``|F - c K| / |F|`` at the best c, ``sqrt(1 - cosine²)``.
        scale: that c, ``<F, K> / |K|²``.
        shared: true curvature of a shift that is common to all positions (a bias) over K-FAC's with the sharing expand,
            ``mean_i |sum_t g_it|² / mean_i sum_t |g_it|²``: 1 where positions are independent or there is but one, 0
            where their gradients cancel (keys of an attention, which a softmax cannot tell from keys that are all
            shifted). Not a number for a layer that is called more than once.

    Sums of few examples vary: a cosine can come out a little above 1.
    """

    cosine: float
    error: float
    best: float
    scale: float
    shared: float

    @classmethod
    def between(cls, one: LayerFactors, other: LayerFactors) -> Fit:
        """Compare block and product by two halves of the examples.

        Args:
            one: whole factors with samples, of one half.
            other: those of the other half.

        Raises:
            ValueError: a factor is a diagonal, or there are no samples.
        """
        if not (one.full and other.full) or one.samples is None or other.samples is None:
            raise ValueError(f"layer {one.name!r} must have whole factors and samples: observe(samples=True)")
        blocks = squared(one.samples, other.samples)
        mixed = (along(one.samples, other) + along(other.samples, one)) / 2
        products = float(((one.A * other.A).sum((1, 2)) * (one.G * other.G).sum((1, 2))).sum())
        if not (blocks > 0 and products > 0):
            return cls(math.nan, math.nan, math.nan, math.nan, math.nan)
        cosine = mixed / math.sqrt(blocks * products)
        error = max(blocks - 2 * mixed + products, 0.0) / blocks
        best = math.sqrt(max(1 - cosine**2, 0.0))
        return cls(cosine, math.sqrt(error), best, mixed / products, _shared([one.samples, other.samples]))


def _shared(parts: list[Samples]) -> float:
    """See Fit."""
    together = apart = 0.0
    for samples in parts:
        if "V" in samples.factors:
            return math.nan
        assert isinstance(samples.layer, AffineLayer)
        g = samples.layer.gradients(samples.factors["g"]).double()
        together += float(g.sum(2).square().sum())
        apart += float(g.square().sum())
    return together / apart if apart > 0 else math.nan


def along(samples: Samples, factors: LayerFactors) -> float:
    """``<F, G (x) A>``: the sum over a layer's samples of ``<V_i, G V_i A>``.

    Args:
        samples: of F.
        factors: whole ones, of the product.
    """
    layer = samples.layer
    assert isinstance(layer, AffineLayer)
    shape = (layer.groups, layer.d_out, layer.columns)
    some = max(1, ROOM // math.prod(shape))
    a, g = factors.A.double(), factors.G.double()
    kept = samples.factors
    total = 0.0
    for parts in zip(*(t.split(some) for t in kept.values()), strict=True):
        rows = parts[0] if "V" in kept else layer.rows(*parts)
        v = rows.double().view(-1, *shape)
        total += float((v * (g @ v @ a)).sum())
    return total


def squared(one: Samples, other: Samples) -> float:
    """``<F, F'>`` of two sets of samples of one layer: the sum of ``<V_i, V'_j>²``.

    Args:
        one: of F.
        other: of F'.
    """
    layer, count = one.layer, len(next(iter(one.factors.values())))
    joined: list[Tensor] = [torch.cat(pair) for pair in zip(one.factors.values(), other.factors.values(), strict=True)]
    gram = joined[0].double() @ joined[0].double().mT if "V" in one.factors else layer.gram(*joined)
    return float(gram[:count, count:].square().sum())
