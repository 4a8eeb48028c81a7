"""One contract for every optimizer: what a training script may rely on, whatever the method."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import pytorch_optimizer
import torch
import torch.nn.functional as F
from torch import nn

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
    NewtonMuon,
    TwoLevelKFAC,
)
from optimizers.packaged import EXCEPTIONS, muon
from optimizers.shampoo import shampoo
from optimizers.testing import parametrize_with_checks
from optimizers.testing.checks import check_every_trainable_tensor_moves
from optimizers.testing.loop import Maker, same_state, train_step, weights
from tests.optimizers.problems import TORCHVISION, conv_net, images, mlp

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
    "kfac_measured": partial(KFAC, **KRONECKER, kl_of="measured", kl_warmup=4, damping_unit="layer", damping=1.0),
    "kfac_auto": partial(KFAC, **KRONECKER | {"lr": "auto", "momentum": "auto"}, damping=1.0, decoupled_decay=True),
    "kfac_damping_auto": partial(KFAC, **KRONECKER, damping="auto"),
    "kfac_direction": partial(KFAC, **KRONECKER, kl_of="direction", early_updates=False),
    "ekfac": partial(EKFAC, **KRONECKER | {"refresh_every": 6}),
    "ekfac_empirical": partial(EKFAC, **KRONECKER | {"fisher": "empirical", "batch_fraction": 0.5, "update_every": 1}),
    "ekfac_rank": partial(EKFAC, **KRONECKER, rank=2),
    "ekfac_eigh": partial(EKFAC, **KRONECKER, basis="eigh"),
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
    "shampoo": partial(shampoo, lr=3e-3, preconditioning_compute_steps=1),
    "shampoo_own_length": partial(pytorch_optimizer.Shampoo, lr=0.05, preconditioning_compute_steps=1, matrix_eps=1e-4),
    "soap": partial(pytorch_optimizer.SOAP, lr=3e-3, precondition_frequency=3),
    "lamb": partial(pytorch_optimizer.Lamb, lr=1e-3, weight_decay=5e-4),
    "lion": partial(pytorch_optimizer.Lion, lr=1e-3),
    "muon": partial(muon, lr=5e-3),
    "newton_muon": partial(
        # In half precision, rounding leaves what six examples span; there A + damping is damping alone.
        NewtonMuon, lr=5e-3, damping=10.0, update_every=3, refresh_every=4, weight_decay=5e-4
    ),
    "adabelief": partial(pytorch_optimizer.AdaBelief, lr=1e-3),
    "adan": partial(pytorch_optimizer.Adan, lr=1e-3),
    "ademamix": partial(pytorch_optimizer.AdEMAMix, lr=1e-3),
    "adamp": partial(pytorch_optimizer.AdamP, lr=1e-3),
    "stableadamw": partial(pytorch_optimizer.StableAdamW, lr=1e-3),
}
OURS = [
    name
    for name, factory in OPTIMIZERS.items()
    if isinstance(factory.func, type) and issubclass(factory.func, CurvatureOptimizer)
]
THEIRS = [
    name
    for name, factory in OPTIMIZERS.items()
    if name not in OURS and not factory.func.__module__.startswith("torch.")
]


# Checks by the points of EXCEPTIONS.
POINTS = {
    "groups": (
        "check_groups_have_their_own_learning_rate",
        "check_filtered_parameters",
        "check_add_param_group_later",
    ),
    "micro-batches": ("check_micro_batches_equal_one_batch",),
    "copies": ("check_copies_of_model_and_optimizer",),
    "tensor lr": ("check_tensor_learning_rate",),
    "NaN": ("check_nan_gradients_do_not_pass_silently",),
    "maximize": ("check_maximize",),
}
# What holds for all of a package.
PACKAGED = "pytorch_optimizer"


def known_failures() -> dict[str, dict[str, str]]:
    """By optimizer: the checks it is known not to pass."""
    found: dict[str, dict[str, str]] = {name: {} for name in OPTIMIZERS}
    for (name, point), reason in EXCEPTIONS.items():
        for one in THEIRS if name == PACKAGED else {name} & set(OPTIMIZERS):
            found[one] |= dict.fromkeys(POINTS.get(point, ()), reason)
    unstated = "the check's loss states no targets, which damping='auto' asks for"
    found["kfac_damping_auto"]["check_weight_decay_pulls_to_zero"] = unstated
    return found


def every(point: str, names: Iterable[str] = tuple(OPTIMIZERS)) -> list[Any]:
    """Optimizers; one that is known not to meet a point of the contract must fail its test, or it is known wrongly."""
    reasons = {name: reason for (name, excepted), reason in EXCEPTIONS.items() if excepted == point}
    marks = {name: [pytest.mark.xfail(reason=reason, strict=True)] for name, reason in reasons.items()}
    return [pytest.param(name, marks=marks.get(name, [])) for name in names]


def build(name: str, model: nn.Module, params: Any = None, **extra: Any) -> Any:
    return Maker(OPTIMIZERS[name])(model, params, **extra)


@pytest.mark.filterwarnings("ignore:weights in half precision")
@parametrize_with_checks(OPTIMIZERS, expected_failures=known_failures())
def test_contract(make_optimizer: Maker, check: Callable[[Maker], None]) -> None:
    check(make_optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("problem", TORCHVISION)
def test_torchvisions_nets_train_whole(name: str, problem: str) -> None:
    make = Maker(OPTIMIZERS[name])
    if problem == "resnet" and name in OURS and make.accepts("max_factor_dim"):
        make = Maker(make, max_factor_dim=128)
    check_every_trainable_tensor_moves(make, {problem: TORCHVISION[problem]})


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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_half_precision(name: str) -> None:
    dtype = torch.bfloat16
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
