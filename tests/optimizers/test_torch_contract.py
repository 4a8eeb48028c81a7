"""What torch promises of its own optimizers, of all twelve here."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.utils.checkpoint import checkpoint as torch_checkpoint

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
)
from optimizers.base import descend, descend_scaled
from tests.optimizers.test_contract import same_state

FISHER: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "weight_decay": 0.01, "likelihood": Categorical()}
KRONECKER: dict[str, Any] = FISHER | {"update_every": 2, "refresh_every": 3, "batch_fraction": 1.0}

BUILDERS: dict[str, Callable[..., CurvatureOptimizer]] = {
    "AdaFisher": partial(AdaFisher, lr=1e-2, update_every=2, weight_decay=0.01),
    "AdaFisherW": partial(AdaFisherW, lr=1e-2, update_every=2, weight_decay=0.01),
    "AdaHessian": partial(AdaHessian, lr=0.05, hessian_every=2, weight_decay=0.01),
    "FishLeg": partial(FishLeg, lr=0.02, aux_every=2, aux_lr=1e-3, likelihood=Categorical()),
    "ExactNaturalGradient": partial(ExactNaturalGradient, **FISHER, update_every=2),
    "TwoLevelKFAC": partial(TwoLevelKFAC, **KRONECKER),
} | {kind.__name__: partial(kind, **KRONECKER) for kind in (KFAC, EKFAC, KPSVD, Deflation, KFACCorrected, Lanczos)}

KRONECKER_METHODS = [name for name in BUILDERS if name not in ("AdaFisher", "AdaFisherW", "AdaHessian", "FishLeg")]

every = pytest.mark.parametrize("name", BUILDERS)


class Net(nn.Module):
    """Affine layers, a norm and a free parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)
        self.shift = nn.Parameter(torch.zeros(6))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x)) + self.shift))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(12, 5, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (12,), generator=generator)


def advance(
    model: nn.Module,
    optimizer: CurvatureOptimizer,
    steps: range,
    dtype: torch.dtype = torch.float32,
    sign: float = 1.0,
) -> None:
    for step in steps:
        x, y = batch(step, dtype)
        optimizer.zero_grad()
        outputs = model(x)
        optimizer.backward(sign * F.cross_entropy(outputs, y), outputs)
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(name: str, steps: int = 5, **options: Any) -> tuple[Net, CurvatureOptimizer]:
    model = net()
    optimizer = BUILDERS[name](model, **options)
    advance(model, optimizer, range(steps))
    return model, optimizer


# -- precision ---------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("way", ["up", "down", "half"])
def test_a_state_of_another_precision_is_cast(name: str, way: str) -> None:
    """Loaded and carried on, it takes nearly the steps that the precision it was saved in takes."""
    saved, here = {
        "up": (torch.float32, torch.float64),
        "down": (torch.float64, torch.float32),
        "half": (torch.float32, torch.bfloat16),
    }[way]
    sure = {"fisher": "exact"} if name in KRONECKER_METHODS else {}  # draws depend on the precision
    model = net().to(saved)
    optimizer = BUILDERS[name](model, **sure)
    advance(model, optimizer, range(5), saved)
    other = net().to(here)
    second = BUILDERS[name](other, **sure)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(optimizer.state_dict())
    wanted = torch.float64 if here == torch.float64 else torch.float32
    for block in second.blocks.values():
        assert {t.dtype for t in block.factors.values() if t.is_floating_point()} <= {wanted}
    advance(model, optimizer, range(5, 9), saved)
    advance(other, second, range(5, 9), here)
    assert bool(weights(other).isfinite().all())
    if way != "half":
        torch.testing.assert_close(weights(other).double(), weights(model).double(), rtol=2e-2, atol=2e-3)


@every
@pytest.mark.parametrize("steps", [0, 1, 4, 5])
def test_a_model_may_change_its_precision_under_way(name: str, steps: int) -> None:
    """As a copy in the new precision does that loads the state."""
    model, optimizer = trained(name, steps)
    other = net().double()
    second = BUILDERS[name](other)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(optimizer.state_dict())
    model.double()
    advance(model, optimizer, range(steps, steps + 5), torch.float64)
    advance(other, second, range(steps, steps + 5), torch.float64)
    assert torch.equal(weights(model), weights(other))
    assert same_state(optimizer.state_dict(), second.state_dict())
    model.float()
    advance(model, optimizer, range(20, 23))
    assert bool(weights(model).isfinite().all())


# -- copies ------------------------------------------------------------------------------------------------------------


def together(model: nn.Module, optimizer: CurvatureOptimizer) -> tuple[nn.Module, CurvatureOptimizer]:
    return copy.deepcopy((model, optimizer))


def optimizer_first(model: nn.Module, optimizer: CurvatureOptimizer) -> tuple[nn.Module, CurvatureOptimizer]:
    return copy.deepcopy((optimizer, model))[::-1]


def pickled(model: nn.Module, optimizer: CurvatureOptimizer) -> tuple[nn.Module, CurvatureOptimizer]:
    return pickle.loads(pickle.dumps((model, optimizer)))


def saved_whole(model: nn.Module, optimizer: CurvatureOptimizer) -> tuple[nn.Module, CurvatureOptimizer]:
    buffer = io.BytesIO()
    torch.save({"m": model, "o": optimizer}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    return loaded["m"], loaded["o"]


def held_by_its_model(model: nn.Module, optimizer: CurvatureOptimizer) -> tuple[nn.Module, CurvatureOptimizer]:
    model.trainer = {"optimizer": optimizer}  # type: ignore[assignment]
    twin = copy.deepcopy(model)
    del model.trainer
    return twin, twin.trainer["optimizer"]  # type: ignore[index]


COPIES = [together, optimizer_first, pickled, saved_whole, held_by_its_model]


@every
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("steps", [0, 5])
def test_a_copy_trains_like_the_original_and_apart_from_it(name: str, way: Callable[..., Any], steps: int) -> None:
    model, optimizer = trained(name, steps)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # which wraps step
    twin, second = way(model, optimizer)
    assert same_state(second.state_dict(), optimizer.state_dict())
    before = weights(model)
    advance(twin, second, range(steps, steps + 6))
    assert torch.equal(weights(model), before)
    advance(model, optimizer, range(steps, steps + 6))
    assert torch.equal(weights(twin), weights(model)) and not torch.equal(before, weights(model))
    assert same_state(second.state_dict(), optimizer.state_dict())
    assert second.coverage().rows == optimizer.coverage().rows


@every
def test_a_copy_of_the_optimizer_alone_brings_its_own_model(name: str) -> None:
    model, optimizer = trained(name)
    if name == "AdaHessian":
        optimizer = AdaHessian(model.parameters(), model=model, lr=0.05)
    second = copy.deepcopy(optimizer)
    assert second.model is not None and second.model is not model
    before = weights(model)
    advance(second.model, second, range(5, 10))
    assert torch.equal(weights(model), before)
    assert {id(p) for p in second.model.parameters()} == {id(p) for g in second.param_groups for p in g["params"]}
    advance(model, optimizer, range(5, 10))
    assert torch.equal(weights(model), weights(second.model))


@every
def test_a_new_optimizer_takes_away_dead_hooks(name: str) -> None:
    model, _ = trained(name)

    def hooks(m: nn.Module) -> int:
        return sum(len(k._forward_hooks) + len(k._forward_pre_hooks) for k in m.modules())

    twin = copy.deepcopy(model)
    assert hooks(twin) == hooks(model)
    fresh = hooks(twin)
    optimizer = BUILDERS[name](twin)
    alone = net()
    other = BUILDERS[name](alone)
    assert hooks(twin) == hooks(alone) > 0 and fresh > 0
    other.close()
    optimizer.close()
    assert hooks(twin) == 0


def test_a_copy_of_a_stream_is_refused_with_a_sentence() -> None:
    optimizer = FishLeg(net(), likelihood=Categorical(), aux_loader=[torch.randn(4, 5)])
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"aux_loader cannot be copied or pickled.*state_dict\(\)"):
            attempt(optimizer)


# -- distributed checkpoints and hooks ---------------------------------------------------------------------------------

STATE_OPTIONS = {
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}


@every
@pytest.mark.parametrize("way", STATE_OPTIONS)
@pytest.mark.parametrize("seen", [0, 3])
def test_a_distributed_state_resumes_bit_for_bit(name: str, way: str, seen: int) -> None:
    """Into an optimizer that has not taken a step, and into one that has."""
    options = STATE_OPTIONS[way]
    model, optimizer = trained(name)
    a, b = get_state_dict(model, optimizer, options=options)
    a, b = copy.deepcopy((a, b))
    advance(model, optimizer, range(5, 10))
    other, second = trained(name, seen)
    set_state_dict(other, second, model_state_dict=a, optim_state_dict=b, options=options)
    advance(other, second, range(5, 10))
    assert torch.equal(weights(model), weights(other))
    assert same_state(second.state_dict(), optimizer.state_dict())


@every
def test_a_distributed_state_in_files_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, optimizer = trained(name)
    a, b = get_state_dict(model, optimizer)
    checkpoint.save({"model": a, "optimizer": b}, checkpoint_id=tmp_path, no_dist=True)
    saved = copy.deepcopy(optimizer.state_dict())
    advance(model, optimizer, range(5, 10))
    for seen in (0, 3):
        other, second = trained(name, seen)
        template = dict(zip(("model", "optimizer"), get_state_dict(other, second), strict=True))
        if seen == 0 and name in ("ExactNaturalGradient", "TwoLevelKFAC"):  # the first batch tells their shapes
            with pytest.raises(checkpoint.api.CheckpointException):
                checkpoint.load(template, checkpoint_id=tmp_path, no_dist=True)
            continue
        checkpoint.load(template, checkpoint_id=tmp_path, no_dist=True)

        def put(other: nn.Module = other, second: Any = second, template: Any = template) -> None:
            parts = {"model_state_dict": template["model"], "optim_state_dict": template["optimizer"]}
            set_state_dict(other, second, **parts)

        put()
        found = second.state_dict()
        found["curvature"]["rows"] = saved["curvature"]["rows"]  # which are found out anew
        assert same_state(found, saved)
        advance(other, second, range(5, 10))
        # Tensors that a fresh state holds lie in memory by rows, where a decomposition's may lie by columns: products
        # with them round differently.
        tolerance = 0.0 if seen else 1e-3
        torch.testing.assert_close(weights(model), weights(other), rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("error")
@every
@pytest.mark.parametrize("way", STATE_OPTIONS)
def test_asking_for_the_state_before_the_first_step_changes_nothing(name: str, way: str) -> None:
    results = []
    for asked in (False, True):
        model, optimizer = trained(name, 0)
        if asked:
            get_optimizer_state_dict(model, optimizer, options=STATE_OPTIONS[way])
            assert optimizer.steps == 0 and optimizer.diagnostics().get("curvature/updates", 0) == 0
        advance(model, optimizer, range(6))
        results.append((weights(model), optimizer.state_dict()))
    assert torch.equal(results[0][0], results[1][0])
    assert same_state(results[0][1], results[1][1])


@every
def test_a_step_at_rate_zero_is_a_step(name: str) -> None:
    """A warm-up begins at 0, and its gradients are not zero: what it sees counts."""
    model = net()
    optimizer = BUILDERS[name](model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    advance(model, optimizer, range(1))
    assert optimizer.steps == 1
    if name not in ("AdaHessian", "FishLeg"):
        assert all(block.factors for block in optimizer.blocks.values())


@every
def test_state_hooks_see_and_change_everything(name: str) -> None:
    _, optimizer = trained(name)
    seen: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before"))

    def mark(o: Any, state: dict[str, Any]) -> dict[str, Any]:
        assert state["curvature"]["steps"] == 5
        assert any("curvature" in entry for entry in state["state"].values())
        state["curvature"]["steps"] += 100
        for layer in state["curvature"]["layers"].values():
            layer.update({key: 2 * t for key, t in layer.items()})
        return state | {"mine": "note"}

    optimizer.register_state_dict_post_hook(mark)
    state = optimizer.state_dict()
    assert seen == ["before"] and state["mine"] == "note"
    _, second = trained(name, 0)

    def before(o: Any, state: dict[str, Any]) -> dict[str, Any]:
        assert state["mine"] == "note"
        return state | {"curvature": state["curvature"] | {"steps": 50}}

    second.register_load_state_dict_pre_hook(before)
    second.register_load_state_dict_post_hook(lambda o: seen.append(o.steps))
    second.register_load_state_dict_post_hook(lambda o: seen.append({n: dict(b.factors) for n, b in o.blocks.items()}))
    second.load_state_dict(state)
    assert seen[1] == 50
    for layer, factors in seen[2].items():
        original = optimizer.blocks[layer].factors
        if name != "ExactNaturalGradient":  # whose samples are elsewhere
            assert same_state(factors, {key: 2 * t for key, t in original.items()})
    assert len(second._optimizer_load_state_dict_post_hooks) == 2
    assert len(optimizer._optimizer_state_dict_post_hooks) == 1


@every
def test_a_state_with_curvature_at_the_top_alone_is_loaded(name: str) -> None:
    """Those of earlier versions."""
    model, optimizer = trained(name)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry.pop("curvature", None)
    other, second = trained(name, 0)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(state)
    for twin, one in ((model, optimizer), (other, second)):
        advance(twin, one, range(5, 9))
    assert torch.equal(weights(model), weights(other))


# -- steps with nothing to do ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@every
@pytest.mark.parametrize("steps", [0, 4])
def test_a_step_without_gradients_does_nothing(name: str, steps: int) -> None:
    model, optimizer = trained(name, steps)
    optimizer.zero_grad()
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    assert optimizer.step() is None
    assert optimizer.step(lambda: 0.1) == 0.1  # a closure that does not call backward
    assert optimizer.step(lambda: model(batch(0)[0]).sum().item()) is not None  # nor does this one
    assert torch.equal(weights(model), before) and same_state(optimizer.state_dict(), state)
    twin, second = trained(name, steps)
    for one, other in ((model, optimizer), (twin, second)):
        advance(one, other, range(steps, steps + 4))
    assert torch.equal(weights(model), weights(twin))


# -- groups and flags --------------------------------------------------------------------------------------------------


@every
def test_what_a_loaded_group_lacks_comes_from_the_defaults(name: str) -> None:
    model, optimizer = trained(name)
    state = copy.deepcopy(optimizer.state_dict())
    for key in set(state["param_groups"][0]) - {"params"}:
        other, second = trained(name, 0)
        other.load_state_dict(model.state_dict())
        missing = copy.deepcopy(state)
        del missing["param_groups"][0][key]
        second.load_state_dict(missing)
        assert same_state(second.state_dict(), state), key
        twin, first = copy.deepcopy((model, optimizer))
        for one, it in ((twin, first), (other, second)):
            advance(one, it, range(5, 8))
        assert torch.equal(weights(twin), weights(other)), key


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learning_rate_may_be_a_tensor(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Scheduled in place, too."""
    results = []
    for as_tensor in (False, True):
        model = net().to(dtype)
        lr: Any = torch.full(shape, 0.0625, dtype=torch.float32) if as_tensor else 0.0625
        optimizer = BUILDERS[name](model, lr=lr)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(5):
            advance(model, optimizer, range(step, step + 1), dtype)
            scheduler.step()
        assert not as_tensor or optimizer.param_groups[0]["lr"] is lr
        assert float(lr) == (0.0625 / 32 if as_tensor else 0.0625)
        results.append(weights(model))
    assert torch.equal(*results)


def test_a_tensor_on_an_accelerator_is_multiplied_with_rather_than_read() -> None:
    torch.manual_seed(0)
    params, moments = [torch.randn(3, 2), torch.randn(4)], [torch.randn(3, 2), torch.randn(4)]
    for sizes in ([0.5, 2.0], [1.0, 1.0]):
        results = []
        for lr in (0.125, torch.tensor(0.125)):
            moved = [p.clone() for p in params]
            descend_scaled(moved, moments, [m.abs() + 1 for m in moments], sizes, lr)
            descend(moved, moments, lr)
            results.append(torch.cat([p.flatten() for p in moved]))
        torch.testing.assert_close(*results)


def test_a_learning_rate_of_many_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="lr must be one number, got a tensor of 3"):
        AdaFisher(net(), lr=torch.ones(3))  # type: ignore[arg-type]


@every
@pytest.mark.parametrize("way", ["all", "groups", "group option"])
def test_to_maximize_is_to_minimise_the_negated_loss(name: str, way: str) -> None:
    results = []
    for sign in (1.0, -1.0):
        model = net()
        groups: Any = None if way == "all" else [{"params": [p]} for p in model.parameters()]
        flag = {"maximize": True} if sign < 0 else {}
        if way == "group option":
            groups, flag = [group | flag for group in groups], {}
        given = {} if groups is None else {"params": groups} if name != "AdaHessian" else {"model": model}
        first = groups if name == "AdaHessian" and groups is not None else model
        optimizer = BUILDERS[name](first, **given, **flag)
        advance(model, optimizer, range(6), sign=sign)
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert not torch.equal(results[0], weights(net()))


@every
def test_gradients_are_as_they_were_after_a_step_that_maximizes(name: str) -> None:
    model = net()
    optimizer = BUILDERS[name](model, maximize=True)
    x, y = batch(0)
    outputs = model(x)
    loss = F.cross_entropy(outputs, y)
    wanted = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    if name == "AdaHessian":
        with warnings.catch_warnings():  # torch says once a process that this makes a cycle
            warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph")
            loss.backward(create_graph=True)
    else:
        optimizer.backward(loss, outputs)
    optimizer.step()
    for p, g in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g)
        assert p.grad is not None and not p.grad.requires_grad


@every
def test_flags_of_torch_that_ask_for_nothing_are_taken(name: str) -> None:
    nothing = {"foreach": None, "capturable": False, "fused": None, "differentiable": False, "maximize": False}
    model = net()
    optimizer = BUILDERS[name](model, **nothing)
    advance(model, optimizer, range(3))
    twin, _ = trained(name, 3)
    assert torch.equal(weights(model), weights(twin))
    for flag in ("foreach", "capturable", "fused", "differentiable"):
        BUILDERS[name](net(), **{flag: False})
        with pytest.raises(ValueError, match=f"{flag} must be false or left out, got True"):
            BUILDERS[name](net(), **{flag: True})
        with pytest.raises(ValueError, match=f"{flag} must be false or left out, got True"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], flag: True})
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentun'"):
        BUILDERS[name](net(), momentun=0.9)


@every
def test_what_is_the_whole_optimizers_cannot_differ_between_groups(name: str) -> None:
    interval = {"AdaHessian": "hessian_every", "FishLeg": "aux_every"}.get(name, "update_every")
    model = net()
    params = list(model.parameters())

    def built(**options: Any) -> CurvatureOptimizer:
        groups = [{"params": params[:2]}, {"params": params[2:], **options}]
        if name == "AdaHessian":
            return BUILDERS[name](groups, model=model)
        return BUILDERS[name](model, groups)

    mine = getattr(built(), interval)
    built(**{interval: mine}).close()
    with pytest.raises(ValueError, match=f"{interval} is the whole optimizer's and cannot differ.*: got 7"):
        built(**{interval: 7})
    if name in KRONECKER_METHODS and name != "ExactNaturalGradient":
        with pytest.raises(ValueError, match="refresh_every is the whole optimizer's"):
            built(refresh_every=7)
    optimizer = built()
    with pytest.raises(ValueError, match=f"{interval} is the whole optimizer's"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], interval: 7})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("name", KRONECKER_METHODS)
def test_groups_have_clips_of_their_own(name: str) -> None:
    """Layers of one clip are held to it together, those of another apart; equal clips are one."""
    options: dict[str, Any] = {"weight_decay": 0.0, "momentum": 0.0, "fisher": "exact"}

    def step(first: float | None, last: float | None, lr: tuple[float, float] = (0.05, 0.05)) -> list[Tensor]:
        model = net().double()
        groups = [
            {"params": [p for n, p in model.named_parameters() if "last" not in n], "kl_clip": first, "lr": lr[0]},
            {"params": list(model.last.parameters()), "kl_clip": last, "lr": lr[1]},
        ]
        optimizer = BUILDERS[name](model, groups, **options)
        before = [p.detach().clone() for p in model.parameters()]
        advance(model, optimizer, range(1), torch.float64)
        moved = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
        shift = next(i for i, (n, _) in enumerate(model.named_parameters()) if n == "shift")
        return [m for i, m in enumerate(moved) if i != shift]

    free, apart, one = step(None, None), step(1e-4, None), step(1e-4, 1e-6)
    torch.testing.assert_close(apart[-2:], free[-2:])
    ratios = [float(a.norm() / f.norm()) for a, f in zip(apart, free, strict=True)]
    assert 0 < ratios[0] < 0.9 and max(ratios[:-2]) - min(ratios[:-2]) < 1e-9
    torch.testing.assert_close(one[:-2], apart[:-2])
    assert float(one[-1].norm() / free[-1].norm()) < 0.9
    # Alone in its clip, a group's nu is what it would be if the others stood still.
    still = step(1e-4, 1e-4, (0.05, 0.0))
    torch.testing.assert_close(still[:-2], apart[:-2])
    joint = step(1e-4, 1e-4)
    ratios = [float(a.norm() / f.norm()) for a, f in zip(joint, free, strict=True)]
    assert max(ratios) - min(ratios) < 1e-9


@pytest.mark.parametrize("name", [n for n in BUILDERS if n in KRONECKER_METHODS or "AdaFisher" in n])
def test_groups_have_averages_of_their_own(name: str) -> None:
    if name == "ExactNaturalGradient":
        return  # which keeps none
    extra: dict[str, Any] = {"ema": "average"} if "AdaFisher" in name else {"fisher": "exact"}
    matrices = []
    for decays in ((0.5, 0.5), (0.2, 0.2), (0.5, 0.2)):
        model = net()
        parts = [[p for n, p in model.named_parameters() if ("last" in n) == last] for last in (False, True)]
        groups = [{"params": part, "decay": decay} for part, decay in zip(parts, decays, strict=True)]
        optimizer = BUILDERS[name](model, groups, lr=0.0, **extra)
        advance(model, optimizer, range(6))
        matrices.append(optimizer.curvature_matrices())
    for layer in ("first", "norm"):
        assert torch.equal(matrices[2][layer], matrices[0][layer])
        assert not torch.equal(matrices[2][layer], matrices[1][layer])
    assert torch.equal(matrices[2]["last"], matrices[1]["last"])


@pytest.mark.parametrize("name", KRONECKER_METHODS)
def test_setting_a_value_of_groups_sets_it_in_all(name: str) -> None:
    model = net()
    optimizer: Any = BUILDERS[name](model, [{"params": [p]} for p in model.parameters()])
    optimizer.kl_clip = 1e-5
    assert optimizer.kl_clip == 1e-5 and all(group["kl_clip"] == 1e-5 for group in optimizer.param_groups)
    with pytest.raises(ValueError, match="kl_clip must be in"):
        BUILDERS[name](model, [{"params": list(model.parameters()), "kl_clip": 0.0}])


@pytest.mark.parametrize("name", KRONECKER_METHODS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_decoupled_decay_shrinks_weights_before_the_step(name: str, momentum: float) -> None:
    """As AdamW: the step is that without decay, from weights times ``1 - lr weight_decay``."""
    lr, decay = 0.05, 0.3
    model, plain = net().double(), net().double()
    optimizer = BUILDERS[name](model, lr=lr, weight_decay=decay, decoupled_decay=True, momentum=momentum)
    other = BUILDERS[name](plain, lr=lr, weight_decay=0.0, momentum=momentum)
    for step in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        advance(model, optimizer, range(step, step + 1), torch.float64)
        advance(plain, other, range(step, step + 1), torch.float64)
        shrunk = [q.detach() - lr * decay * b for q, b in zip(plain.parameters(), before, strict=True)]
        torch.testing.assert_close([p.detach() for p in model.parameters()], shrunk)
        with torch.no_grad():
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                q.copy_(p)  # the next step starts from the same weights


# -- complex parameters, sparse gradients ------------------------------------------------------------------------------


class Waves(nn.Module):
    """Complex parameters of one, two and three dimensions, or as many real ones of two channels."""

    def __init__(self, as_complex: bool, shape: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        w = torch.randn(shape, dtype=torch.complex128, generator=generator)
        self.as_complex = as_complex
        self.w = nn.Parameter(w if as_complex else torch.view_as_real(w).clone())
        self.mix = torch.randn(5, w.numel(), dtype=torch.complex128, generator=generator)
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        w = self.w if self.as_complex else torch.view_as_complex(self.w)
        return self.layer(x * (self.mix @ w.flatten()).abs() + (self.mix @ w.flatten().conj() ** 2).real)


@every
@pytest.mark.parametrize("shape", [(), (4,), (3, 2), (2, 3, 2)])
def test_complex_parameters_are_real_ones_of_two_channels(name: str, shape: tuple[int, ...]) -> None:
    results = []
    for as_complex in (False, True):
        torch.manual_seed(0)
        model = Waves(as_complex, shape)
        before = model.w.detach().clone()
        optimizer = BUILDERS[name](model, maximize=False)
        for half in range(2):
            advance(model, optimizer, range(4 * half, 4 * half + 4), torch.float64)
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = BUILDERS[name](model)
            optimizer.load_state_dict(state)
        w = model.w.detach()
        assert not bool((w == before).any())
        results.append(torch.view_as_real(w) if as_complex else w)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@every
@pytest.mark.parametrize("step", [0, 1])
def test_sparse_gradients_are_refused_with_a_sentence(name: str, step: int) -> None:
    """On steps that are due and on others."""
    model = nn.Sequential(nn.Embedding(6, 4, sparse=step == 0), nn.Flatten(), nn.Linear(8, 3))
    optimizer = BUILDERS[name](model)
    x, y = torch.tensor([[0, 1], [2, 3], [0, 5]]), torch.tensor([0, 1, 2])

    def run() -> None:
        optimizer.zero_grad()
        outputs = model(x)
        optimizer.backward(F.cross_entropy(outputs, y), outputs)
        optimizer.step()

    for _ in range(step):
        run()
    model[0].sparse = True  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"takes no sparse gradients: use nn.Embedding\(sparse=False\)"):
        run()


# -- what hides parameters from AdaHessian -----------------------------------------------------------------------------


class Recomputed(torch.autograd.Function):
    """A checkpoint of one's own."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor | None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.run(x).backward(g)
        return None, x.grad


class Square(torch.autograd.Function):
    """An honest function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


class Hiding(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.unused = nn.Linear(2, 2)
        self.way = way

    def inner(self, h: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(h))))

    def forward(self, x: Tensor) -> Tensor:
        def whole(h: Tensor) -> Tensor:
            return self.c(self.inner(h))

        if self.way in ("reentrant", "torch's"):
            return self.c(torch_checkpoint(self.inner, x, use_reentrant=self.way == "reentrant"))
        if self.way == "whole":
            return torch_checkpoint(whole, x, use_reentrant=True)
        if self.way == "behind a layer":
            return self.c(torch_checkpoint(lambda h: torch.tanh(self.b(h)), self.a(x), use_reentrant=True))
        if self.way == "shared":  # found outside, and hidden inside
            return self.c(Recomputed.apply(self.inner, x) + self.inner(x.detach()))
        if self.way == "shared reentrant":
            return self.c(torch_checkpoint(self.inner, x, use_reentrant=True) + self.inner(x.detach()))
        if self.way == "own":
            return self.c(Recomputed.apply(self.inner, x))
        return self.c(Square.apply(self.inner(x)))


@pytest.mark.parametrize("way", ["reentrant", "whole", "behind a layer", "shared", "shared reentrant", "own"])
@pytest.mark.parametrize("plain", [False, True])
def test_parameters_that_adahessian_cannot_see_are_told(way: str, plain: bool) -> None:
    if plain and way == "shared":
        pytest.skip("the gradients are there with a graph, though it is not whole: see backward")
    torch.manual_seed(0)
    model = Hiding(way)
    optimizer = AdaHessian(model)
    x, y = batch(0)
    loss = F.cross_entropy(model(x.requires_grad_()), y)
    with pytest.raises(RuntimeError, match="use_reentrant=False") as told, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if plain:
            loss.backward(create_graph=True)
            optimizer.step()
        else:
            optimizer.backward(loss)
    assert "has no second derivatives" not in str(told.value) or (plain and way == "whole")
    assert plain or (x.grad is None and all(p.grad is None for p in model.parameters()))


@pytest.mark.parametrize("way", ["torch's", "honest"])
def test_functions_that_hide_nothing_are_differentiated_through(way: str) -> None:
    results = []
    for other in (way, "honest without"):
        torch.manual_seed(0)
        model = Hiding(other)
        if other == "honest without":
            model.forward = lambda x, m=model: m.c(m.inner(x) ** 2 if way == "honest" else m.inner(x))  # type: ignore
        optimizer = AdaHessian(model, lr=0.05)
        advance(model, optimizer, range(4))
        results.append(weights(model))
    torch.testing.assert_close(*results)


# -- TorchScript -------------------------------------------------------------------------------------------------------


@every
def test_scripting_says_what_to_do_and_tracing_works(name: str) -> None:
    model, optimizer = trained(name)
    x, _ = batch(0)
    with pytest.raises(AttributeError, match=r"call optimizer.close\(\) first"):
        torch.jit.script(model)
    for steps in (range(5, 6), range(6, 7)):  # due or not
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(x), model(x))
        optimizer.zero_grad()
        advance(model, optimizer, steps)
    twin, _ = trained(name, 7)
    assert torch.equal(weights(model), weights(twin))
    optimizer.close()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
