"""Two-level K-FAC: K-FAC's blocks, and a coarse correction for what they do not know of each other.

Sources: Tselepidis, Kohler and Orvieto, "Two-Level K-FAC Preconditioning for Deep Learning", 2020 (arXiv 2011.00573);
Koroko, Anciaux-Sedrakian, Ben Gharbia, Garès, Haddou and Tran, "Analysis and Comparison of Two-Level KFAC Methods for
Training Deep Neural Networks", 2023 (arXiv 2303.18083); Nicolaides, "Deflation of conjugate gradients with applications
to boundary value problems", 1987.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from ..base import CURVATURE, Params
from ..checks import check_choice
from ..curvature import communication, linalg
from ..curvature.approximations import Approximation, statistics_dtype
from ..curvature.kronecker import Factors, Invertible
from ..curvature.layers import Flow, Layer
from ..curvature.samples import Samples
from ..kronecker import KFAC
from ..natural_gradient import KLOf, KLUnit, Stack, stacked
from .metric import SampledClip, SampledMetric, shares
from .spaces import RIDGES, CoarseSpace, dots, multiplies_bfloat16, narrowed, plus, smoother, smoothest, tiled

Coarse = Literal["nicolaides", "residual", "tselepidis", "spectral"]


class TwoLevelKFAC(SampledMetric, KFAC):
    """K-FAC's direction ``d0 = P^-1 g``, corrected on a coarse space, R0, of one or two vectors a layer.

    The vectors are the rows of R0, and the direction is::

        d = d0 + R0ᵀ (R0 (F + L) R0ᵀ)^-1 R0 (g - (F + L) d0),        L the diagonal of the layers' damping,

    with F the exact Fisher matrix, its blocks between layers included, of the examples that K-FAC's last update saw.
    This is the projection of the error of d0 on the coarse space in the norm of ``F + L``: there, d is never farther
    from ``(F + L)^-1 g`` than K-FAC's direction. ``tselepidis`` is the published additive form instead, which has
    ``R0 g`` on the right: it corrects as if d0 were zero, and makes no such promise.

    The projection is not symmetric, as the additive form is. So the KL clip holds ``lr² vᵀ (F + L) v`` itself, which is
    not ``lr² vᵀ g`` here. And where d0 is farther off than the projection of its error can make up for, d may lead
    uphill: then the step is K-FAC's (``curvature/uphill`` counts them).

    No product with F is formed: its samples (``curvature.samples``) outlive the step and are part of the state, and
    ``R0 F R0ᵀ = (Sᵀ R0ᵀ)ᵀ (Sᵀ R0ᵀ)`` and ``R0 F d0 = (Sᵀ R0ᵀ)ᵀ (Sᵀ d0)`` take a pass through the layers each. For all
    spaces but ``residual`` the first is due on updates and refreshes only.

    Args:
        coarse: the vectors of a layer: ``nicolaides``: ones; ``residual``: its share of ``P^-1 (g - (F + L) d0)``,
            renewed in every step; ``tselepidis``: ones, their matrix averaged over updates, the right-hand side R0 g;
            ``spectral``: the eigenvector of the smallest eigenvalue of ``A (x) G``.
        krylov: ``nicolaides`` and ``residual``: also P^-1 of each vector.
        coarse_dtype: of the products with P^-1 that coarse vectors are made by where statistics are float32. The
            correction is the projection on whatever vectors there are; ``auto``: bfloat16 on processors (no GPUs) that
            have instructions for it.
        damping_mode: see KFAC; of P.
        decay: weight of the past in the averages of P's factors (rho).
        update_every: steps between updates of the factors and samples (T_cov).
        sharing: see KFAC; of P.
    """

    _bound = SampledMetric._bound | {"_rough"}
    _length: SampledClip

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        batch_fraction: float = 0.25,
        coarse: Coarse = "nicolaides",
        krylov: bool = False,
        coarse_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        **shared: Any,
    ) -> None:
        check_choice("coarse", coarse, ("nicolaides", "residual", "tselepidis", "spectral"))
        if krylov and coarse not in ("nicolaides", "residual"):
            raise ValueError(f"krylov must be false for coarse={coarse!r}: it enriches nicolaides and residual")
        check_choice("coarse_dtype", coarse_dtype, ("auto", "float32", "bfloat16"))
        self.coarse, self.krylov, self.coarse_dtype = coarse, krylov, coarse_dtype
        self._space: CoarseSpace | None = None  # of residual, which is renewed in every step: none is kept
        self._names: list[str] = []  # the layers that the stacks hold, in their order
        self._shifts = torch.empty(0)  # L, one a layer of the stacks
        self._averaged: Tensor | None = None  # R0 F R0ᵀ of tselepidis
        self._seen: Tensor | None = None  # Sᵀ d by layer; None: not to be known
        self._uphill: Tensor | int = 0  # corrections left out, as the gradient would have grown along them
        super().__init__(model, params, batch_fraction=batch_fraction, **shared)

    def _check_options(self) -> None:
        super()._check_options()
        if self.assign == "owned":
            raise ValueError("assign must be 'balanced' or 'replicated' here: all inverses make coarse vectors")

    def length_rule(self, kl_of: KLOf, kl_unit: KLUnit, kl_warmup: int) -> SampledClip:
        """See NaturalGradient."""
        return SampledClip(kl_of, kl_unit, kl_warmup, getattr(self.likelihood, "independent", False), self._say)

    def _attach(self) -> None:
        super()._attach()
        # What coarse vectors are made by, and the stacks that it is of.
        self._rough: tuple[list[Stack], list[Factors]] = ([], [])

    # -- statistics ----------------------------------------------------------------------------------------------------

    def _observe(self, flow: Flow) -> None:
        super()._observe(flow)
        with record_function(CURVATURE):
            self.samples[flow.layer.name].accumulate(flow.scaled(1 / self._scale))

    def _update_curvature(self) -> bool:
        seen = super()._update_curvature()
        self._update_samples()
        return seen

    def _update_samples(self) -> None:
        alone = communication.world_size() == 1
        seen = [samples for samples in self.samples.values() if samples.observed or not alone]
        found = Samples.estimate_all(seen, *self._scaling())
        if not found:
            return
        if bool(torch.stack([t.sum() for factors in found.values() for t in factors.values()]).isfinite().all()):
            self._renew_samples(found)
        else:
            self.rejected += 1

    # -- the correction ------------------------------------------------------------------------------------------------

    def _solve_blocks(self, gradients: list[Tensor]) -> list[Tensor]:
        """See NaturalGradient."""
        wide = [g.to(statistics_dtype(g)) for g in gradients]
        fine = super()._solve_blocks(wide)
        self._seen = None
        if any(self.samples[block.layer.name].factors for stack in self._stacks for block in stack.blocks):
            self._renew_space(wide)
            fine = self._corrected(wide, fine)
        return [d.to(g.dtype) for d, g in zip(fine, gradients, strict=True)]

    def _corrected(self, gradients: list[Tensor], fine: list[Tensor]) -> list[Tensor]:
        """``d0 + R0ᵀ (R0 (F + L) R0ᵀ)^-1 R0 r`` with r the residual of d0, or the gradient."""
        if self.coarse == "tselepidis":
            assert self._space is not None
            space, shares = self._space, self._space.solve(self._restricted(self._space, gradients))
        else:
            seen = self._images(fine)
            space = self._space or self._spanned(self._residual(gradients, fine, seen.sum(0)))
            slopes = self._restricted(space, gradients)
            damped = self._restricted(space, fine) * self._shifts.repeat(len(space.vectors))
            shares = space.solve(slopes - damped - space.images.mT @ seen.sum(0).double())
            slope = self._inner(fine, gradients).sum() + shares.flatten() @ slopes
            self._uphill = self._uphill + (slope <= 0)
            shares = torch.where(slope > 0, shares, 0.0)
            self._seen = seen + (space.images.view(-1, *shares.shape) * shares).sum(1).mT.to(seen)
        for vectors, share in zip(space.vectors, shares, strict=True):
            parts = zip(fine, vectors, self._by_stack(share), strict=True)
            fine = [plus(d, v, part, d) for d, v, part in parts]
        return fine

    def _restricted(self, space: CoarseSpace, tensors: list[Tensor]) -> Tensor:
        """R0 times the stacks' tensors."""
        return torch.cat([self._inner(vectors, tensors) for vectors in space.vectors])

    # -- the coarse space ----------------------------------------------------------------------------------------------

    def _renew_space(self, like: list[Tensor]) -> None:
        """On refreshes and updates: the damping, the vectors, the matrix of the vectors."""
        layers = [block.layer for stack in self._stacks for block in stack.blocks]
        names = [layer.name for layer in layers]
        moved = self._inverted_at == self.steps or names != self._names
        if not moved and self._updated_at != self.steps:
            return
        if names != self._names:
            self._averaged = None
        self._names = names
        dampings = [self._damping(layer) for layer in layers]
        self._shifts = torch.tensor(dampings, dtype=torch.float64).to(like[0].device)
        if self.coarse != "residual":
            kept = None if moved or self._space is None else self._space.vectors
            self._space = self._spanned(zip(*(kept or self._vectors(like)), strict=True))

    def _vectors(self, like: list[Tensor]) -> list[list[Tensor]]:
        """What spans the space: ``[k][stack]``, the k-th vector of each layer in the shape of a stacked gradient."""
        if self.coarse == "spectral":
            found = self._from_owners(self._stacks, like, lambda k: smoothest(self._stacks[k]))
            return [[vector.view_as(t) for vector, t in zip(found, like, strict=True)]]
        ones = [torch.ones_like(t) for t in like]
        if not self.krylov:
            return [ones]
        return [ones, [smooth(v) for smooth, v in zip(self._smoothers(), ones, strict=True)]]

    def _residual(self, gradients: list[Tensor], fine: list[Tensor], seen: Tensor) -> Iterator[list[Tensor]]:
        """``P^-1 r`` with ``r = (g - L d0) - S (Sᵀ d0)``, and what enriches it: a stack's vectors after another's."""
        shifts = self._by_stack(-self._shifts)
        members = zip(self._stacks, self._smoothers(), gradients, fine, shifts, strict=True)
        for stack, smooth, g, d, shift in members:
            parts = []
            for block, part in zip(stack.blocks, shares(stack, plus(g, d, shift)), strict=True):
                samples = self.samples[block.layer.name]
                if samples.factors and not samples.deduct(part, seen):
                    part = part - block.to_matrix(samples.combine(seen))
                parts.append(part)
            vectors = smooth(stacked(parts))
            yield [vectors, smooth(vectors)] if self.krylov else [vectors]

    def _smoothers(self) -> list[Callable[[Tensor], Tensor]]:
        """By stack ``v -> P^-1 v``, which nothing but a coarse vector is made of: so in ``coarse_dtype``."""
        if self._rough[0] is not self._stacks:
            self._rough = self._stacks, [self._narrowed(stack) for stack in self._stacks]
        caches = self._rough[1]
        if self.coarse != "residual":  # asked for on refreshes alone
            self._rough = [], []
        return [smoother(stack, cache) for stack, cache in zip(self._stacks, caches, strict=True)]

    def _narrowed(self, stack: Stack) -> Factors:
        """A stack's inverses in bfloat16 or, where coarse vectors are not made in it, themselves."""
        if not self._narrows(stack.blocks[0].layer) or any(key.startswith("L_") for key in stack.cache):
            return stack.cache  # with L_ triangles are solved
        return narrowed(stack.cache)

    def _narrows(self, layer: Layer) -> bool:
        weight = layer.parameters[0]
        if statistics_dtype(weight) != torch.float32 or self.coarse_dtype == "float32":
            return False
        if self.coarse_dtype == "bfloat16":
            return True
        alone = communication.world_size() == 1  # another process may have another processor
        return alone and weight.device.type == "cpu" and multiplies_bfloat16()

    def _spanned(self, vectors: Iterable[Sequence[Tensor]]) -> CoarseSpace:
        """The space of some vectors, a stack's after another's, which are brought to a largest entry of 1, in place.

        All that is to be known of a stack's vectors is worked out before the next one's are asked for: while they are
        at hand.

        A layer without samples takes no part: its vectors become zero. Neither zeros nor dependent vectors do any harm:
        whatever the ridge, the correction brings d0 no farther from the solution.
        """
        scaled, images, inner = [], [], []
        for stack, candidates in zip(self._stacks, vectors, strict=True):
            scaled.append([self._scaled(stack, v) for v in candidates])
            images.append([self._images_in(stack, v) for v in scaled[-1]])
            inner.append([torch.stack([dots(len(stack.blocks), a, b) for a in scaled[-1]]) for b in scaled[-1]])
        seen = torch.stack([row for rows in zip(*images, strict=True) for part in rows for row in part]).double().mT
        matrix = seen.mT @ seen
        if self.coarse == "tselepidis" and (self._updated_at == self.steps or self._averaged is None):
            keep = 0.0 if self._averaged is None else min(1 - 1 / self.updates, self.decay)
            self._averaged = matrix if self._averaged is None else torch.lerp(matrix, self._averaged, keep)
        if self._averaged is not None:
            matrix = self._averaged
        products = torch.stack([torch.cat(parts, -1) for parts in zip(*inner, strict=True)]).double()
        matrix = matrix + torch.diag_embed(products * self._shifts).transpose(1, 2).reshape(matrix.shape)
        scale = matrix.diagonal().clamp(min=torch.finfo(matrix.dtype).tiny).rsqrt()
        scale = torch.where(matrix.diagonal() > 0, scale, torch.ones_like(scale))
        matrix = matrix * scale * scale.unsqueeze(1)
        rounding = len(matrix) * torch.finfo(scaled[0][0].dtype).eps
        ridges = torch.tensor([rounding * factor for factor in RIDGES]).to(matrix)
        roots, failed = torch.linalg.cholesky_ex(linalg.damped(matrix.expand(len(RIDGES), -1, -1), ridges))
        first = (failed == 0).int().argmax().view(1)  # an index that stays on the device
        columns = [list(column) for column in zip(*scaled, strict=True)]
        return CoarseSpace(columns, seen, roots.index_select(0, first)[0], scale)

    def _scaled(self, stack: Stack, vectors: Tensor) -> Tensor:
        flat = vectors.view(len(stack.blocks), -1)
        largest = torch.maximum(flat.amax(1, keepdim=True), -flat.amin(1, keepdim=True))  # faster than that of abs
        flat.div_(largest.clamp(min=torch.finfo(flat.dtype).tiny))
        if not all(has := [bool(self.samples[block.layer.name].factors) for block in stack.blocks]):
            flat = flat * torch.tensor(has, device=flat.device).unsqueeze(1)
        return flat.view(vectors.shape)

    # -- state ---------------------------------------------------------------------------------------------------------

    def diagnostics(self) -> dict[str, float]:
        """Adds in how many steps the correction was left out, as it would have led uphill."""
        return super().diagnostics() | {"curvature/uphill": float(self._uphill)}

    def _cache_bytes(self, block: Approximation) -> int:
        kept = list(self.samples[block.layer.name].factors.values())
        size = super()._cache_bytes(block) + sum(t.numel() * t.element_size() for t in kept)
        size += self.samples[block.layer.name].prepared_bytes()
        if self.coarse == "residual" and isinstance(block, Invertible) and self._narrows(block.layer):
            shapes = [shape for key, (shape, _) in block.cache_shapes().items() if key[0] != "W"]
            triangles = any(key.startswith("L_") for key in block.cache_shapes())
            if "W" not in block.cache_shapes():
                shapes = [(shape[0], *map(tiled, shape[1:])) for shape in shapes]
            size += 0 if triangles else 2 * sum(torch.Size(shape).numel() for shape in shapes)
        if self._space is None:
            return size
        own = sum(p.numel() for p in block.layer.parameters) * len(self._space.vectors)
        shared = self._space.images.numel() // max(len(self._names), 1)
        return size + own * self._space.vectors[0][0].element_size() + shared * self._space.images.element_size()

    def _curvature(self) -> dict[str, Any]:
        """See SampledFisher; also the coarse space in use."""
        space = self._space
        return super()._curvature() | {
            "coarse": {
                "layers": list(self._names),
                "dampings": self._shifts,
                "averaged": self._averaged,
                "moving": self._length.moving,
                "uphill": int(self._uphill),
                "vectors": [] if space is None else [self._apart(vectors) for vectors in space.vectors],
                "matrix": {} if space is None else {"images": space.images, "root": space.root, "scale": space.scale},
            }
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        coarse = saved["coarse"]
        weights: list[Tensor] = [block.layer.parameters[0] for block in self.blocks.values()] or [torch.empty(0)]

        def own(tensor: Tensor) -> Tensor:
            return tensor.to(weights[0].device, copy=True)  # of double precision, whatever the layers are

        self._names, self._uphill = list(coarse["layers"]), int(coarse["uphill"])
        self._shifts = own(coarse["dampings"])
        self._averaged = None if coarse["averaged"] is None else own(coarse["averaged"])
        self._length.moving = None if coarse.get("moving") is None else own(coarse["moving"])
        self._space = None
        if coarse["vectors"] and self._names == [block.layer.name for stack in self._stacks for block in stack.blocks]:
            parts = [iter(vectors) for vectors in coarse["vectors"]]
            vectors = [
                [
                    stacked([own(next(t)).to(statistics_dtype(block.layer.parameters[0])) for block in stack.blocks])
                    for stack in self._stacks
                ]
                for t in parts
            ]
            self._space = CoarseSpace(vectors, **{key: own(t) for key, t in coarse["matrix"].items()})

    def _apart(self, tensors: list[Tensor]) -> list[Tensor]:
        return [part for stack, t in zip(self._stacks, tensors, strict=True) for part in t.chunk(len(stack.blocks))]
