"""The natural gradient with a block for each layer: the options, and the four things that they choose.

When curvature is gathered and inverted is ``inverses``' to say, what it is gathered from ``fisher``'s; ``steps`` are
taken along the directions, as long as a rule (``lengths``) makes them. Rate, momentum and damping may be found by a
model of the loss and by what steps have changed in it (``regulation``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from ..base import CURVATURE, OfGroups, Params, complete
from ..checks import check_choice, check_range
from ..curvature.losses import targets_of
from ..likelihoods import Likelihood, check_outputs
from .fisher import Fisher, FisherEstimate, Once
from .kl_clip import KLClip, KLOf, KLUnit
from .lengths import LengthRule, OfRule
from .regulation import RegulatedSteps

Auto = float | Literal["auto"]


class NaturalGradient(RegulatedSteps):
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

    Four things make a step, each replaced by itself: the estimate of F (``fisher``), its inverse (``affine_block`` and
    ``_solve_blocks``), the step along it, and the rule for its length (``length_rule``, by the ``kl_...`` options).

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
        likelihood: of the model's outputs; needed unless ``fisher="empirical"``.
        seed: of the sampled targets.
        loss_reduction: how the loss sums over examples; matters for ``fisher="empirical"`` only.
        decoupled_decay: decay weights as AdamW does, ``theta *= 1 - lr weight_decay``, apart from the direction and its
            momentum.
        flags: torch's; see CurvatureOptimizer.

    Raises:
        ValueError: for a hyper-parameter out of its range.
    """

    _bound = RegulatedSteps._bound | {"_estimate"}

    #: Options that a class does not leave to the user, with their values: see ``base.with_fixed``.
    fixed: ClassVar[Mapping[str, Any]] = {}

    kl_clip = OfGroups()
    kl_of, kl_unit, kl_warmup = OfRule(), OfRule(), OfRule()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Complete the signature and the docstring of a class that declares its own options alone."""
        super().__init_subclass__(**kwargs)
        complete(cls, NaturalGradient)

    def __init__(
        self,
        model: nn.Module,
        params: Params | None = None,
        *,
        lr: Auto = 0.1,
        momentum: Auto = 0.9,
        damping: Auto = 3e-3,
        damping_unit: Literal["absolute", "layer"] = "absolute",
        kl_clip: float | None = 1e-3,
        kl_of: KLOf = "step",
        kl_unit: KLUnit = "root",
        kl_warmup: int = 0,
        fisher: Fisher = "sampled",
        batch_fraction: float = 1.0,
        decay: float = 0.95,
        update_every: int = 10,
        early_updates: bool = True,
        refresh_every: int = 10,
        weight_decay: float = 0.0,
        fallback_lr: float = 1e-3,
        skip: str | None = None,
        likelihood: Likelihood | None = None,
        seed: int = 0,
        loss_reduction: Literal["mean", "sum"] = "mean",
        decoupled_decay: bool = False,
        **flags: Any,
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
        self._say = Once()
        self.likelihood = likelihood
        self._length = self.length_rule(kl_of, kl_unit, kl_warmup)
        asking = {
            "kl_of='measured'": self._length.is_measured,
            "lr or momentum 'auto'": self._is_auto,
            "damping='auto'": self.auto_damping,
        }
        for name, asked in asking.items():
            if asked and likelihood is None:
                raise ValueError(f"likelihood must be given for {name}, such as Categorical()")
        if self._is_auto and self._length.of_direction:
            raise ValueError("kl_of must be 'step' or 'measured' where lr or momentum is 'auto'")
        check_choice("fisher", fisher, ("sampled", "empirical", "exact"))
        if likelihood is None and fisher != "empirical":
            raise ValueError(f"likelihood must be given for fisher={fisher!r}, such as Categorical()")
        check_range("batch_fraction", batch_fraction, 0, 1, open_low=True)
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
        super().__init__(
            model, params, defaults, damping_unit=damping_unit, adapts=self.auto_damping, early_updates=early_updates,
            update_every=update_every, refresh_every=refresh_every, loss_reduction=loss_reduction, flags=flags,
        )  # fmt: skip
        self.fisher, self.batch_fraction, self.skip, self.seed = fisher, batch_fraction, skip, seed
        self._attach()

    def length_rule(self, kl_of: KLOf, kl_unit: KLUnit, kl_warmup: int) -> LengthRule:
        """The rule for the length of steps: the KL clip. A class that has another one overrides this.

        Args:
            kl_of: see the class.
            kl_unit: see the class.
            kl_warmup: see the class.
        """
        return KLClip(kl_of, kl_unit, kl_warmup, getattr(self.likelihood, "independent", False), self._say)

    def _attach(self) -> None:
        super()._attach()
        self._estimate: FisherEstimate | None = None
        if self.likelihood is not None:
            self._estimate = FisherEstimate(self.likelihood, self.fisher, self.seed, self._say)
        self._watch(self._block, skip=self.skip, deferred=self.fisher != "empirical", fraction=self.batch_fraction)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group.get("kl_clip") is not None:
            check_range("kl_clip", group["kl_clip"], 0, open_low=True)
        if self._is_auto and group.get("weight_decay") and not group.get("decoupled_decay"):
            raise ValueError("decoupled_decay must be true for weight_decay where lr or momentum is 'auto'")
        if self._is_auto and self.auto_damping and any(g["kl_clip"] != group["kl_clip"] for g in self.param_groups):
            raise ValueError("kl_clip must be the same in all groups where damping and lr or momentum are 'auto'")

    # -- the estimate --------------------------------------------------------------------------------------------------

    def _begin_pass(
        self, loss: Tensor, outputs: Any, targets: Tensor | None, mask: Tensor | None, scale: float, retain_graph: bool
    ) -> None:
        """See AnnouncedLosses. ``outputs`` are needed on the steps that sample targets, so always give them.

        Curvature is that of ``likelihood.nll(outputs, targets)``. Where targets are not given, those that the loss was
        computed from are found in its graph, if it is ``F.cross_entropy``.

        Raises:
            TypeError: outputs are not one tensor.
            ValueError: outputs are missing or a single number, or mask or targets do not fit them.
        """
        if self.likelihood is not None and outputs is not None:
            self._length.variables = self.likelihood.variables(check_outputs(outputs))
        recorder = self._recorder
        if recorder is not None and recorder.waiting:
            if outputs is None:
                raise ValueError(f"outputs must be given to backward(loss, outputs) for fisher={self.fisher!r}")
            assert self.likelihood is not None and self._estimate is not None
            if check_outputs(outputs).requires_grad is False:
                raise ValueError("outputs must be what the model returned, with its graph: they were detached")
            self._scale = scale
            recorder.note(outputs)
            try:
                with record_function(CURVATURE):
                    told = targets_of(self.likelihood, loss, outputs) if targets is None else targets
                    seen = recorder.settle(self.likelihood.observations(outputs, told), retain_graph)
                    weights = recorder.arrange(self._estimate.weights(loss, outputs, told, mask, told is not None))
                    self._estimate.agreement.see(loss, outputs, targets, told, mask, scale)
                    self._place(len(seen))
                    chosen = recorder.choose(len(seen))
                    multiplier = self._estimate.multiplier(weights, chosen)
                    if (share := self._estimate.share(loss, outputs, told, scale)) is not None:  # see _scaling
                        shown = len(weights) if chosen is None else len(chosen)
                        multiplier = multiplier * (share / max(shown, 1)).to(multiplier.dtype)
                    gradients = self._estimate.gradients(seen, weights, chosen, multiplier, scale, self.steps)
                    recorder.differentiate(seen, gradients)
            finally:
                self._scale = 1.0
        elif recorder is not None and recorder.deferred and self._due():  # other ranks have something to choose from
            assert self._estimate is not None
            self._place(0)
            nothing = torch.zeros(0, device=loss.device)
            self._estimate.multiplier(nothing, recorder.choose(0))
        if self._replay is not None and self._replay.inputs.calls and outputs is not None:
            self._replay.inputs.locate(outputs, len(self._replay.shown))
            assert self.likelihood is not None and self._estimate is not None
            told = targets_of(self.likelihood, loss, check_outputs(outputs)) if targets is None else targets
            weights = self._estimate.weights(loss, outputs, told, mask, told=True)
            self._replay.shown.append((outputs.detach(), told, weights))
            if self._judges():
                self._replay.note_loss(loss.detach() / scale, outputs.detach(), told, mask)
        super()._begin_pass(loss, outputs, targets, mask, scale, retain_graph)

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

    def _scaling(self) -> tuple[float, int]:
        gradient_scale, examples = super()._scaling()  # F is a mean over examples
        if self._estimate is not None and self._estimate.shares is not None:  # or over passes by their shares
            whole = float(self._estimate.shares)
            return (examples / whole) ** 0.5 if whole > 0 else 1.0, examples
        return (gradient_scale if self.fisher == "empirical" else 1.0), examples

    def _reset(self) -> None:
        super()._reset()
        if self._estimate is not None:
            self._estimate.reset()

    def _check_passes(self) -> None:
        """Raise RuntimeError if a due step went without the backward pass of its own that it needs."""
        assert self._recorder is not None
        if self._recorder.waiting and not self._recorder.observed:
            raise RuntimeError(
                f"{type(self).__name__} with fisher={self.fisher!r} saw a forward pass but no backward of its own: "
                "call optimizer.backward(loss, outputs) in place of loss.backward(), or, where a loop calls that "
                "itself, loss = optimizer.before_backward(loss, outputs) before it."
            )
        if self._estimate is not None:
            self._estimate.agreement.conclude()
