"""One contract for every optimizer: what a training script may rely on, whatever the method."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import pytorch_optimizer
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers import (
    EKFAC,
    KFAC,
    KPSVD,
    AdaFisher,
    AdaFisherW,
    AdaHessian,
    Categorical,
    CurvatureOptimizer,
    Deflation,
    ExactNaturalGradient,
    FishLeg,
    KFACCorrected,
    Lanczos,
    TwoLevelKFAC,
    build_optimizer,
)
from optimizers.packaged import EXCEPTIONS, muon
from tests import dense
from tests.optimizers.problems import PROBLEMS, conv_net, images, mlp

Build = Callable[[nn.Module], torch.optim.Optimizer]

# Updates and refreshes fall on different steps, so that inverses are now older than the factors and now not.
KRONECKER: dict[str, Any] = {
    "lr": 0.05, "update_every": 3, "refresh_every": 4, "batch_fraction": 1.0, "likelihood": Categorical(),
}  # fmt: skip

# Exact Fisher matrices of 16 examples want more damping.
EXACT: dict[str, Any] = {"lr": 0.05, "likelihood": Categorical(), "damping": 0.1}
TWO_LEVEL = KRONECKER | {"damping": 1.0}

OPTIMIZERS: dict[str, partial[torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "adam": partial(torch.optim.Adam, lr=1e-3, weight_decay=5e-4),
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
    "adafisher": partial(AdaFisher, lr=1e-3, update_every=3, weight_decay=5e-4),
    "adafisher_average": partial(
        AdaFisher, lr=1e-3, update_every=2, ema="average", normalize="none", damping=1e-2, weight_decay=5e-4
    ),
    "adafisherw": partial(AdaFisherW, lr=1e-3, update_every=3, weight_decay=1e-2),
    "adahessian": partial(AdaHessian, lr=0.05, weight_decay=5e-4),
    "adahessian_delayed": partial(AdaHessian, lr=0.05, hessian_every=3, samples=2, block_size=4),
    "kfac": partial(KFAC, **KRONECKER, weight_decay=5e-4),
    "kfac_tikhonov": partial(KFAC, **KRONECKER, damping_mode="tikhonov", sharing="reduce"),
    "kfac_empirical": partial(KFAC, **KRONECKER | {"fisher": "empirical", "batch_fraction": 0.5, "refresh_every": 2}),
    "kfac_exact": partial(KFAC, **KRONECKER, fisher="exact", kl_clip=None, damping=0.1),
    "ekfac": partial(EKFAC, **KRONECKER | {"refresh_every": 6}),
    "ekfac_empirical": partial(EKFAC, **KRONECKER | {"fisher": "empirical", "batch_fraction": 0.5, "update_every": 1}),
    "kpsvd": partial(KPSVD, **KRONECKER, weight_decay=5e-4),
    "deflation": partial(Deflation, **KRONECKER | {"batch_fraction": 0.5}),
    "deflation_empirical": partial(Deflation, **KRONECKER, fisher="empirical", solver="power"),
    "kfac_corrected": partial(KFACCorrected, **KRONECKER),
    "lanczos": partial(Lanczos, **KRONECKER | {"refresh_every": 6}),
    "exact_ng": partial(ExactNaturalGradient, **EXACT, weight_decay=5e-4),
    "exact_ng_layer": partial(ExactNaturalGradient, **EXACT, blocks="layer", damping_mode="heuristic", update_every=3),
    "exact_ng_empirical": partial(
        ExactNaturalGradient, **EXACT, fisher="empirical", batch_fraction=0.5, update_every=2
    ),
    "exact_ng_exact": partial(ExactNaturalGradient, **EXACT, fisher="exact", kl_clip=None),
    "twolevel_kfac": partial(TwoLevelKFAC, **TWO_LEVEL, weight_decay=5e-4),
    "twolevel_kfac_krylov": partial(
        TwoLevelKFAC, **TWO_LEVEL | {"batch_fraction": 0.5, "refresh_every": 6}, krylov=True
    ),
    "twolevel_kfac_residual": partial(TwoLevelKFAC, **TWO_LEVEL, coarse="residual", fisher="empirical"),
    "twolevel_kfac_tselepidis": partial(TwoLevelKFAC, **TWO_LEVEL, coarse="tselepidis"),
    "twolevel_kfac_spectral": partial(TwoLevelKFAC, **TWO_LEVEL, coarse="spectral", damping_mode="tikhonov"),
    "fishleg": partial(FishLeg, lr=0.02, damping=0.1, aux_every=3, weight_decay=5e-4, likelihood=Categorical()),
    "fishleg_each": partial(FishLeg, lr=0.02, damping=0.1, aux_every=1, aux_lr=1e-3, likelihood=Categorical()),
    "fishleg_rank_one": partial(
        FishLeg,
        lr=0.02,
        damping=0.1,
        aux_every=1,
        aux_steps=2,
        product="rank_one",
        u="gaussian",
        precondition_aux=False,
        warmup_steps=2,
        likelihood=Categorical(),
    ),
    "shampoo": partial(pytorch_optimizer.Shampoo, lr=0.05, preconditioning_compute_steps=1, matrix_eps=1e-4),
    "soap": partial(pytorch_optimizer.SOAP, lr=3e-3, precondition_frequency=3),
    "lamb": partial(pytorch_optimizer.Lamb, lr=1e-3, weight_decay=5e-4),
    "lion": partial(pytorch_optimizer.Lion, lr=1e-3),
    "muon": partial(muon, lr=5e-3),  # type: ignore[dict-item]
}
OURS = [
    name
    for name, factory in OPTIMIZERS.items()
    if isinstance(factory.func, type) and issubclass(factory.func, CurvatureOptimizer)
]


def every(point: str, names: Iterable[str] = tuple(OPTIMIZERS)) -> list[Any]:
    """Optimizers; one that is known not to meet a point of the contract must fail its test, or it is known wrongly."""
    reasons = {name: reason for (name, excepted), reason in EXCEPTIONS.items() if excepted == point}
    marks = {name: [pytest.mark.xfail(reason=reason, strict=True)] for name, reason in reasons.items()}
    return [pytest.param(name, marks=marks.get(name, [])) for name in names]


def build(name: str, model: nn.Module, params: Any = None, **extra: Any) -> torch.optim.Optimizer:
    target: Any = OPTIMIZERS[name].func
    options = OPTIMIZERS[name].keywords | extra
    if params is None:
        return build_optimizer(target, model, **options)
    if name in OURS and target is not AdaHessian:
        return target(model, params, **options)
    return target(params, **options)


def train_step(
    optimizer: torch.optim.Optimizer, model: nn.Module, batch: tuple[Tensor, Tensor], micro: int = 1
) -> float:
    optimizer.zero_grad()
    total = 0.0
    for inputs, targets in zip(batch[0].chunk(micro), batch[1].chunk(micro), strict=True):
        outputs = model(inputs)
        loss = F.cross_entropy(outputs, targets) / micro
        if isinstance(optimizer, CurvatureOptimizer):
            optimizer.backward(loss, outputs)
        else:
            loss.backward()
        total += loss.item()
    optimizer.step()
    return total


def weights(model: nn.Module) -> Tensor:
    return dense.flatten([p.detach() for p in model.parameters()])


def same_state(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_state(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_trainable_tensor_moves_and_no_other(name: str, problem: str) -> None:
    factory, data = PROBLEMS[problem]
    model, batch = factory(), data()
    wide = (
        problem == "resnet" and name in OURS and "max_factor_dim" in inspect.signature(OPTIMIZERS[name].func).parameters
    )
    optimizer = build(name, model, **{"max_factor_dim": 128} if wide else {})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):  # an even number of equal steps may lead back
        train_step(optimizer, model, batch)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) != p.requires_grad, n
        assert bool(p.isfinite().all()), n


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_goes_down(name: str) -> None:
    model, batch = conv_net(), images(16)
    optimizer = build(name, model)
    losses = [train_step(optimizer, model, batch) for _ in range(40)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("problem", ["conv", "vit", "tied", "frozen"])
def test_state_round_trip_is_bit_for_bit(name: str, problem: str) -> None:
    """20 steps = 10 + save + load into a fresh model and optimizer + 10; through weights_only loading."""
    factory, data = PROBLEMS[problem]
    model, batch = factory(), data()
    optimizer = build(name, model)
    for _ in range(10):
        train_step(optimizer, model, batch)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    for _ in range(10):
        train_step(optimizer, model, batch)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    original = copy.deepcopy(saved)
    resumed = factory()
    second = build(name, resumed)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    for _ in range(10):
        train_step(second, resumed, batch)
    assert torch.equal(weights(model), weights(resumed))
    assert same_state(optimizer.state_dict(), second.state_dict())
    if name in OURS:
        assert same_state(saved["optimizer"], original["optimizer"]), "loading must not alias or change its argument"


@pytest.mark.parametrize("name", OURS)
def test_state_of_another_model_is_refused_with_a_sentence(name: str) -> None:
    optimizer = build(name, mlp())
    with pytest.raises(ValueError, match="no curvature: it was not saved by"):
        optimizer.load_state_dict(torch.optim.Adam(mlp().parameters()).state_dict())


@pytest.mark.parametrize(("saved", "loaded"), [("kfac", "deflation"), ("ekfac", "kfac"), ("adafisher", "kpsvd")])
def test_state_of_another_method_is_refused_with_a_sentence(saved: str, loaded: str) -> None:
    model, batch = mlp(), images()
    optimizer = build(saved, model)
    train_step(optimizer, model, batch)
    other = build(loaded, mlp())
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="belong: another method saved it"):
        other.load_state_dict(optimizer.state_dict())
    assert same_state(other.state_dict(), before)


def test_state_with_a_foreign_layer_or_shape_is_refused() -> None:
    model, batch = mlp(), images()
    optimizer = build("adafisher", model)
    train_step(optimizer, model, batch)
    state = optimizer.state_dict()
    layers = state["curvature"]["layers"]
    with pytest.raises(ValueError, match="'elsewhere', which is not a layer of this model"):
        build("adafisher", mlp()).load_state_dict(
            {**state, "curvature": {"steps": 1, "layers": {"elsewhere": layers["1"]}}}
        )
    with pytest.raises(ValueError, match=r"factor H of '1' is \[1, 7\] in the state but \[1, 193\] here"):
        build("adafisher", mlp()).load_state_dict({**state, "curvature": {"steps": 1, "layers": {"1": layers["3"]}}})


@pytest.mark.parametrize("name", OURS)
def test_state_crosses_wrappers(name: str) -> None:
    """Curvature is keyed by the bare model's names, so a DataParallel run's state loads into the bare model."""
    model, batch = mlp(), images()
    wrapped = build(name, nn.DataParallel(model))
    train_step(wrapped, model, batch)
    bare = build(name, mlp())
    bare.load_state_dict(wrapped.state_dict())
    assert same_state(bare.state_dict(), wrapped.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_closures(name: str) -> None:
    results = []
    for closed in (False, True):
        torch.manual_seed(0)
        model, batch = mlp(), images()
        optimizer = build(name, model)

        def closure(optimizer: Any = optimizer, model: nn.Module = model, batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            outputs = model(batch[0])
            loss = F.cross_entropy(outputs, batch[1])
            if isinstance(optimizer, CurvatureOptimizer):
                optimizer.backward(loss, outputs)
            else:
                loss.backward()
            return loss

        for _ in range(4):
            if closed:
                assert optimizer.step(closure).item() > 0
            else:
                train_step(optimizer, model, batch)
        results.append(weights(model))
    assert torch.equal(*results)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", every("micro-batches"))
@pytest.mark.parametrize("problem", ["mlp", "groupnorm", "embedding"])
def test_micro_batches_equal_one_batch(name: str, problem: str) -> None:
    factory, data = PROBLEMS[problem]
    results = []
    for micro in (1, 3):
        torch.manual_seed(0)
        # So many examples that factors have full rank: in a null space no basis is the right one, and EKFAC's moments
        # of what comes there later are those in the one that rounding chose.
        model, batch = factory(), data(96)
        optimizer = build(name, model)
        for _ in range(4):
            train_step(optimizer, model, batch, micro)
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", every("groups"))
def test_groups_have_their_own_learning_rate(name: str) -> None:
    model, batch = mlp(), images()
    groups = [
        {"params": list(model[1].parameters())},
        {"params": list(model[3].parameters()), "lr": 0.0, "weight_decay": 0.0},
    ]
    optimizer = build(name, model, groups)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        train_step(optimizer, model, batch)
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [True, True, False, False]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rate_schedulers_take_effect(name: str) -> None:
    model, batch = mlp(), images()
    optimizer = build(name, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    train_step(optimizer, model, batch)
    scheduler.step()
    before = weights(model)
    train_step(optimizer, model, batch)
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("name", OURS)
def test_close_removes_every_hook(name: str) -> None:
    model = PROBLEMS["vit"][0]()
    optimizer = build(name, model)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())

    assert hooks() > 0
    optimizer.close()
    assert hooks() == 0
    optimizer.close()  # idempotent


@pytest.mark.parametrize("name", OURS)
def test_a_deep_copy_of_the_model_feeds_nobody(name: str) -> None:
    model, batch = mlp(), images()
    optimizer = build(name, model)
    twin = copy.deepcopy(model)
    outputs = twin(batch[0])
    loss = F.cross_entropy(outputs, batch[1])
    if optimizer.blocks:
        optimizer.backward(loss, outputs)  # would send sampled gradients through whatever was recorded
    else:
        loss.backward()
    assert not any(block.observed for block in optimizer.blocks.values())
    train_step(optimizer, model, batch)
    assert not torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize("name", OURS)
def test_dropping_the_optimizer_frees_it(name: str) -> None:
    """Hooks on a live model do not keep a dead optimizer alive."""
    import gc
    import weakref

    model, batch = mlp(), images()
    optimizer = build(name, model)
    train_step(optimizer, model, batch)
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    model(batch[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    model, (inputs, targets) = conv_net().to(dtype), images()
    optimizer = build(name, model)
    before = weights(model)
    for _ in range(3):
        train_step(optimizer, model, (inputs.to(dtype), targets))
    after = weights(model)
    assert after.dtype == dtype and bool(after.isfinite().all()) and not torch.equal(before, after)


@pytest.mark.parametrize("name", OURS)
def test_autocast_and_a_gradient_scaler(name: str) -> None:
    """A scaled bf16 run stays close to the float32 one, and an overflowed step leaves no trace."""
    results = []
    for mixed in (False, True):
        torch.manual_seed(0)
        model, (inputs, targets) = mlp(), images()
        optimizer = build(name, model)
        scaler = torch.amp.GradScaler("cpu", enabled=mixed, init_scale=2.0**10)
        for step in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                outputs = model(inputs)
                loss = F.cross_entropy(outputs.float(), targets)
            if mixed and step == 2:  # an overflow: the scaler skips this step
                optimizer.backward(scaler.scale(loss) * float("inf"), outputs, scale=scaler.get_scale())
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    outputs = model(inputs)
                    loss = F.cross_entropy(outputs.float(), targets)
            optimizer.backward(scaler.scale(loss), outputs, scale=scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
        results.append(weights(model))
    assert bool(results[1].isfinite().all())
    torch.manual_seed(0)
    travelled = results[0] - weights(mlp())
    assert float((results[1] - results[0]).norm()) < 0.3 * float(travelled.norm())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_built_late_or_thawed_later_trains_everything(name: str) -> None:
    model, batch = PROBLEMS["frozen"][0](), images()
    optimizer = build(name, model)
    for _ in range(2):
        train_step(optimizer, model, batch)
    for p in model.parameters():
        p.requires_grad_(True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        train_step(optimizer, model, batch)
    assert not [n for n, p in model.named_parameters() if torch.equal(p, before[n])]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_without_a_trainable_layer(name: str, frozen: bool) -> None:
    """Bare parameters alone (a toy function), or all that is left beside frozen layers: the fallback, quietly."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(2))
            self.layer = nn.Linear(2, 2).requires_grad_(False) if frozen else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + self.shift)

    model = Shifted()
    optimizer = build(name, model)
    before = model.shift.detach().clone()
    for _ in range(3):
        train_step(optimizer, model, (torch.randn(4, 2), torch.tensor([0, 1, 0, 1])))
    assert bool((model.shift != before).all()) and bool(model.shift.isfinite().all())
