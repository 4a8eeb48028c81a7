"""What torch promises of its own optimizers, of all twelve here."""

from __future__ import annotations

import copy
import io
import pickle
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

    count = hooks(model)
    twin = copy.deepcopy(model)
    assert hooks(twin) == count
    optimizer = BUILDERS[name](twin)
    assert hooks(twin) == count
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
        assert same_state(second.state_dict(), saved)
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
    model, optimizer = trained(name)
    seen = []
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
