"""Learning rates, numbers and flags."""

from __future__ import annotations

from typing import Any
from unittest import SkipTest

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, StepLR

from ..loop import Maker, differentiate, train_step, weights
from ..problems import PROBLEMS, EmbeddingModel, conv_net, images, mlp
from .common import demand, demand_close, seeded


@seeded
def check_learning_rate_schedulers(make: Maker) -> None:
    """A scheduler that takes the rate to zero stops training; one that starts from zero starts it."""
    model, batch = mlp(), images()
    optimizer = make(model)
    scheduler = StepLR(optimizer, 1, gamma=0.0)
    train_step(optimizer, model, batch)
    scheduler.step()
    before = weights(model)
    train_step(optimizer, model, batch)
    demand(torch.equal(weights(model), before), "parameters move though the scheduler has set the rate to zero.")

    optimizer = make(model)
    warm = LambdaLR(optimizer, lambda step: min(step, 1))
    train_step(optimizer, model, batch)
    demand(torch.equal(weights(model), before), "parameters move in a warm-up's first step, at a rate of zero.")
    warm.step()
    for _ in range(3):
        train_step(optimizer, model, batch)
    demand(not torch.equal(weights(model), before), "parameters do not move after a warm-up from zero.")


@seeded
def check_tensor_learning_rate(make: Maker) -> None:
    """A learning rate that is a tensor does what the number does."""
    results = []
    for tensor in (False, True):
        torch.manual_seed(0)
        model, batch = mlp(), images()
        start = weights(model)
        optimizer = make(model)
        for group in optimizer.param_groups:
            rate = torch.tensor(float(group["lr"]))
            group["lr"] = rate if tensor else float(rate)
        for _ in range(4):
            train_step(optimizer, model, batch)
        results.append(weights(model))
    demand_close(results[1], results[0], start, 1e-4, "lr as a tensor is not lr as a number")


@seeded
def check_grad_scaler(make: Maker) -> None:
    """Under ``torch.amp.GradScaler`` on the CPU training is what it is without; an overflowed step leaves no trace."""
    results = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model, (inputs, targets) = mlp(), images()
        start = weights(model)
        optimizer = make(model)
        # A power of two, so that scaling rounds nothing; an overflow halves it.
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)

        def passes(spoilt: bool, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> None:
            optimizer.zero_grad()
            outputs = model(inputs)  # noqa: B023 - called at once
            loss = scaler.scale(F.cross_entropy(outputs, targets))  # noqa: B023
            differentiate(optimizer, loss * float("inf") if spoilt else loss, outputs, scale=scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()

        for step in range(5):
            if scaled and step == 2:
                before = weights(model)
                passes(True, optimizer, scaler)
                demand(torch.equal(weights(model), before), "a step whose gradients overflowed moves the parameters.")
            passes(False, optimizer, scaler)
        results.append(weights(model))
    demand_close(results[1], results[0], start, 1e-4, "training with a gradient scaler is not training without")


@seeded
def check_maximize(make: Maker) -> None:
    """``maximize=True`` climbs the negated loss as the default descends the loss."""
    if not make.accepts("maximize"):
        raise SkipTest("no maximize")
    results = []
    for sign in (1, -1):
        torch.manual_seed(0)
        model, (inputs, targets) = mlp(), images()
        start = weights(model)
        optimizer = make(model, maximize=sign < 0)
        for _ in range(4):
            optimizer.zero_grad()
            outputs = model(inputs)
            differentiate(optimizer, sign * F.cross_entropy(outputs, targets), outputs)
            optimizer.step()
        results.append(weights(model))
    demand_close(results[1], results[0], start, 1e-5, "maximize=True on the negated loss is not minimizing the loss")


@seeded
def check_nan_gradients_do_not_pass_silently(make: Maker) -> None:
    """After NaN gradients the step raises, or changes nothing, or their parameter is NaN: it does not just go on."""
    model, batch = mlp(), images()
    optimizer = make(model)
    for _ in range(2):
        train_step(optimizer, model, batch)
    optimizer.zero_grad()
    outputs = model(batch[0])
    differentiate(optimizer, F.cross_entropy(outputs, batch[1]), outputs)
    before, spoilt = weights(model), model.get_parameter("1.weight")
    assert spoilt.grad is not None
    spoilt.grad.fill_(float("nan"))
    try:
        optimizer.step()
    except (RuntimeError, ValueError, ArithmeticError):
        return
    moved = not torch.equal(weights(model), before)
    demand(not (moved and bool(spoilt.isfinite().all())), "a parameter with NaN gradients stays finite in the step.")


@seeded
def check_float64(make: Maker) -> None:
    """A float64 model is trained in float64: what is kept in a parameter's shape, too."""
    model, (inputs, targets) = conv_net().double(), images()
    optimizer = make(model)
    before = weights(model)
    for _ in range(3):
        train_step(optimizer, model, (inputs.double(), targets))
    after = weights(model)
    demand(after.dtype == torch.float64 and bool(after.isfinite().all()), "float64 weights are not finite any more.")
    demand(not torch.equal(after, before), "float64 weights do not move.")
    for p, kept in optimizer.state.items():
        for key, value in kept.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.is_floating_point():
                demand(value.dtype == torch.float64, f"{key!r} of a float64 parameter is {value.dtype}.")


@seeded
def check_loss_reduction(make: Maker) -> None:
    """``loss_reduction="sum"`` with a summed loss gathers the curvature that ``"mean"`` does with the mean."""
    if not make.accepts("loss_reduction"):
        raise SkipTest("no loss_reduction")
    found: list[dict[str, Tensor]] = []
    for reduction in ("mean", "sum"):
        torch.manual_seed(0)
        model, (inputs, targets) = mlp().double(), images()
        optimizer: Any = make(model, loss_reduction=reduction)
        optimizer.zero_grad()
        outputs = model(inputs.double())
        differentiate(optimizer, F.cross_entropy(outputs, targets, reduction=reduction), outputs)
        optimizer.step()
        if not callable(getattr(optimizer, "curvature_matrices", None)) or not optimizer.curvature_matrices():
            raise SkipTest("no curvature_matrices()")
        found.append(optimizer.curvature_matrices())
    for name, matrix in found[0].items():
        apart = float((found[1][name] - matrix).norm())
        same = apart <= 1e-8 * float(matrix.norm())
        demand(same, f"curvature of layer {name!r} depends on how the loss is reduced: {apart:.2g} apart.")


@seeded
def check_tied_weights(make: Maker) -> None:
    """A weight that two layers share is one parameter: both see its new value, and it moves once a step."""
    model, batch = EmbeddingModel(tied=True), PROBLEMS["tied"][1]()
    optimizer = make(model)
    counted = [id(p) for group in optimizer.param_groups for p in group["params"]]
    demand(len(counted) == len(set(counted)), "a shared weight is in the parameter groups twice.")
    for _ in range(3):
        train_step(optimizer, model, batch)
    demand(model.head.weight is model.embedding.weight, "a shared weight is shared no longer.")
