"""The training loop: closures, micro-batches, empty batches, and a model that is left as it was."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any
from unittest import SkipTest

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ..loop import Batch, Maker, differentiate, same_state, train_step, weights
from ..problems import PROBLEMS, conv_net, frozen_net, images, mlp
from .common import demand, demand_close, run, seeded


@seeded
def check_closures(make: Maker) -> None:
    """``step(closure)`` returns the closure's loss and does what backward and ``step()`` do."""
    results = []
    for closed in (False, True):
        torch.manual_seed(0)
        model, batch = mlp(), images()
        optimizer = make(model)

        def closure(optimizer: Optimizer = optimizer, model: nn.Module = model, batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            outputs = model(batch[0])
            loss = F.cross_entropy(outputs, batch[1])
            differentiate(optimizer, loss, outputs)
            return loss

        for _ in range(4):
            if closed:
                found: Any = optimizer.step(closure)  # type: ignore[arg-type]
                good = isinstance(found, Tensor) and found.item() > 0
                demand(good, f"step(closure) returns {found!r} and not the loss.")
            else:
                train_step(optimizer, model, batch)
        results.append(weights(model))
    demand(torch.equal(*results), "steps with a closure lead elsewhere than steps without.")


@seeded
def check_zero_grad(make: Maker) -> None:
    """``zero_grad`` leaves None, or zeros with ``set_to_none=False``, and training does not depend on which."""
    results = []
    for none in (True, False):
        torch.manual_seed(0)
        model, batch = mlp(), images()
        optimizer = make(model)
        for _ in range(4):
            outputs = model(batch[0])
            differentiate(optimizer, F.cross_entropy(outputs, batch[1]), outputs)
            optimizer.step()
            optimizer.zero_grad(set_to_none=none)
            gradients = [p.grad for p in model.parameters()]
            if none:
                demand(all(g is None for g in gradients), "zero_grad(set_to_none=True) leaves gradients.")
            else:
                zeros = all(g is not None and not bool(g.any()) for g in gradients)
                demand(zeros, "zero_grad(set_to_none=False) leaves something else than zeros.")
        results.append(weights(model))
    demand(torch.equal(*results), "training depends on how gradients are cleared.")


@seeded
def check_micro_batches_equal_one_batch(
    make: Maker, problems: tuple[str, ...] = ("mlp", "groupnorm", "embedding")
) -> None:
    """Three backward passes on thirds of a batch and one step are the step on the whole batch, in float64.

    Args:
        make: the optimizer.
        problems: names of models of this package.
    """
    for problem in problems:
        factory, data = PROBLEMS[problem]
        results = []
        for micro in (1, 3):
            torch.manual_seed(0)
            # So many examples that factors have full rank: in a null space no basis is the right one, and what is kept
            # of what comes there later depends on the one that rounding chose.
            model, (inputs, targets) = factory().double(), data(96)
            inputs = inputs.double() if inputs.is_floating_point() else inputs
            start = weights(model)
            optimizer = make(model)
            for _ in range(4):
                train_step(optimizer, model, (inputs, targets), micro)
            results.append(weights(model))
        demand_close(results[1], results[0], start, 1e-7, f"three micro-batches of {problem!r} are not one batch")


@seeded
def check_empty_batch(make: Maker) -> None:
    """A step on a batch without examples does no harm: parameters stay finite, and training goes on."""
    model, (inputs, targets) = mlp(), images()
    optimizer = make(model)
    for chosen in (slice(0), slice(None), slice(0), slice(None)):
        optimizer.zero_grad()
        outputs = model(inputs[chosen])
        loss = F.cross_entropy(outputs, targets[chosen], reduction="sum") / len(targets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it may say so
            differentiate(optimizer, loss, outputs)
            optimizer.step()
    demand(bool(weights(model).isfinite().all()), "a batch without examples leaves parameters that are not finite.")
    before = weights(model)
    train_step(optimizer, model, (inputs, targets))
    demand(not torch.equal(weights(model), before), "after a batch without examples parameters do not move any more.")


@seeded
def check_in_place_activations(make: Maker) -> None:
    """In-place activations behind layers change nothing."""

    def plain() -> nn.Module:
        model = conv_net()
        for module in model:
            if isinstance(module, nn.ReLU):
                module.inplace = False
        return model

    batch = images()
    same = torch.equal(run(make, conv_net, batch, 4), run(make, plain, batch, 4))
    demand(same, "a model with in-place activations trains otherwise than one without.")


@seeded
def check_determinism(make: Maker) -> None:
    """Two runs from one seed are the same to the bit."""
    batch = images()
    same = torch.equal(run(make, conv_net, batch, 6), run(make, conv_net, batch, 6))
    demand(same, "two runs from one seed end at different weights.")


@seeded
def check_model_unharmed(make: Maker) -> None:
    """Building leaves weights alone, and ``step`` all but the weights: buffers, modes, flags, names, random numbers."""
    model, batch = frozen_net(), images()
    model[4].eval()
    before = weights(model)
    names = list(model.state_dict())
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    optimizer = make(model)
    demand(torch.equal(weights(model), before), "building the optimizer changes the weights.")
    for _ in range(4):
        optimizer.zero_grad()
        outputs = model(batch[0])
        differentiate(optimizer, F.cross_entropy(outputs, batch[1]), outputs)
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        state = torch.get_rng_state()
        optimizer.step()
        demand(same_state(dict(model.named_buffers()), buffers), "step changes buffers of the model.")
        demand(torch.equal(torch.get_rng_state(), state), "step draws from torch's global random generator.")
    counted = int(model.get_buffer("1.num_batches_tracked"))
    demand(counted == 4, f"batch statistics were renewed {counted} times in four training passes.")
    demand([m.training for m in model.modules()] == modes, "the modules' training modes were changed.")
    demand([p.requires_grad for p in model.parameters()] == flags, "requires_grad of the parameters was changed.")
    demand(list(model.state_dict()) == names, "the names in the model's state_dict were changed.")


@seeded
def check_close_removes_hooks(make: Maker) -> None:
    """``close()`` removes every hook from the model, and may be called twice."""
    model = PROBLEMS["vit"][0]()

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())

    before = hooks()
    optimizer = make(model)
    close = getattr(optimizer, "close", None)
    if close is None:
        demand(hooks() == before, "the optimizer put hooks on the model and has no close() that removes them.")
        raise SkipTest("no hooks, and no close()")
    close()
    demand(hooks() == before, "close() leaves hooks on the model.")
    close()


@seeded
def check_dropped_optimizer_is_freed(make: Maker) -> None:
    """An optimizer that nobody holds is freed, and the model that it trained goes on."""
    model, batch = mlp(), images()
    optimizer = make(model)
    train_step(optimizer, model, batch)
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    demand(alive() is None, "the model keeps an optimizer alive that nobody holds.")
    model(batch[0])
