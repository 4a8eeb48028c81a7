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

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.utils._pytree import tree_map

from .base import CURVATURE, CurvatureOptimizer, Params, adopted, descend, limited, rate, real
from .checks import check_choice, check_range
from .curvature import communication
from .curvature.approximations import Approximation, statistics_dtype
from .curvature.layers import AffineLayer, Layer
from .curvature.losses import targets_of
from .curvature.recorder import Call, RootInputs
from .likelihoods import Likelihood

#: Tensors by parameter: a vector of the size of the model, or of a part of it.
Vector = dict[Tensor, Tensor]
#: Factors, or their gradients, by name.
Factors = dict[str, Tensor]

#: Processors multiply matrices faster whose rows are a multiple of so many numbers long; narrow ones gain nothing.
ALIGNED, NARROW = 8, 64


class LearnedInverse(ABC):
    """A positive matrix Q over one layer's parameters, with the gradient of ``<D, Q U>`` by what it is made of.

    Attributes:
        layer: the layer's adapter.
        factors: λ by name.
        first: Adam's first moments of λ.
        second: Adam's second moments of λ.
        updates: how many updates λ has had.
        squares: mean of the squared gradients seen in the warm-up, as a matrix; None outside of it.
    """

    #: Nothing is gathered in backward passes.
    observed: bool = False

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        weight = layer.parameters[0]
        dtype = statistics_dtype(weight)
        self.factors = {k: torch.zeros(s, dtype=dtype, device=weight.device) for k, s in self.shapes().items()}
        self.first = {key: torch.zeros_like(t) for key, t in self.factors.items()}
        self.second = {key: torch.zeros_like(t) for key, t in self.factors.items()}
        self.updates = 0
        self.squares: Tensor | None = None

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors."""

    @abstractmethod
    def to_matrix(self, tensors: list[Tensor]) -> Tensor:
        """Tensors shaped like the layer's parameters in the one shape that Q acts on."""

    @abstractmethod
    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """Inverse of ``to_matrix``."""

    @abstractmethod
    def set_diagonal(self, values: Tensor) -> None:
        """Make Q the diagonal matrix of positive ``values`` (as a matrix: see ``to_matrix``)."""

    @abstractmethod
    def apply(self, u: Tensor) -> Tensor:
        """``Q U``."""

    @abstractmethod
    def vjp(self, u: Tensor) -> tuple[Tensor, Callable[[Tensor], Factors]]:
        """``Q U``, and the function from D to the gradient of ``<D, Q U>`` by each factor."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Q as a matrix in the row-major order of the ``[d_out, d_in (+ 1)]`` weight matrix, bias last."""

    @abstractmethod
    def refresh(self) -> None:
        """Work out again what is kept of the factors: they have changed."""

    def kept_bytes(self) -> int:
        """Bytes besides the factors: Adam's moments and what ``refresh`` keeps."""
        return 2 * sum(t.numel() * t.element_size() for t in self.factors.values())


class LearnedKronecker(LearnedInverse):
    """``Q U = A * (RᵀR (A * U) LLᵀ)`` with an elementwise A: the block of an affine layer (section 4.2 of the paper).

    The two products ``RᵀR`` and ``LLᵀ`` are kept, so that a step multiplies twice and not four times.

    Args:
        layer: of parameters ``[groups, d_out, columns]``.
        max_factor_dim: a wider L or R is left out (it is the identity; A alone acts on that side); None: none is.
    """

    layer: AffineLayer

    def __init__(self, layer: AffineLayer, max_factor_dim: int | None) -> None:
        self._limit = float("inf") if max_factor_dim is None else max_factor_dim
        # Columns are filled up with zeros: A is zero there, and the gradient of L, so L stays the identity.
        self._width = -(-layer.columns // ALIGNED) * ALIGNED if layer.columns > NARROW else layer.columns
        self._grams: Factors = {}
        super().__init__(layer)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See LearnedInverse."""
        groups, rows, width = self.layer.groups, self.layer.d_out, self._width
        shapes: dict[str, tuple[int, ...]] = {}
        if self.layer.columns <= self._limit:
            shapes["L"] = (groups, width, width)
        if rows <= self._limit:
            shapes["R"] = (groups, rows, rows)
        return shapes | {"A": (groups, rows, width)}

    def to_matrix(self, tensors: list[Tensor]) -> Tensor:
        """See LearnedInverse."""
        matrix = self.layer.to_matrix(tensors[0], tensors[1] if len(tensors) > 1 else None)
        missing = self._width - self.layer.columns
        return (F.pad(matrix, (0, missing)) if missing else matrix).to(self.factors["A"].dtype)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """See LearnedInverse."""
        return self.layer.from_matrix(matrix[..., : self.layer.columns])

    def set_diagonal(self, values: Tensor) -> None:
        """See LearnedInverse."""
        columns = slice(self.layer.columns)
        self.factors["A"].zero_()[..., columns] = values[..., columns].sqrt()
        for key in self.factors.keys() - {"A"}:
            factor = self.factors[key]
            factor.copy_(torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device))
            self._grams[key] = factor.clone()  # no need to multiply

    def refresh(self) -> None:
        """See LearnedInverse."""
        if "L" in self.factors:
            self._grams["L"] = self.factors["L"] @ self.factors["L"].mT
        if "R" in self.factors:
            self._grams["R"] = self.factors["R"].mT @ self.factors["R"]

    def _left(self, x: Tensor) -> Tensor:
        return self._grams["R"] @ x if "R" in self._grams else x

    def _right(self, x: Tensor) -> Tensor:
        return x @ self._grams["L"] if "L" in self._grams else x

    def apply(self, u: Tensor) -> Tensor:
        """See LearnedInverse."""
        a = self.factors["A"]
        return a * self._right(self._left(a * u))

    def vjp(self, u: Tensor) -> tuple[Tensor, Callable[[Tensor], Factors]]:
        """See LearnedInverse.

        With ``X = A * U`` and ``E = A * D`` the product is ``<E, RᵀR X LLᵀ>``: bilinear in X and E, and linear in the
        two Gram matrices, whose gradients G reach R as ``R (G + Gᵀ)`` and L as ``(G + Gᵀ) L``.
        """
        a = self.factors["A"]
        x = a * u
        left = self._left(x)
        both = self._right(left)

        def gradients(d: Tensor) -> Factors:
            e = a * d
            right = self._right(e)
            found = {"A": d * both + u * self._left(right)}
            if "L" in self.factors:
                gram = left.mT @ e
                found["L"] = (gram + gram.mT) @ self.factors["L"]
            if "R" in self.factors:
                gram = right @ x.mT
                found["R"] = self.factors["R"] @ (gram + gram.mT)
            return {key: found[key] for key in self.factors}

        return a * both, gradients

    def to_dense(self) -> Tensor:
        """See LearnedInverse."""
        columns = self.layer.columns
        identities = {"R": torch.eye(self.layer.d_out), "L": torch.eye(columns)}
        blocks = []
        for group, a in enumerate(self.factors["A"][..., :columns]):
            right, left = (
                self._grams[key][group, :size, :size] if key in self._grams else identities[key].to(a)
                for key, size in (("R", self.layer.d_out), ("L", columns))
            )
            blocks.append(a.reshape(-1, 1) * torch.kron(right.contiguous(), left.contiguous()) * a.reshape(1, -1))
        return torch.block_diag(*blocks)

    def kept_bytes(self) -> int:
        """See LearnedInverse."""
        return super().kept_bytes() + sum(t.numel() * t.element_size() for t in self._grams.values())


class LearnedDiagonal(LearnedInverse):
    """``Q U = D * D * U``: the block of an elementwise layer (norms, Embedding), all parameters in one vector."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See LearnedInverse."""
        return {"D": (sum(p.numel() for p in self.layer.parameters),)}

    def to_matrix(self, tensors: list[Tensor]) -> Tensor:
        """See LearnedInverse."""
        return torch.cat([t.flatten() for t in tensors]).to(self.factors["D"].dtype)

    def from_matrix(self, matrix: Tensor) -> list[Tensor]:
        """See LearnedInverse."""
        parameters = self.layer.parameters
        pieces = matrix.split([p.numel() for p in parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]

    def set_diagonal(self, values: Tensor) -> None:
        """See LearnedInverse."""
        self.factors["D"].copy_(values.sqrt())

    def refresh(self) -> None:
        """See LearnedInverse. Nothing is."""

    def apply(self, u: Tensor) -> Tensor:
        """See LearnedInverse."""
        return self.factors["D"].square().mul_(u)

    def vjp(self, u: Tensor) -> tuple[Tensor, Callable[[Tensor], Factors]]:
        """See LearnedInverse."""
        return self.apply(u), lambda d: {"D": 2 * self.factors["D"] * u * d}

    def to_dense(self) -> Tensor:
        """See LearnedInverse."""
        return torch.diag(self.factors["D"].square())


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

    _bound = CurvatureOptimizer._bound | {"_inputs"}

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
        self._last: dict[str, Tensor] = {}  # what the last auxiliary update found
        self._directions: Vector = {}
        self._targets: list[Tensor | None] = []  # of each pass; they say what counts and how much
        self._stream = None if aux_loader is None else _cycle(aux_loader)
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
        assert self._recorder is not None
        self._recorder.close()  # Q is learned from whole passes, not from what flows through a layer
        self._inputs = RootInputs(self.model, self._due)

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
        block.set_diagonal(block.to_matrix(_filled(block, scales)))
        return block

    def _damping(self, block: LearnedInverse) -> list[float]:
        """γ of each of a block's parameters."""
        dampings = {p: float(group["damping"]) for group in self.param_groups for p in group["params"]}
        own = float(self._group(block.layer)["damping"])
        return [dampings.get(p, own) for p in block.layer.parameters]

    def backward(
        self,
        loss: Tensor,
        outputs: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        scale: float = 1.0,
        retain_graph: bool = False,
    ) -> None:
        """See CurvatureOptimizer. ``outputs`` are needed where some observations count less or not at all.

        Raises:
            ValueError: for a mask, which the auxiliary passes cannot apply: let targets say what counts.
        """
        if mask is not None:
            raise ValueError("mask must be None for FishLeg: let targets say what counts, such as -100 for padding")
        if self._stream is None and self._due():
            if targets is None and outputs is not None:
                targets = targets_of(self.likelihood, loss, outputs)
            self._targets.append(targets)
        super().backward(loss, outputs, targets=targets, scale=scale, retain_graph=retain_graph)

    # -- the auxiliary loss --------------------------------------------------------------------------------------------

    def _update_curvature(self) -> bool:
        blocks = [b for b in self.blocks.values() if any(p.requires_grad for p in b.layer.parameters)]
        if not blocks:
            return True
        for index in range(self.aux_steps):
            if self._stream is None:
                calls = self._inputs.calls
                if len(self._targets) != len(calls):  # whose they are is not known
                    self._targets = [None] * len(calls)
            else:
                inputs, targets = _parts(next(self._stream))
                calls, self._targets = [((inputs,), {})], [targets]
            if not calls and communication.world_size() == 1:
                self._warn_of_no_pass()
                return False
            self._learn(blocks, [self._placed(call) for call in calls], index)
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
        products = [block.vjp(matrix) for block, matrix in zip(blocks, _matrices(blocks, u), strict=True)]
        v = _vector(blocks, [product for product, _ in products])
        fv, count = self._multiply(v, calls, seed)

        dampings = {p: float(group["damping"]) for group in self.param_groups for p in group["params"]}
        residual = [product.add(t, alpha=dampings[p]) for product, (p, t) in zip(fv, v.items(), strict=True)]
        loss = 0.5 * _dot(residual, v.values()) - _dot(u.values(), v.values())
        torch._foreach_sub_(residual, list(u.values()))
        found = {"aux_loss": loss, "residual": _dot(residual, residual).sqrt()}
        finite, seen = torch.stack([found["residual"].isfinite(), count > 0]).tolist()  # the one synchronisation
        if not seen:
            self._warn_of_no_pass()
            return
        if not finite:
            self.rejected += 1
            return
        self._last = found
        adjoints = _matrices(blocks, dict(zip(v, residual, strict=True)))
        if self.precondition_aux:
            preconditioned = [block.apply(d) for block, d in zip(blocks, adjoints, strict=True)]
            adjoints = _matrices(blocks, _vector(blocks, preconditioned))  # without entries that are not trained
        self._descend(blocks, [gradients(d) for (_, gradients), d in zip(products, adjoints, strict=True)])
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
        length = _norm(u)
        return {p: t / length for p, t in zip(params, u, strict=True)}

    def _descend(self, blocks: list[LearnedInverse], gradients: list[Factors]) -> None:
        """Adam's step of λ."""
        names = [(block, key) for block in blocks for key in block.factors]
        found = [g[key] for block, g in zip(blocks, gradients, strict=True) for key in block.factors]
        for block in blocks:
            block.updates += 1
        (beta1, beta2), counts = self.aux_betas, [block.updates for block, _ in names]
        first, second = [block.first[key] for block, key in names], [block.second[key] for block, key in names]
        torch._foreach_lerp_(first, found, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, found, found, value=1 - beta2)
        # Bias corrections in the scalars alone: sqrt(v / c) + eps = (sqrt(v) + eps sqrt(c)) / sqrt(c).
        roots = [(1 - beta2**n) ** 0.5 for n in counts]
        denominators = torch._foreach_sqrt(second)
        torch._foreach_add_(denominators, [self.aux_eps * root for root in roots])
        rates = [-self.aux_lr * root / (1 - beta1**n) for root, n in zip(roots, counts, strict=True)]
        torch._foreach_addcdiv_([block.factors[key] for block, key in names], first, denominators, rates)

    # -- products with the Fisher matrix -------------------------------------------------------------------------------

    def _multiply(self, v: Vector, calls: list[Call], seed: int) -> tuple[list[Tensor], Tensor]:
        """``F v`` in the order of v, estimated from targets sampled here; and how many were sampled, over all ranks."""
        return (self._antithetic if self.product == "antithetic" else self._rank_one)(v, calls, seed)

    def _antithetic(self, v: Vector, calls: list[Call], seed: int) -> tuple[list[Tensor], Tensor]:
        """``H v``: the central difference of the gradient at sampled targets."""
        params = list(v)
        generator = torch.Generator(params[0].device).manual_seed(seed)
        with self._aside():
            targets = [self._sample(self._observed(index, call)[0], generator) for index, call in enumerate(calls)]
        length = _norm(v.values())
        offset = [(self.eps / length * t).to(p.dtype) for p, t in v.items()]
        saved = [p.clone() for p in params]
        try:
            torch._foreach_add_(params, offset)
            ahead, count = self._gradients(params, calls, lambda index, seen: targets[index])
            torch._foreach_copy_(params, saved)
            torch._foreach_sub_(params, offset)
            behind, _ = self._gradients(params, calls, lambda index, seen: targets[index])
        finally:
            torch._foreach_copy_(params, saved)
        means, total = self._joint([a - b for a, b in zip(ahead, behind, strict=True)], count)
        return [t * (length / (2 * self.eps)) for t in means], total

    def _rank_one(self, v: Vector, calls: list[Call], seed: int) -> tuple[list[Tensor], Tensor]:
        """``m (ḡ·v) ḡ``, with the square root of an observation's weight in ḡ, which comes twice."""
        generator = torch.Generator(next(iter(v)).device).manual_seed(seed)
        gradient, count = self._gradients(list(v), calls, lambda index, seen: self._sample(seen, generator), power=0.5)
        means, total = self._joint(gradient, count)
        slope = _dot(means, v.values())
        return [t * (total * slope) for t in means], total

    def _gradients(
        self, params: list[Tensor], calls: list[Call], targets: Callable[[int, Tensor], Any], power: float = 1.0
    ) -> tuple[list[Tensor], Tensor]:
        """Gradient of the targets' negative log-likelihood, summed over observations, and how many of them count.

        An observation has its weight in the loss, times the number of those that count in its call: 1 in a plain mean.

        Args:
            params: what to differentiate by.
            calls: of the model.
            targets: of a call, by its index and observations.
            power: of the weights.
        """
        sums = [torch.zeros_like(p, dtype=statistics_dtype(p)) for p in params]
        count = torch.zeros((), device=params[0].device)
        with self._aside():
            for index, call in enumerate(calls):
                with torch.enable_grad():
                    seen, weights = self._observed(index, call)
                counted = weights.count_nonzero()
                score = self.likelihood.score(seen, targets(index, seen)) * (weights * counted).pow(power).unsqueeze(-1)
                found = torch.autograd.grad(
                    seen, params, score.to(seen.dtype), allow_unused=True, materialize_grads=True
                )
                torch._foreach_add_(sums, [g.to(s.dtype) for g, s in zip(found, sums, strict=True)])
                count += counted.to(count.device)
        return sums, count

    def _observed(self, index: int, call: Call) -> tuple[Tensor, Tensor]:
        """The observations of a call, and their weights in its loss, as far as that is known."""
        outputs = self._outputs(call)
        targets = self._targets[index] if index < len(self._targets) else None
        if targets is not None:
            targets = targets.to(outputs.device)
            if self._stream is not None and not self._fit(outputs, targets):
                targets = None
        return self.likelihood.observations(outputs, targets), self.likelihood.weights(outputs, targets)

    def _fit(self, outputs: Tensor, targets: Tensor) -> bool:
        """Whether what comes second in a loader's batch can be targets: it may be anything."""
        try:
            self.likelihood.observations(outputs, targets)
        except ValueError:
            return False
        return True

    def _joint(self, sums: list[Tensor], count: Tensor) -> tuple[list[Tensor], Tensor]:
        """Means over the observations of all ranks, and how many there are."""
        means = [t / count.clamp(min=1).to(t.device) for t in sums]
        total = count.clone()
        if (world := communication.world_size()) > 1:
            weights = torch.tensor([float(count)] * len(means) + [1.0], device=total.device)
            communication.average_([*means, total], weights)
        return means, total * world

    def _sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Targets from the model's own distribution: this rank's share of what one process would draw."""
        rank, world = communication.rank(), communication.world_size()
        return self.likelihood.sample(outputs, generator, rank=rank, world_size=world)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Forward passes that leave no trace, and all find the same random state."""
        assert self.model is not None
        kind = next(self.model.parameters()).device.type
        with self._inputs.aside(), torch.autocast(kind, enabled=False):
            yield

    def _outputs(self, call: Call) -> Tensor:
        assert self.model is not None
        outputs = self.model(*call[0], **call[1])
        if not isinstance(outputs, Tensor):
            raise ValueError(
                f"model must return its outputs as one tensor for FishLeg to sample targets, got "
                f"{type(outputs).__name__}: wrap it in a module that does."
            )
        return outputs

    def _placed(self, call: Call) -> Call:
        """A call's tensors where the model is, in its precision (autocast is off in the auxiliary passes)."""
        assert self.model is not None
        weight = next(self.model.parameters())

        def place(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(weight.device, weight.dtype.to_real() if x.is_floating_point() else None, non_blocking=True)

        return cast("Call", tree_map(place, call))

    # -- the step ------------------------------------------------------------------------------------------------------

    def _precondition(self) -> None:
        blocks = [b for b in self.blocks.values() if any(p.grad is not None for p in b.layer.parameters)]
        gradients = _matrices(blocks, {p: p.grad for b in blocks for p in b.layer.parameters if p.grad is not None})
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
                    block.set_diagonal(1 / (block.squares + block.to_matrix(_filled(block, self._damping(block)))))
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
        self._inputs.reset()
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
        found = {f"fishleg/{name}": float(value) for name, value in self._last.items()}
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
            name: {
                "updates": block.updates,
                "first": dict(block.first),
                "second": dict(block.second),
                "squares": block.squares,
            }
            for name, block in self.blocks.items()
        }
        return super()._curvature() | {"inner": inner, "updates": self.updates}

    def _check(self, saved: dict[str, Any]) -> None:
        super()._check(saved)
        if "inner" not in saved:
            raise ValueError(f"this state has no learned inverse: it was not saved by {type(self).__name__}.")

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        self.updates = int(saved["updates"])
        for name, inner in saved["inner"].items():
            block = self.blocks[name]
            weight = block.layer.parameters[0]
            block.updates = int(inner["updates"])
            block.first, block.second = adopted(inner["first"], weight), adopted(inner["second"], weight)
            block.squares = None if inner["squares"] is None else adopted({"": inner["squares"]}, weight)[""]
            block.refresh()
        self._directions.clear()


def _filled(block: LearnedInverse, values: list[float]) -> list[Tensor]:
    """Tensors shaped like a block's parameters, each full of one value."""
    return [
        torch.full_like(p, value, dtype=statistics_dtype(p))
        for p, value in zip(block.layer.parameters, values, strict=True)
    ]


def _matrices(blocks: Sequence[LearnedInverse], vector: Vector) -> list[Tensor]:
    """A vector in the shape that each block acts on; zero where it has no entry."""
    return [
        block.to_matrix([vector[p] if p in vector else torch.zeros_like(p) for p in block.layer.parameters])
        for block in blocks
    ]


def _vector(blocks: Sequence[LearnedInverse], matrices: Sequence[Tensor]) -> Vector:
    """The entries of matrices, one a block, that belong to trainable parameters."""
    return {
        p: entry
        for block, matrix in zip(blocks, matrices, strict=True)
        for p, entry in zip(block.layer.parameters, block.from_matrix(matrix), strict=True)
        if p.requires_grad
    }


def _dot(a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
    """Inner product of two vectors, on the device of the first tensor."""
    products = [(x * y).sum() for x, y in zip(a, b, strict=True)]
    return torch.stack([t.to(products[0].device) for t in products]).sum()


def _norm(vector: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of a vector; of zero the smallest number, by which one may divide."""
    norms = torch._foreach_norm(list(vector))
    norm = torch.stack([n.to(norms[0].device) for n in norms]).norm()
    return norm.clamp(min=torch.finfo(norm.dtype).tiny)


def _parts(batch: Any) -> tuple[Any, Tensor | None]:
    """The inputs of a loader's batch, and its targets if it has some."""
    if not isinstance(batch, (tuple, list)):
        return batch, None
    return batch[0], batch[1] if len(batch) > 1 and isinstance(batch[1], Tensor) else None


def _cycle(loader: Iterable[Any]) -> Iterator[Any]:
    """A loader's batches, again and again."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("aux_loader must yield batches each time that it is iterated over, and it yielded none")
