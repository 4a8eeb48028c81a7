"""Weights that ``fully_shard`` has cut up over two real processes: first-order optimizers train them, others refuse."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from optimizers import EMA, KFAC, AdaFisher, AdaHessian, Categorical, FishLeg, Graft, ScheduleFree
from tests.conftest import START
from tests.training.small_run import small_data, small_model
from training import Trainer, UserError, tasks

STEPS = 3
WHOLE = StateDictOptions(full_state_dict=True)
FIRST_ORDER: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "ema": lambda model: EMA(torch.optim.AdamW(model.parameters(), lr=1e-2)),
}
REFUSING: dict[str, Callable[[nn.Module], Any]] = {
    "KFAC": partial(KFAC, likelihood=Categorical()),
    "AdaFisher": AdaFisher,
    "FishLeg": partial(FishLeg, likelihood=Categorical()),
    "AdaHessian": lambda model: AdaHessian(model.parameters()),
    "ScheduleFree": lambda model: ScheduleFree(torch.optim.SGD(model.parameters(), lr=0.1)),
    "Graft": lambda model: Graft(torch.optim.SGD(model.parameters(), lr=0.1)),
}


def built(sharded: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3))
    if sharded:
        fully_shard(model[0])
        fully_shard(model)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int, world: int) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(16, 10, generator=generator).chunk(world)[rank]
        targets = torch.randint(0, 3, (16,), generator=generator).chunk(world)[rank]
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def whole(model: nn.Module) -> Tensor:
    """All weights of a model, sharded or not."""
    found = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in found])


def run(name: str, rank: int, world: int, resumed: bool = False) -> Tensor:
    """Final weights, averaged ones of an average; in between, all may go through a whole state."""
    sharded = world > 1
    model = built(sharded)
    optimizer = FIRST_ORDER[name](model)
    train(model, optimizer, range(STEPS), rank, world)
    if resumed:
        states = get_model_state_dict(model, options=WHOLE), get_optimizer_state_dict(model, optimizer, options=WHOLE)
        model = built(sharded)
        optimizer = FIRST_ORDER[name](model)
        set_model_state_dict(model, states[0], options=WHOLE)
        set_optimizer_state_dict(model, optimizer, states[1], options=WHOLE)
    train(model, optimizer, range(STEPS, 2 * STEPS), rank, world)
    if isinstance(optimizer, EMA):
        optimizer.eval()
    return whole(model)


def complaint(function: Callable[[], Any]) -> str:
    try:
        function()
    except (TypeError, UserError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def later(rank: int) -> Any:
    """A model that is sharded behind its optimizer's back."""
    model = built(False)
    optimizer = KFAC(model, likelihood=Categorical(), fisher="empirical")
    fully_shard(model)
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(0, 3, (4,))).backward()
    optimizer.step()


def fitted() -> Any:
    data = small_data()
    model = small_model(data)
    fully_shard(model)
    task = tasks.build(data.task, data.facts)
    return Trainer(max_steps=1).check(data, task, model=model)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    try:
        found: dict[str, Any] = {name: run(name, rank, 2) for name in FIRST_ORDER}
        found["resumed"] = run("adamw", rank, 2, resumed=True)
        found |= {name: complaint(lambda make=make: make(built(True))) for name, make in REFUSING.items()}
        found["trainer"] = complaint(fitted)
        found["later"] = complaint(lambda: later(rank))
        torch.save(found, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    mp.start_processes(worker, args=(str(folder),), nprocs=2, start_method=START)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_first_order_optimizers_train_pieces_as_they_train_the_whole(name: str, ranks: list[dict[str, Any]]) -> None:
    alone = run(name, 0, 1)
    for results in ranks:
        torch.testing.assert_close(results[name], alone, rtol=1e-5, atol=1e-6)


def test_a_run_goes_on_from_its_whole_state(ranks: list[dict[str, Any]]) -> None:
    assert torch.equal(ranks[0]["resumed"], ranks[0]["adamw"])


@pytest.mark.parametrize("name", [*REFUSING, "later"])
def test_what_needs_whole_weights_says_so(name: str, ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        kind = "KFAC" if name == "later" else name
        assert results["trainer"].startswith("UserError: the model's weights are sharded")
        assert results[name].startswith(f"TypeError: {kind} needs whole weights"), results[name]
