"""Losses whose backward pass another calls: what ``backward`` takes from the graph is taken as that pass begins."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..curvature import communication
from ..curvature.recorder import Hook, aside
from .state import StatefulOptimizer

#: A factor, or who knows it when it is wanted.
Scale = float | Callable[[], float]


class AnnouncedLosses(StatefulOptimizer):
    """An optimizer that can be told of a loss before another calls its ``backward()``. Arguments as of its base."""

    _bound = StatefulOptimizer._bound | {"_following", "_largest"}

    # Of the class, for pickles of before.
    _begun = False  # whether a backward pass has come since the last step
    _told_scale = False  # whether a factor that nobody has told of was warned of
    _divided: bool | None = None  # whether gradients are divided behind backward passes; None: not known yet
    _largest: tuple[Tensor, Tensor] | None = None  # a parameter, and what the largest entry of its gradient was
    _followed: dict[str, Any] | None = None  # arguments of ``follow_model``, once it was called

    def _attach(self) -> None:
        super()._attach()
        self._following: RemovableHandle | None = None
        if self._followed is not None:
            self._follow()

    def before_backward(
        self,
        loss: Tensor,
        outputs: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        scale: Scale = 1.0,
    ) -> Tensor:
        """For loops that call ``loss.backward()`` themselves: the loss, so that it does what ``backward`` would do.

        ::

            loss = optimizer.before_backward(criterion(outputs, targets), outputs)
            accelerator.backward(loss)  # or any other that multiplies it and calls its backward() at last

        The loop may multiply the loss: by a micro-batch's share of a batch, by a scaler's factor (see ``scale``).
        Where no backward pass comes, nothing happens.

        Args:
            loss: scalar, as it was computed.
            outputs: the model's; see ``backward``, as for the next two.
            targets: of the loss.
            mask: which observations count.
            scale: the factor of the ``GradScaler`` that the loop has, or a function that says it when it is wanted,
                such as ``scaler.get_scale``.

        Returns:
            The loss to go on with: it is the one that was given, and knows what its backward pass begins with.

        Raises:
            ValueError: the loss is not a single number.
        """
        if loss.numel() != 1:
            raise ValueError(f"loss must be a single number, got the shape {list(loss.shape)}: reduce it first.")
        if not loss.requires_grad:
            return loss

        def begin(loss: Tensor, gradient: Tensor) -> None:
            factor = 1.0
            if self._due() or self._looks():
                factor = float(scale() if callable(scale) else scale)
                self._check_factor(float(gradient), factor)
            self._drop_skipped()
            self._begin_foreign_pass(loss * gradient, outputs, targets, mask, factor)
            self._scale = factor
            torch.autograd.Variable._execution_engine.queue_callback(forget)

        def forget() -> None:
            self._scale = 1.0

        return _Announced.apply(loss, begin)

    def follow_model(self, *, loss: str = "loss", outputs: str = "logits", scale: Scale = 1.0) -> None:
        """``before_backward`` for losses that the model itself returns, where a loop leaves no place to call it.

        Models of the package transformers return their loss where they are given labels. From now on, what the model
        returns of a forward pass with gradients has the announced loss in the place of its own.

        Args:
            loss: the loss's name in what the model returns, a mapping or an object.
            outputs: the outputs' name there.
            scale: see ``before_backward``.

        Raises:
            ValueError: the optimizer has no model.
        """
        if self.model is None:
            raise ValueError(f"model must be given to {type(self).__name__} for it to be followed")
        self._followed = {"loss": loss, "outputs": outputs, "scale": scale}
        self._follow()

    def _follow(self) -> None:
        if self._following is not None:
            self._following.remove()
        assert self.model is not None
        self._following = self.model.register_forward_hook(Hook(self._returned))

    def _returned(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """A forward pass of the model is over."""
        if not torch.is_grad_enabled() or self._followed is None:
            return
        names = self._followed["loss"], self._followed["outputs"]
        if isinstance(result, Mapping):
            loss, outputs = (result.get(name) for name in names)
        else:
            loss, outputs = (getattr(result, name, None) for name in names)
        if loss is None and (outputs is not None or not isinstance(result, tuple)):
            return  # no labels were given: another computes the loss, who has to tell of it
        if loss is None or outputs is None:
            raise ValueError(
                f"the model returns {type(result).__name__} without {names[0]!r} and {names[1]!r}: name them by "
                "follow_model(loss=..., outputs=...), and let the model return a mapping or an object "
                "(return_dict=True)."
            )
        loss = self.before_backward(loss, outputs, scale=self._followed["scale"])
        if isinstance(result, Mapping):
            result[names[0]] = loss  # type: ignore[index]
        else:
            setattr(result, names[0], loss)

    @abstractmethod
    def _begin_pass(
        self, loss: Tensor, outputs: Any, targets: Tensor | None, mask: Tensor | None, scale: float, retain_graph: bool
    ) -> None:
        """Before a backward pass: take from the graph what is to be taken.

        Args:
            loss: that is to be differentiated.
            outputs: see ``backward``, as for the next two.
            targets: of the loss.
            mask: which observations count.
            scale: a scaler's factor in the loss.
            retain_graph: another pass will go through this graph.
        """

    def _begin_foreign_pass(
        self, loss: Tensor, outputs: Any, targets: Tensor | None, mask: Tensor | None, scale: float
    ) -> None:
        """``_begin_pass`` within a backward pass that another has called, and that leaves the gradients."""
        self._begin_pass(loss, outputs, targets, mask, scale, False)

    def _looks(self) -> bool:
        """Whether the loss of this step is looked at for more than curvature."""
        return False

    def _check_factor(self, factor: float, scale: float) -> None:
        """Warn of what a loss was multiplied by where it can only be a scaler's factor that nobody has told of."""
        if not self._told_scale and factor > 1.5 * scale * communication.world_size():
            self._told_scale = True
            warnings.warn(
                f"the loss was multiplied by {factor:.6g} before its backward pass, and so is what is gathered of it: "
                "tell of the loop's GradScaler by scale=scaler.get_scale, in before_backward or follow_model.",
                stacklevel=2,
            )

    def _remember(self, scale: float) -> None:
        """Behind a backward pass that was told of no factor: how large a gradient is, before a scaler divides it."""
        if scale != 1.0 or self._divided is not None or not self._due():
            return
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is not None and p.grad.layout is torch.strided and p.grad.numel():
                self._largest = p, p.grad.detach().abs().max()
                return

    def _check_unscaled(self) -> None:
        """Warn, once, if gradients have been divided since by a large power of two, as scalers have them."""
        if self._largest is None:
            return
        (p, before), self._largest = self._largest, None
        factor = 0.0 if p.grad is None else float(before / p.grad.abs().max())
        if not 0 < factor < math.inf:
            return
        self._divided = factor >= 256 and math.log2(factor).is_integer()
        if self._divided:
            warnings.warn(
                f"gradients were divided by {factor:g} between backward and step, as a GradScaler does: tell of it by "
                "backward(..., scale=scaler.get_scale()), or what is gathered is of the multiplied loss.",
                stacklevel=4,
            )

    # -- steps that were not taken -------------------------------------------------------------------------------------

    def _drop_skipped(self) -> None:
        """Before a backward pass: forget what was gathered for a step that was not taken.

        A scaler skips a step whose gradients are not finite. The optimizer's ``zero_grad`` then forgets what belonged
        to them; that of a model leaves the optimizer to find out.
        """
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        looks = self._due() or self._looks()
        if self._begun and not (grads and (not looks or any(bool(g.any()) for g in grads))):
            self._skip()
        self._begun = True

    def _skip(self) -> None:
        """Forget what backward passes have left since the last step, but not a forward pass that waits for its own."""
        under_way = [] if self._recorder is None else self._recorder.under_way()
        self._reset()
        if self._recorder is not None:
            self._recorder.go_on(under_way)

    def _reset(self) -> None:
        super()._reset()
        self._begun = False

    def close(self) -> None:
        """See LayerwiseOptimizer. The model is not followed any more."""
        super().close()
        self._followed = None
        if self._following is not None:
            self._following.remove()


class _Announced(torch.autograd.Function):
    """The identity. A backward pass comes here first, while the whole graph is still there."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, begin: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.begin = begin
        ctx.save_for_backward(loss)
        return loss.clone()  # no view: some loops divide their losses in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (loss,) = ctx.saved_tensors
        if not aside():  # another optimizer's own passes are not the loop's
            with torch.enable_grad():
                ctx.begin(loss, gradient.detach())
        return gradient, None
