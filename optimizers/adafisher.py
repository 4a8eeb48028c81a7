"""AdaFisher and AdaFisherW: Adam with the Fisher's Kronecker-factored diagonal in place of the second moment.

Source: Gomes et al., "AdaFisher: Adaptive Second Order Optimization via Fisher Information", ICLR 2025 (arXiv
2405.16397). For each layer, ``F~ = diag(H) (x) diag(S) + Lambda``, with H and S normalised and averaged over steps;
then ``m = beta m + (1 - beta) g`` and ``theta -= lr / (1 - beta^t) * m / F~``: no square root.

Two things differ from the published code on purpose, and are tested: parameters are paired with layers by identity
(there, by running index and shape, which leaves some layers untrained), and norm layers use the exact diagonal of their
Fisher block, of which the paper's Proposition 3.1 is an approximation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .base import CurvatureOptimizer, OfGroups, Params, descend_scaled, rate, real
from .checks import check_choice, check_range
from .curvature import spectra
from .curvature.approximations import Approximation, Diagonal, KroneckerDiagonal
from .curvature.layers import AffineLayer, Layer
from .curvature.spectra import Spectrum


def minmax(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``(x - min) / (max - min + eps)`` over all entries: in [0, 1] whatever the scale of the loss."""
    low, high = torch.aminmax(x)
    return (x - low) / (high - low + eps)


class AdaFisher(CurvatureOptimizer):
    """AdaFisher with L2 regularisation in the gradient. Plain ``loss.backward()`` serves as well as ``backward``.

    Parameters without a supported layer (positional embeddings, tied weights, ...) get Adam's denominator at the same
    lr; see ``coverage()``.

    Args:
        model: the whole module.
        params: parameters or groups; default all. ``lr, momentum, damping, decay, max_update, weight_decay, maximize``
            may differ between groups (a layer takes the decay of its weight's).
        lr: learning rate (alpha in the paper); 1e-3 with ``ema="reference"`` and no limit, as published.
        momentum: decay of the first moment (beta_1).
        damping: added to every curvature (Lambda). With ``ema="reference"`` curvature settles below 1e-4, so the
            published 1e-3 dominates it: ``diagnostics()`` reports the share of directions in which it does not.
        decay: decay of the factors' average (gamma).
        update_every: steps between curvature updates (T_cov).
        ema: ``"reference"``: the published recursion ``c = 0.1 gamma c + 0.01 gamma new`` from ones, which is no
            average (its weights sum to 0.088 at gamma = 0.8); ``"average"``: the paper's Eq. 3,
            ``c = gamma c + (1 - gamma) new``, the first update replacing.
        normalize: ``"minmax"`` scales each new factor to [0, 1]; ``"none"`` keeps its units (the per-example loss's).
        damping_mode: ``"absolute"``, or ``"relative"``: Lambda times the layer's mean curvature.
        max_update: largest root mean square over a tensor of the update ``m / F~``, which is shortened to it (Shazeer &
            Stern, "Adafactor", 2018, section 6): no step is longer than ``lr max_update``, whatever the scale of the
            loss and however curvature falls from one update to the next. None: none, as published.
        weight_decay: L2 coefficient.
        loss_reduction: how the loss sums over examples; matters for ``normalize="none"`` only.
        flags: torch's; see CurvatureOptimizer.
    """

    decoupled_decay: ClassVar[bool] = False

    _bound = CurvatureOptimizer._bound | {"_owner"}

    decay = OfGroups()
    max_update = OfGroups()

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        lr: float = 1e-2,
        momentum: float = 0.9,
        damping: float = 1e-3,
        decay: float = 0.8,
        update_every: int = 100,
        ema: Literal["reference", "average"] = "average",
        normalize: Literal["minmax", "none"] = "minmax",
        damping_mode: Literal["absolute", "relative"] = "absolute",
        max_update: float | None = 0.1,
        weight_decay: float = 0.0,
        loss_reduction: Literal["mean", "sum"] = "mean",
        **flags: Any,
    ) -> None:
        check_range("lr", lr, 0)
        check_range("momentum", momentum, 0, 1, open_high=True)
        check_range("damping", damping, 0, open_low=True)
        check_range("decay", decay, 0, 1, open_high=True)
        check_range("weight_decay", weight_decay, 0)
        for name, value, choices in (
            ("ema", ema, ("reference", "average")),
            ("normalize", normalize, ("minmax", "none")),
            ("damping_mode", damping_mode, ("absolute", "relative")),
        ):
            check_choice(name, value, choices)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "max_update": max_update,
            "weight_decay": weight_decay,
            "decay": decay,
        }
        super().__init__(model, params, defaults, update_every=update_every, loss_reduction=loss_reduction, flags=flags)
        self.ema, self.normalize, self.damping_mode = ema, normalize, damping_mode
        # F~ by parameter, and the Lambda it was made with (a schedule may change it between updates).
        self._fisher: dict[Tensor, tuple[float, Tensor]] = {}
        self._owner: dict[Tensor, Approximation] = {}
        self._attach()

    def _attach(self) -> None:
        super()._attach()
        self._watch(self._block)

    def _watch_layers(self) -> None:
        super()._watch_layers()
        self._owner = {p: b for b in self.blocks.values() for p in b.layer.parameters}

    def _forget(self, block: Approximation) -> None:
        super()._forget(block)
        for p in block.layer.parameters:
            self._fisher.pop(p, None)

    @staticmethod
    def _block(layer: Layer) -> Approximation:
        return KroneckerDiagonal(layer) if isinstance(layer, AffineLayer) else Diagonal(layer)

    def _update_curvature(self) -> bool:
        for name, new in self._estimates().items():
            factors, decay = self.blocks[name].factors, self._group(self.blocks[name].layer)["decay"]
            for key, value in new.items():
                value = minmax(value) if self.normalize == "minmax" else value
                if self.ema == "reference":
                    old = factors.get(key, torch.ones_like(value))
                    value = (0.1 * decay) * old + (0.01 * decay) * value
                elif key in factors:
                    value = torch.lerp(value, factors[key], decay)
                factors[key] = value
        self._fisher.clear()
        return self._saw

    def _remember(self, scale: float) -> None:
        """See AnnouncedLosses. Scaled to [0, 1], statistics know of no factor in the loss."""
        if self.normalize != "minmax":
            super()._remember(scale)

    def _refresh(self, params: list[Tensor], damping: float) -> None:
        """Recompute F~ of the parameters whose factors or Lambda changed."""
        stale = {p for p in params if p in self._owner and self._fisher.get(p, (None,))[0] != damping}
        for block in dict.fromkeys(self._owner[p] for p in params if p in stale):
            if not block.factors:
                continue
            diagonals = block.diagonal(block.factors)
            unit = self._damping_unit(diagonals)
            for p, diagonal in zip(block.layer.parameters, diagonals, strict=True):
                if p in stale:
                    self._fisher[p] = (damping, (diagonal + damping * unit).to(p.dtype))

    def _damping_unit(self, diagonals: list[Tensor]) -> float:
        """What Lambda is in units of, for a layer of this curvature."""
        if self.damping_mode == "absolute":
            return 1.0
        mean = float(torch.stack([d.sum() for d in diagonals]).sum()) / sum(d.numel() for d in diagonals)
        return max(mean, torch.finfo(torch.float32).tiny)

    @staticmethod
    def _diagonals(block: Approximation) -> list[tuple[Tensor, Tensor]]:
        """Each parameter of a layer with its curvature; none before there is any."""
        return list(zip(block.layer.parameters, block.diagonal(block.factors), strict=True)) if block.factors else []

    def _update_parameters(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        lr, beta, decay = rate(group), group["momentum"], group["weight_decay"]
        self._refresh(params, group["damping"])
        moments, corrections = self._moments(params, grads, beta)
        if decay and not self.decoupled_decay:  # m of (g + decay * theta), without a copy of g
            torch._foreach_add_(moments, real(params), alpha=decay * (1 - beta))
        coupled = 0.0 if self.decoupled_decay else decay  # a part of the gradient, in the denominator too
        bare = [
            (p, g.add(p, alpha=coupled) if coupled else g)
            for p, g in zip(params, grads, strict=True)
            if p not in self._fisher
        ]
        fallback = self._fallback(bare)
        fisher = [self._fisher[p][1] if p in self._fisher else fallback[p] for p in params]
        if decay and self.decoupled_decay:
            torch._foreach_mul_(params, 1 - lr * decay)
        descend_scaled(real(params), moments, fisher, [1 / c for c in corrections], lr, group["max_update"])

    def _cache_bytes(self, block: Approximation) -> int:
        return sum(p.numel() * p.element_size() for p in block.layer.parameters)  # F~

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        self._fisher.clear()

    def _initial(self, p: Tensor) -> dict[str, Any]:
        """See CurvatureOptimizer."""
        return {"step": 0, "exp_avg": torch.zeros_like(p)} | self._initial_fallback(p)

    def diagnostics(self) -> dict[str, float]:
        """Adds ``curvature/above_damping``: the share of covered directions whose curvature exceeds Lambda."""
        damping = {p: g["damping"] for g in self.param_groups for p in g["params"]}
        above = total = 0.0
        for block in self.blocks.values():
            for p, diagonal in self._diagonals(block) if self.damping_mode == "absolute" else ():
                if p in damping:  # no other is trained: biases may be frozen, of a layer that is not
                    above += float((diagonal > damping[p]).sum())
                    total += diagonal.numel()
        return super().diagnostics() | ({"curvature/above_damping": above / total} if total else {})

    def layer_diagnostics(self) -> dict[str, dict[str, float]]:
        """See CurvatureOptimizer: of F~, whose entries are the eigenvalues."""
        dampings = {p: float(g["damping"]) for g in self.param_groups for p in g["params"]}
        rows = []
        for name, block in self.blocks.items():
            pairs = [(d, dampings[p]) for p, d in self._diagonals(block) if p in dampings]
            if pairs:
                unit = self._damping_unit([d for d, _ in pairs])
                values = torch.cat([d.flatten() for d, _ in pairs])
                shifts = torch.cat([d.new_full((d.numel(),), damping * unit) for d, damping in pairs])
                rows.append((name, spectra.numbers(Spectrum(values, shifts), None, spectra.row(values))))
        return spectra.told(rows)

    def quadratic(self, steps: Mapping[Tensor, Tensor]) -> float | None:
        """See CurvatureOptimizer. Only factors that are neither scaled nor summed anyhow are in the loss's units."""
        if self.normalize != "none" or self.ema != "average" or not self._fisher:
            return None
        return float(sum((steps[p].square() * f).sum() for p, (_, f) in self._fisher.items() if p in steps))


class AdaFisherW(AdaFisher):
    """AdaFisher with decoupled weight decay: ``theta -= lr (m_hat / F~ + weight_decay theta)``. Arguments as there."""

    decoupled_decay = True
