"""Two gloo processes on halves of a batch equal one process on the joint batch, and replicas stay bit-identical."""

from __future__ import annotations

import datetime
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from optimizers.curvature.recorder import Recorder
from optimizers.kronecker import KroneckerMethod
from tests.conftest import START
from tests.optimizers import problems
from tests.optimizers.test_contract import build, every, train_step, weights

pytestmark = pytest.mark.slow

STEPS = 10  # the longest interval is 6; what rounding has grown to is a hundredth of what it is after 20
KRONECKER = ["kfac", "ekfac", "kpsvd", "deflation", "kfac_corrected", "lanczos", "exact_ng", "twolevel_kfac"]
SHARED = (("sampled", 1.0), ("sampled", 0.5), ("empirical", 0.5))  # estimates of F, and of which share of a batch
# By name: an entry of the contract's OPTIMIZERS, and what differs from it.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {})
    for name in ("sgd", "adam", "adafisher", "adafisher_average", "adafisherw", "adahessian", "adahessian_delayed")
} | {
    f"{name}_{fisher}_{fraction}": (name, {"fisher": fisher, "batch_fraction": fraction})
    for name, (fisher, fraction) in itertools.product(KRONECKER, SHARED)
}
CASES |= {
    f"twolevel_{coarse}": ("twolevel_kfac", {"coarse": coarse}) for coarse in ("residual", "tselepidis", "spectral")
}
CASES |= {
    "twolevel_krylov": ("twolevel_kfac", {"krylov": True}),
    "ekfac_rank": ("ekfac_rank", {}),
    **{
        f"{name}_replicated": (name, {"assign": "replicated"})
        for name in ("kfac", "ekfac", "deflation", "twolevel_kfac_spectral")
    },
    "kfac_damping_auto": ("kfac_damping_auto", {}),
    "ekfac_damping_auto": ("ekfac", {"damping": "auto", "damping_unit": "layer"}),
    "twolevel_damping_auto": ("twolevel_kfac", {"damping": "auto", "kl_of": "measured"}),
    "exact_ng_damping_auto": ("exact_ng", {"damping": "auto", "kl_clip": None}),
    "exact_ng_exact": ("exact_ng", {"fisher": "exact", "blocks": "layer"}),
    **{
        name: (name, {})
        for name in ("fishleg", "fishleg_each", "fishleg_rank_one", "lamb", "lion", "muon", "shampoo", "soap")
    },
}


class Around(nn.Module):
    """Multiplies by the weight of a layer that it never calls, so that no rank sees anything flow through it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(192, 6, bias=False), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x.flatten(1), self.inner.weight).tanh())


PROBLEMS = {name: problems.PROBLEMS[name] for name in ("mlp", "groupnorm", "embedding")}
PROBLEMS["around"] = (Around, problems.images)
# EKFAC's moments depend on the basis, and a null space has none of its own. Half of so many examples give every factor
# full rank but the widest, that of the MLP's inputs.
BATCH = 96
# Of so few examples, a process has no whole number in its share: the union of the shares has to be the batch's. (They
# leave factors null spaces, which EKFAC's moments depend on.)
FEW = 20
SHARES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name}_{fisher}": (name, {"fisher": fisher, "batch_fraction": 0.25})
    for name, fisher in [*itertools.product(KRONECKER, ["sampled"]), ("kfac", "empirical"), ("kpsvd", "empirical")]
    if name != "ekfac"
}
UNEVENLY = ("kfac", "ekfac", "kpsvd")
UNEVEN = (13, 7)  # examples of the two processes, where they are not as many


def batches(problem: str, examples: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    inputs, targets = PROBLEMS[problem][1](examples)
    # Every other example of a batch is always one of the same inputs, so that their null space does not change.
    return [(inputs.roll(2 * step, 0), targets.roll(4 * step, 0)) for step in range(STEPS)]


def run(name: str, problem: str, rank: int, world: int, few: bool = False) -> Tensor:
    """Train on this rank's share of every batch; DistributedDataParallel when there is more than one rank."""
    torch.manual_seed(0)
    model = PROBLEMS[problem][0]()
    entry, options = (SHARES if few else CASES)[name]
    optimizer = build(entry, model, **options)
    if isinstance(optimizer, KroneckerMethod) and "assign" not in options:
        optimizer.assign = "balanced"  # the harder way; replicated has cases of its own
    network: nn.Module = DistributedDataParallel(model) if world > 1 else model
    for inputs, targets in batches(problem, FEW if few else BATCH)[: 3 if few else STEPS]:
        # Halves, one behind the other: that is how targets are drawn and statistics' shares of a batch are taken.
        train_step(optimizer, network, (inputs.chunk(world)[rank], targets.chunk(world)[rank]))
    return weights(model)


def curvature(name: str, rank: int, world: int) -> dict[str, Tensor]:
    """Blocks after a step on shares of different length."""
    torch.manual_seed(0)
    model = PROBLEMS["groupnorm"][0]()
    optimizer = build(name, model, fisher="empirical", batch_fraction=0.3, assign="balanced")
    network: nn.Module = DistributedDataParallel(model) if world > 1 else model
    share = [t.split(UNEVEN)[rank] if world > 1 else t for t in PROBLEMS["groupnorm"][1](FEW)]
    train_step(optimizer, network, (share[0], share[1]))
    return optimizer.curvature_matrices()


def worker(rank: int, folder: str, cases: list[tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    try:
        found: dict[Any, Any] = {case: run(*case, rank, 2) for case in cases}
        found |= {("few", name): run(name, "groupnorm", rank, 2, few=True) for name in SHARES}
        found |= {("uneven", name): curvature(name, rank, 2) for name in UNEVENLY}
        torch.save(found, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What every case ends with on each of two real processes: final weights, of most."""
    folder = tmp_path_factory.mktemp("ddp")
    cases = [(name, problem) for name in CASES for problem in PROBLEMS]
    # Fails on any worker's exit code.
    mp.start_processes(worker, args=(str(folder), cases), nprocs=2, start_method=START)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", every("ranks", list(CASES)))
def test_two_processes_equal_one(name: str, problem: str, ranks: list[dict[Any, Any]]) -> None:
    first, second = (results[name, problem] for results in ranks)
    assert torch.equal(first, second), "replicas drifted apart"
    torch.manual_seed(0)
    start = weights(PROBLEMS[problem][0]())
    alone = run(name, problem, 0, 1)
    assert not torch.allclose(alone, start)
    torch.testing.assert_close(first, alone, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", SHARES)
def test_a_share_of_the_batch_is_the_same_on_any_number_of_processes(name: str, ranks: list[dict[Any, Any]]) -> None:
    first, second = (results["few", name] for results in ranks)
    assert torch.equal(first, second), "replicas drifted apart"
    torch.testing.assert_close(first, run(name, "groupnorm", 0, 1, few=True), rtol=1e-7, atol=1e-7)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", UNEVENLY)
def test_processes_with_more_examples_count_for_more(name: str, ranks: list[dict[Any, Any]]) -> None:
    alone = curvature(name, 0, 1)
    for results in ranks:
        for layer, block in results["uneven", name].items():
            torch.testing.assert_close(block, alone[layer], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fraction", (0.25, 0.3, 0.7))
@pytest.mark.parametrize("shares", ((20,), (10, 10), (5, 5, 5, 5), (7, 7, 6), (13, 0, 7), (1, 19)))
def test_shares_are_chosen_by_places_in_the_whole_batch(fraction: float, shares: tuple[int, ...]) -> None:
    recorder = Recorder(nn.Linear(1, 1), [], lambda: False, lambda flow: None, fraction=fraction)
    whole = recorder.choose(sum(shares))
    found = []
    for rank, examples in enumerate(shares):
        recorder.place(sum(shares[:rank]))
        chosen = recorder.choose(examples)
        assert chosen is not None
        found.append(chosen + sum(shares[:rank]))
    assert torch.equal(torch.cat(found), whole)
