"""The quadratic model of the loss on the span of a few directions, with the exact Fisher matrix of the batch.

``M(d) = gᵀ d + dᵀ (F + L) d / 2`` needs F only through ``D_iᵀ F D_j = sum over observations of w (J D_i)ᵀ H (J D_j)``
for directions D_i, with J the Jacobian of the outputs and H the Hessian of an observation's negative log-likelihood.
One forward pass in forward mode a direction gives J D_i; no backward pass and no approximation of F is needed (Martens
& Grosse 2015, section 6.4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..likelihoods import Likelihood
from . import communication
from .approximations import statistics_dtype
from .recorder import RootInputs

#: What a step shows of a call: outputs, targets if they are known, weights of the observations in the loss.
Shown = tuple[Tensor, Tensor | None, Tensor]


def fisher_products(
    root: nn.Module,
    inputs: RootInputs,
    shown: Sequence[Shown],
    likelihood: Likelihood,
    directions: Sequence[dict[Tensor, Tensor]],
) -> Tensor:
    """``D_iᵀ F D_j``, ``[k, k]`` in float64, F being that of all calls' batches: their mean, and over ranks.

    Args:
        root: the whole model; it is left as it was.
        inputs: what it was called with.
        shown: of each call.
        likelihood: of the outputs.
        directions: k of them, by parameter; those that are left out are zero there.

    Raises:
        ValueError: an operation of the model has no forward-mode derivative.
    """
    names: dict[Tensor, str] = {p: name for name, p in root.named_parameters()}
    total = torch.zeros(len(directions), len(directions), dtype=torch.float64, device=inputs.device)
    for index, (_, targets, weights) in enumerate(shown):
        tangents = []
        curved = []
        for direction in directions:
            with forward_mode.dual_level(), sdpa_kernel(SDPBackend.MATH):
                duals = {names[p]: forward_mode.make_dual(p.detach(), d) for p, d in direction.items()}
                try:
                    outputs = inputs.again(index, duals)
                except NotImplementedError as error:
                    raise ValueError(
                        f"lr='auto' and momentum='auto' need forward-mode derivatives, and this model has an operation "
                        f"without them ({str(error).splitlines()[0]}): give numbers."
                    ) from error
                seen, tangent = forward_mode.unpack_dual(likelihood.observations(outputs, targets))
                wide = statistics_dtype(seen)
                tangent = torch.zeros_like(seen) if tangent is None else tangent
                tangents.append(tangent.to(wide))
                curved.append(likelihood.hessian_product(seen.to(wide), tangents[-1]) * weights.unsqueeze(-1))
        for i, left in enumerate(tangents):
            for j, right in enumerate(curved):
                total[i, j] += (left * right).sum().double()
    total = total / max(len(shown), 1)
    if communication.world_size() > 1:
        communication.average_([total], torch.ones(1, device=total.device))
    return (total + total.mT) / 2


def minimizer(matrix: Tensor, slopes: Tensor, fixed: Tensor) -> Tensor:
    """Coefficients c that minimize ``cᵀ matrix c / 2 - slopesᵀ c``, two of them, those given in ``fixed`` held there.

    Args:
        matrix: ``[2, 2]``, positive semi-definite; a direction of no length gets the coefficient 0.
        slopes: ``[2]``.
        fixed: ``[2]``, NaN where a coefficient is free.
    """
    free = fixed.isnan() & (matrix.diagonal() > 0)
    given = torch.where(free | fixed.isnan(), 0.0, fixed)
    right = torch.where(free, slopes - matrix @ given, given)
    keep = free.unsqueeze(0) & free.unsqueeze(1)
    # Scaled to a unit diagonal, so that lengths of any order can be told apart; two parallel ones share a least ridge.
    scale = torch.where(free, matrix.diagonal(), 1.0).rsqrt()
    scaled = torch.where(keep, matrix * scale * scale.unsqueeze(1), 0.0)
    scaled = scaled + torch.diag(torch.where(free, 4 * torch.finfo(matrix.dtype).eps, 1.0))
    return torch.linalg.solve(scaled, right * scale) * scale
