"""What every curvature-aware optimizer shares: the ``backward`` verb, what a step does, the fallback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from ..curvature import communication
from ..curvature.losses import stated
from .announced import AnnouncedLosses
from .groups import Params
from .layers import CURVATURE
from .model import placed_mask
from .update import real


class CurvatureOptimizer(AnnouncedLosses):
    """Base of the optimizers that take more from the backward pass than the gradient.

    Training differs from any other optimizer in one line::

        optimizer.zero_grad()
        outputs = model(inputs)
        loss = criterion(outputs, targets)
        optimizer.backward(loss, outputs)      # in place of loss.backward()
        optimizer.step()

    Where another's loop calls ``loss.backward()``, ``before_backward`` or ``follow_model`` make it do the same.
    Several ``backward`` calls on ``loss / k`` before one ``step`` are gradient accumulation: k micro-batches equal one
    batch. Hyper-parameters that may differ between parameters live in ``param_groups``; curvature is kept under layer
    *names* in ``state_dict()["curvature"]``, so a checkpoint of a wrapped model loads into a bare one and back.

    Args:
        model: the whole module (or None where the method needs parameters only). Wrappers are looked through.
        params: parameters or groups to train; default all of the model's.
        defaults: hyper-parameters of a group.
        update_every: curvature is gathered every so many steps, starting with the first. Where no gradient has come
            through a layer yet (behind a weight that starts at zero, say), once more after 1, 3, 7, 15, ... steps, up
            to that interval.
        loss_reduction: how the loss sums over examples; the gradient of the per-example loss is worked out from it.
        flags: what torch's optimizers take besides: ``maximize`` (climb the loss; may differ between groups), and those
            in ``UNUSED_FLAGS``, at the values that ask for nothing.

    Raises:
        ValueError: for a hyper-parameter out of its range, a flag that asks for what there is not, or a group with a
            value of its own for what is the whole optimizer's.
        TypeError: for an argument that is none.
    """

    #: Whether gradients must be differentiable (no torch.compile, no fused attention on due steps).
    needs_graph: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module | None,
        params: Params | None,
        defaults: dict[str, Any],
        *,
        update_every: int = 1,
        loss_reduction: Literal["mean", "sum"] = "mean",
        flags: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            model, params, defaults, update_every=update_every, loss_reduction=loss_reduction, flags=flags or {}
        )

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
        """Leave ``.grad`` as ``loss.backward()`` would, and gather curvature where this step is due.

        Args:
            loss: scalar; in accumulation, the micro-batch's loss divided by the number of micro-batches.
            outputs: the model's outputs, ``[batch, ...]``; needed by methods that sample targets, and for all the
                surest way to tell which examples there are.
            targets: of the loss, in the shape that the likelihood takes; they say what counts (padding does not).
                ``F.cross_entropy`` says so itself.
            mask: which observations count, bool, of the outputs' leading shape or of its first dimensions.
            scale: a factor inside ``loss`` that curvature must not see (``GradScaler.get_scale()``).
            retain_graph: another backward pass will go through the same graph; together they are one.

        Raises:
            ValueError: mask or targets do not fit the outputs.
        """
        self._drop_skipped()
        self._begin_pass(loss, outputs, targets, mask, float(scale), retain_graph)
        self._scale = float(scale)
        try:
            loss.backward(retain_graph=retain_graph)
        finally:
            self._scale = 1.0
        self._remember(float(scale))

    def _begin_pass(
        self, loss: Tensor, outputs: Any, targets: Tensor | None, mask: Tensor | None, scale: float, retain_graph: bool
    ) -> None:
        """See AnnouncedLosses."""
        if self._recorder is not None and self._recorder.recording:
            self._announce(loss, outputs, targets, mask, retain_graph)
        elif self._recorder is not None and not self._recorder.deferred and outputs is not None and self._due():
            self._place(0)

    def _announce(
        self, loss: Tensor, outputs: Any, targets: Tensor | None, mask: Tensor | None, retain_graph: bool
    ) -> None:
        """Before a backward pass that shows layers: which examples there are, and which of them count."""
        assert self._recorder is not None
        if not isinstance(outputs, Tensor) or not outputs.dim() or not outputs.requires_grad:
            self._recorder.expect(retain_graph)
            return
        self._recorder.note(outputs)
        self._place(len(self._recorder.settle(self._as_observations(outputs, targets), retain_graph)))
        counted = self._counted(loss, outputs, targets, mask)
        if counted is not None:
            arranged = self._recorder.arrange(counted)
            self._recorder.counts(arranged.view(len(arranged), -1).any(1))

    def _place(self, examples: int) -> None:
        """Find out where this rank's examples are in the batch of all ranks, if a share of these is to be chosen.

        Args:
            examples: how many this rank has; a rank without any must say so, too.
        """
        assert self._recorder is not None
        if self._recorder.fraction < 1 and communication.world_size() > 1:
            device = next(p.device for group in self.param_groups for p in group["params"])
            self._recorder.place(communication.before(examples, device))

    def _as_observations(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Outputs as ``[n, ..., features]``."""
        return outputs.unsqueeze(-1) if outputs.dim() == 1 else outputs

    def _counted(
        self, loss: Tensor, outputs: Tensor, targets: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        """Which observations count, bool ``[n, ...]``, as far as they tell it; None: all."""
        if mask is not None:
            return placed_mask(mask, self._as_observations(outputs, targets).shape[:-1])
        found = [s.targets for s in stated(loss, outputs) if s.kind == "cross_entropy" and s.targets is not None]
        return found[0] != -100 if found else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update curvature if it is due, then the parameters.

        Args:
            closure: optional; zeroes gradients, computes the loss, calls ``backward`` and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._come_alive()
        self._check_unscaled()
        if not self._idle():
            self._refuse_sparse([p.grad for g in self.param_groups for p in g["params"] if p.grad is not None])
            self._follow_model()
            with self._climbing():
                self._advance()
            if len(self.state) != self._marked:
                self._mark()
        else:
            self._reset()
        return loss

    @contextmanager
    def _climbing(self) -> Iterator[None]:
        """Within it, gradients of groups that maximize are those of the negated loss."""
        params = [p for g in self.param_groups if g["maximize"] for p in g["params"] if p.grad is not None]
        own = [p.grad for p in params]
        try:
            with torch.enable_grad():  # AdaHessian may need their graph
                for p, g in zip(params, own, strict=True):
                    p.grad = -g
            yield
        finally:
            for p, g in zip(params, own, strict=True):
                p.grad = g.detach()

    def _advance(self) -> None:
        """A step on the gradients that there are."""
        self._forget_replaced()
        if self._due():
            with record_function(CURVATURE):
                if self._update_curvature():  # what saw nothing stays due
                    self._updated_at = self.steps
                    # A weight that starts at zero lets gradients through after a step: not to wait an interval for it.
                    self._again = 2 * self.steps + 1 if self._silent or self.early_updates else None
        self._precondition()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update_parameters(group, params, [p.grad for p in params])
        self._look_back()
        self._reset()
        self.steps += 1

    def _refuse_sparse(self, grads: Sequence[Tensor]) -> None:
        if any(g.is_sparse for g in grads):
            raise RuntimeError(f"{type(self).__name__} takes no sparse gradients: use nn.Embedding(sparse=False).")

    def _update_curvature(self) -> bool:
        """Fold what this step gathered into the running averages; whether a pass was there to gather from."""
        raise NotImplementedError

    def _precondition(self) -> None:
        """Before the parameters' update: what has to be worked out over all groups together."""

    def _look_back(self) -> None:
        """After the parameters' update: what depends on where it led."""

    def _update_parameters(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Update, in place, the parameters of one group that have gradients."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and whatever curvature was gathered since the last step (an overflowed AMP step, say).

        A forward pass whose backward pass has not come yet is kept for it: some loops clear gradients between the two.
        """
        self._come_alive()
        super().zero_grad(set_to_none)
        self._skip()

    def _moments(self, params: list[Tensor], grads: list[Tensor], beta: float) -> tuple[list[Tensor], list[float]]:
        """Adam's first moments with this step's gradients in them, and their bias corrections ``1 - beta^t``.

        Those of complex parameters are views as ``real`` has them.
        """
        moments, corrections = [], []
        for p in params:
            state = self.state[p]
            if "exp_avg" not in state:
                state.update(step=0, exp_avg=torch.zeros_like(p))
            state["step"] += 1
            moments.append(state["exp_avg"])
            corrections.append(1 - beta ** state["step"])
        moments = real(moments)
        torch._foreach_lerp_(moments, real(grads), 1 - beta)
        return moments, corrections

    def _fallback(
        self, bare: list[tuple[Tensor, Tensor]], decay: float = 0.999, eps: float = 1e-8
    ) -> dict[Tensor, Tensor]:
        """Adam's denominators ``sqrt(v_hat) + eps`` of (parameter, gradient) pairs: steps of about lr.

        Complex parameters have one for either part, as ``real`` lays them out.
        """
        if not bare:
            return {}
        params, grads = [p for p, _ in bare], real(g for _, g in bare)
        for p in params:
            state = self.state[p]
            if "fallback_sq" not in state:  # what a momentum from before brings along counts as a gradient
                known = "exp_avg" in state and state["step"] > 1
                start = torch.zeros_like(p)
                if known:
                    square, past = real([start, state["exp_avg"]])
                    square.addcmul_(past, past, value=1 - decay)
                state["fallback_sq"], state["fallback_step"] = start, int(known)
        squares = real(self.state[p]["fallback_sq"] for p in params)
        torch._foreach_mul_(squares, decay)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - decay)
        corrections = []
        for p in params:
            self.state[p]["fallback_step"] += 1
            corrections.append((1 - decay ** self.state[p]["fallback_step"]) ** 0.5)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, corrections)
        torch._foreach_add_(denominators, eps)
        return dict(zip(params, denominators, strict=True))
