"""FishLeg: natural gradient with an inverse Fisher matrix that is learned beside the model.

Source: Garcia, Freddi, Fotiadis, Li, Vakili, Bernacchia & Hennequin, "Fisher-Legendre (FishLeg) optimization of deep
neural networks", ICLR 2023. The natural gradient is the gradient of a Legendre conjugate, hence the minimiser over v of
``½ vᵀ(F + γ I) v - uᵀ v``. A positive matrix ``Q(λ)`` is trained to be that linear map: Adam takes λ down the gradient
of this *auxiliary loss* at ``v = Q(λ) u``, which is that of ``<F v + γ v - u, Q(λ) u>`` with the first part held fixed.
One product ``F v`` an update is all that is needed of the Fisher matrix. The model moves by
``m = β m + (1 - β) Q g`` and ``θ -= η (m + wd θ)``.

Q is block-diagonal over layers and lies in the optimizer: the model is not changed, and its checkpoint is its own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from ..base import CURVATURE, CurvatureOptimizer, Params, adopted, descend, limited, rate, real
from ..checks import check_choice, check_range
from ..curvature import communication
from ..curvature.approximations import Approximation, statistics_dtype
from ..curvature.layers import AffineLayer, Layer
from ..curvature.losses import targets_of
from ..curvature.recorder import Call, RootInputs
from ..likelihoods import Likelihood
from ..natural_gradient.agreement import Agreement
from .learned_inverses import LearnedDiagonal, LearnedInverse, LearnedKronecker, descend_blocks
from .products import SampledProducts, cycle, parts
from .vectors import Vector, dot, filled, matrices, norm, vector


class FishLeg(CurvatureOptimizer):
    """FishLeg.

    Affine layers have a ``LearnedKronecker``, norms and embeddings a ``LearnedDiagonal`` block; parameters of other
    layers, tied and free ones take Adam's step at ``fallback_lr`` (see ``coverage()``). Q starts as ``init_scale I``:
    the first steps are those of SGD with rate ``lr * init_scale`` (and with ``momentum`` an average of gradients).

    On due steps ``step`` evaluates the model again, at targets sampled from its own predictions, on what the model was
    called with in this step, or on a loader of its own. Buffers (BatchNorm's statistics), the random state and the
    weights are afterwards what they were, bit for bit; dropout draws the same masks in all passes of an update. These
    passes are in the weights' precision, whatever autocast says. Plain ``loss.backward()`` serves as well as
    ``backward``, where all observations count and equally: what does not count (padding), class weights and the like
    are read in the graph of the loss that ``backward(loss, outputs)`` is given.

    The loss is taken to be the likelihood's ``nll``, and F is its Gauss-Newton matrix; of several micro-batches, the
    mean of theirs, weighted by how many observations count in each. Multiplying the loss by c leaves the natural
    gradient as it is if damping is multiplied by c, too.

    Args:
        model: the whole module; it returns its outputs as one tensor.
        params: parameters or groups; default all. ``lr, momentum, damping, max_update, weight_decay, fallback_lr``
            may differ between groups.
        lr: learning rate (η).
        momentum: decay of the average of natural gradients (β); no bias correction.
        damping: γ; of the Fisher matrix, in the units of the loss. May be scheduled: Q follows.
        max_update: largest root mean square over a tensor of a natural gradient, which is shortened to it before it
            goes into the average: until Q is learned, steps are plain gradients as long as the loss is steep. None:
            none, as published.
        weight_decay: decoupled: ``θ -= lr weight_decay θ``.
        aux_lr: Adam's rate for λ. The published 1e-4 is careful: 1e-3 learns Q faster, and much more may diverge.
        aux_betas: Adam's decays for λ.
        aux_eps: Adam's epsilon for λ.
        aux_every: steps between auxiliary updates; the first comes after so many steps, never at once.
        aux_steps: updates in a due step, with other sampled targets (and, from a loader, another batch) each.
        u: what Q is learned on: ``"gradient"``, the step's, or ``"gaussian"``, white noise; normalised.
        product: ``"antithetic"``: ``F v`` as the central difference along v of the gradient at sampled targets, that is
            ``H v`` with H the Hessian of their negative log-likelihood, whose expectation is F. Not for weights in half
            precision, where so small a difference is lost. ``"rank_one"``: ``m (ḡ·v) ḡ`` with ḡ the mean gradient of m
            sampled targets; its expectation is ``F v``, too, at a third of the cost and a far larger variance.
        eps: distance of the central difference from the weights, in Euclidean norm.
        precondition_aux: replace the residual ``F v + γ v - u`` by Q times it, which measures the error of v itself.
        init_scale: of Q at first; None: 1 / damping.
        warmup_steps: with Q as it starts, no auxiliary updates; then Q becomes ``1 / (mean of g² + damping)`` and they
            begin. 0: no such phase.
        max_factor_dim: a wider L or R is left out; None: none is.
        fallback_lr: first-order step of the parameters without a block, at the initial ``lr``; schedules scale it.
        skip: regular expression of layers to leave to the fallback.
        likelihood: of the model's outputs.
        aux_loader: of batches for the auxiliary updates: inputs, or a sequence that begins with them. Targets are
            sampled; if the second entry can be targets, it says what counts and how much. Started again when it ends;
            None: the training batches. Where it stands is not in ``state_dict``.
        seed: of sampled targets and of gaussian u.
        flags: torch's; see CurvatureOptimizer.

    Raises:
        ValueError: for a hyper-parameter out of its range.
    """

    _bound = CurvatureOptimizer._bound | {"_inputs", "_products"}

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        lr: float = 0.05,
        momentum: float = 0.9,
        damping: float = 0.1,
        max_update: float | None = 0.1,
        weight_decay: float = 1e-5,
        aux_lr: float = 1e-4,
        aux_betas: tuple[float, float] = (0.9, 0.999),
        aux_eps: float = 1e-8,
        aux_every: int = 10,
        aux_steps: int = 1,
        u: Literal["gradient", "gaussian"] = "gradient",
        product: Literal["antithetic", "rank_one"] = "antithetic",
        eps: float = 1e-4,
        precondition_aux: bool = True,
        init_scale: float | None = None,
        warmup_steps: int = 0,
        max_factor_dim: int | None = 8192,
        fallback_lr: float = 1e-3,
        skip: str | None = None,
        likelihood: Likelihood | None = None,
        aux_loader: Iterable[Any] | None = None,
        seed: int = 0,
        **flags: Any,
    ) -> None:
        check_range("lr", lr, 0)
        check_range("momentum", momentum, 0, 1, open_high=True)
        check_range("damping", damping, 0, open_low=True)
        check_range("weight_decay", weight_decay, 0)
        check_range("aux_lr", aux_lr, 0)
        for i, beta in enumerate(aux_betas):
            check_range(f"aux_betas[{i}]", beta, 0, 1, open_high=True)
        check_range("aux_eps", aux_eps, 0, open_low=True)
        check_range("aux_every", aux_every, 1)
        check_range("aux_steps", aux_steps, 1)
        check_choice("u", u, ("gradient", "gaussian"))
        check_choice("product", product, ("antithetic", "rank_one"))
        check_range("eps", eps, 0, open_low=True)
        if init_scale is not None:
            check_range("init_scale", init_scale, 0, open_low=True)
        check_range("warmup_steps", warmup_steps, 0)
        if max_factor_dim is not None:
            check_range("max_factor_dim", max_factor_dim, 1)
        check_range("fallback_lr", fallback_lr, 0)
        if likelihood is None:
            raise ValueError("likelihood must be given, such as Categorical()")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "max_update": max_update,
            "weight_decay": weight_decay,
            "fallback_lr": fallback_lr,
        }
        super().__init__(model, params, defaults, update_every=aux_every, flags=flags)
        assert self.model is not None
        self.aux_lr, self.aux_betas, self.aux_eps, self.aux_steps = aux_lr, tuple(aux_betas), aux_eps, aux_steps
        self.u, self.product, self.eps, self.precondition_aux = u, product, eps, precondition_aux
        self.init_scale, self.warmup_steps, self.max_factor_dim = init_scale, warmup_steps, max_factor_dim
        self.likelihood, self.seed = likelihood, seed
        self.updates = 0  # of λ
        self._updated_at = warmup_steps  # the first update comes an interval later
        self._last = torch.full((2,), torch.inf)  # auxiliary loss and residual of the last update; inf: there was none
        self._directions: Vector = {}
        self._targets: list[Tensor | None] = []  # of each pass; they say what counts and how much
        self._stream = None if aux_loader is None else cycle(aux_loader)
        self.skip = skip
        self._attach()
        self.blocks: dict[str, LearnedInverse]  # type: ignore[assignment]
        if product == "antithetic" and any(
            p.dtype in (torch.float16, torch.bfloat16) for block in self.blocks.values() for p in block.layer.parameters
        ):
            warnings.warn(
                f"weights in half precision do not resolve a difference of {eps:g}: use product='rank_one', or keep "
                "the weights in float32 and compute under autocast.",
                stacklevel=2,
            )

    def _attach(self) -> None:
        super()._attach()
        assert self.model is not None
        self._watch(cast("Callable[[Layer], Approximation]", self._block), skip=self.skip)
        self._inputs = RootInputs(self.model, self._due)
        self._agreement = Agreement(self.likelihood)
        loose = self._stream is not None
        self._products = SampledProducts(self.model, self.likelihood, self._inputs, loose=loose)

    @property
    def aux_every(self) -> int:
        """Steps between auxiliary updates; another name of ``update_every``."""
        return self.update_every

    @aux_every.setter
    def aux_every(self, value: int) -> None:
        self.update_every = value

    def _complete(self, group: dict[str, Any]) -> None:
        super()._complete(group)
        group.setdefault("fallback_ratio", float(group["fallback_lr"]) / float(group["lr"]) if group["lr"] else 0.0)

    def _watch_layers(self) -> None:
        super()._watch_layers()
        assert self._recorder is not None
        self._recorder.close()  # Q is learned from whole passes, not from what flows through a layer

    def _forget_replaced(self) -> None:
        """Nothing: the auxiliary passes go through the model as it is."""

    def _block(self, layer: Layer) -> LearnedInverse:
        block: LearnedInverse
        if isinstance(layer, AffineLayer):
            block = LearnedKronecker(layer, self.max_factor_dim)
        else:
            block = LearnedDiagonal(layer)
        scales = [1 / damping if self.init_scale is None else self.init_scale for damping in self._damping(block)]
        block.set_diagonal(block.to_matrix(filled(block, scales)))
        return block

    def _damping(self, block: LearnedInverse) -> list[float]:
        """γ of each of a block's parameters."""
        dampings = {p: float(group["damping"]) for group in self.param_groups for p in group["params"]}
        own = float(self._group(block.layer)["damping"])
        return [dampings.get(p, own) for p in block.layer.parameters]

    def _begin_pass(
        self, loss: Tensor, outputs: Any, targets: Tensor | None, mask: Tensor | None, scale: float, retain_graph: bool
    ) -> None:
        """See AnnouncedLosses. ``outputs`` are needed where some observations count less or not at all.

        Raises:
            ValueError: for a mask, which the auxiliary passes cannot apply: let targets say what counts.
        """
        if mask is not None:
            raise ValueError("mask must be None for FishLeg: let targets say what counts, such as -100 for padding")
        if self._due():
            self._inputs.locate(outputs, len(self._targets))
            if self._stream is None:
                told = targets
                if outputs is not None:
                    told = targets_of(self.likelihood, loss, outputs) if targets is None else targets
                    self._agreement.see(loss, outputs, targets, told, None, scale)
                self._targets.append(told)
        super()._begin_pass(loss, outputs, targets, mask, scale, retain_graph)

    def _skip(self) -> None:
        under_way = self._inputs.under_way(len(self._targets))
        super()._skip()
        self._inputs.go_on(under_way)

    # -- the auxiliary loss --------------------------------------------------------------------------------------------

    def _update_curvature(self) -> bool:
        blocks = [b for b in self.blocks.values() if any(p.requires_grad for p in b.layer.parameters)]
        if not blocks:
            return True
        self._agreement.conclude()
        for index in range(self.aux_steps):
            if self._stream is None:
                calls = self._inputs.gone_through()
                if len(self._targets) != len(calls):  # whose they are is not known
                    self._targets = [None] * len(calls)
            else:
                inputs, targets = parts(next(self._stream))
                calls, self._targets = [((inputs,), {})], [targets]
            if not calls and communication.world_size() == 1:
                self._warn_of_no_pass()
                return False
            self._learn(blocks, [self._products.placed(call) for call in calls], index)
        return True

    def _warn_of_no_pass(self) -> None:
        warnings.warn(
            "no forward pass came through the model in training mode between zero_grad() and step(), so its inverse "
            "was not updated: call model.train(), and the whole model rather than its parts.",
            stacklevel=6,
        )

    def _learn(self, blocks: list[LearnedInverse], calls: list[Call], index: int) -> None:
        """One update of λ."""
        # A pure function of (seed, step, index), the same on every rank; gaussian u has the next seed.
        seed = (self.seed * 1_000_003 + self.steps) * 4096 + 2 * index
        u = self._probe(blocks, seed + 1)
        products = [block.vjp(matrix) for block, matrix in zip(blocks, matrices(blocks, u), strict=True)]
        v = vector(blocks, [product for product, _ in products])
        fv, count = self._multiply(v, calls, seed)

        dampings = {p: float(group["damping"]) for group in self.param_groups for p in group["params"]}
        residual = [product.add(t, alpha=dampings[p]) for product, (p, t) in zip(fv, v.items(), strict=True)]
        loss = 0.5 * dot(residual, v.values()) - dot(u.values(), v.values())
        torch._foreach_sub_(residual, list(u.values()))
        found = torch.stack([loss, dot(residual, residual).sqrt()])
        finite, seen = torch.stack([found[1].isfinite(), count > 0]).tolist()  # the one synchronisation
        if not seen:
            self._warn_of_no_pass()
            return
        if not finite:
            self.rejected += 1
            return
        self._last = found
        adjoints = matrices(blocks, dict(zip(v, residual, strict=True)))
        if self.precondition_aux:
            preconditioned = [block.apply(d) for block, d in zip(blocks, adjoints, strict=True)]
            adjoints = matrices(blocks, vector(blocks, preconditioned))  # without entries that are not trained
        descents = [gradients(d) for (_, gradients), d in zip(products, adjoints, strict=True)]
        descend_blocks(blocks, descents, self.aux_lr, self.aux_betas, self.aux_eps)
        for block in blocks:
            block.refresh()
        self.updates += 1

    def _probe(self, blocks: list[LearnedInverse], seed: int) -> Vector:
        """u: the step's gradient or white noise, of norm 1 over all blocks."""
        params = [p for block in blocks for p in block.layer.parameters if p.requires_grad]
        if self.u == "gradient":
            u = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            u = [t.to(statistics_dtype(t)) for t in u]
        else:
            device = params[0].device
            generator = torch.Generator(device).manual_seed(seed)
            u = [
                torch.randn(p.shape, generator=generator, device=device, dtype=statistics_dtype(p)).to(p.device)
                for p in params
            ]
        length = norm(u)
        return {p: t / length for p, t in zip(params, u, strict=True)}

    def _multiply(self, v: Vector, calls: list[Call], seed: int) -> tuple[list[Tensor], Tensor]:
        """``F v`` in the order of v, estimated from targets sampled here; and how many were sampled, over all ranks."""
        told = [*self._targets, *[None] * (len(calls) - len(self._targets))]
        if self.product == "antithetic":
            return self._products.antithetic(v, calls, told, seed, self.eps)
        return self._products.rank_one(v, calls, told, seed)

    # -- the step ------------------------------------------------------------------------------------------------------

    def _precondition(self) -> None:
        blocks = [b for b in self.blocks.values() if any(p.grad is not None for p in b.layer.parameters)]
        gradients = matrices(blocks, {p: p.grad for b in blocks for p in b.layer.parameters if p.grad is not None})
        with record_function(CURVATURE):
            if self.steps < self.warmup_steps:
                self._warm_up(blocks, gradients)
            for block, gradient in zip(blocks, gradients, strict=True):
                for p, direction in zip(block.layer.parameters, block.from_matrix(block.apply(gradient)), strict=True):
                    self._directions[p] = direction.to(p.dtype)

    def _warm_up(self, blocks: list[LearnedInverse], gradients: list[Tensor]) -> None:
        """Average the squared gradient, and at the end set Q to its damped inverse."""
        for block, gradient in zip(blocks, gradients, strict=True):
            square = gradient.square() / self.warmup_steps
            block.squares = square if block.squares is None else block.squares + square
        if self.steps + 1 == self.warmup_steps:
            for block in self.blocks.values():
                if block.squares is not None:
                    block.set_diagonal(1 / (block.squares + block.to_matrix(filled(block, self._damping(block)))))
                    block.squares = None

    def _update_parameters(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        lr, beta, decay = rate(group), group["momentum"], group["weight_decay"]
        long = [self._directions[p] for p in params if p in self._directions]
        if group["max_update"] is not None and long:
            torch._foreach_mul_(long, limited(long, group["max_update"], [1.0] * len(long)))
        bare = [(p, g) for p, g in zip(params, grads, strict=True) if p not in self._directions]
        for (p, g), denominator in zip(bare, self._fallback(bare).values(), strict=True):
            self._directions[p] = real([g])[0] / denominator * group["fallback_ratio"]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        directions = [self._directions.pop(p) for p in params]
        buffers, params = real(self.state[p]["momentum_buffer"] for p in params), real(params)
        torch._foreach_lerp_(buffers, directions, 1 - beta)
        if decay:
            torch._foreach_mul_(params, 1 - lr * decay)
        descend(params, buffers, lr)

    def _reset(self) -> None:
        self._begun = False
        self._inputs.reset()
        self._agreement.reset()
        self._targets.clear()
        self._directions.clear()

    def close(self) -> None:
        """See CurvatureOptimizer."""
        super().close()
        self._inputs.close()

    # -- what it knows -------------------------------------------------------------------------------------------------

    def curvature_matrices(self) -> dict[str, Tensor]:
        """Nothing: no Fisher matrix is kept, only its damped inverse; see ``inverse_matrices``."""
        return {}

    def inverse_matrices(self) -> dict[str, Tensor]:
        """Dense Q, the learned inverse of ``F + damping``, by layer name, row-major over ``[d_out, d_in (+ 1)]``."""
        return {name: block.to_dense() for name, block in self.blocks.items()}

    def _cache_bytes(self, block: Approximation) -> int:
        return cast("LearnedInverse", block).kept_bytes()

    def diagnostics(self) -> dict[str, float]:
        """Adds how often Q was updated, and of the last update the auxiliary loss and ``|(F + damping) Q u - u|``.

        The latter is 1 for a Q of no use (0) and falls to 0 for the exact inverse, but for the noise of sampled F.
        """
        loss, residual = self._last.tolist()
        found = {} if math.isinf(residual) else {"fishleg/aux_loss": loss, "fishleg/residual": residual}
        return super().diagnostics() | {"fishleg/updates": float(self.updates)} | found

    # -- state ---------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """See CurvatureOptimizer.

        Raises:
            TypeError: with an ``aux_loader``, which cannot be copied where it stands.
        """
        if self._stream is not None:
            raise TypeError(
                "FishLeg with an aux_loader cannot be copied or pickled, as its place in the loader cannot: build "
                "another one and give it state_dict(), or go without aux_loader."
            )
        return super().__getstate__()

    def _initial(self, p: Tensor) -> dict[str, Any]:
        """See CurvatureOptimizer."""
        return {"momentum_buffer": torch.zeros_like(p)} | self._initial_fallback(p)

    def _curvature(self) -> dict[str, Any]:
        """See CurvatureOptimizer; also the moments of λ, and what a warm-up under way has gathered."""
        inner = {
            name: {"updates": b.updates, "first": dict(b.first), "second": dict(b.second), "squares": b.squares}
            for name, b in self.blocks.items()
        }
        return super()._curvature() | {"inner": inner, "updates": self.updates, "last": self._last}

    def _check(self, saved: dict[str, Any]) -> None:
        super()._check(saved)
        if "inner" not in saved:
            raise ValueError(f"this state has no learned inverse: it was not saved by {type(self).__name__}.")

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        self.updates, self._last = int(saved["updates"]), saved.get("last", self._last).clone()
        for name, inner in saved["inner"].items():
            weight = (block := self.blocks[name]).layer.parameters[0]
            block.updates = int(inner["updates"])
            block.first, block.second = adopted(inner["first"], weight), adopted(inner["second"], weight)
            block.squares = None if inner["squares"] is None else adopted({"": inner["squares"]}, weight)[""]
            block.refresh()
        self._directions.clear()
