"""The engine of all Kronecker methods: when curvature is gathered, refreshed and applied. Blocks say how."""

from __future__ import annotations

import re
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from optimizers.base import (
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
from optimizers.checks import check_choice, check_range
from optimizers.curvature import communication
from optimizers.curvature.approximations import Approximation
from optimizers.curvature.kronecker import Counts, ExactDiagonal, Factors, Invertible, Options
from optimizers.curvature.layers import AffineLayer, Layer
from optimizers.curvature.losses import stated, targets_of
from optimizers.curvature.recorder import set_aside
from optimizers.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, check_outputs

#: Wider matrices than this keep a processor busy one by one.
LARGE = 512

Fisher = Literal["sampled", "empirical", "exact"]


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
    def build(cls, blocks: list[Block], damping: list[float], counts: Counts, last: list[Factors] | None) -> Stack:
        """Invert the blocks' factors.

        Args:
            blocks: of one kind and shape.
            damping: one a block.
            counts: where repairs are counted.
            last: each block's share of the last cache, if all have one.
        """
        factors = {key: stacked([block.factors[key] for block in blocks]) for key in blocks[0].factors}
        first = next(iter(factors.values()))
        groups = len(first) // len(blocks)
        before = None if last is None else {key: stacked([part[key] for part in last]) for key in last[0]}
        cache = blocks[0].invert(factors, first.new_tensor(damping).repeat_interleave(groups), counts, before)
        for key, tensor in factors.items():
            if cache.get(key) is tensor:  # what the solve uses as it is need not be kept twice
                for block, part in zip(blocks, tensor.chunk(len(blocks)), strict=True):
                    block.factors[key] = part
        return cls(blocks, cache)

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

    ``v = nu (F + damping)^-1 g``, then ``m = momentum m + v + weight_decay theta`` and ``theta -= lr m``. The KL clip
    holds the step's quadratic model of the KL divergence, without momentum, to ``kl_clip``::

        nu = min(1, sqrt(kl_clip / sum over layers of lr² vᵀ (F + damping) v)),    v = (F + damping)^-1 g

    where ``vᵀ (F + damping) v`` is just ``vᵀ g``. It bounds ``lr² vᵀ F v`` from above.

    Curvature is that of the training loss: F is the mean over observations of the Fisher of one, so that it equals the
    generalized Gauss-Newton matrix of a loss that averages over observations.

    Args:
        model: the whole module.
        params: parameters or groups; default all. ``lr, momentum, damping, weight_decay, decoupled_decay, fallback_lr,
            kl_clip, decay, maximize`` may differ between groups (a layer takes damping, clip and the average's decay
            from its weight's). Layers of one ``kl_clip`` are clipped together.
        lr: learning rate.
        momentum: decay of the sum of past directions.
        damping: lambda.
        kl_clip: kappa; None: off.
        fisher: targets are ``"sampled"`` from the model's predictions (one more backward pass to the layers' outputs),
            those of the data (``"empirical"``), or all of them, weighed (``"exact"``: a pass an output; small nets).
        batch_fraction: share of the batch that statistics are taken on.
        decay: weight of the past in the averages; smaller at first: ``min(1 - 1/k, decay)`` at the k-th update.
        update_every: steps between updates of the factors (T_cov).
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

    _bound = CurvatureOptimizer._bound | {"_stacks", "_generator"}

    kl_clip = OfGroups()
    decay = OfGroups()

    def __init__(
        self,
        model: nn.Module,
        params: Params | None,
        *,
        lr: float,
        momentum: float,
        damping: float,
        kl_clip: float | None,
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
        check_range("lr", lr, 0)
        check_range("momentum", momentum, 0, 1, open_high=True)
        check_range("damping", damping, 0, open_low=True)
        if kl_clip is not None:
            check_range("kl_clip", kl_clip, 0, open_low=True)
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
        self.options = options
        self.updates = 0  # of the factors
        self.refreshes = 0  # of the inverses
        self._refreshed_at = self._rebased_at = LONG_AGO
        self._block_updates: dict[str, int] = {}
        self._counts = Counts()
        self._stacks: list[Stack] = []
        self._directions: dict[Tensor, Tensor] = {}
        self._kl_scales: dict[float, Tensor] = {}  # nu by kl_clip
        self._generator: torch.Generator | None = None
        self._said: set[str] = set()  # warnings that were given
        self.skip = skip
        self._attach()
        self.blocks: dict[str, Block]  # type: ignore[assignment]

    def _attach(self) -> None:
        super()._attach()
        self._watch(self._block, skip=self.skip, deferred=self.fisher != "empirical", fraction=self.batch_fraction)

    def _complete(self, group: dict[str, Any]) -> None:
        super()._complete(group)
        group.setdefault("fallback_ratio", float(group["fallback_lr"]) / float(group["lr"]) if group["lr"] else 0.0)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group.get("kl_clip") is not None:
            check_range("kl_clip", group["kl_clip"], 0, open_low=True)
        check_range("decay", group.get("decay", 0), 0, 1, open_high=True)

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
        super().backward(loss, outputs, targets=targets, mask=mask, scale=scale, retain_graph=retain_graph)

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
        return self.steps - self._refreshed_at >= self.refresh_every

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
            damping = [float(self._group(block.layer)["damping"]) for block in members]
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

    def _precondition(self) -> None:
        usable = [block for block in self.blocks.values() if block.factors]
        self._stacks = self._stacks if usable else []
        if usable and self._must_refresh():
            with record_function(CURVATURE):
                self._rebase()
                self._stacks = self._refresh(usable)
            self._refreshed_at = self.steps
            self.refreshes += 1
        elif self._updated_at == self.steps and any(block.inverts_on_update for block in usable):
            with record_function(CURVATURE):
                follow = [block for block in usable if block.inverts_on_update]
                others = [stack for stack in self._stacks if not stack.blocks[0].inverts_on_update]
                # In the order of the blocks, as after loading: the KL clip's sum over stacks rounds by its order.
                order = {id(block): i for i, block in enumerate(self.blocks.values())}
                self._stacks = sorted(others + self._refresh(follow), key=lambda stack: order[id(stack.blocks[0])])
        with record_function(CURVATURE):
            self._solve()

    def _solve(self) -> None:
        """Directions ``(F + damping)^-1 g`` of all covered parameters, and the factor nu that is still to come."""
        gradients = [stacked([block.to_matrix(_grads(block)) for block in stack.blocks]) for stack in self._stacks]
        directions = self._solve_blocks(gradients)
        self._clip(gradients, directions)
        for stack, direction in zip(self._stacks, directions, strict=True):
            for block, part in zip(stack.blocks, direction.chunk(len(stack.blocks)), strict=True):
                for p, entry in zip(block.layer.parameters, block.from_matrix(part), strict=True):
                    if p.grad is not None:
                        self._directions[p] = entry

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
        """Set nu from ``lr² vᵀ g`` summed over the layers of one ``kl_clip``."""
        products: dict[float, list[Tensor]] = {}
        for stack, gradient, direction in zip(self._stacks, gradients, directions, strict=True):
            own = [self._clip_setting(block.layer) for block in stack.blocks]
            alike = all(clip == own[0][0] and (lr is own[0][1] or lr == own[0][1]) for clip, lr in own[1:])
            count = 1 if alike else len(own)
            for (clip, lr), v, g in zip(own[:count], direction.chunk(count), gradient.chunk(count), strict=True):
                if clip is not None:
                    product = torch.dot(v.flatten(), g.flatten())
                    products.setdefault(clip, []).append((lr**2 * product).to(product.dtype))
        self._kl_scales = {}
        for clip, found in products.items():
            scale = (clip / torch.stack(found).sum()).sqrt()
            self._kl_scales[clip] = torch.where(scale < 1, scale, torch.ones_like(scale))  # NaN of a negative sum: 1

    def _clip_setting(self, layer: Layer) -> tuple[float | None, float | Tensor]:
        """The clip and the learning rate of a layer's group."""
        group = self._group(layer)
        return group["kl_clip"], rate(group)

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
        buffers, params = real(self.state[p]["momentum_buffer"] for p in params), real(params)
        torch._foreach_mul_(buffers, beta)
        torch._foreach_addcmul_(buffers, directions, scales)
        if decay and group["decoupled_decay"]:
            torch._foreach_mul_(params, 1 - lr * decay)
        elif decay:
            torch._foreach_add_(buffers, params, alpha=decay)
        descend(params, buffers, lr)

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
        """Adds how often curvature was updated and inverted, what had to be repaired, and the last KL scale nu."""
        return super().diagnostics() | {
            "curvature/updates": float(self.updates),
            "curvature/refreshes": float(self.refreshes),
            "curvature/fallbacks": float(self._counts.repaired),
            "curvature/floored": float(self._counts.floored),
            "curvature/kl_scale": min((float(scale) for scale in self._kl_scales.values()), default=1.0),
        }

    def _curvature(self) -> dict[str, Any]:
        """See CurvatureOptimizer; also the inverses in use, which may be older than the factors, and all counters."""
        return super()._curvature() | {
            "inverses": {block.layer.name: part for stack in self._stacks for block, part in stack.members()},
            "block_updates": dict(self._block_updates),
            "counters": {
                "updates": self.updates,
                "refreshes": self.refreshes,
                "refreshed_at": self._refreshed_at,
                "repaired": self._counts.repaired,
                "floored": int(self._counts.floored),
            },
        }

    def _check(self, saved: dict[str, Any]) -> None:
        super()._check(saved)
        if "inverses" not in saved:
            raise ValueError(f"this state has no inverses: it was not saved by {type(self).__name__}.")

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        counters = saved["counters"]
        self.updates, self.refreshes = int(counters["updates"]), int(counters["refreshes"])
        self._refreshed_at = int(counters["refreshed_at"])
        self._rebased_at = LONG_AGO  # the step that it is of may come again
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


def _kind(block: Block, tensors: Factors) -> Any:
    """What blocks must have in common to share a stack; large ones gain nothing by it and go alone."""
    alone = block.layer.name if max(size for t in tensors.values() for size in t.shape) > LARGE else ""
    return (type(block), alone, *((key, t.shape, t.dtype, t.device) for key, t in tensors.items()))


def _grads(block: Block) -> list[Tensor]:
    """Gradients of a block's parameters; zeros where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in block.layer.parameters]
