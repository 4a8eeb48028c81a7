"""What a training script may rely on whatever the optimizer, as functions ``check_xxx(make_optimizer)``.

Each raises AssertionError with a sentence, or ``unittest.SkipTest`` (which pytest knows, too) where an optimizer does
not have what is asked about. ``make_optimizer`` is a class or a callable; see ``Maker``.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import SkipTest

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, StepLR

from .loop import Batch, Maker, differentiate, named, ours, same_state, train_step, weights
from .problems import PROBLEMS, EmbeddingModel, Problem, conv_net, frozen_net, images, mlp

Check = Callable[[Callable[..., Optimizer]], None]

_CHECKS: dict[str, Check] = {}


def _check(function: Callable[..., None]) -> Callable[..., None]:
    """Register a check; it starts from one random state, leaves the caller's alone, and is given a ``Maker``."""

    @functools.wraps(function)
    def seeded(make_optimizer: Callable[..., Optimizer], *args: Any, **kwargs: Any) -> None:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            function(Maker(make_optimizer), *args, **kwargs)

    _CHECKS[function.__name__] = seeded
    return seeded


def optimizer_checks() -> Iterator[tuple[str, Check]]:
    """All checks as (name, function), for ``pytest.mark.parametrize`` or a loop of one's own."""
    yield from _CHECKS.items()


def demand(condition: bool, sentence: str) -> None:
    """Raise AssertionError unless the condition holds (as ``assert``, which ``python -O`` leaves out)."""
    if not condition:
        raise AssertionError(sentence)


def _close(found: Tensor, expected: Tensor, start: Tensor, tolerance: float, sentence: str) -> None:
    """Demand that two runs ended at the same weights, in units of how far they went."""
    travelled = float((expected - start).norm())
    apart = float((found - expected).norm())
    demand(apart <= tolerance * travelled, f"{sentence}: {apart:.2g} apart after {travelled:.2g} of way.")


def _run(make: Maker, problem: Callable[[], nn.Module], batch: Batch, steps: int, **overrides: Any) -> Tensor:
    """Weights after some steps of a model that starts from the same random state each time."""
    torch.manual_seed(0)
    model = problem()
    optimizer = make(model, **overrides)
    for _ in range(steps):
        train_step(optimizer, model, batch)
    return weights(model)


def _reached(model: nn.Module, batch: Batch) -> set[str]:
    """Names of the parameters whose gradient is more than rounding: a bias before a batch norm has none."""
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(batch[0]), batch[1]).backward()
    sizes = {name: float(p.grad.abs().max()) for name, p in twin.named_parameters() if p.grad is not None}
    return {name for name, size in sizes.items() if size > 1e-5 * max(sizes.values())}


# -- what moves ------------------------------------------------------------------------------------------------------


@_check
def check_every_trainable_tensor_moves(make: Maker, problems: Mapping[str, Problem] | None = None) -> None:
    """Every parameter with a gradient moves within three steps, all stay finite, and no frozen one moves.

    Args:
        make: the optimizer.
        problems: models and data to try; None: all of this package's.
    """
    for problem, (factory, data) in (problems or PROBLEMS).items():
        model, batch = factory(), data()
        optimizer = make(model)
        before, reached = named(model), _reached(model, batch)
        for _ in range(3):  # an even number of equal steps may lead back
            train_step(optimizer, model, batch)
        for name, p in model.named_parameters():
            moved = not torch.equal(p, before[name])
            demand(moved or name not in reached, f"{name} of {problem!r} has a gradient and does not move.")
            demand(p.requires_grad or not moved, f"{name} of {problem!r} is frozen and moves.")
            demand(bool(p.isfinite().all()), f"{name} of {problem!r} is not finite after three steps.")


@_check
def check_the_loss_goes_down(make: Maker) -> None:
    """Forty steps on one batch lower its loss."""
    model, batch = conv_net(), images(16)
    optimizer = make(model)
    losses = [train_step(optimizer, model, batch) for _ in range(40)]
    demand(losses[-1] < losses[0], f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g} in forty steps.")


@_check
def check_no_gradient_no_move(make: Maker) -> None:
    """A step without gradients changes and raises nothing; a layer that the loss does not reach stays put."""
    model, batch = mlp(), images()
    optimizer = make(model)
    before = weights(model)
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may say so
        optimizer.step()
    demand(torch.equal(weights(model), before), "a step without gradients moves the parameters.")

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    model.add_module("aside", nn.Linear(3, 3))
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    optimizer = make(model)
    aside = named(model[2])
    for _ in range(3):
        train_step(optimizer, model, batch)
    demand(same_state(named(model[2]), aside), "parameters that never had a gradient move.")


@_check
def check_lr_zero_no_move(make: Maker) -> None:
    """With a learning rate of zero in every group nothing moves, to the bit."""
    model, batch = conv_net(), images()
    optimizer = make(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = weights(model)
    for _ in range(3):
        train_step(optimizer, model, batch)
    demand(torch.equal(weights(model), before), "parameters move at lr=0.")


@_check
def check_weight_decay_pulls_to_zero(make: Maker) -> None:
    """Where the loss is flat, weight decay makes weights smaller, and without it they stay."""
    model, batch = mlp(), images()
    if "weight_decay" not in make(model).defaults:
        raise SkipTest("no weight_decay")
    moved = {}
    for decay in (0.0, 0.1):
        torch.manual_seed(0)
        model = mlp()
        start = weights(model)
        optimizer = make(model, weight_decay=decay)
        for _ in range(3):
            optimizer.zero_grad()
            outputs = model(batch[0])
            differentiate(optimizer, outputs.sum() * 0, outputs)
            optimizer.step()
        moved[decay] = weights(model) - start
    demand(not bool(moved[0.0].any()), "zero gradients move parameters without weight decay.")
    inwards = -float(moved[0.1] @ start) / float(start.norm())
    demand(inwards > 0, f"weight decay moves weights outwards, by {-inwards:.2g}.")


# -- state -------------------------------------------------------------------------------------------------------------


@_check
def check_state_round_trip(make: Maker, problems: tuple[str, ...] = ("conv", "vit", "tied", "frozen")) -> None:
    """Ten steps, save, load into a fresh model and optimizer, ten more: the twenty of one run, bit for bit.

    Through ``torch.save`` and ``torch.load(weights_only=True)``, which takes tensors and plain values alone.

    Args:
        make: the optimizer.
        problems: names of models of this package.
    """
    for problem in problems:
        factory, data = PROBLEMS[problem]
        model, batch = factory(), data()
        optimizer = make(model)
        for _ in range(10):
            train_step(optimizer, model, batch)
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
        for _ in range(10):
            train_step(optimizer, model, batch)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        original = copy.deepcopy(saved["optimizer"])
        resumed = factory()
        second = make(resumed)
        resumed.load_state_dict(saved["model"])
        second.load_state_dict(saved["optimizer"])
        for _ in range(10):
            train_step(second, resumed, batch)
        same = torch.equal(weights(model), weights(resumed))
        demand(same, f"a resumed run of {problem!r} ends at other weights than one that was not interrupted.")
        same = same_state(optimizer.state_dict(), second.state_dict())
        demand(same, f"a resumed run of {problem!r} ends in another state than one that was not interrupted.")
        if ours(optimizer):  # torch's own takes the tensors over
            demand(same_state(saved["optimizer"], original), "the loaded state was changed by training on.")


@_check
def check_deepcopy_of_state(make: Maker) -> None:
    """``copy.deepcopy(optimizer.state_dict())`` loaded later, into the same optimizer, takes training back there."""
    model, batch = mlp(), images()
    optimizer = make(model)
    for _ in range(3):
        train_step(optimizer, model, batch)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    ends = []
    for _ in range(2):
        for _ in range(5):
            train_step(optimizer, model, batch)
        ends.append(weights(model))
        model.load_state_dict(kept[0])
        optimizer.load_state_dict(copy.deepcopy(kept[1]))
    demand(torch.equal(*ends), "a state that was copied and loaded again leads elsewhere.")


@_check
def check_copies_of_model_and_optimizer(make: Maker) -> None:
    """Model and optimizer, deep-copied or pickled together, train on as the originals do."""
    model, batch = mlp(), images()
    optimizer = make(model)
    train_step(optimizer, model, batch)
    pairs = {
        "deep copy": copy.deepcopy((model, optimizer)),
        "pickled copy": pickle.loads(pickle.dumps((model, optimizer))),
    }
    for _ in range(5):
        train_step(optimizer, model, batch)
    for how, (twin, own) in pairs.items():
        before = weights(twin)
        for _ in range(5):
            train_step(own, twin, batch)
        demand(not torch.equal(weights(twin), before), f"a {how} of the optimizer does not train its own model.")
        demand(torch.equal(weights(twin), weights(model)), f"a {how} of model and optimizer trains otherwise.")


@_check
def check_state_dict_hooks(make: Maker) -> None:
    """What a hook on ``state_dict()`` or ``load_state_dict()`` is shown is the whole state."""
    model, batch = mlp(), images()
    optimizer = make(model)
    train_step(optimizer, model, batch)
    seen: dict[str, set[str]] = {}
    optimizer.register_state_dict_post_hook(lambda _, state: seen.update(saved=set(state)))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.update(loaded=set(state)))
    state = optimizer.state_dict()
    optimizer.load_state_dict(copy.deepcopy(state))
    for when, keys in seen.items():
        missing = sorted(set(state) - keys)
        demand(not missing, f"a hook on the {when} state is not shown {', '.join(missing)}.")


@_check
def check_state_crosses_wrappers(make: Maker) -> None:
    """The state of a run under ``nn.DataParallel`` loads into one of the bare model."""
    model, batch = mlp(), images()
    wrapped = make(nn.DataParallel(model))
    train_step(wrapped, model, batch)
    torch.manual_seed(0)
    bare = make(mlp())
    bare.load_state_dict(copy.deepcopy(wrapped.state_dict()))
    demand(same_state(bare.state_dict(), wrapped.state_dict()), "a wrapped model's state is another after loading it.")


# -- the loop ----------------------------------------------------------------------------------------------------------


@_check
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


@_check
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


@_check
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
        _close(results[1], results[0], start, 1e-7, f"three micro-batches of {problem!r} are not one batch")


@_check
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


@_check
def check_in_place_activations(make: Maker) -> None:
    """In-place activations behind layers change nothing."""

    def plain() -> nn.Module:
        model = conv_net()
        for module in model:
            if isinstance(module, nn.ReLU):
                module.inplace = False
        return model

    batch = images()
    same = torch.equal(_run(make, conv_net, batch, 4), _run(make, plain, batch, 4))
    demand(same, "a model with in-place activations trains otherwise than one without.")


@_check
def check_determinism(make: Maker) -> None:
    """Two runs from one seed are the same to the bit."""
    batch = images()
    same = torch.equal(_run(make, conv_net, batch, 6), _run(make, conv_net, batch, 6))
    demand(same, "two runs from one seed end at different weights.")


@_check
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


@_check
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


@_check
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


# -- groups and frozen parameters --------------------------------------------------------------------------------------


@_check
def check_groups_have_their_own_learning_rate(make: Maker) -> None:
    """A group with ``lr=0`` stays, another one moves."""
    model, batch = mlp(), images()
    groups: list[dict[str, Any]] = [
        {"params": list(model[1].parameters())},
        {"params": list(model[3].parameters()), "lr": 0.0, "weight_decay": 0.0},
    ]
    optimizer = make(model, groups)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        train_step(optimizer, model, batch)
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    demand(moved == [True, True, False, False], f"with lr=0 for the second layer alone, these moved: {moved}.")


@_check
def check_filtered_parameters(make: Maker) -> None:
    """Given some of a model's parameters, as a list or a generator, it trains these and no other."""
    for listed in (True, False):
        model, batch = frozen_net(), images()
        chosen = (p for p in model.parameters() if p.requires_grad)
        optimizer = make(model, list(chosen) if listed else chosen)
        for p in model.parameters():
            p.requires_grad_(True)  # what it was not given is not its own even now
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        before, reached = named(model), _reached(model, batch)
        for _ in range(3):
            train_step(optimizer, model, batch)
        for name, p in model.named_parameters():
            moved = not torch.equal(p, before[name])
            demand(id(p) in trained or not moved, f"{name} moves, which the optimizer was not given.")
            demand(moved or id(p) not in trained or name not in reached, f"{name} does not move.")


@_check
def check_thawed_later(make: Maker) -> None:
    """Parameters that were frozen when the optimizer was built move once they require gradients."""
    model, batch = frozen_net(), images()
    optimizer = make(model)
    for _ in range(2):
        train_step(optimizer, model, batch)
    for p in model.parameters():
        p.requires_grad_(True)
    before, reached = named(model), _reached(model, batch)
    for _ in range(3):
        train_step(optimizer, model, batch)
    still = [name for name, p in model.named_parameters() if name in reached and torch.equal(p, before[name])]
    demand(not still, f"thawed, and does not move: {', '.join(still)}.")


@_check
def check_add_param_group_later(make: Maker) -> None:
    """``add_param_group`` in the middle of training trains what it adds, at its own learning rate."""
    model, batch = mlp(), images()
    for p in model[1].parameters():
        p.requires_grad_(False)
    optimizer = make(model, list(model[3].parameters()))
    for _ in range(2):
        train_step(optimizer, model, batch)
    for p in model[1].parameters():
        p.requires_grad_(True)
    optimizer.add_param_group({"params": [model[1].weight]})
    optimizer.add_param_group({"params": [model[1].bias], "lr": 0.0, "weight_decay": 0.0})
    before = named(model)
    for _ in range(3):
        train_step(optimizer, model, batch)
    moved = {name: not torch.equal(p, before[name]) for name, p in model.named_parameters()}
    expected = {"1.weight": True, "1.bias": False, "3.weight": True, "3.bias": True}
    demand(moved == expected, f"the weight was added, and the bias at lr=0: {moved}.")


@_check
def check_model_without_a_trainable_layer(make: Maker) -> None:
    """Bare parameters alone, or all that is left beside a frozen layer, are trained, and without a warning."""

    class Shifted(nn.Module):
        def __init__(self, frozen: bool) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(2))
            self.layer = nn.Linear(2, 2).requires_grad_(False) if frozen else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + self.shift)

    for frozen in (False, True):
        model = Shifted(frozen)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = make(model)
            before = model.shift.detach().clone()
            for _ in range(3):
                train_step(optimizer, model, (torch.randn(4, 2), torch.tensor([0, 1, 0, 1])))
        moved = bool((model.shift != before).all()) and bool(model.shift.isfinite().all())
        demand(moved, f"a bare parameter {'beside a frozen layer ' if frozen else ''}does not move.")


# -- learning rates, numbers, flags ------------------------------------------------------------------------------------


@_check
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


@_check
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
    _close(results[1], results[0], start, 1e-4, "lr as a tensor is not lr as a number")


@_check
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
    _close(results[1], results[0], start, 1e-4, "training with a gradient scaler is not training without")


@_check
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
    _close(results[1], results[0], start, 1e-5, "maximize=True on the negated loss is not minimizing the loss")


@_check
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


@_check
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


@_check
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


@_check
def check_tied_weights(make: Maker) -> None:
    """A weight that two layers share is one parameter: both see its new value, and it moves once a step."""
    model, batch = EmbeddingModel(tied=True), PROBLEMS["tied"][1]()
    optimizer = make(model)
    counted = [id(p) for group in optimizer.param_groups for p in group["params"]]
    demand(len(counted) == len(set(counted)), "a shared weight is in the parameter groups twice.")
    for _ in range(3):
        train_step(optimizer, model, batch)
    demand(model.head.weight is model.embedding.weight, "a shared weight is shared no longer.")
