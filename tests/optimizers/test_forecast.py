"""What a forecast says before training is what is there after it: bytes exactly, operations by their formulas."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from optimizers import EMA, KFAC, Categorical, CurvatureOptimizer, Graft, build_optimizer
from optimizers.forecast import Prices, forecast, held, rehearse
from optimizers.forecast.operations import Like, Operation
from optimizers.forecast.prices import added
from optimizers.forecast.rehearsal import looked
from optimizers.forecast.trial import tried
from optimizers.packaged import Package
from optimizers.table import CATALOGUE, present
from optimizers.wrapper import innermost

loss_of = F.cross_entropy


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 16, 4),
    )  # fmt: skip


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.place = nn.Parameter(torch.zeros(5, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.tokens(x) + self.place))


def text_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], Callable[..., Tensor]]] = {
    "mlp": (mlp, lambda: (torch.rand(6, 12), torch.randint(4, (6,))), loss_of),
    "conv": (conv, lambda: (torch.rand(6, 3, 6, 6), torch.randint(4, (6,))), loss_of),
    "transformer": (Transformer, lambda: (torch.randint(11, (6, 5)), torch.randint(11, (6, 5))), text_loss),
}

Make = Callable[[nn.Module], torch.optim.Optimizer]


def predicted_and_measured(net: str, make: Make) -> tuple[dict[str, int], dict[str, int], int]:
    """Bytes of the state as rehearsed, and as they are after two steps; and those that numbers decide on."""
    build, draw, loss = NETS[net]
    torch.manual_seed(0)
    model = build()
    x, y = draw()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = looked(model, make, x, y, loss)
    found = rehearse(model, make, x, y, loss, rows, timed=False)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters()), "the model is left as it was"
    optimizer = make(model)
    for _ in range(2):
        x, y = draw()
        optimizer.zero_grad()
        outputs = model(x)
        if isinstance(innermost(optimizer), CurvatureOptimizer):
            optimizer.backward(loss(outputs, y), outputs)
        else:
            loss(outputs, y).backward()
        optimizer.step()
    return found.state, held(optimizer), found.optional


EVERY = [name for name, _, target in present() if not isinstance(target, Package)]


# Every one on a net of linear layers, and those that keep most kinds of things on the others.
CASES = [(name, "mlp") for name in EVERY]
CASES += [(name, "conv") for name in ("kfac", "ekfac")]
CASES += [(name, "transformer") for name in ("kfac", "adafisherw")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "net"), CASES)
def test_the_forecast_of_memory_is_the_measured_state(name: str, net: str) -> None:
    ((_, entry, target),) = present([name])
    make = partial(build_optimizer, target, likelihood=Categorical(), **entry.options)
    predicted, measured, optional = predicted_and_measured(net, make)
    assert predicted == measured and optional == 0
    assert sum(measured.values()) > 0


@pytest.mark.filterwarnings("ignore")
def test_what_numbers_decide_on_is_named_apart() -> None:
    """A second pair may be antisymmetric in a convolution, and its layer keeps more then: no more than is said."""
    ((_, entry, target),) = present(["deflation"])
    make = partial(build_optimizer, target, likelihood=Categorical(), **entry.options)
    predicted, measured, optional = predicted_and_measured("conv", make)
    more = sum(measured.values()) - sum(predicted.values())
    assert 0 < more <= optional and predicted["factors"] == measured["factors"]


OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("kfac", "mlp", {"solve_dtype": "bfloat16"}),
    ("kfac", "conv", {"damping_mode": "tikhonov"}),
    ("kfac", "conv", {"max_factor_dim": 20}),
    ("kfac", "mlp", {"damping": "auto", "kl_of": "measured"}),
    ("kfac", "mlp", {"lr": "auto", "momentum": "auto"}),
    ("kfac", "mlp", {"batch_fraction": 0.5}),
    ("ekfac", "mlp", {"rank": 3, "solve_dtype": "bfloat16"}),
    ("fishleg", "mlp", {"max_factor_dim": 8}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "net", "options"), OPTIONS, ids=lambda value: str(value))
def test_it_stays_right_where_options_change_what_is_kept(name: str, net: str, options: dict[str, Any]) -> None:
    ((_, entry, target),) = present([name])
    make = partial(build_optimizer, target, likelihood=Categorical(), **entry.options | options)
    predicted, measured, _ = predicted_and_measured(net, make)
    assert predicted == measured


@pytest.mark.filterwarnings("ignore")
def test_groups_wrappers_and_frozen_parameters_count_as_they_are() -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        first, *others = model.parameters()
        first.requires_grad_(False)
        groups = [{"params": others[:1], "lr": 0.01}, {"params": others[1:]}]
        kfac = KFAC(model, groups, lr=0.1, likelihood=Categorical())
        return EMA(Graft(kfac, to="adam", lr=1e-3), decay=0.9)

    predicted, measured, _ = predicted_and_measured("mlp", make)
    assert predicted == measured


def operations(found: Any, part: str, name: str) -> float:
    """Multiplications and additions of one kind of operation in a part of an average step."""
    return sum(times * op.flops() for op, times in added(found.parts[part]).items() if op.name == name)


def test_operations_of_statistics_and_refreshes_are_those_of_their_formulas() -> None:
    """A and G of a linear layer take 2 n d² each; a Cholesky factor d³ / 3, its inverse twice that."""
    batch, ins, outs = 10, 30, 20
    model = nn.Sequential(nn.Linear(ins, outs))
    make = partial(KFAC, update_every=5, refresh_every=20, likelihood=Categorical())
    x, y = torch.rand(batch, ins), torch.randint(outs, (batch,))
    found = rehearse(model, make, x, y, loss_of, looked(model, make, x, y, loss_of))
    columns = ins + 1
    products = sum(operations(found, "update", name) for name in ("mm", "bmm", "baddbmm"))
    assert products * 5 == pytest.approx(2 * batch * (columns**2 + outs**2))
    cholesky = operations(found, "refresh", "linalg_cholesky_ex") + operations(found, "refresh", "cholesky_inverse")
    assert cholesky * 20 == pytest.approx(columns**3 + outs**3)
    assert found.intervals == {"update": 5, "refresh": 20}


def test_a_forecast_prices_what_an_average_step_adds() -> None:
    """With a price of one a call, seconds are calls."""

    class Ones(Prices):
        def total(self, weighted: Mapping[Operation, float]) -> float:
            return sum(weighted.values())

    model, (x, y) = mlp(), NETS["mlp"][1]()
    adam: Make = lambda m: torch.optim.Adam(m.parameters())  # noqa: E731
    found = forecast(model, adam, x, y, loss_of, prices=Ones(), passes=7.0)
    assert found.parts["step"] == found.calls > found.sgd > 0
    assert found.ratio == pytest.approx((7.0 + found.calls) / (7.0 + found.sgd))
    assert found.gradients == found.parameters == 4 * sum(p.numel() for p in model.parameters())
    assert found.held == sum(found.state.values()) == 2 * found.parameters + 4 * len(list(model.parameters()))


def test_prices_scale_what_is_too_large_to_be_timed() -> None:
    """On a machine that does one multiplication or addition a second."""
    timed: list[float] = []

    class Exact(Prices):
        def _machine(self) -> tuple[float, float, float]:
            return 1.0, 1.0, 0.0

        def _call_of(self, operation: Operation) -> float:
            timed.append(operation.flops())
            return operation.flops()

    prices = Exact(lambda: 0.0)
    assert prices.seconds(_product(4096)) == 2 * 4096**3 and prices.seconds(_product(64)) == 2 * 64**3
    assert len(timed) == 2 and max(timed) < 1e9


def test_large_decompositions_are_foreseen_from_two_sizes() -> None:
    """On a machine that takes a n^3 + b n^2 seconds, and is twice as slow at a side of 1,000 as at infinite ones."""
    timed: list[int] = []

    def takes(side: int) -> float:
        return 1e-3 * ((side / 1000) ** 3 + (side / 1000) ** 2)

    class Blocks(Prices):
        def _machine(self) -> tuple[float, float, float]:
            return 1e10, 1e10, 0.0

        def _call_of(self, operation: Operation) -> float:
            timed.append(operation.likes()[0].size[-1])
            return takes(timed[-1])

    matrix = Like((8192, 8192), (8192, 1), torch.float32)
    cholesky = Operation(torch.ops.aten.linalg_cholesky_ex.default, (matrix,), (), (matrix,))
    assert Blocks(lambda: 0.0).seconds(cholesky) == pytest.approx(takes(8192))
    assert len(timed) == 2 and max(timed) == 2 * min(timed) <= 2048


class Counted(TorchDispatchMode):
    """Counts decompositions, as a clock that shows nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.linalg_cholesky_ex.default
        return func(*args, **(kwargs or {}))


def test_a_copy_takes_steps_of_each_kind_and_weighs_them() -> None:
    """Two factors of two layers are decomposed every twenty steps, whatever early updates do at first."""
    make = partial(KFAC, lr=0.1, update_every=5, refresh_every=20, early_updates=True, likelihood=Categorical())
    model, (x, y) = mlp(), NETS["mlp"][1]()
    with Counted() as counted:
        parts = tried(model, make, x, y, loss_of, lambda: counted.count)
    assert parts == {"step": 0.0, "update": 0.0, "refresh": 4 / 20}


def test_steps_that_are_short_are_taken_by_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = mlp(), NETS["mlp"][1]()
    before = [p.detach().clone() for p in model.parameters()]
    make = partial(KFAC, lr=0.1, likelihood=Categorical())
    random = torch.get_rng_state()
    found = forecast(model, make, x, y, loss_of)
    assert found.tried and found.passes and found.step > found.passes and found.ratio > 1 and found.calls > 0
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert torch.equal(random, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    monkeypatch.setattr(importlib.import_module("optimizers.forecast.forecast"), "ROOM", 0)  # no room for a trial
    dear = forecast(model, make, x, y, loss_of, prices=Prices(budget=0.2))
    assert not dear.tried and dear.state == found.state and dear.parts.keys() == found.parts.keys()


def test_a_triangular_solve_takes_the_square_of_its_side_for_each_column() -> None:
    a, b = (Like((1, n, m), (n * m, m, 1), torch.float32) for n, m in ((6, 6), (4, 6)))
    solve = Operation(torch.ops.aten.linalg_solve_triangular.default, (a, b), (("upper", False), ("left", False)), (b,))
    assert solve.flops() == 6**2 * 4


def _product(n: int) -> Operation:
    like = Like((n, n), (n, 1), torch.float32)
    return Operation(torch.ops.aten.mm.default, (like, like), (), (like,))


def test_all_optimizers_of_the_table_are_here() -> None:
    assert {"kfac", "soap", "fishleg", "shampoo"} <= set(EVERY) <= set(CATALOGUE)
