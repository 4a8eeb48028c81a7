"""Newton-Muon: momentum right-preconditioned by the covariance of a layer's inputs, then orthogonalised.

Muon's step is the polar factor of the momentum M, the steepest descent in the spectral norm (Jordan et al., "Muon",
2024; Bernstein & Newhouse, "Old Optimizer, New Norm", 2024, arXiv 2409.20325). Here one half of K-FAC comes before it,
the second moments A of the inputs: ``polar(M (A + damping)^-1)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import Params, descend, rate, real, with_fixed
from .checks import check_range
from .curvature.approximations import Approximation, statistics_dtype
from .curvature.kronecker import Factors, KroneckerFactors
from .curvature.layers import AffineLayer, Flow, Layer
from .kronecker.method import KroneckerMethod
from .natural_gradient import Moves

#: Coefficients (a, b, c) of ``X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X``, step by step: what brings all singular values from
#: [1e-3, 1] nearest to 1 (Amsel, Persson, Musco & Gower, "The Polar Express", 2025, arXiv 2505.16932).
QUINTICS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)


def polar(matrices: Tensor, steps: int = len(QUINTICS)) -> Tensor:
    """The nearest matrices with orthonormal rows or columns, ``U Vᵀ`` of ``U S Vᵀ``; nought stays nought.

    Singular values below a thousandth of the Frobenius norm are brought up part of the way.

    Args:
        matrices: ``[n, rows, columns]``.
        steps: of the iteration, three matrix products each.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(statistics_dtype(matrices))
    x = x / (1.01 * torch.linalg.matrix_norm(x, keepdim=True)).clamp(min=torch.finfo(x.dtype).tiny)
    for a, b, c in QUINTICS[:steps]:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class InputCovariance(KroneckerFactors):
    """``F ~ A (x) I``: K-FAC's factor of the inputs alone, damped by itself."""

    def __init__(self, layer: AffineLayer, options: Any) -> None:
        super().__init__(layer, options)
        self.full["G"] = False

    def _statistics(self, flow: Flow) -> list[tuple[str, Tensor]]:
        return self._input_moments(flow)

    def estimate(self, gradient_scale: float, examples: int) -> Factors:
        """See Approximation."""
        a = self._sums["A"].div_(self._sums["count"])
        return {"A": a, "G": a.new_ones(self.shapes()["G"])}

    def _shares(self, factors: Factors, damping: Tensor) -> dict[str, Tensor]:
        return {"A": damping, "G": torch.zeros_like(damping)}


class NewtonMuon(KroneckerMethod):
    """Newton-Muon: ``M = momentum M + g``, ``theta -= lr 0.2 sqrt(max(rows, columns)) polar(M (A + damping)^-1)``.

    The factor makes a step's root mean square what AdamW's is, whatever the shape (Liu et al., "Muon is Scalable for
    LLM Training", 2025, arXiv 2502.16982). A bias is the column of its layer's matrix that sees an input of one. What
    has no affine layer, and layers that ``skip`` names (heads and embeddings, with Muon), take Adam's step.

    Args:
        params: parameters or groups; default all. ``lr, momentum, damping, weight_decay, fallback_lr, decay, maximize``
            may differ between groups; a layer takes damping and the average's decay from its weight's.
        lr: learning rate, of steps as long as AdamW's.
        momentum: decay of the sum of past gradients.
        damping: lambda, in units of the mean eigenvalue of each layer's A unless ``damping_unit`` says otherwise.
        update_every: steps between updates of A.
        weight_decay: decoupled, as in AdamW.
        polar_steps: of the iteration for the polar factor; 5, as Muon has, leave singular values within a tenth of
            1, 8 are exact.
    """

    fixed: ClassVar[Mapping[str, Any]] = {
        "kl_clip": None, "kl_of": "step", "kl_unit": "root", "kl_warmup": 0, "fisher": "empirical", "pi": False,
        "damping_mode": "factored", "decoupled_decay": True,
    }  # fmt: skip

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        lr: float = 1e-2,
        momentum: float = 0.95,
        damping: float = 0.1,
        damping_unit: Literal["absolute", "layer"] = "layer",
        polar_steps: int = 5,
        **shared: Any,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("damping", damping)):
            if isinstance(value, str):  # a model of the loss says nothing of steps whose length is fixed
                raise ValueError(f"{name} must be a number, got {value!r}")
        check_range("polar_steps", polar_steps, 1, len(QUINTICS))
        self.polar_steps = polar_steps
        super().__init__(
            model, params, lr=lr, momentum=momentum, damping=damping, damping_unit=damping_unit,
            **with_fixed(NewtonMuon, self, shared),
        )  # fmt: skip

    def affine_block(self, layer: AffineLayer) -> Approximation:
        """See NaturalGradient."""
        return InputCovariance(layer, self.options)

    def _block(self, layer: Layer) -> Approximation | None:
        return self.affine_block(layer) if isinstance(layer, AffineLayer) else None

    def _solve_blocks(self, gradients: list[Tensor]) -> list[Tensor]:
        """Steps without rate: of the momentum, which these gradients are added to, and not of a gradient alone."""
        moves = Moves(self, {})
        for p in (p for stack in self._stacks for block in stack.blocks for p in block.layer.parameters):
            if p.grad is not None and (group := self._group_of(p)) is not None:
                buffer = self.state[p]["momentum_buffer"] = moves.momentum_of(p)
                buffer.mul_(group["momentum"]).add_(p.grad)
        momenta = moves.stacked(moves.momentum_of)
        found = [polar(direction, self.polar_steps) for direction in super()._solve_blocks(momenta)]
        return [direction * (0.2 * max(direction.shape[-2:]) ** 0.5) for direction in found]

    def quadratic(self, steps: Mapping[Tensor, Tensor]) -> float | None:
        """See CurvatureOptimizer. The inputs' covariance is half of a curvature, and none of the loss."""
        return None

    def _update_parameters(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        covered = [p for p in params if p in self._directions]
        bare = [(p, g) for p, g in zip(params, grads, strict=True) if p not in self._directions]
        if covered:
            lr, matrices = rate(group), real(covered)
            if group["weight_decay"]:
                torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
            descend(matrices, [self._directions.pop(p) for p in covered], lr)
        if bare:
            super()._update_parameters(group, [p for p, _ in bare], [g for _, g in bare])
