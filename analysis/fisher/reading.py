"""What an optimizer's state keeps of a layer's curvature, as operators: the approximation and its damped inverse.

Everything here is read from ``state_dict()["curvature"]`` in the names under which the optimizers keep it, as it is in
memory or in a checkpoint: nothing is estimated anew. Tests hold each operator against the block that it was read from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from analysis.fisher.operators import KroneckerSum, Operator, Scaled, Term
from optimizers.curvature.layers import AffineLayer
from optimizers.curvature.linalg import as_matrix

Factors = Mapping[str, Tensor]


def approximation(curvature: Mapping[str, Any], layer: AffineLayer) -> Operator | None:
    """A layer's Fisher block as an optimizer approximates it, undamped.

    Args:
        curvature: ``state_dict()["curvature"]``.
        layer: which.

    Returns:
        None where it keeps none, as FishLeg does, which learns the inverse alone.
    """
    factors = _double(curvature["layers"].get(layer.name, {}))
    if "S" in factors and "H" in factors:
        return KroneckerSum(Term((factors["S"], factors["H"])))
    if "S" in factors:
        bases = _bases(factors)
        return KroneckerSum(Term(factors["S"], bases, bases))
    if "G" not in factors:
        return None
    pairs = [("G", "A"), ("D", "C")] if "C" in factors else [("G", "A")]
    return KroneckerSum(*(_kronecker(factors[g], factors[a]) for g, a in pairs))


def inverse(curvature: Mapping[str, Any], layer: AffineLayer, damping: float, unit: float = 1.0) -> Operator | None:
    """The damped inverse of a layer's Fisher block, as an optimizer applies it to gradients.

    Args:
        curvature: ``state_dict()["curvature"]``.
        layer: which.
        damping: lambda, which AdaFisher adds when it steps; the others' inverses are stored with it.
        unit: of AdaFisher's lambda.

    Returns:
        None where it has none for this layer.
    """
    factors = _double(curvature["layers"].get(layer.name, {}))
    if "H" in factors:
        return KroneckerSum(Term(1 / (_outer(factors["S"], factors["H"]) + damping * unit)))
    if "A" in factors and "G" not in factors:
        return _learned(factors, layer)
    cache = _double(curvature.get("inverses", {}).get(layer.name, {}))
    if not cache:
        return None
    terms = []
    if "K_A" in cache:
        outer = (cache["K_G"], cache["K_A"])
        terms.append(Term(cache["W"], outer, outer))
        if "W_odd" in cache:
            terms.append(Term(cache["W_odd"], (cache["J_G"], cache["J_A"]), outer))
    elif "W" in cache:
        bases = _bases(cache)
        return KroneckerSum(Term(cache["W"], bases, bases))
    if sides := [_inverted(cache, key) for key in ("G", "A") if key in cache or f"L_{key}" in cache]:
        terms.append(_kronecker(*sides))
    return KroneckerSum(*terms)


def _double(tensors: Factors) -> dict[str, Tensor]:
    return {key: t.double() for key, t in tensors.items()}


def _bases(tensors: Factors) -> tuple[Tensor | None, Tensor | None]:
    """U_G and U_A as matrices; None: the identity."""
    found = [as_matrix(tensors[key]) if key in tensors else None for key in ("U_G", "U_A")]
    return found[0], found[1]


def _outer(g: Tensor, a: Tensor) -> Tensor:
    return g.unsqueeze(-1) * a.unsqueeze(-2)


def _inverted(cache: Factors, key: str) -> Tensor:
    """The inverse of a damped factor, or of its diagonal; of a wide one its Cholesky factor is kept."""
    return cache[key] if key in cache else torch.cholesky_inverse(cache[f"L_{key}"])


def _kronecker(g: Tensor, a: Tensor) -> Term:
    """``G (x) A``, of which either may be a diagonal."""
    sides = [(t, None) if t.dim() == 3 else (None, t) for t in (g, a)]
    weights = [t.new_ones(len(t), t.shape[-1]) if t.dim() == 3 else t for t in (g, a)]
    return Term((weights[0], weights[1]), (sides[0][0], sides[1][0]))


def _learned(factors: Factors, layer: AffineLayer) -> Operator:
    """FishLeg's ``A * (RᵀR (A * U) LLᵀ)``, whose columns are filled up."""
    width = layer.columns
    scale = factors["A"][..., :width]
    identities = [torch.eye(n, dtype=torch.float64).expand(len(scale), n, n) for n in (layer.d_out, width)]
    g = factors["R"].mT @ factors["R"] if "R" in factors else identities[0]
    a = (factors["L"] @ factors["L"].mT)[:, :width, :width] if "L" in factors else identities[1]
    return Scaled(scale, g, a)
