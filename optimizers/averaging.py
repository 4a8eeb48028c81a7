"""Averages of the parameters around any optimizer: what is evaluated is not what is trained.

Training goes on its own way; ``eval()`` puts the averages into the model and ``train()`` brings the training weights
back, bit for bit. Running statistics of BatchNorm belong to the weights they were gathered with: ``recalibrate``
gathers them anew for the averages.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from .base import known_rate
from .checks import check_range
from .wrapper import Wrapper, half, innermost, wide, wrappers


def none(optimizer: Optimizer) -> Optimizer:
    """No averaging: the optimizer as it is.

    Args:
        optimizer: any.
    """
    return optimizer


def _alike(values: Sequence[Any]) -> dict[Any, list[int]]:
    """Places of equal values, by value."""
    places: dict[Any, list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault(value, []).append(place)
    return places


def _chosen(tensors: Sequence[Tensor], places: Iterable[int]) -> list[Tensor]:
    return [tensors[place] for place in places]


def _copies(tensors: Iterable[Tensor], dtypes: Iterable[torch.dtype] | None = None) -> list[Tensor]:
    if dtypes is None:
        return [t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
    return [t.detach().to(dtype, copy=True) for t, dtype in zip(tensors, dtypes, strict=True)]


class Averaging(Wrapper):
    """Base of the averages: the switch between the weights that are trained and those that are evaluated.

    In between, ``state_dict()`` holds both: saved beside the model after ``eval()``, it brings back a wrapper that is
    in evaluation too. A step then ends in a sentence.

    Args:
        optimizer: any; its steps are taken on the training weights.
        calibrate: training batches on which a trainer gathers BatchNorm's running statistics for the averages, at each
            evaluation; 0: they stay those of training.

    Raises:
        TypeError: ``optimizer`` is no optimizer.
        ValueError: for a value out of its range, or another average inside.
    """

    #: Names under which the state of a parameter is a tensor of its shape, and whether in a wide format.
    _kept: ClassVar[Mapping[str, bool]]

    def __init__(self, optimizer: Optimizer, calibrate: int) -> None:
        check_range("calibrate", calibrate, 0)
        self.calibrate = calibrate
        self._own: dict[Tensor, dict[str, Any]] = {}
        self._evaluating = False
        if isinstance(optimizer, Wrapper) and {"ema", "schedule_free"} & set(wrappers(optimizer)):
            raise ValueError("one average cannot go around another: choose one of them.")
        super().__init__(optimizer)

    @property
    def evaluating(self) -> bool:
        """Whether the parameters hold the averages."""
        return self._evaluating

    def _averages(self, params: list[Tensor]) -> list[Tensor]:
        """The averages of parameters that have a state, as these are in training."""
        raise NotImplementedError

    @torch.no_grad()
    def eval(self) -> None:
        """Put the averages into the parameters, until ``train()``. Does nothing the second time."""
        if self._evaluating:
            return
        self._follow()
        params = list(self._own)
        averages = self._averages(params)
        for p, copy in zip(params, _copies(params), strict=True):
            self._own[p]["training"] = copy
        for p, average in zip(params, averages, strict=True):  # one by one, which sharded ones know
            p.copy_(average)
        self._evaluating = True

    @torch.no_grad()
    def train(self) -> None:
        """Bring the training weights back, bit for bit. Does nothing the second time."""
        if self._evaluating:
            for p, own in self._own.items():
                if "training" in own:
                    p.copy_(own.pop("training"))
        self._evaluating = False

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the parameters hold the averages."""
        before = self._evaluating
        self.eval()
        try:
            yield
        finally:
            if not before:
                self.train()

    def _check_ready(self) -> None:
        if self._evaluating:
            raise RuntimeError(
                f"the parameters hold the averages of {type(self).__name__} and a step would train these: call "
                "optimizer.train() first."
            )

    def _follow(self) -> None:
        """Bring the state where the parameters are, and to their precision, where that has changed."""
        for p, own in self._own.items():
            for key, is_wide in self._kept.items():
                dtype = wide(p) if is_wide else p.dtype
                if key in own and (own[key].dtype != dtype or own[key].device != p.device):
                    own[key] = own[key].to(p.device, dtype)

    def _entries(self) -> Mapping[Tensor, dict[str, Any]]:
        return self._own

    def _check_entries(self, entries: Mapping[Tensor, dict[str, Any]]) -> None:
        for p, own in entries.items():
            for key, value in own.items():
                if isinstance(value, Tensor) and value.dim() and value.shape != p.shape:
                    raise ValueError(
                        f"{key} of {self.entry} is {list(value.shape)} in the state and the parameter {list(p.shape)}: "
                        "the state is of another model."
                    )

    def _restore(self, entries: dict[Tensor, dict[str, Any]], settings: Mapping[str, Any]) -> None:
        kinds = dict(self._kept) | {"training": False}
        self._own = {
            p: {
                key: value.to(p.device, wide(p) if kinds[key] else p.dtype, copy=True) if key in kinds else value
                for key, value in own.items()
            }
            for p, own in entries.items()
        }
        self._evaluating = any("training" in own for own in self._own.values())


class EMA(Averaging):
    """An exponential average of the parameters around any optimizer.

    It starts at the initial parameters; after each step, with t of them done, ``average += (1 - d) (θ - average)``,
    ``d = min(decay, (1 + t) / (warmup + t))``: early on it spans about a ``1 / warmup`` of the steps so far, so that
    it is of use from the start. Averages of weights in half precision are kept in float32.

    Args:
        optimizer: any.
        decay: d, share of the average that a step leaves; it spans about ``1 / (1 - decay)`` steps.
        warmup: how much shorter it spans at first; 1: not at all.
        calibrate: see Averaging.

    Raises:
        ValueError: for a value out of its range, or another average inside.
    """

    entry = "ema"
    of_pieces = True
    _kept: ClassVar[Mapping[str, bool]] = {"average": True}

    def __init__(self, optimizer: Optimizer, decay: float = 0.999, warmup: float = 10.0, calibrate: int = 20) -> None:
        check_range("decay", decay, 0, 1, open_high=True)
        check_range("warmup", warmup, 1)
        self.decay, self.warmup = decay, warmup
        super().__init__(optimizer, calibrate)

    def _begin(self, params: list[Tensor]) -> None:
        new = [p for p in params if p not in self._own]
        for p, average in zip(new, _copies(new, map(wide, new)), strict=True):
            self._own[p] = {"average": average, "step": 0}

    def _advance(self) -> None:
        self._begin([p for group in self.param_groups for p in group["params"] if p.requires_grad])
        self._follow()
        self.inner.step()
        params = list(self._own)
        for step, places in _alike([self._own[p]["step"] for p in params]).items():
            t = step + 1
            some = _chosen(params, places)
            averages = [self._own[p]["average"] for p in some]
            weight = 1 - min(self.decay, (1 + t) / (self.warmup + t))
            torch._foreach_lerp_(averages, [p.to(a.dtype) for p, a in zip(some, averages, strict=True)], weight)
            for p in some:
                self._own[p]["step"] = t

    def _averages(self, params: list[Tensor]) -> list[Tensor]:
        return [self._own[p]["average"] for p in params]


class ScheduleFree(Averaging):
    """Schedule-free training around any optimizer: an average in place of a falling rate, its length not known before.

    Three sequences, equal at first. Gradients are taken at ``y = (1 - β) z + β x``; the optimizer steps on z; and x,
    which is evaluated, is the average of z with weights ``w_t = t^r lr_t^2``::

        z_t = z_{t-1} + step(gradient at y_{t-1})
        x_t = (1 - c) x_{t-1} + c z_t,    c = w_t / (w_1 + ... + w_t)

    The parameters hold y in training, and beside them only z is kept (of weights in half precision also y in float32);
    x is worked out from both when it is asked for. ``lr_t`` is each parameter group's rate, whatever a scheduler makes
    of it; the method is meant for one that stays, after a warm-up.

    In the paper y takes the place of momentum, and its optimizers have none: any will do here, but set the optimizer's
    own ``momentum`` (or the first of its ``betas``) to 0; a warning says so otherwise. Weight decay acts on z, and so
    does what a method works out in its step from the parameters' values.

    Source: Defazio et al., "The Road Less Scheduled", NeurIPS 2024 (arXiv 2405.15682), Algorithm 1.

    Args:
        optimizer: any.
        beta: β, the share of the average in the point where gradients are taken.
        r: power of t in the weights.
        lr_power: power of the rate in the weights.
        warmup: steps in which the rate rises linearly to the group's.
        calibrate: see Averaging.

    Raises:
        ValueError: for a value out of its range, or another average inside.
    """

    entry = "schedule_free"
    _kept: ClassVar[Mapping[str, bool]] = {"z": False, "y": True}

    def __init__(
        self,
        optimizer: Optimizer,
        beta: float = 0.9,
        r: float = 0.0,
        lr_power: float = 2.0,
        warmup: int = 0,
        calibrate: int = 20,
    ) -> None:
        check_range("beta", beta, 0, 1, open_low=True)  # at 0, y has no trace of x
        check_range("r", r, 0)
        check_range("lr_power", lr_power, 0)
        check_range("warmup", warmup, 0)
        self.beta, self.r, self.lr_power, self.warmup = beta, r, lr_power, warmup
        super().__init__(optimizer, calibrate)
        if name := _momentum(optimizer):
            warnings.warn(
                f"ScheduleFree takes the place of momentum, and {type(innermost(optimizer)).__name__} has its own: set "
                f"{name} to 0.",
                stacklevel=2,
            )

    def _begin(self, params: list[Tensor]) -> None:
        for p in params:
            if p not in self._own:
                self._own[p] = {"z": _copies([p])[0], "step": 0, "weight": 0.0}
                if half(p):
                    self._own[p]["y"] = p.detach().to(wide(p), copy=True)

    def _advance(self) -> None:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._begin(params)
        self._follow()
        for p in params:
            if half(p) != ("y" in self._own[p]):  # its precision was changed
                self._own[p].pop("y", None)
                self._own[p] |= {"y": p.detach().to(wide(p), copy=True)} if half(p) else {}
        if not params:
            self.inner.step()
            return
        zs = [self._own[p]["z"] for p in params]
        before = _copies(params)
        torch._foreach_copy_(params, zs)
        try:
            shares = self._step()
        except BaseException:
            torch._foreach_copy_(params, before)
            raise
        # y_t = (1 - c) y_{t-1} + c z_{t-1} + (1 - β (1 - c)) (z_t - z_{t-1}), without x, and right for every β.
        ys = [self._own[p].get("y", y) for p, y in zip(params, before, strict=True)]
        moved = torch._foreach_sub(params, zs)
        steps = [step.to(y.dtype) for step, y in zip(moved, ys, strict=True)]
        for share, places in _alike([shares[p] for p in params]).items():
            some = _chosen(ys, places)
            old = [z.to(y.dtype) for z, y in zip(_chosen(zs, places), some, strict=True)]
            torch._foreach_lerp_(some, old, share)
            torch._foreach_add_(some, _chosen(steps, places), alpha=1 - self.beta * (1 - share))
        torch._foreach_copy_(zs, params)
        torch._foreach_copy_(params, ys)

    def _step(self) -> dict[Tensor, float]:
        """The optimizer's step at its rate, and the share c of each parameter's z in its average."""
        rates = [group.get("lr") for group in self.param_groups]
        weights: dict[Tensor, float] = {}
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            lr = float(known_rate(group))
            for p in trained:
                t = self._own[p]["step"] + 1
                weights[p] = t**self.r * (lr * self._rise(t)) ** self.lr_power
            rise = max((self._rise(self._own[p]["step"] + 1) for p in trained), default=1.0)
            if rise < 1 and isinstance(group.get("lr"), (int, float, Tensor)):
                group["lr"] = group["lr"] * rise
        try:
            self.inner.step()
        finally:
            for group, own_rate in zip(self.param_groups, rates, strict=True):
                if own_rate is not None:
                    group["lr"] = own_rate
        for p, weight in weights.items():
            own = self._own[p]
            own["step"], own["weight"] = own["step"] + 1, own["weight"] + weight
        return {p: weight / (self._own[p]["weight"] or 1.0) for p, weight in weights.items()}

    def _rise(self, step: int) -> float:
        return min(1.0, step / self.warmup) if self.warmup else 1.0

    def _averages(self, params: list[Tensor]) -> list[Tensor]:
        averages = []
        for p in params:
            own = self._own[p]
            y = own.get("y", p)
            averages.append(torch.lerp(y, own["z"].to(y.dtype), 1 - 1 / self.beta))
        return averages


def _momentum(optimizer: Optimizer) -> str | None:
    """The hyper-parameter by which an optimizer has momentum, if it has."""
    for group in optimizer.param_groups:
        if group.get("momentum"):
            return "momentum"
        betas = group.get("betas")
        if betas and betas[0]:
            return "betas[0]"
    return None


@torch.no_grad()
def recalibrate(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any] | None = None
) -> list[_BatchNorm]:
    """Gather the running statistics of BatchNorm layers anew, for weights that changed: plain means over the batches.

    Everything else is in evaluation mode meanwhile, dropout too, and modes are then what they were. Layers without
    running statistics, and those in evaluation mode while the model is in training, are left alone. The loss of what
    was there before is for the caller to prevent.

    Args:
        model: in either mode; a model without such layers is not called.
        batches: of training; as many as are to count.
        forward: passes a batch through the model; None: the model itself.

    Returns:
        The layers.
    """
    layers = batch_norms(model)
    if not layers:
        return []
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    model.eval()
    try:
        for layer in layers:
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean
        for batch in batches:
            (forward or model)(batch)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes:
            module.training = mode
    return layers


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The layers whose running statistics ``recalibrate`` gathers."""
    found = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    return [m for m in found if m.training or not model.training]
