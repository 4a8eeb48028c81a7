"""Blocks that have an owner each among the processes: what a process holds, what a state is, how all go on alike."""

from __future__ import annotations

import copy
import datetime
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from optimizers.base import CurvatureOptimizer
from optimizers.curvature.packing import mirror_, pack_, packed_size, unpack_
from optimizers.natural_gradient.owners import shared_out
from optimizers.testing.loop import same_state
from tests.conftest import START
from tests.optimizers import problems
from tests.optimizers.test_contract import build, train_step, weights

METHODS = ("kfac", "ekfac", "kpsvd", "deflation", "twolevel_kfac_spectral", "kfac_damping_auto")
OWNED = "_owned"  # behind a method's name: inverses are at their owners alone
METHODS += tuple(f"{name}{OWNED}" for name in ("kfac", "ekfac", "deflation"))
BATCH, STEPS = 32, 5
inputs, targets = problems.images(BATCH)
FROZEN = 3  # steps for which a layer is


def batch(step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """A rank's share of a step's batch, in the precision of the weights."""
    share = (t.roll(2 * step, 0).chunk(world)[rank] for t in (inputs, targets))
    x, y = share
    return x.to(torch.get_default_dtype()), y


def started(name: str, world: int, **options: Any) -> tuple[nn.Module, nn.Module, Any]:
    torch.manual_seed(0)
    model = problems.mlp()
    options["assign"] = "owned" if name.endswith(OWNED) else "balanced"
    optimizer = build(name.removesuffix(OWNED), model, **options)
    return model, DistributedDataParallel(model) if world > 1 else model, optimizer


def trained(network: nn.Module, optimizer: Any, steps: range, rank: int, world: int) -> None:
    for step in steps:
        train_step(optimizer, network, batch(step, rank, world))


def told(function: Any) -> str:
    """What it complains of."""
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return ""


def apart(name: str, rank: int, world: int, stored: dict[str, Any] | None, folder: str = "") -> dict[str, Any]:
    """A run, and what is known of it on one process."""
    model, network, optimizer = started(name, world)
    trained(network, optimizer, range(STEPS), rank, world)
    assert isinstance(optimizer, CurvatureOptimizer)
    found: dict[str, Any] = {"diagnostics": optimizer.diagnostics(), "complaint": told(optimizer.state_dict)}
    found["own"] = sorted(optimizer.curvature_matrices())
    found["bytes"] = sum(row[-1] for row in optimizer.coverage().rows)
    factors = {name: block.factors for name, block in optimizer.blocks.items()}
    found["held"] = {name: sorted(k for k, t in own.items() if not t.is_meta) for name, own in factors.items()}
    pair = copy.deepcopy((model, optimizer))
    if rank == 0 and world > 1:
        torch.save(pair, Path(folder) / f"{name}.pt")
    optimizer.consolidate()
    found["matrices"] = optimizer.curvature_matrices()
    found["state"], found["weights"] = copy.deepcopy(optimizer.state_dict()), weights(model)
    trained(network, optimizer, range(STEPS, 2 * STEPS), rank, world)
    found["later"] = weights(model)
    copied = DistributedDataParallel(pair[0]) if world > 1 else pair[0]
    trained(copied, pair[1], range(STEPS, 2 * STEPS), rank, world)
    found["copied"] = weights(pair[0])
    # Resumed, from a state of these processes and from one that a single process has saved.
    for kind, state in (("resumed", found), ("other", stored)):
        if state is not None:
            model, network, optimizer = started(name, world)
            nn.utils.vector_to_parameters(state["weights"].clone(), model.parameters())
            optimizer.load_state_dict(state["state"])
            trained(network, optimizer, range(STEPS, 2 * STEPS), rank, world)
            found[kind] = weights(model)
    return found


def thawed(rank: int, world: int, name: str = "kfac") -> Tensor:
    """A layer without curvature at first, whose coming moves others to other owners."""
    model, network, optimizer = started(name, world, update_every=2, refresh_every=3)
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    before = None
    for step in range(3 * FROZEN):
        layer.requires_grad_(step >= FROZEN)
        if world > 1 and step in (0, FROZEN):
            network = DistributedDataParallel(model)
        train_step(optimizer, network, batch(step, rank, world))
        owners = {name: block.owner for name, block in optimizer.blocks.items()}
        before = owners if step == FROZEN - 1 else before
    if world > 1:
        assert before is not None
        assert any(before[name] not in (None, owner) for name, owner in owners.items()), "nothing has moved"
    return weights(model)


def broken(rank: int, world: int) -> dict[str, Any]:
    """Statistics that are not finite on one rank, in one step; and factors that have no inverse, at their owner."""
    model, network, optimizer = started("kfac", world, update_every=1, refresh_every=1, early_updates=False)
    trained(network, optimizer, range(2), rank, world)
    x, y = batch(2, rank, world)
    last = list(optimizer.blocks)[-1]
    optimizer.zero_grad()
    outputs = network(x)
    block = optimizer.blocks[last]
    optimizer.backward(optimizer.likelihood.nll(outputs, y), outputs)
    if rank == world - 1:
        block._sums["A"] = block._sums["A"] * float("nan")
    optimizer.step()
    rejected = optimizer.diagnostics()
    first = next(iter(optimizer.blocks.values()))
    if first.mine:
        first.factors["A"].mul_(float("nan"))
    train_step(optimizer, network, batch(3, rank, world))
    return {"rejected": rejected, "kept": optimizer.diagnostics(), "weights": weights(model)}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    try:
        stored = torch.load(Path(folder) / "stored.pt", weights_only=True)
        found: dict[str, Any] = {name: apart(name, rank, 2, stored[name], folder) for name in METHODS}
        found |= {"thawed": thawed(rank, 2), "thawed_owned": thawed(rank, 2, "kfac_owned"), "broken": broken(rank, 2)}
        torch.save(found, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """The same runs of one process."""
    torch.set_default_dtype(torch.float64)
    try:
        return {name: apart(name, 0, 1, None) for name in METHODS}
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, alone: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of two real processes has found."""
    folder = tmp_path_factory.mktemp("owners")
    states = {name: {key: run[key] for key in ("state", "weights")} for name, run in alone.items()}
    torch.save(states, folder / "stored.pt")
    mp.start_processes(worker, args=(str(folder),), nprocs=2, start_method=START)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) | {"folder": folder} for rank in range(2)]


@pytest.mark.parametrize("name", METHODS)
def test_each_factor_is_kept_by_one_process(name: str, ranks: list[Any], alone: dict[str, Any]) -> None:
    first, second = (results[name] for results in ranks)
    whole = alone[name]["held"]
    everywhere = {"U_A", "U_G"}
    for layer, keys in whole.items():
        shares = [set(run["held"][layer]) for run in (first, second)]
        assert shares[0] | shares[1] == set(keys)
        assert shares[0] & shares[1] <= everywhere, "kept twice"
    assert max(first["bytes"], second["bytes"]) < alone[name]["bytes"]
    if name.endswith(OWNED) and "ekfac" not in name:
        assert first["bytes"] + second["bytes"] == alone[name]["bytes"]
    assert sorted(first["own"] + second["own"]) == alone[name]["own"]
    assert first["own"] and second["own"], "one process has it all"


@pytest.mark.parametrize("name", METHODS)
def test_a_state_is_whole_or_refused(name: str, ranks: list[Any], alone: dict[str, Any]) -> None:
    first, second = (results[name] for results in ranks)
    assert "consolidate() on every process" in first["complaint"]
    assert not alone[name]["complaint"]
    assert same_state(first["state"], second["state"])
    assert first["matrices"].keys() == alone[name]["matrices"].keys()
    for layer, block in alone[name]["matrices"].items():
        torch.testing.assert_close(first["matrices"][layer], block, rtol=1e-7, atol=1e-9)
    assert first["diagnostics"] == second["diagnostics"]
    for key, value in alone[name]["diagnostics"].items():
        assert first["diagnostics"][key] == pytest.approx(value, rel=1e-6), key


@pytest.mark.parametrize("name", METHODS)
def test_runs_go_on_from_any_state(name: str, ranks: list[Any], alone: dict[str, Any]) -> None:
    first, second = (results[name] for results in ranks)
    assert torch.equal(first["later"], second["later"])
    assert torch.equal(first["resumed"], first["later"]), "not bit for bit"
    assert torch.equal(first["copied"], first["later"])
    torch.testing.assert_close(first["other"], alone[name]["later"], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(first["later"], alone[name]["later"], rtol=1e-7, atol=1e-8)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", METHODS)
def test_one_process_goes_on_from_the_state_of_two(name: str, ranks: list[Any]) -> None:
    model, network, optimizer = started(name, 1)
    nn.utils.vector_to_parameters(ranks[0][name]["weights"].clone(), model.parameters())
    optimizer.load_state_dict(ranks[0][name]["state"])
    trained(network, optimizer, range(STEPS, 2 * STEPS), 0, 1)
    torch.testing.assert_close(weights(model), ranks[0][name]["later"], rtol=1e-7, atol=1e-8)


def test_a_pickle_of_a_process_is_no_state_for_others(ranks: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="is another process's"):
        torch.load(ranks[0]["folder"] / "kfac.pt", weights_only=False)


@pytest.mark.usefixtures("float64")
def test_layers_that_thaw_move_others(ranks: list[Any]) -> None:
    alone = thawed(0, 1)
    for name in ("thawed", "thawed_owned"):
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], alone, rtol=1e-7, atol=1e-8)


@pytest.mark.usefixtures("float64")
def test_what_is_not_finite_at_one_process_is_so_at_all(ranks: list[Any]) -> None:
    single = broken(0, 1)
    for results in ranks:
        found = results["broken"]
        assert found["rejected"]["curvature/rejected"] == single["rejected"]["curvature/rejected"] == 1
        assert found["kept"]["curvature/fallbacks"] == single["kept"]["curvature/fallbacks"] >= 1
        torch.testing.assert_close(found["weights"], single["weights"], rtol=1e-7, atol=1e-8)
    assert torch.equal(ranks[0]["broken"]["weights"], ranks[1]["broken"]["weights"])


@pytest.mark.parametrize("form", ("full", "symmetric", "lower", "upper"))
@pytest.mark.parametrize("size", (1, 2, 31, 33, 64, 70, 600))
def test_triangles_are_packed_and_come_back(form: Any, size: int) -> None:
    torch.manual_seed(size)
    whole = torch.randn(2, size, size)
    whole = {"full": whole, "symmetric": whole + whole.mT, "lower": whole.tril(), "upper": whole.triu()}[form]
    packed = pack_(torch.empty(packed_size(whole.shape, form)), whole, form)
    assert form == "full" or size < 600 or packed.numel() < 0.54 * whole.numel()
    assert torch.equal(unpack_(torch.full_like(whole, float("nan")), packed, form), whole)
    rough = whole + 1e-3 * torch.randn(2, size, size)
    packed = pack_(packed, rough, form)
    if form == "symmetric":
        assert torch.equal(unpack_(torch.empty_like(whole), packed, form), mirror_(rough))


def test_work_goes_to_who_has_the_least() -> None:
    costs = {"a": 1.0, "b": 8.0, "c": 5.0, "d": 4.0, "e": 1.0}
    found = shared_out(costs, 2)
    assert found == {"a": 0, "b": 0, "c": 1, "d": 1, "e": 0}
    assert list(found) == list(costs)
    assert set(shared_out(costs, 7).values()) == set(range(5))
