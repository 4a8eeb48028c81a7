"""The engine of all Kronecker methods: when curvature is gathered, refreshed and applied. Blocks say how."""

from __future__ import annotations

import re
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from .base import (
    CURVATURE,
    LONG_AGO,
    CurvatureOptimizer,
    OfGroups,
    Params,
    adopted,
    descend,
    placed_mask,
    rate,
    real,
)
from .checks import check_choice, check_range
from .curvature import communication
from .curvature.approximations import Approximation, statistics_dtype
from .curvature.damping import AdaptiveDamping
from .curvature.kronecker import Counts, ExactDiagonal, Factors, Invertible, Options
from .curvature.layers import AffineLayer, Layer
from .curvature.losses import stated, targets_of
from .curvature.quadratic import fisher_products, minimizer
from .curvature.recorder import RootInputs, set_aside
from .likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, check_outputs

#: Wider matrices than this keep a processor busy one by one.
LARGE = 512

Fisher = Literal["sampled", "empirical", "exact"]
KLOf = Literal["step", "direction", "measured"]
KLUnit = Literal["root", "variable", "observation"]
Auto = float | Literal["auto"]

#: By ``kl_unit`` the power of the number of variables in an observation that kappa is multiplied by.
KL_POWERS: dict[KLUnit, float] = {"root": 0.5, "variable": 1.0, "observation": 0.0}


class Block(Invertible, Approximation):
    """For type hints: an approximation with a damped solve."""


def stacked(tensors: list[Tensor]) -> Tensor:
    """Tensors ``[groups, ...]`` side by side; a single one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class Stack:
    """Blocks of one kind and shape: inverted and solved side by side, in one leading dimension.

    Attributes:
        blocks: its members.
        cache: what their solves need, stacked.
    """

    def __init__(self, blocks: list[Block], cache: Factors) -> None:
        self.blocks, self.cache = blocks, cache

    @classmethod
    def build(cls, blocks: list[Block], damping: Tensor, counts: Counts, last: list[Factors] | None) -> Stack:
        """Invert the blocks' factors.

        Args:
            blocks: of one kind and shape.
            damping: one a stacked matrix.
            counts: where repairs are counted.
            last: each block's share of the last cache, if all have one.
        """
        factors = cls(blocks, {}).factors()
        before = None if last is None else {key: stacked([part[key] for part in last]) for key in last[0]}
        cache = blocks[0].invert(factors, damping, counts, before)
        for key, tensor in factors.items():
            if cache.get(key) is tensor:  # what the solve uses as it is need not be kept twice
                for block, part in zip(blocks, tensor.chunk(len(blocks)), strict=True):
                    block.factors[key] = part
        return cls(blocks, cache)

    def factors(self) -> Factors:
        """Its blocks' factors, stacked."""
        return {key: stacked([block.factors[key] for block in self.blocks]) for key in self.blocks[0].factors}

    def members(self) -> Iterator[tuple[Block, Factors]]:
        """Each block with its share of the cache, as views."""
        for i, block in enumerate(self.blocks):
            yield block, {key: t.chunk(len(self.blocks))[i] for key, t in self.cache.items()}

    def finite(self) -> list[bool]:
        """Whether each block's cache is; waits for the device."""
        sums = torch.stack([t.flatten(1).sum(1, dtype=torch.float32) for t in self.cache.values()]).sum(0)
        return [bool(part.isfinite().all()) for part in sums.cpu().chunk(len(self.blocks))]


class NaturalGradient(CurvatureOptimizer):
    """Steps along ``(F + damping)^-1 grad`` with F block-diagonal over layers, one block approximation a layer.

    ``v = (F + damping)^-1 g``, then ``m = nu (momentum m + v + weight_decay theta)`` and ``theta -= lr m``. The KL clip
    nu holds the length of the step that is *taken*, past directions included::

        nu = min(1, sqrt(kl_clip / (lr² q))),    q = sum over layers of xᵀ (F + damping) x,   x = momentum m + v + ...

    ``lr² q`` is twice the quadratic model of the KL divergence between the model's predictions before and after the
    step, and bounds it from above by the damping. It costs two inner products and no product with F: as
    ``(F + damping) v = g``,

        q = momentum² mᵀ (F + damping) m + 2 momentum mᵀ g + vᵀ g,

    whose first term is nu² q of the step before. Only where F has moved since then (a refresh), and where x holds
    more than directions (coupled weight decay), q is multiplied out. With ``kl_of="direction"`` it is each new
    direction that is held to ``kl_clip``, as published: ``m = momentum m + nu v + ...``, ``q = vᵀ g``. A momentum of
    0.9 then sums ten of them.

    Curvature is that of the training loss: F is the mean over observations of the Fisher of one, so that it equals the
    generalized Gauss-Newton matrix of a loss that averages over observations.

    Args:
        model: the whole module.
        params: parameters or groups; default all. ``lr, momentum, damping, weight_decay, decoupled_decay, fallback_lr,
            kl_clip, decay, maximize`` may differ between groups (a layer takes damping, clip and the average's decay
            from its weight's). Layers of one ``kl_clip`` are clipped together.
        lr: learning rate; ``"auto"``: in each step that at which the quadratic model of the loss is least along the
            step, with the exact Fisher matrix of the batch (Martens & Grosse 2015, section 6.4): two forward passes in
            forward mode. The groups' rate, 1 at first, multiplies it, so that schedules act on it.
        momentum: decay of the sum of past directions; ``"auto"``: in each step the best one by the same model, for its
            rate. The parameters without curvature have 0.9 then.
        damping: lambda; ``"auto"``: adapted to how well the quadratic model foretells what steps change in the loss of
            their batch (Martens & Grosse 2015, section 6.5; see ``curvature.damping``), which takes another forward
            pass in the first steps, up to five, and in every fifth one. It starts at 1 in units of each layer's mean
            eigenvalue, and else at the mean of these over layers; the groups' damping, 1 at first, multiplies it.
            Inverses are made anew where it has changed by half since. Where lr or momentum is ``"auto"``, F in the
            model is the batch's, which says nothing of the blocks: there, the rate that is best for a direction alone,
            1 were they exact, counts like the ratio if it is lower. The loss is the likelihood's, of the targets: give
            them to ``backward``. Gradients that were clipped make the model expect too little.
        kl_clip: kappa; None: off. Where lr or momentum is ``"auto"``, F in what it bounds is the batch's.
        kl_of: what kappa bounds: the ``"step"``, by the quadratic model; its new ``"direction"`` alone; or the step as
            ``"measured"``: another forward pass of what the model saw gives its true KL divergence d, fallback and all,
            and where ``2 d > kl_clip`` the step is shortened by the root of their ratio. The model's F is an average
            over steps without the terms between layers, and can be wrong by a factor of ten; this costs a third of a
            step.
        kl_unit: kappa is of a whole ``"observation"``, as published; of each ``"variable"`` that it predicts
            (``Likelihood.variables``: one for a softmax, as many as there are pixels for an image); or of the
            ``"root"`` of their number. Pixels of an image depend on each other: of the three, it is the root with
            which one value serves labels, texts and images.
        kl_warmup: the radius ``sqrt(kl_clip)`` grows over so many steps, the k-th one having k / kl_warmup of it: the
            curvature of a first batch is not to be trusted any farther.
        damping_unit: lambda is ``"absolute"``, or in units of the mean eigenvalue of each ``"layer"``.
        fisher: targets are ``"sampled"`` from the model's predictions (one more backward pass to the layers' outputs),
            those of the data (``"empirical"``), or all of them, weighed (``"exact"``: a pass an output; small nets).
        batch_fraction: share of the batch that statistics are taken on.
        decay: weight of the past in the averages; smaller at first: ``min(1 - 1/k, decay)`` at the k-th update.
        update_every: steps between updates of the factors (T_cov).
        early_updates: update and invert more often at first: after 1, 3, 7, 15, ... steps, up to the intervals.
        refresh_every: steps between inversions (T_inv).
        weight_decay: L2 coefficient, added to the preconditioned gradient.
        fallback_lr: Adam's step for the parameters without curvature, at the initial ``lr``; schedules of lr scale it.
        skip: regular expression: layers whose name contains a match are left to the fallback.
        options: of the blocks.
        likelihood: of the model's outputs; needed unless ``fisher="empirical"``.
        seed: of the sampled targets.
        loss_reduction: how the loss sums over examples; matters for ``fisher="empirical"`` only.
        decoupled_decay: decay weights as AdamW does, ``theta *= 1 - lr weight_decay``, apart from the direction and its
            momentum.
        flags: torch's; see CurvatureOptimizer.

    Raises:
        ValueError: for a hyper-parameter out of its range.
    """

    _bound = CurvatureOptimizer._bound | {"_stacks", "_generator", "_inputs", "_shown"}

    kl_clip = OfGroups()
    decay = OfGroups()

    def __init__(
        self,
        model: nn.Module,
        params: Params | None,
        *,
        lr: Auto,
        momentum: Auto,
        damping: Auto,
        damping_unit: Literal["absolute", "layer"],
        kl_clip: float | None,
        kl_of: KLOf,
        kl_unit: KLUnit,
        kl_warmup: int,
        early_updates: bool,
        fisher: Fisher,
        batch_fraction: float,
        decay: float,
        update_every: int,
        refresh_every: int,
        weight_decay: float,
        fallback_lr: float,
        skip: str | None,
        options: Options,
        likelihood: Likelihood | None,
        seed: int,
        loss_reduction: Literal["mean", "sum"],
        decoupled_decay: bool,
        flags: dict[str, Any],
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("damping", damping)):
            if isinstance(value, str) and value != "auto":
                raise ValueError(f"{name} must be a number or 'auto', got {value!r}")
        self.auto_lr, self.auto_momentum = lr == "auto", momentum == "auto"
        self.auto_damping = damping == "auto"
        lr, momentum = 1.0 if lr == "auto" else lr, 0.9 if momentum == "auto" else momentum
        damping = 1.0 if damping == "auto" else damping
        check_range("lr", lr, 0)
        check_range("momentum", momentum, 0, 1, open_high=True)
        check_range("damping", damping, 0, open_low=True)
        if kl_clip is not None:
            check_range("kl_clip", kl_clip, 0, open_low=True)
        check_choice("damping_unit", damping_unit, ("absolute", "layer"))
        check_choice("kl_of", kl_of, ("step", "direction", "measured"))
        asking = {
            "kl_of='measured'": kl_of == "measured",
            "lr or momentum 'auto'": self._is_auto,
            "damping='auto'": self.auto_damping,
        }
        for name, asked in asking.items():
            if asked and likelihood is None:
                raise ValueError(f"likelihood must be given for {name}, such as Categorical()")
        if self._is_auto and kl_of == "direction":
            raise ValueError("kl_of must be 'step' or 'measured' where lr or momentum is 'auto'")
        check_choice("kl_unit", kl_unit, tuple(KL_POWERS))
        check_range("kl_warmup", kl_warmup, 0)
        check_choice("fisher", fisher, ("sampled", "empirical", "exact"))
        if likelihood is None and fisher != "empirical":
            raise ValueError(f"likelihood must be given for fisher={fisher!r}, such as Categorical()")
        check_range("batch_fraction", batch_fraction, 0, 1, open_low=True)
        check_range("decay", decay, 0, 1, open_high=True)
        check_range("refresh_every", refresh_every, 1)
        check_range("weight_decay", weight_decay, 0)
        check_range("fallback_lr", fallback_lr, 0)
        if skip is not None:
            try:
                re.compile(skip)
            except re.error as error:
                raise ValueError(f"skip must be a regular expression, got {skip!r} ({error})") from error
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "weight_decay": weight_decay,
            "fallback_lr": fallback_lr,
            "kl_clip": kl_clip,
            "decay": decay,
            "decoupled_decay": decoupled_decay,
        }
        super().__init__(model, params, defaults, update_every=update_every, loss_reduction=loss_reduction, flags=flags)
        self.fisher, self.batch_fraction = fisher, batch_fraction
        self.refresh_every, self.likelihood, self.seed = refresh_every, likelihood, seed
        self.damping_unit, self.kl_of, self.kl_unit, self.kl_warmup = damping_unit, kl_of, kl_unit, kl_warmup
        self.early_updates = early_updates
        self.options = options
        self.updates = 0  # of the factors
        self.refreshes = 0  # of the inverses
        self._refreshed_at = self._rebased_at = LONG_AGO
        self._inverted_at = LONG_AGO  # when the inverses in use were last others than in the step before
        self._adapted = AdaptiveDamping(1.0 if damping_unit == "layer" else None) if self.auto_damping else None
        self._block_updates: dict[str, int] = {}
        self._counts = Counts()
        self._variables = 0  # that an observation holds; 0 until outputs were seen
        self._stacks: list[Stack] = []
        self._directions: dict[Tensor, Tensor] = {}
        self._kl_scales: dict[float, Tensor] = {}  # nu by kl_clip
        self._shown: list[tuple[Tensor, Tensor | None, Tensor]] = []  # outputs, targets, weights of calls
        self._losses: list[Tensor] = []  # of each of these calls, where damping is "auto"
        self._stated: list[Tensor] = []  # and what it was called with for a loss
        self._masks: list[Tensor | None] = []
        self._length: Tensor | None = None  # dᵀ (F + damping) d of this step d, where lr or momentum is "auto"
        self._trust: Tensor | None = None  # the rate that is best for the direction alone there
        self._coefficients: Tensor | None = None  # of direction and past in this step, where one is "auto"
        self._measured: Tensor | None = None  # what the last step was shortened by
        self._squares: list[Tensor] = []  # mᵀ (F + damping) m of each group's layers, as of the last step
        self._generator: torch.Generator | None = None
        self._said: set[str] = set()  # warnings that were given
        self.skip = skip
        self._attach()
        self.blocks: dict[str, Block]  # type: ignore[assignment]

    def _attach(self) -> None:
        super()._attach()
        self._shown, self._losses, self._stated, self._masks = [], [], [], []
        self._inputs: RootInputs | None = None
        if self._always_looks or self.auto_damping:
            assert self.model is not None
            self._inputs = RootInputs(self.model, lambda: not self._unobserved and self._looks())
        self._watch(self._block, skip=self.skip, deferred=self.fisher != "empirical", fraction=self.batch_fraction)

    @property
    def _is_auto(self) -> bool:
        return self.auto_lr or self.auto_momentum

    @property
    def _always_looks(self) -> bool:
        """Whether each step asks the model again."""
        return self.kl_of == "measured" or self._is_auto

    @property
    def needs_targets(self) -> bool:
        """Whether ``backward`` must be told the targets of a loss that does not state them itself."""
        return self.auto_damping

    def _judges(self) -> bool:
        """Whether this step tells something about lambda."""
        return self._adapted is not None and self._adapted.due(self.steps)

    def _looks(self) -> bool:
        return self._always_looks or self._judges()

    def _complete(self, group: dict[str, Any]) -> None:
        super()._complete(group)
        group.setdefault("fallback_ratio", float(group["fallback_lr"]) / float(group["lr"]) if group["lr"] else 0.0)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group.get("kl_clip") is not None:
            check_range("kl_clip", group["kl_clip"], 0, open_low=True)
        check_range("decay", group.get("decay", 0), 0, 1, open_high=True)
        if self._is_auto and group.get("weight_decay") and not group.get("decoupled_decay"):
            raise ValueError("decoupled_decay must be true for weight_decay where lr or momentum is 'auto'")
        if self._is_auto and self.auto_damping and any(g["kl_clip"] != group["kl_clip"] for g in self.param_groups):
            raise ValueError("kl_clip must be the same in all groups where damping and lr or momentum are 'auto'")

    @abstractmethod
    def affine_block(self, layer: AffineLayer) -> Approximation:
        """The block of an affine layer."""

    def _block(self, layer: Layer) -> Approximation:
        return self.affine_block(layer) if isinstance(layer, AffineLayer) else ExactDiagonal(layer, self.options)

    # -- statistics ----------------------------------------------------------------------------------------------------

    def renew(self) -> None:
        """See CurvatureOptimizer."""
        super().renew()
        self._refreshed_at = LONG_AGO

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
        """See CurvatureOptimizer. ``outputs`` are needed on the steps that sample targets, so always give them.

        Curvature is that of ``likelihood.nll(outputs, targets)``. Where targets are not given, those that the loss was
        computed from are found in its graph, if it is ``F.cross_entropy``.

        Raises:
            TypeError: outputs are not one tensor.
            ValueError: outputs are missing or a single number, or mask or targets do not fit them.
        """
        if self.likelihood is not None and outputs is not None:
            self._variables = self.likelihood.variables(check_outputs(outputs))
        recorder = self._recorder
        if recorder is not None and recorder.waiting:
            if outputs is None:
                raise ValueError(f"outputs must be given to backward(loss, outputs) for fisher={self.fisher!r}")
            assert self.likelihood is not None
            if check_outputs(outputs).requires_grad is False:
                raise ValueError("outputs must be what the model returned, with its graph: they were detached")
            self._scale = float(scale)
            try:
                with record_function(CURVATURE):
                    self._compare_losses(loss, outputs)
                    told = targets_of(self.likelihood, loss, outputs) if targets is None else targets
                    seen = recorder.settle(self.likelihood.observations(outputs, told), retain_graph)
                    weights = recorder.arrange(self._weights(loss, outputs, told, mask, told is not None))
                    gradients = self._output_gradients(seen, weights, recorder.choose(len(seen)), scale)
                    recorder.differentiate(seen, gradients)
            finally:
                self._scale = 1.0
        if self._inputs is not None and self._inputs.calls and outputs is not None:
            assert self.likelihood is not None
            told = targets_of(self.likelihood, loss, check_outputs(outputs)) if targets is None else targets
            weights = self._weights(loss, outputs, told, mask, told=True)
            self._shown.append((outputs.detach(), told, weights))
            if self._judges():
                self._note_loss(loss.detach() / float(scale), outputs.detach(), told, mask)
        super().backward(loss, outputs, targets=targets, mask=mask, scale=scale, retain_graph=retain_graph)

    def _note_loss(self, loss: Tensor, outputs: Tensor, targets: Tensor | None, mask: Tensor | None) -> None:
        """Keep what a call's loss is before the step that is to be judged by it."""
        assert self.likelihood is not None
        if targets is None and outputs.numel():
            raise ValueError(
                "targets must be given to backward(loss, outputs, targets=...) for damping='auto', which compares the "
                "likelihood's loss before and after steps: this loss does not state them."
            )
        if mask is not None:
            shape = self.likelihood.observations(outputs, targets).shape[:-1]
            mask = placed_mask(mask.to(outputs.device), shape)
        self._stated.append(loss)
        self._masks.append(mask)
        with torch.no_grad():
            self._losses.append(self._loss(len(self._losses), outputs))

    def _as_observations(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        if self.likelihood is None:
            return super()._as_observations(outputs, targets)
        return self.likelihood.observations(outputs, targets)

    def _counted(
        self, loss: Tensor, outputs: Tensor, targets: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        if mask is None and targets is not None and self.likelihood is not None:
            return self.likelihood.counted(outputs, targets)
        return super()._counted(loss, outputs, targets, mask)

    def _compare_losses(self, loss: Tensor, outputs: Tensor) -> None:
        """Say where the loss, as far as its graph tells, is another one than the likelihood's."""
        likelihood = self.likelihood
        for found in stated(loss, outputs):
            if isinstance(likelihood, Categorical) and found.kind == "cross_entropy":
                if found.weight is not None and likelihood.weight is None:
                    self._say("the loss weighs classes and the likelihood does not: use Categorical(weight=...)")
            elif isinstance(likelihood, (Gaussian, Bernoulli)) and found.kind in ("mse", "bernoulli"):
                features = likelihood.observations(outputs).shape[-1]
                if found.reduction == "mean" and likelihood.reduction != "mean" and features > 1:
                    name = type(likelihood).__name__
                    self._say(
                        f"the loss averages over {features} features and {name}() sums over them, so curvature is so "
                        f"many times too large: use {name}(reduction='mean')"
                        + (", and sigma=0.5**0.5 for F.mse_loss" if isinstance(likelihood, Gaussian) else "")
                    )

    def _say(self, sentence: str) -> None:
        """Warn of something once."""
        if sentence not in self._said:
            self._said.add(sentence)
            warnings.warn(sentence + ".", stacklevel=5)

    def _weights(
        self, loss: Tensor, outputs: Tensor, targets: Tensor | None, mask: Tensor | None, told: bool
    ) -> Tensor:
        """How much each observation weighs in the loss, ``[n, ...]``."""
        assert self.likelihood is not None
        weights = self.likelihood.weights(outputs, targets)
        if mask is not None:
            kept = weights * placed_mask(mask.to(weights.device), weights.shape)
            total = kept.sum()
            one = torch.ones_like(total)
            unit = one if self.likelihood.reduction == "sum" else weights.sum() / total.where(total > 0, one)
            return kept * unit
        if not told:
            with set_aside():
                (own,) = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
            if own is not None:
                silent = self.likelihood.observations(own).eq(0).all(-1)
                if bool(silent.any()):
                    self._say(
                        f"the loss has no gradient at {int(silent.sum())} of {silent.numel()} observations, "
                        "which count all the same: if they are padding, say so by backward(..., mask=...)"
                    )
        return weights

    def _output_gradients(
        self, outputs: Tensor, weights: Tensor, chosen: Tensor | None, scale: float
    ) -> Iterator[Tensor]:
        """What to send back: each observation's score of sampled targets, or the columns of a root of its Fisher.

        Scaled so that a mean over examples is the weighted sum over observations. Zero for who is not chosen.
        """
        assert self.likelihood is not None
        outputs = outputs.detach()
        chosen = None if chosen is None else chosen.to(outputs.device)
        seen, shares = (outputs, weights) if chosen is None else (outputs[chosen], weights[chosen])
        shown = shares.sum()
        unit = (len(seen) * shares * (weights.sum() / shown.where(shown > 0, 1))).sqrt().unsqueeze(-1) * scale

        def placed(gradient: Tensor) -> Tensor:
            if chosen is None:
                return gradient
            return torch.zeros_like(outputs, dtype=gradient.dtype).index_copy_(0, chosen, gradient)

        if self.fisher == "sampled":
            if self._generator is None:
                self._generator = torch.Generator(outputs.device).manual_seed(self.seed * 1_000_003 + self.steps)
            targets = self.likelihood.sample(
                outputs, self._generator, rank=communication.rank(), world_size=communication.world_size()
            )
            yield placed(unit * self.likelihood.score(seen, targets if chosen is None else targets[chosen]))
            return
        root = unit.unsqueeze(-1) * self.likelihood.hessian_sqrt(seen)
        positions = root.flatten(1, -3) if root.dim() > 3 else root.unsqueeze(1)  # [n, positions, features, rank]
        for position in range(positions.shape[1]):
            for column in range(positions.shape[-1]):
                gradient = torch.zeros_like(positions[..., 0])
                gradient[:, position] = positions[:, position, :, column]
                yield placed(gradient.view_as(seen))

    def _scaling(self) -> tuple[float, int]:
        gradient_scale, examples = super()._scaling()  # F is a mean over examples
        return (gradient_scale if self.fisher == "empirical" else 1.0), examples

    def _reset(self) -> None:
        super()._reset()
        self._generator = None
        for kept in (self._shown, self._losses, self._stated, self._masks):
            kept.clear()
        if self._inputs is not None:
            self._inputs.reset()

    # -- curvature -----------------------------------------------------------------------------------------------------

    def _check_passes(self) -> None:
        """Raise RuntimeError if a due step went without the backward pass of its own that it needs."""
        assert self._recorder is not None
        if self._recorder.waiting and not self._recorder.observed:
            raise RuntimeError(
                f"{type(self).__name__} with fisher={self.fisher!r} saw a forward pass but no backward of its own: "
                "call optimizer.backward(loss, outputs) in place of loss.backward()."
            )

    def _update_curvature(self) -> bool:
        self._check_passes()
        estimates = self._estimates()
        if not estimates:
            return self._saw
        self._average(estimates)
        self.updates += 1
        if self._must_refresh():
            self._rebase()
        scaling = self._scaling()
        moments = {name: m for name in estimates if (m := self.blocks[name].moments(*scaling))}
        self._average(self._exchanged(moments))
        for name in estimates:
            self._block_updates[name] = self._block_updates.get(name, 0) + 1
        return True

    def _forget(self, block: Approximation) -> None:
        if block.factors:
            self._refreshed_at = LONG_AGO
            self._block_updates.pop(block.layer.name, None)
        super()._forget(block)

    def _average(self, estimates: dict[str, Factors]) -> None:
        kinds: dict[type[Block], list[str]] = {}
        for name in estimates:
            kinds.setdefault(type(self.blocks[name]), []).append(name)
        for kind, names in kinds.items():
            blocks, new = [self.blocks[name] for name in names], [estimates[name] for name in names]
            kind.average_all(blocks, new, [self._keep(name) for name in names])

    def _keep(self, name: str) -> float:
        """Weight of the past in the k-th update: the first one replaces, the second is a mean of two, ..."""
        decay = self._group(self.blocks[name].layer)["decay"]
        return min(1 - 1 / (self._block_updates.get(name, 0) + 1), decay)

    def _refresh_due(self) -> bool:
        elapsed = self.steps - self._refreshed_at
        return elapsed >= self.refresh_every or (self.early_updates and elapsed > self._refreshed_at)

    def _must_refresh(self) -> bool:
        """Whether inverses are due, or a block with factors has none yet (its layer was thawed, say)."""
        inverted = {id(block) for stack in self._stacks for block in stack.blocks}
        return self._refresh_due() or any(b.factors and id(b) not in inverted for b in self.blocks.values())

    def _rebase(self) -> None:
        if self._rebased_at != self.steps:
            self._rebased_at = self.steps
            self._counts.repaired += sum(block.rebase() for block in self.blocks.values() if block.factors)

    def _refresh(self, blocks: list[Block]) -> list[Stack]:
        """Invert blocks side by side. One whose inverse is not finite keeps its last good one, or has none."""
        last = {id(block): part for stack in self._stacks for block, part in stack.members()}
        alike: dict[Any, list[Block]] = {}
        for block in blocks:
            alike.setdefault(_kind(block, block.factors), []).append(block)
        stacks = []
        for members in alike.values():
            damping = self._dampings(members)
            known = [last[id(block)] for block in members] if all(id(block) in last for block in members) else None
            stack = Stack.build(members, damping, self._counts, known)
            good = stack.finite()
            if all(good):
                stacks.append(stack)
                continue
            self._counts.repaired += good.count(False)
            for (block, part), usable in zip(stack.members(), good, strict=True):
                if usable or id(block) in last:
                    stacks.append(Stack([block], part if usable else last[id(block)]))
        return stacks

    def _dampings(self, blocks: list[Block]) -> Tensor:
        """Lambda of each stacked matrix of some blocks, ``[n]``."""
        first = next(iter(blocks[0].factors.values()))
        damping = [self._lambda(block.layer) for block in blocks]
        scales = first.new_tensor(damping).repeat_interleave(len(first))
        if self.damping_unit == "absolute":
            return scales
        units = torch.cat([block.mean_eigenvalue(block.factors) for block in blocks])
        return scales * units.clamp(min=torch.finfo(scales.dtype).tiny)

    def _lambda(self, layer: Layer) -> float:
        """What a layer is damped by in ``damping_unit``; one that is adapted is that of the inverses in use."""
        damping = float(self._group(layer)["damping"])
        return damping if self._adapted is None else damping * self._adapted.used

    def _take_damping(self, blocks: list[Block], refreshing: bool) -> bool:
        """Before inverses are made: whether all of them have to be, for another lambda."""

        def unit() -> float:
            return float(torch.stack([block.mean_eigenvalue(block.factors).mean() for block in blocks]).mean())

        return bool(blocks) and self._adapted is not None and self._adapted.renew(refreshing, unit)

    def _precondition(self) -> None:
        usable = [block for block in self.blocks.values() if block.factors]
        self._stacks = self._stacks if usable else []
        whole = bool(usable) and self._must_refresh()
        follow = [block for block in usable if block.inverts_on_update and self._updated_at == self.steps]
        if self._take_damping(usable, whole or bool(follow)):
            follow = usable  # bases stay as they are, and so does the schedule of refreshes
        if whole:
            with record_function(CURVATURE):
                self._rebase()
                self._stacks = self._refresh(usable)
            self._refreshed_at = self._inverted_at = self.steps
            self.refreshes += 1
        elif follow:
            self._inverted_at = self.steps
            with record_function(CURVATURE):
                renewed = {id(block) for block in follow}
                others = [stack for stack in self._stacks if id(stack.blocks[0]) not in renewed]
                # In the order of the blocks, as after loading: the KL clip's sum over stacks rounds by its order.
                order = {id(block): i for i, block in enumerate(self.blocks.values())}
                self._stacks = sorted(others + self._refresh(follow), key=lambda stack: order[id(stack.blocks[0])])
        with record_function(CURVATURE):
            self._solve()

    def _solve(self) -> None:
        """Directions ``(F + damping)^-1 g`` of all covered parameters, and the factor nu that is still to come."""
        gradients = [stacked([block.to_matrix(_grads(block)) for block in stack.blocks]) for stack in self._stacks]
        directions = self._solve_blocks(gradients)
        for stack, direction in zip(self._stacks, directions, strict=True):
            for block, part in zip(stack.blocks, direction.chunk(len(stack.blocks)), strict=True):
                for p, entry in zip(block.layer.parameters, block.from_matrix(part), strict=True):
                    if p.grad is not None:
                        self._directions[p] = entry
        if self._is_auto:
            self._plan()
        else:
            self._clip(gradients, directions)

    def _solve_blocks(self, gradients: list[Tensor]) -> list[Tensor]:
        """Each block's damped inverse times its gradient. Methods that couple layers extend this.

        Args:
            gradients: one stacked tensor ``[n, d_out, columns]`` a stack, in the order of ``_stacks``.

        Returns:
            Directions of the same shapes.
        """
        pairs = zip(self._stacks, gradients, strict=True)
        return [stack.blocks[0].solve(stack.cache, gradient) for stack, gradient in pairs]

    def _clip(self, gradients: list[Tensor], directions: list[Tensor]) -> None:
        """Set nu by ``kl_clip`` from the squared lengths of what the groups' layers are about to do."""
        if all(group["kl_clip"] is None for group in self.param_groups):
            self._kl_scales, self._squares = {}, []
            return
        whole = self.kl_of == "direction" or not self._must_multiply()
        squares = self._lengths(gradients, directions) if whole else self._squared(self._steps())
        self._kl_scales = {}
        for clip in {group["kl_clip"] for group in self.param_groups} - {None}:
            own = [rate(g) ** 2 * q for g, q in zip(self.param_groups, squares, strict=True) if g["kl_clip"] == clip]
            scale = (self._kappa(clip) / torch.stack([t.to(own[0].dtype) for t in own]).sum()).sqrt()
            self._kl_scales[clip] = torch.where(scale < 1, scale, torch.ones_like(scale))  # NaN of a negative sum: 1
        self._squares = []
        if self.kl_of != "direction" and whole:  # else what stood still has a past that x did not hold
            one = squares[0].new_ones(())
            scales = [self._kl_scales.get(group["kl_clip"], one) for group in self.param_groups]
            self._squares = [q.clamp(min=0) * nu**2 for q, nu in zip(squares, scales, strict=True)]

    def _plan(self) -> None:
        """Set rate and momentum to where the exact quadratic model is least, and nu by the length that it gives."""
        self._check_shown()
        assert self.model is not None and self._inputs is not None and self.likelihood is not None
        self._kl_scales, self._coefficients, self._length, self._trust = {}, None, None, None
        if not self._directions:
            return
        # The rate that is found is that of the whole step: what is left for schedules of the groups' to multiply.
        whole = max((rate(group) for group in self.param_groups), key=float) or 1.0 if self.auto_lr else 1.0
        rates = {p: rate(group) / whole for group in self.param_groups for p in group["params"]}
        past = {p: self._momentum_of(p) * (rates[p] * self._own_momentum(p)) for p in self._directions}
        pair = [{p: v * rates[p] for p, v in self._directions.items()}, past]
        if self._judges() and any(group["weight_decay"] for group in self.param_groups):
            decays = {p: group["weight_decay"] for group in self.param_groups for p in group["params"]}
            pair.append({p: p.detach() * (rates[p] * decays[p]) for p in self._directions})
        matrix = fisher_products(self.model, self._inputs, self._shown, self.likelihood, pair)
        stacks = [self._stacked(_reader(own)) for own in pair]
        dampings = [self._dampings(stack.blocks) for stack in self._stacks]
        for i, left in enumerate(stacks):
            for j, right in enumerate(stacks):
                shares = [(shift * inner(a, b)).sum() for shift, a, b in zip(dampings, left, right, strict=True)]
                matrix[i, j] += torch.stack(shares).sum().double()
        grads = {p: p.grad for p in self._directions if p.grad is not None}
        slopes = [torch.stack([(g * own[p]).sum().double() for p, g in grads.items()]).sum() for own in pair[:2]]
        free = [float("nan") if auto else 1.0 for auto in (self.auto_lr, self.auto_momentum)]
        fixed = torch.tensor(free, dtype=torch.float64).to(matrix.device)
        found = minimizer(matrix[:2, :2], torch.stack(slopes), fixed)
        if self._judges():
            shares = [(g * pair[0][p]).sum().double() * rates[p] for p, g in grads.items()]
            self._trust = torch.stack(shares).sum() / matrix[0, 0]
        self._coefficients = found
        for p in self._directions:
            self._directions[p] = self._directions[p] * found[0].to(self._directions[p].dtype)
        matrix = matrix * whole**2
        length = found @ matrix[:2, :2] @ found
        taken = torch.ones_like(matrix[0])
        taken[:2] = found
        for clip in {group["kl_clip"] for group in self.param_groups} - {None}:
            scale = (self._kappa(clip) / length).sqrt()
            self._kl_scales[clip] = torch.where(scale < 1, scale, torch.ones_like(scale)).float()
            taken[:2] = found * self._kl_scales[clip]
        self._length = taken @ matrix @ taken

    def _own_momentum(self, p: Tensor) -> float:
        """What multiplies a parameter's past beside the coefficient that is found for it."""
        group = self._group_of(p)
        return 1.0 if self.auto_momentum or group is None else float(group["momentum"])

    def _kappa(self, kl_clip: float) -> float:
        """What bounds twice the KL divergence of an observation in this step, units and warm-up included."""
        share = min(1.0, (self.steps + 1) / self.kl_warmup) if self.kl_warmup else 1.0
        power = KL_POWERS[self.kl_unit]
        if power and not self._variables and getattr(self.likelihood, "independent", False):
            self._say("kl_clip is of whole observations until outputs are given: call backward(loss, outputs)")
        return kl_clip * share**2 * max(self._variables, 1) ** power

    def _lengths(self, gradients: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
        """``xᵀ (F + damping) x`` of each group's layers, which move as a whole, x being what ``kl_of`` says: no lr."""
        products = self._by_group([inner(v, g) for v, g in zip(directions, gradients, strict=True)])
        if self.kl_of == "direction":
            return products
        momenta = self._stacked(self._momentum_of)
        if self._has_moved() or len(self._squares) != len(products):
            self._squares = self._squared(momenta)
        crossed = self._by_group([inner(m, g) for m, g in zip(momenta, gradients, strict=True)])
        betas = [group["momentum"] for group in self.param_groups]
        return [
            beta**2 * past + 2 * beta * both + new
            for beta, past, both, new in zip(betas, self._squares, crossed, products, strict=True)
        ]

    def _must_multiply(self) -> bool:
        """Whether layers move by more or less than directions of theirs: coupled decay; frozen or grouped in part."""
        if any(group["weight_decay"] and not group["decoupled_decay"] for group in self.param_groups):
            return True
        for layer in (block.layer for stack in self._stacks for block in stack.blocks):
            own = self._group(layer)
            for p in layer.parameters:
                group = self._group_of(p) or own
                if p.grad is None or (group is not own and _pace(group) != _pace(own)):
                    return True
        return False

    def _has_moved(self) -> bool:
        """Whether the inverses in use are of another F, or lambda, than those of the last step."""
        return self._inverted_at == self.steps

    def _stacked(self, entry: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Something that each parameter has, in the shape of the stacks' gradients."""
        return [
            stacked([block.to_matrix([entry(p) for p in block.layer.parameters]) for block in stack.blocks])
            for stack in self._stacks
        ]

    def _momentum_of(self, p: Tensor) -> Tensor:
        return self.state[p]["momentum_buffer"] if "momentum_buffer" in self.state[p] else torch.zeros_like(p)

    def _relative_rates(self) -> dict[Tensor, float | Tensor]:
        """By parameter its rate over that of its layer; a layer's rate of zero counts as one."""
        found: dict[Tensor, float | Tensor] = {}
        for layer in (block.layer for stack in self._stacks for block in stack.blocks):
            own = self._group(layer)
            for p in layer.parameters:
                group = self._group_of(p) or own
                found[p] = 1.0 if group is own or own["lr"] == 0 else rate(group) / rate(own)
        return found

    def _steps(self) -> list[Tensor]:
        """What layers would move by, in units of their rates, were there no clip."""
        paces = self._relative_rates()
        return self._stacked(lambda p: self._step_of(p) * paces[p])

    def _step_of(self, p: Tensor) -> Tensor:
        """What a covered parameter would move by, without lr, were there no clip."""
        group = self._group_of(p)
        if p.grad is None or group is None:
            return torch.zeros_like(p)
        step = self._momentum_of(p) * group["momentum"] + self._directions[p]
        if group["weight_decay"] and not group["decoupled_decay"]:
            step.add_(p, alpha=group["weight_decay"])
        return step

    def _squared(self, tensors: list[Tensor]) -> list[Tensor]:
        """``xᵀ (F + damping) x`` of each group's layers, for x in the shape of the stacks' gradients."""
        found = []
        for stack, x in zip(self._stacks, tensors, strict=True):
            factors, damping = stack.factors(), self._dampings(stack.blocks)
            found.append(stack.blocks[0].squared(factors, stack.cache, damping, x))
        return self._by_group(found)

    def _by_group(self, numbers: list[Tensor]) -> list[Tensor]:
        """Sums over each group's layers of numbers ``[n]`` a stack."""
        first = numbers[0] if numbers else self.param_groups[0]["params"][0].detach()
        sums = [first.new_zeros(()) for _ in self.param_groups]
        places = {id(group): index for index, group in enumerate(self.param_groups)}
        for stack, values in zip(self._stacks, numbers, strict=True):
            own = [places[id(self._group(block.layer))] for block in stack.blocks]
            parts = [values] if len(set(own)) == 1 else values.chunk(len(own))
            for index, part in zip(own, parts, strict=False):
                sums[index] = sums[index] + part.sum()
        return sums

    def _scale_of(self) -> dict[Tensor, Tensor]:
        """By parameter the factor nu, if there is a clip: that of its layer's weight's ``kl_clip``."""
        if not self._kl_scales:
            return {}
        found: dict[Tensor, Tensor] = {}
        for stack in self._stacks:
            for block in stack.blocks:
                if (clip := self._group(block.layer)["kl_clip"]) in self._kl_scales:
                    found.update(dict.fromkeys(block.layer.parameters, self._kl_scales[clip]))
        return found

    def _update_parameters(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        lr, beta, decay = rate(group), group["momentum"], group["weight_decay"]
        bare = [(p, g) for p, g in zip(params, grads, strict=True) if p not in self._directions]
        for (p, g), denominator in zip(bare, self._fallback(bare).values(), strict=True):
            # Momentum adds directions up where Adam averages: hence 1 - momentum.
            self._directions[p] = real([g])[0] / denominator * ((1 - beta) * group["fallback_ratio"])
        unclipped = {p for p, _ in bare}
        directions = [self._directions.pop(p) for p in params]
        clipped = self._scale_of()
        one = next(iter(clipped.values()), params[0]).new_ones(())
        scales = [one if p in unclipped else clipped.get(p, one) for p in params]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        given = params
        buffers, params = real(self.state[p]["momentum_buffer"] for p in params), real(params)
        if self._coefficients is None:
            torch._foreach_mul_(buffers, beta)
        else:
            share = self._coefficients[1] * (1.0 if self.auto_momentum else beta)
            shares = [share if p not in unclipped else share.new_tensor(beta) for p in given]
            torch._foreach_mul_(buffers, [t.to(b.dtype) for t, b in zip(shares, buffers, strict=True)])
        if self.kl_of != "direction":
            torch._foreach_add_(buffers, directions)
        else:
            torch._foreach_addcmul_(buffers, directions, scales)
        if decay and group["decoupled_decay"]:
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            torch._foreach_add_(buffers, params, alpha=decay)
        if self.kl_of != "direction" and clipped:
            torch._foreach_mul_(buffers, scales)
        descend(params, buffers, lr)

    def _look_back(self) -> None:
        """Judge lambda by the step that was taken, and shorten it to the KL divergence that it is found to have.

        Both are of all ranks' examples, and of one forward pass: where steps are shortened, lambda is judged by the
        step before it is.
        """
        measures = self.kl_of == "measured" and self.kl_clip is not None
        judges = self._judges() and bool(self._stacks)
        if not (measures or judges):
            return
        self._check_shown()
        assert self._inputs is not None
        with record_function(CURVATURE):
            found: dict[str, list[Tensor]] = {}
            for index in range(len(self._shown)):
                after = self._inputs.again(index)
                if measures:
                    found.setdefault("divergence", []).append(self._divergence(index, after))
                if judges:
                    found.setdefault("after", []).append(self._loss(index, after))
            if judges:
                found["before"] = self._losses
            means = {name: torch.stack(values).mean() for name, values in found.items()}
            if communication.world_size() > 1:
                tensors = list(means.values())
                communication.average_(tensors, torch.ones(len(tensors), device=tensors[0].device))
            if judges:
                self._judge(means["before"], means["after"])
            if measures:
                self._keep_within(means["divergence"])

    def _keep_within(self, divergence: Tensor) -> None:
        """Shorten the step that was taken, if it is too long."""
        assert self.kl_clip is not None
        scale = (self._kappa(self.kl_clip) / (2 * divergence)).sqrt()
        self._measured = torch.where(scale < 1, scale, torch.ones_like(scale))
        for group in self.param_groups:
            mine = [p for p in group["params"] if p.grad is not None]
            buffers, params = real(self.state[p]["momentum_buffer"] for p in mine), real(mine)
            excess = torch._foreach_mul(buffers, self._measured - 1)
            descend(params, list(excess), rate(group))
            torch._foreach_mul_(buffers, self._measured)
        self._shorten(self._measured)

    def _judge(self, before: Tensor, after: Tensor) -> None:
        """Adapt lambda to what the step that was taken has changed in the loss, beside what was to be expected."""
        assert self._adapted is not None
        steps = self._last_steps()
        slopes = [sum_of_products(p.grad, step) for p, step in steps.items() if p.grad is not None]
        predicted = torch.stack(slopes).sum() + self._step_length(steps).to(slopes[0]) / 2
        stated = torch.stack(self._stated).sum()  # micro-batches' shares of one loss
        trust = predicted.new_tensor(float("inf")) if self._trust is None else self._trust
        tensors = (before, after, predicted, trust, stated, torch.stack(self._losses).mean())
        now, then, expected, best, given, own = torch.stack([t.double().cpu() for t in tensors]).tolist()
        given = -given if all(group["maximize"] for group in self.param_groups) else given
        if abs(given - own) > 0.02 * abs(own):
            self._say(
                f"the loss is {given:.4g} where the likelihood's is {own:.4g}, and damping='auto' compares what steps "
                "change in the likelihood's with the gradient of the loss: train on likelihood.nll(outputs, targets)"
            )
        # Outputs round each for itself, and what is summed of them in float32 or wider.
        count = sum(outputs.numel() for outputs, _, _ in self._shown)
        rounding = max(
            torch.finfo(self._shown[0][0].dtype).eps / max(count, 1) ** 0.5, torch.finfo(self._losses[0].dtype).eps
        )
        self._adapted.judge(now, then, expected, 4 * rounding, best)

    def _last_steps(self) -> dict[Tensor, Tensor]:
        """By parameter what it was moved by in this step, decay included."""
        found = {}
        for group in self.param_groups:
            lr, decay = rate(group), group["weight_decay"] if group["decoupled_decay"] else 0.0
            for p in group["params"]:
                if p.grad is None:
                    continue
                step = self.state[p]["momentum_buffer"] * -lr
                if decay and (shrunk := lr * decay) != 1:  # p is (1 - shrunk) what it was, and the step
                    step = step - (p - step) * (shrunk / (1 - shrunk))
                found[p] = step
        return found

    def _step_length(self, steps: dict[Tensor, Tensor]) -> Tensor:
        """``dᵀ (F + damping) d`` of the last step d of the layers with curvature.

        With F that of the batch where lr or momentum is ``"auto"``, else that of the inverses in use.
        """
        if self._is_auto:
            return next(iter(steps.values())).new_zeros(()) if self._length is None else self._length
        if self._knows_length():
            squares = [q * rate(g) ** 2 for g, q in zip(self.param_groups, self._squares, strict=True)]
            return torch.stack([q.reshape(()) for q in squares]).sum()
        return torch.stack(self._squared(self._stacked(_reader(steps)))).sum()

    def _knows_length(self) -> bool:
        """Whether what the clip remembers is of the whole of the last step."""
        return len(self._squares) == len(self.param_groups) and not self._decays_apart()

    def _decays_apart(self) -> bool:
        return any(group["weight_decay"] and group["decoupled_decay"] for group in self.param_groups)

    def _shorten(self, share: Tensor) -> None:
        """Bring what is remembered of the last step's length to a share of that length."""
        self._squares = [q * share**2 for q in self._squares]

    def _check_shown(self) -> None:
        """Raise RuntimeError if what the model returned is not known of each of its calls."""
        assert self._inputs is not None
        if not self._shown or len(self._shown) != len(self._inputs.calls):
            asked = "lr or momentum 'auto'" if self._is_auto else "damping='auto'"
            asked = "kl_of='measured'" if self.kl_of == "measured" else asked
            when = "in each step" if self._always_looks else "in some steps"
            raise RuntimeError(
                f"{asked} looks at what the model returns {when}, and saw {len(self._inputs.calls)} forward "
                f"passes for {len(self._shown)} backward(loss, outputs): call the model once for each of them."
            )

    def _loss(self, index: int, outputs: Tensor) -> Tensor:
        """The likelihood's loss of a call, with the outputs that it has now."""
        assert self.likelihood is not None
        targets = self._shown[index][1]
        if targets is None:  # of no examples
            return outputs.new_zeros((), dtype=torch.promote_types(outputs.dtype, torch.float32))
        return self.likelihood.masked_nll(outputs, targets, self._masks[index])

    def _divergence(self, index: int, now: Tensor) -> Tensor:
        """KL divergence of a call's predictions as they were from those that they are now."""
        assert self.likelihood is not None
        outputs, targets, weights = self._shown[index]
        before, after = (self.likelihood.observations(o, targets) for o in (outputs, now))
        wide = statistics_dtype(before)
        return (weights * self.likelihood.divergence(before.to(wide), after.to(wide))).sum()

    def close(self) -> None:
        """See CurvatureOptimizer."""
        super().close()
        if self._inputs is not None:
            self._inputs.close()

    # -- state ---------------------------------------------------------------------------------------------------------

    def _cache_bytes(self, block: Approximation) -> int:
        assert isinstance(block, Invertible)
        for stack in self._stacks:
            for member, part in stack.members():
                if member is block:  # as it is; before the first refresh, as it will be
                    kept = {t.data_ptr() for t in block.factors.values()}  # some serve in the solve as they are
                    return sum(t.numel() * t.element_size() for t in part.values() if t.data_ptr() not in kept)
        return sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in block.cache_shapes().values())

    def diagnostics(self) -> dict[str, float]:
        """Adds how often curvature was updated and inverted, what had to be repaired, and the last KL scale nu.

        Where it is ``"auto"``, also lambda (in ``damping_unit``) and the last ratio of a loss's change to the expected.
        """
        return super().diagnostics() | {
            "curvature/updates": float(self.updates),
            "curvature/refreshes": float(self.refreshes),
            "curvature/fallbacks": float(self._counts.repaired),
            "curvature/floored": float(self._counts.floored),
            "curvature/kl_scale": min((float(scale) for scale in self._kl_scales.values()), default=1.0)
            * (1.0 if self._measured is None else float(self._measured)),
        } | self._found()

    def _found(self) -> dict[str, float]:
        """Rate and momentum of the last step, as multiples of what the groups have; lambda and its last ratio."""
        adapted: dict[str, float] = {}
        if self._adapted is not None:
            known = {"damping": self._adapted.value, "reduction_ratio": self._adapted.ratio}
            adapted = {f"curvature/{name}": value for name, value in known.items() if value is not None}
        if self._coefficients is None:
            return adapted
        asked = ((self.auto_lr, "rate"), (self.auto_momentum, "momentum"))
        pairs = zip(asked, self._coefficients.tolist(), strict=True)
        return adapted | {f"curvature/{name}": value for (auto, name), value in pairs if auto}

    def _curvature(self) -> dict[str, Any]:
        """See CurvatureOptimizer; also the inverses in use, which may be older than the factors, and all counters."""
        adapted = {} if self._adapted is None else {"damping": self._adapted.state()}
        return super()._curvature() | adapted | {
            "inverses": {block.layer.name: part for stack in self._stacks for block, part in stack.members()},
            "block_updates": dict(self._block_updates),
            "kl_squares": self._kl_squares(),
            "counters": {
                "updates": self.updates,
                "refreshes": self.refreshes,
                "refreshed_at": self._refreshed_at,
                "repaired": self._counts.repaired,
                "floored": int(self._counts.floored),
                "variables": self._variables,
            },
        }

    def _kl_squares(self) -> Tensor:
        """What the clip remembers, one number a group."""
        if len(self._squares) == len(self.param_groups):
            return torch.stack(self._squares)
        return torch.full((len(self.param_groups),), -1.0)  # not known

    def _check(self, saved: dict[str, Any]) -> None:
        super()._check(saved)
        if "inverses" not in saved:
            raise ValueError(f"this state has no inverses: it was not saved by {type(self).__name__}.")

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        counters = saved["counters"]
        self.updates, self.refreshes = int(counters["updates"]), int(counters["refreshes"])
        self._refreshed_at = int(counters["refreshed_at"])
        self._variables = int(counters.get("variables", 0))
        if self._adapted is not None and "damping" in saved:
            self._adapted.restore(saved["damping"])
        self._rebased_at = self._inverted_at = LONG_AGO  # the step that it is of may come again
        self._counts = Counts(int(counters["repaired"]), int(counters["floored"]))
        self._block_updates = {name: int(count) for name, count in saved["block_updates"].items()}
        alike: dict[Any, list[tuple[Block, Factors]]] = {}
        for name, block in self.blocks.items():
            if name in saved["inverses"]:
                part = self._adopted_inverse(block, saved["inverses"][name])
                alike.setdefault((_kind(block, block.factors), _kind(block, part)), []).append((block, part))
        self._stacks = [
            Stack([b for b, _ in members], {k: stacked([part[k] for _, part in members]) for k in members[0][1]})
            for members in alike.values()
        ]
        self._directions.clear()
        weights = [block.layer.parameters[0] for block in self.blocks.values()]
        if weights and "kl_squares" in saved:
            squares = saved["kl_squares"].to(weights[0].device, statistics_dtype(weights[0]), copy=True)
            self._squares = list(squares) if bool((squares >= 0).all()) else []

    def _initial(self, p: Tensor) -> dict[str, Any]:
        """See CurvatureOptimizer."""
        return {"momentum_buffer": torch.zeros_like(p)} | self._initial_fallback(p)

    def _template(self, name: str) -> dict[str, Any]:
        """See CurvatureOptimizer."""
        template, block = super()._template(name), self.blocks[name]
        device = block.layer.parameters[0].device
        if template:
            shapes = block.cache_shapes()
            template["inverses"] = {k: torch.zeros(s, dtype=dtype, device=device) for k, (s, dtype) in shapes.items()}
            bases = {k: torch.zeros_like(t) for k, t in template["layers"].items() if k.startswith("U_")}
            template["inverses"] = bases | template["inverses"]  # which serve in the solve as they are
            template["block_updates"] = 0
        return template

    def _adopted_inverse(self, block: Block, part: Factors) -> Factors:
        """An inverse as this optimizer would have made it; diagonals (W) keep the precision of the statistics."""
        weight, narrow = block.layer.parameters[0], None
        if not isinstance(block, ExactDiagonal):
            narrow = self.options.solve_dtype
        wide = adopted({key: t for key, t in part.items() if key[0] == "W"}, weight)
        rest = adopted({key: t for key, t in part.items() if key[0] != "W"}, weight, narrow)
        return {key: wide[key] if key in wide else rest[key] for key in part}


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of stacked tensors ``[n, ...]``, in the precision of statistics."""
    dtype = statistics_dtype(left)
    left, right = left.to(dtype), right.to(dtype)
    if len(left) == 1:
        return torch.dot(left.flatten(), right.flatten()).view(1)
    return (left * right).flatten(1).sum(1)


def sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of two tensors of a shape, in the precision of statistics; of complex ones, its real part."""
    left, right = real([left, right])
    dtype = statistics_dtype(left)
    return (left.to(dtype) * right.to(dtype)).sum()


def _reader(entries: Mapping[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    """What a parameter has in some entries; zeros if it has nothing."""
    return lambda p: entries[p] if p in entries else torch.zeros_like(p)


def _pace(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the parameters of a layer have in common if it moves as a whole."""
    return group["momentum"], group["lr"]


def _kind(block: Block, tensors: Factors) -> Any:
    """What blocks must have in common to share a stack; large ones gain nothing by it and go alone."""
    alone = block.layer.name if max(size for t in tensors.values() for size in t.shape) > LARGE else ""
    return (type(block), alone, *((key, t.shape, t.dtype, t.device) for key, t in tensors.items()))


def _grads(block: Block) -> list[Tensor]:
    """Gradients of a block's parameters; zeros where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in block.layer.parameters]
