"""State: saved, loaded, copied, pickled."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from torch import nn

from ..loop import Maker, ours, same_state, train_step, weights
from ..problems import PROBLEMS, images, mlp
from .common import demand, seeded


@seeded
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


@seeded
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


@seeded
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


@seeded
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


@seeded
def check_state_crosses_wrappers(make: Maker) -> None:
    """The state of a run under ``nn.DataParallel`` loads into one of the bare model."""
    model, batch = mlp(), images()
    wrapped = make(nn.DataParallel(model))
    train_step(wrapped, model, batch)
    torch.manual_seed(0)
    bare = make(mlp())
    bare.load_state_dict(copy.deepcopy(wrapped.state_dict()))
    demand(same_state(bare.state_dict(), wrapped.state_dict()), "a wrapped model's state is another after loading it.")
