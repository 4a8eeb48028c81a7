"""What holds of everything that goes around an optimizer: it is one, and the one inside still does its work."""

from __future__ import annotations

import copy
import datetime
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from optimizers import EKFAC, KFAC, AdaFisherW, AdaHessian, Categorical, ExactNaturalGradient, FishLeg
from optimizers.averaging import EMA, ScheduleFree
from optimizers.packaged import muon
from optimizers.step_length import Graft, Normalized
from optimizers.testing import check_curvature, parametrize_with_checks
from optimizers.testing.loop import Maker, differentiate, same_state, train_step, weights
from optimizers.wrapper import Wrapper, check_wrappers, innermost, wrappers
from tests.conftest import START
from tests.optimizers.problems import PROBLEMS, images, mlp

KRONECKER: dict[str, Any] = {"lr": 0.05, "update_every": 3, "refresh_every": 4, "likelihood": Categorical()}
INNER: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "sgd0": partial(torch.optim.SGD, lr=0.05, weight_decay=5e-4),
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
    "adamw0": partial(torch.optim.AdamW, lr=1e-3, betas=(0.0, 0.999)),
    "lamb": partial(pytorch_optimizer.Lamb, lr=1e-3, weight_decay=5e-4),
    "muon": partial(muon, lr=5e-3),
    "adafisherw": partial(AdaFisherW, lr=1e-3, update_every=3),
    "adahessian": partial(AdaHessian, lr=0.05, weight_decay=5e-4),
    "kfac": partial(KFAC, **KRONECKER, weight_decay=5e-4),
    "kfac0": partial(KFAC, **KRONECKER, momentum=0.0),
    "ekfac": partial(EKFAC, **KRONECKER),
    "exact_ng": partial(ExactNaturalGradient, lr=0.05, likelihood=Categorical(), damping=0.1),
    "fishleg": partial(FishLeg, lr=0.02, damping=0.1, aux_every=3, likelihood=Categorical()),
}
AROUND: dict[str, Callable[[Optimizer], Optimizer]] = {
    "ema": partial(EMA, decay=0.9),
    "free": partial(ScheduleFree, warmup=3),
    "graft": partial(Graft, to="adam", lr=2e-3),
    "graft_all": partial(Graft, to="SGD", lr=0.05, options={"momentum": 0.9}, per="all"),
    "normalized": partial(Normalized, ratio=1e-2),
    "hold": partial(Normalized, ratio=1e-2, hold=True),
}
# Inner optimizer and what goes around it, from the inside.
CASES = [
    "sgd-ema", "kfac-ema", "muon-ema", "adahessian-ema", "sgd0-free", "adamw0-free", "kfac0-free", "sgd-graft",
    "kfac-graft", "ekfac-graft_all", "exact_ng-graft", "fishleg-graft", "lamb-graft", "adamw-normalized",
    "adafisherw-normalized", "kfac-hold", "adahessian-hold", "kfac-graft-ema", "kfac0-normalized-free",
]  # fmt: skip
# Torch's and packages' make no promise about these.
PLAIN = ("sgd", "adamw", "lamb", "muon", "sgd0", "adamw0")


def wrapped(case: str) -> Callable[..., Optimizer]:
    """A factory as users write one; it takes what the inner optimizer takes."""
    inner, *around = case.split("-")
    maker = Maker(INNER[inner])

    def make(model: nn.Module, params: Any = None, **options: Any) -> Optimizer:
        optimizer = maker(model, params, **options)
        for name in around:
            kwargs = {"model": model} if issubclass(AROUND[name].func, (Graft, Normalized)) else {}  # type: ignore[attr-defined]
            optimizer = AROUND[name](optimizer, **kwargs)
        return optimizer

    own = ("model", "params", *(name for name in ("maximize", "loss_reduction") if maker.accepts(name)))
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    make.__signature__ = inspect.Signature([inspect.Parameter(name, kind, default=None) for name in own])  # type: ignore[attr-defined]
    make.__name__ = case
    return make


def known_failures() -> dict[str, dict[str, str]]:
    groups = (
        "check_groups_have_their_own_learning_rate", "check_filtered_parameters", "check_add_param_group_later",
    )  # fmt: skip
    found: dict[str, dict[str, str]] = {case: {} for case in CASES}
    for case in CASES:
        if case.startswith("muon"):
            found[case] |= dict.fromkeys(groups, "sorts the parameters into groups itself, so it takes none")
        if case.startswith(("muon", "lamb")):
            found[case]["check_copies_of_model_and_optimizer"] = "the package's optimizers lose attributes in copies"
    return found


@pytest.mark.filterwarnings("ignore:weights in half precision")
@parametrize_with_checks({case: wrapped(case) for case in CASES}, expected_failures=known_failures())
def test_contract(make_optimizer: Maker, check: Callable[[Maker], None]) -> None:
    check(make_optimizer)


def trained(case: str, steps: int = 5) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = mlp()
    optimizer = wrapped(case)(model)
    for _ in range(steps):
        train_step(optimizer, model, images())
    return model, optimizer


# -- one optimizer to everybody ----------------------------------------------------------------------------------------


def test_it_hands_on_what_it_does_not_know() -> None:
    model, optimizer = trained("kfac-graft-ema")
    inner = innermost(optimizer)
    assert isinstance(inner, KFAC) and isinstance(optimizer, Optimizer) and wrappers(optimizer) == ["ema", "graft"]
    assert optimizer.param_groups is inner.param_groups and optimizer.defaults is inner.defaults
    assert str(optimizer.coverage()) == str(inner.coverage()) and optimizer.model is model
    assert optimizer.update_every == 3 and optimizer.likelihood is inner.likelihood
    optimizer.update_every = 7
    assert inner.update_every == 7 and "update_every" not in optimizer.__dict__
    assert optimizer.decay == 0.9 and inner.decay == 0.95  # each has its own
    optimizer.decay = 0.8
    assert inner.decay == 0.95
    assert not hasattr(optimizer, "nothing_of_the_kind") and not hasattr(trained("sgd-ema")[1], "backward")
    found = optimizer.diagnostics()
    assert set(inner.diagnostics()) < set(found) and "step_length/graft_median" in found


def test_groups_and_their_schedule_are_shared() -> None:
    model, optimizer = trained("kfac-graft-ema", 0)
    inner = innermost(optimizer)
    scheduler = CosineAnnealingLR(optimizer, 10)
    for _ in range(5):
        train_step(optimizer, model, images())
        scheduler.step()
    assert inner.param_groups[0]["lr"] == pytest.approx(0.025)
    optimizer.load_state_dict(optimizer.state_dict())  # which makes new groups
    optimizer.param_groups[0]["lr"] = 0.01
    assert inner.param_groups[0]["lr"] == 0.01


def test_hooks_are_each_ones_own() -> None:
    model, optimizer = trained("sgd-graft", 0)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.inner.register_step_post_hook(lambda *_: calls.append("inside"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train_step(optimizer, model, images())
    assert calls == ["before", "inside", "after"]


def test_a_fused_optimizer_inside_sees_unscaled_gradients() -> None:
    """Torch lets a fused optimizer unscale gradients itself; the scaler must not hand that to the wrapper."""
    ends = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model, (inputs, targets) = mlp(), images()
        optimizer = EMA(torch.optim.Adam(model.parameters(), lr=1e-3, fused=True))
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**8)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(inputs), targets)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        ends.append(weights(model))
    assert torch.allclose(*ends, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", ["sgd-ema", "kfac-graft-ema", "kfac0-normalized-free"])
def test_state_is_for_reading_and_shows_both(case: str) -> None:
    model, optimizer = trained(case)
    p = next(model.parameters())
    entry = optimizer.state[p]
    assert set(wrappers(optimizer)) < set(entry) and set(innermost(optimizer).state[p]) <= set(entry)
    with pytest.raises(TypeError):
        optimizer.state[p] = {}


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(("muon", "lamb"))])
def test_copies_under_a_scheduler_and_in_evaluation(case: str) -> None:
    model, optimizer = trained(case)
    scheduler = CosineAnnealingLR(optimizer, 10)  # which wraps step
    train_step(optimizer, model, images())
    scheduler.step()
    switch = hasattr(optimizer, "averaged")
    if switch:
        optimizer.eval()
    buffer = io.BytesIO()
    torch.save((model, optimizer), buffer)
    buffer.seek(0)
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for twin, second in [*pairs, torch.load(buffer, weights_only=False)]:
        assert same_state(second.state_dict(), optimizer.state_dict())
        if switch:
            second.train()
            optimizer.train()
        before = weights(model)
        train_step(second, twin, images())
        assert torch.equal(weights(model), before)
        train_step(copy_of := copy.deepcopy((model, optimizer))[1], copy_model(copy_of), images())
        assert torch.equal(weights(twin), torch.cat([p.detach().reshape(-1) for p in params_of(copy_of)]))
        if switch:
            optimizer.eval()


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def copy_model(optimizer: Optimizer) -> nn.Module:
    """A model around a copied optimizer's parameters, which are those of ``mlp`` in their order."""
    own = getattr(innermost(optimizer), "model", None)
    if own is not None:
        return own
    model, params = mlp(), params_of(optimizer)
    model[1].weight, model[1].bias, model[3].weight, model[3].bias = params  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("around", ["ema", "free", "graft", "normalized"])
def test_an_optimizer_that_has_no_rate_of_its_own(around: str) -> None:
    """It finds it by itself: nothing here needs to know it."""

    class Finding(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for p in params_of(self):
                p.sub_(p.grad, alpha=0.1)  # type: ignore[arg-type]

    model = mlp()
    inner = Finding(model.parameters(), lr=1.0)
    inner.param_groups[0]["lr"] = inner.defaults["lr"] = "auto"
    optimizer = AROUND[around](inner)
    before = weights(model)
    for _ in range(4):
        train_step(optimizer, model, images())
    assert not torch.equal(weights(model), before) and inner.param_groups[0]["lr"] == "auto"


def test_curvature_is_checked_inside() -> None:
    report = check_curvature(mlp(), wrapped("kfac-graft-ema"), images()[0], F.cross_entropy, targets=images()[1])
    assert report.optimizer == "KFAC" and report.ok and len(report.layers) == 2


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_distributed_state_resumes_bit_for_bit(case: str, tmp_path: Path) -> None:
    """In files, into an optimizer that has not taken a step; as exactly as that inside does by itself."""
    model, optimizer = trained(case, 5)
    if case.startswith(("exact_ng", "lamb", "muon")):
        pytest.skip("the first batch tells the inner state's shapes, or the package's state is not plain")
    a, b = get_state_dict(model, optimizer)
    checkpoint.save({"model": a, "optimizer": b}, checkpoint_id=tmp_path, no_dist=True)
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(3):
        train_step(optimizer, model, images())
    other, second = trained(case, 0)
    template = dict(zip(("model", "optimizer"), get_state_dict(other, second), strict=True))
    checkpoint.load(template, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, second, model_state_dict=template["model"], optim_state_dict=template["optimizer"])
    for name in wrappers(second):
        for own, there in zip(second.state_dict()["state"].values(), saved["state"].values(), strict=True):
            assert same_state(own.get(name), there.get(name))
    for _ in range(3):
        train_step(second, other, images())
    if case.startswith(("kfac", "ekfac")):  # finds out again which rows are whose, on other sums than before
        torch.testing.assert_close(weights(model), weights(other), rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(weights(model), weights(other))


SENTENCES = [
    ("sgd", "sgd-ema", "of an optimizer with nothing around it and here is ema around an optimizer"),
    ("kfac", "kfac-ema", "of an optimizer with nothing around it and here is ema around an optimizer"),
    ("kfac-ema", "kfac", "of ema around an optimizer and here is an optimizer with nothing around it"),
    ("sgd-graft", "sgd-ema", "of graft around an optimizer and here is ema around an optimizer"),
    ("kfac-graft-ema", "kfac-ema", "of ema around graft around an optimizer and here is ema around an optimizer"),
    ("sgd-graft", "sgd-normalized", "of graft around an optimizer and here is normalized"),
    ("sgd", "sgd-normalized", "nothing around it and here is normalized around an optimizer"),
]


@pytest.mark.parametrize(("saved", "loaded", "sentence"), SENTENCES)
def test_a_state_of_other_wrappers_is_refused(saved: str, loaded: str, sentence: str) -> None:
    _, optimizer = trained(saved)
    _, other = trained(loaded, 2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=sentence):
        other.load_state_dict(optimizer.state_dict())
    assert same_state(other.state_dict(), before)
    with pytest.raises(ValueError, match=sentence):
        check_wrappers(other, optimizer.state_dict())


def test_wrong_uses_are_sentences() -> None:
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got Sequential"):
        EMA(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="EMA cannot go around LBFGS, which calls the model itself"):
        EMA(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="one average cannot go around another"):
        EMA(ScheduleFree(sgd))
    with pytest.raises(ValueError, match=r"Graft must be inside an average: EMA\(Graft"):
        Graft(EMA(sgd))
    with pytest.raises(ValueError, match="Normalized must be inside an average"):
        Normalized(ScheduleFree(sgd))
    with pytest.raises(ValueError, match="there is graft around this optimizer already"):
        Graft(Normalized(Graft(sgd)))
    assert wrappers(EMA(Normalized(Graft(sgd)))) == ["ema", "normalized", "graft"]


def test_parameters_that_never_had_a_gradient_have_no_state_of_a_rule() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer: Wrapper = Graft(torch.optim.Adam(model.parameters()))
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert len(optimizer.state_dict()["state"]) == 2
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()


@pytest.mark.parametrize("case", ["sgd-ema", "sgd0-free", "kfac-graft", "adamw-normalized", "kfac-hold"])
def test_a_model_may_change_its_precision_under_way(case: str) -> None:
    model, optimizer = trained(case, 3)
    inputs, targets = images()
    if isinstance(innermost(optimizer), (torch.optim.SGD, torch.optim.AdamW)):  # torch's own do not follow
        for state in innermost(optimizer).state.values():
            state |= {k: v.double() for k, v in state.items() if isinstance(v, Tensor) and v.dim()}
    model.double()
    for _ in range(3):
        train_step(optimizer, model, (inputs.double(), targets))
    assert weights(model).dtype == torch.float64 and bool(weights(model).isfinite().all())
    for own in optimizer.state.values():
        kept = own[wrappers(optimizer)[0]].values()
        assert all(t.dtype == torch.float64 for t in kept if isinstance(t, Tensor) and t.dim())


@pytest.mark.parametrize("case", ["sgd-ema", "sgd0-free", "kfac0-free", "kfac-graft", "adamw-normalized"])
def test_half_precision(case: str) -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = mlp().bfloat16(), images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = wrapped(case)(model)
        before = weights(model)
        for _ in range(5):
            train_step(optimizer, model, (inputs.bfloat16(), targets))
    assert not torch.equal(weights(model), before) and bool(weights(model).isfinite().all())
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    twin = mlp().bfloat16()
    second = wrapped(case)(twin)
    twin.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    assert same_state(second.state_dict(), saved[1])


# -- two processes -----------------------------------------------------------------------------------------------------

RANKED = [(case, problem) for case in CASES for problem in ("mlp", "groupnorm")]


def run(case: str, problem: str, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Weights and averages after training on this rank's share of every batch."""
    torch.manual_seed(0)
    model = PROBLEMS[problem][0]()
    optimizer: Any = wrapped(case)(model)
    network: nn.Module = DistributedDataParallel(model) if world > 1 else model
    inputs, targets = PROBLEMS[problem][1](96)
    for step in range(8):
        shares = inputs.roll(2 * step, 0).chunk(world)[rank], targets.roll(4 * step, 0).chunk(world)[rank]
        train_step(optimizer, network, shares)
    own = weights(model)
    if hasattr(optimizer, "averaged"):
        optimizer.eval()
    return own, weights(model)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    try:
        torch.save({case: run(*case, rank, 2) for case in RANKED}, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], tuple[Tensor, Tensor]]]:
    folder = tmp_path_factory.mktemp("wrapped")
    mp.start_processes(worker, args=(str(folder),), nprocs=2, start_method=START)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("case", "problem"), RANKED)
def test_two_processes_equal_one(case: str, problem: str, ranks: list[Any]) -> None:
    first, second = (results[case, problem] for results in ranks)
    alone = run(case, problem, 0, 1)
    for one, other, joint in zip(first, second, alone, strict=True):
        assert torch.equal(one, other), "replicas drifted apart"
        torch.testing.assert_close(one, joint, rtol=1e-7, atol=1e-7)


def test_accumulation_and_closures() -> None:
    """As the contract has them, and together."""
    ends = []
    for parts in (1, 3):
        torch.manual_seed(0)
        model, (inputs, targets) = mlp().double(), images()
        optimizer: Any = wrapped("kfac-graft-ema")(model)

        def closure(model: nn.Module = model, optimizer: Any = optimizer, parts: int = parts) -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros(())
            for x, y in zip(inputs.double().chunk(parts), targets.chunk(parts), strict=True):  # noqa: B023
                outputs = model(x)
                loss = F.cross_entropy(outputs, y) / parts
                differentiate(optimizer, loss, outputs)
                total = total + loss.detach()
            return total

        for _ in range(5):
            assert optimizer.step(closure) > 0
        optimizer.eval()
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)
