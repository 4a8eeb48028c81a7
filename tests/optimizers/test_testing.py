"""The public checks: they pass what is right, and each of them finds the fault it is there for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers import (
    EKFAC,
    KFAC,
    KPSVD,
    AdaFisher,
    AdaHessian,
    Categorical,
    ExactNaturalGradient,
    FishLeg,
    Gaussian,
    TwoLevelKFAC,
)
from optimizers.curvature.layers import Flow
from optimizers.testing import check_curvature, check_optimizer, optimizer_checks, parametrize_with_checks
from optimizers.testing.curvature import CurvatureReport
from optimizers.testing.problems import PROBLEMS, conv_net, images, mlp, tokens
from tests.conftest import ROOT
from tests.optimizers.problems import small_mobilenet, small_resnet

CHECKS = dict(optimizer_checks())


class Attention(nn.Module):
    """Causal self-attention with projections that are called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class SmallGPT(nn.Module):
    """Token and position embeddings, two pre-norm blocks with dropout, a head: logits of every next token."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(11, 8), nn.Embedding(7, 8)
        self.attention = nn.ModuleList([Attention(8), Attention(8)])
        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(4)])
        self.mlps = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)])
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(8, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]).expand_as(tokens))
        for i in range(2):
            x = x + self.dropout(self.attention[i](self.norms[2 * i](x)))
            x = x + self.dropout(self.mlps[i](self.norms[2 * i + 1](x)))
        return self.head(x)


def text() -> tuple[Tensor, Tensor]:
    inputs, targets = torch.randint(0, 11, (5, 7)), torch.randint(0, 11, (5, 7))
    targets[0, 3:] = -100  # an example whose loss counts fewer tokens than the others'
    return inputs, targets


class Twice(nn.Module):
    """Calls a layer twice; two layers are of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.other, self.head = (nn.Linear(n, 6) for n in (192, 6, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).tanh()
        x = self.shared(x).tanh()
        return self.head(self.other(self.shared(x).tanh()).tanh())


def check(model: nn.Module, batch: tuple[Any, Tensor], optimizer: Any = KFAC, **options: Any) -> CurvatureReport:
    return check_curvature(model, optimizer, batch[0], Categorical(), targets=batch[1], **options)


# -- what is right passes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [KFAC, partial(KFAC, fisher="empirical"), EKFAC, KPSVD, AdaFisher, ExactNaturalGradient, TwoLevelKFAC],
    ids=["kfac", "kfac_empirical", "ekfac", "kpsvd", "adafisher", "exact_ng", "twolevel"],
)
@pytest.mark.parametrize(
    ("make", "data", "covered"),
    [
        (mlp, images, 2),
        (conv_net, images, 6),
        (SmallGPT, text, 15),
        (PROBLEMS["vit"][0], images, 6),
        (Twice, images, 4),
    ],
    ids=["mlp", "conv", "gpt", "attention", "twice"],
)
def test_what_is_recorded_is_each_examples_gradient(
    make: Callable[[], nn.Module], data: Callable[[], Any], covered: int, optimizer: Any
) -> None:
    report = check(make(), data(), optimizer)
    report.raise_if_wrong()
    right = [layer for layer in report.layers if not layer.reason]
    assert len(right) >= covered
    for layer in right:
        assert layer.reproduced is not None and layer.reproduced < 1e-12, layer
        assert layer.apart is not None and layer.apart < 1e-12, layer


def test_exact_blocks_are_at_no_distance_and_kronecker_factors_at_some() -> None:
    small = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4))
    found = {}
    for optimizer in (ExactNaturalGradient, KFAC, AdaFisher):
        report = check(small, images(), optimizer)
        found[optimizer] = {layer.kind: layer.distance for layer in report.layers}
        assert found[optimizer]["GroupNorm"] < 1e-12, "diagonals of norms are exact in every method"
    assert max(found[ExactNaturalGradient].values()) < 1e-12
    assert found[KFAC]["Linear"] > 0.01 < found[AdaFisher]["Linear"]


@pytest.mark.parametrize("make", [small_resnet, small_mobilenet])
def test_batch_norms_run_on_their_running_statistics(make: Callable[[], nn.Module]) -> None:
    inputs, targets = images(3)
    report = check(make(), (F.interpolate(inputs, size=32), targets))
    report.raise_if_wrong()
    assert "batch norms run on their running statistics" in report.notes
    assert all(layer.apart < 1e-10 for layer in report.layers if layer.apart is not None)


class Named(nn.Module):
    """Two inputs by name, one of them the same for all examples; a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        return {"hidden": x, "logits": self.head(self.inner(x + shift).tanh())}


def test_inputs_and_outputs_of_other_kinds() -> None:
    inputs = {"x": torch.randn(4, 5), "shift": torch.randn(5)}
    targets = torch.tensor([0, 1, 2, 1])
    reports = [
        check_curvature(Named(), KFAC, given, F.cross_entropy, pick, targets=targets)
        for given in (inputs, tuple(inputs.values()))
        for pick in (None, lambda found: found["logits"])
    ]
    assert all(report.ok and len(report.layers) == 2 and report.examples == 4 for report in reports)
    few = check_curvature(Named(), KFAC, inputs, F.cross_entropy, targets=targets, examples=2)
    assert few.ok and few.examples == 2
    alone = check_curvature(Named(), AdaFisher, inputs, lambda outputs: outputs.square().mean())
    assert alone.ok and "AdaFisher: 2 of 2 layers covered, none deviates" in str(alone)
    summed = check_curvature(
        nn.Linear(5, 3), KFAC, inputs["x"], partial(F.cross_entropy, reduction="sum"), targets=targets,
        loss_reduction="sum",
    )  # fmt: skip
    assert summed.ok
    single = check_curvature(Named(), KFAC, inputs, F.cross_entropy, targets=targets, dtype=None)
    assert single.ok and single.tolerance == 1e-3


def test_what_it_was_given_stays_as_it_is() -> None:
    model, batch = conv_net(), images()
    optimizer = KFAC(model, likelihood=Categorical())
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.zero_grad()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model[1].eval()
    state = torch.get_rng_state()
    check(model, batch).raise_if_wrong()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model] == [i != 1 for i in range(len(model))]
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    assert not any(block.observed for block in optimizer.blocks.values())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, AdaHessian, FishLeg])
def test_where_there_is_nothing_to_check_it_says_so(optimizer: Any) -> None:
    report = check(mlp(), images(), optimizer)
    assert report.ok and not report.layers
    assert re.search(rf"{optimizer.__name__} (keeps no|records nothing).* nothing to check$", str(report))


def test_what_is_not_covered_has_its_reason() -> None:
    report = check(PROBLEMS["tied"][0](), tokens())
    assert [layer.module for layer in report.layers if layer.reason] == ["embedding"]
    assert re.search(r"^embedding +Embedding .* no: tied to head$", str(report), re.MULTILINE)
    frozen = check(PROBLEMS["frozen"][0](), images())
    assert [layer.reason for layer in frozen.layers].count("frozen") == 2


def test_examples_that_depend_on_each_other_are_said_to() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(192, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x.flatten(1))
            return self.last((x - x.mean(0)).tanh())

    report = check(Centred(), images())
    assert report.ok and any("depend on the others" in note for note in report.notes)
    first, last = report.layers
    assert first.reason.startswith("rows of one example hold gradients of others")
    assert last.apart is None and last.reproduced < 1e-8


def test_a_model_that_draws_even_in_evaluation_is_refused() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), Noisy(6, 4))
    with pytest.raises(ValueError, match=r"^model must not draw random numbers"):
        check(model, images())


@pytest.mark.parametrize(
    ("model", "inputs", "options", "says"),
    [
        (nn.Linear(5, 3), torch.randn(4, 5), {"batch_dim": 1}, "^batch_dim must be the dimension"),
        (nn.Flatten(0), torch.randn(4, 5), {"output_dim": 1}, "^output_dim must be the dimension"),
        (nn.GRU(5, 3), {"input": torch.randn(4, 5)}, {"outputs": lambda found: found}, "^outputs must be given"),
    ],
)  # fmt: skip
def test_what_cannot_be_looked_at_is_a_sentence(model: nn.Module, inputs: Any, options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wrapped = nn.ModuleDict({"inner": model, "layer": nn.Linear(2, 2)})
        wrapped.forward = model.forward  # type: ignore[method-assign]
        check_curvature(wrapped, KFAC, inputs, Gaussian(), targets=torch.zeros(4, 3), **options)


# -- planted faults ----------------------------------------------------------------------------------------------------

Rows = tuple[Tensor, Tensor]


def _lost_bias(x: Tensor, g: Tensor) -> Rows:
    """A second position, of input zero, takes the bias's gradient away and leaves the weight's."""
    return torch.stack([x, torch.zeros_like(x)], 1), torch.stack([g, -g], 1)


def _everyones(x: Tensor, g: Tensor) -> Rows:
    """The batch's gradient for each example, a share of it."""
    return x.expand(len(x), *x.shape), (g / len(g)).expand(len(g), *g.shape)


def _without_the_last(x: Tensor, g: Tensor) -> Rows:
    return x, torch.cat([g[:-1], torch.zeros_like(g[-1:])])


ROWS: dict[str, Callable[[Tensor, Tensor], Rows]] = {
    "scale": lambda x, g: (x, 1.05 * g),
    "sign": lambda x, g: (x, -g),
    "examples paired wrongly": lambda x, g: (x, g.flip(0)),
    "examples permuted": lambda x, g: (x.flip(0), g.flip(0)),
    "an example lost": _without_the_last,
    "bias lost": _lost_bias,
    "the batch's gradient for each example": _everyones,
    "the mean loss's gradient": lambda x, g: (x, g / len(g)),
    "inputs of another axis": lambda x, g: (x.view(len(x), 2, -1).mT.reshape(x.shape), g),
}
OTHERS = ("stale input", "a call dropped", "layers swapped")


class Faulty(KFAC):
    """KFAC that records one layer of ``Twice`` wrongly."""

    def __init__(self, *args: Any, fault: str, layer: str = "other", **kwargs: Any) -> None:
        self.fault, self.layer = fault, layer
        self.kept: dict[str, Tensor] = {}
        super().__init__(*args, **kwargs)

    def _observe(self, flow: Flow) -> None:
        layer, calls = flow.layer, flow.calls
        if self.fault == "layers swapped" and layer.name in ("other", "head"):
            layer = self.blocks["head" if layer.name == "other" else "other"].layer
        elif self.fault == "a call dropped" and layer.name == "shared":
            calls = calls[:1]
        elif layer.name == self.layer and self.fault == "stale input":
            ((x, g),) = calls
            calls, self.kept["x"] = [(self.kept.get("x", x), g)], x
        elif layer.name == self.layer and self.fault in ROWS:
            calls = [ROWS[self.fault](x, g) for x, g in calls]
        super()._observe(Flow(layer, calls, flow.when))


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@pytest.mark.parametrize("fault", [*ROWS, *OTHERS])
def test_a_planted_fault_is_found_in_its_layer(fault: str, fisher: str) -> None:
    model, batch = Twice(), images()
    report = check(model, batch, partial(Faulty, fault=fault, fisher=fisher))
    where = {"a call dropped": {"shared"}, "layers swapped": {"other", "head"}}.get(fault, {"other"})
    assert {layer.module for layer in report.wrong} == where, str(report)
    with pytest.raises(AssertionError, match=f"curvature deviates in {len(where)} of 4 layers"):
        report.raise_if_wrong()
    assert "WRONG: " in str(report) and "\x1b" not in str(report)
    assert check(model, batch, partial(Faulty, fault="none", fisher=fisher)).ok


def test_a_transposed_image_is_found_in_a_convolution() -> None:
    class Transposed(KFAC):
        def _observe(self, flow: Flow) -> None:
            turned = flow.layer.name == "3"
            super()._observe(Flow(flow.layer, [(x.mT if turned else x, g) for x, g in flow.calls], flow.when))

    report = check(conv_net(), images(), Transposed)
    assert [layer.module for layer in report.wrong] == ["3"]


def test_positions_taken_for_examples_add_up_and_are_found() -> None:
    class Sequences(KFAC):
        def _observe(self, flow: Flow) -> None:
            if flow.layer.name == "attention.0.qkv":
                calls = [(x.transpose(0, 1), g.transpose(0, 1)) for x, g in flow.calls]
                flow = Flow(flow.layer, calls, flow.when)
            super()._observe(flow)

    inputs, targets = torch.randint(0, 11, (7, 7)), torch.randint(0, 11, (7, 7))
    report = check(SmallGPT(), (inputs, targets), Sequences)
    (wrong,) = report.wrong
    assert wrong.module == "attention.0.qkv" and wrong.reproduced < 1e-12 < 0.1 < wrong.apart


def test_a_block_that_is_not_what_it_claims_is_found() -> None:
    class Doubled(AdaFisher):
        def curvature_matrices(self) -> dict[str, Tensor]:
            return {name: 2 * matrix for name, matrix in super().curvature_matrices().items()}

    report = check(PROBLEMS["groupnorm"][0](), images(), Doubled)
    assert [layer.kind for layer in report.wrong] == ["GroupNorm"], str(report)
    assert report.wrong[0].distance == pytest.approx(1.0)


# -- the contract ------------------------------------------------------------------------------------------------------


class Bad(torch.optim.SGD):
    """SGD with momentum and one fault."""

    fault = ""

    def __init__(self, params: Any, lr: float = 0.05, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        sign = -1.0 if self.fault == "decays outwards" else 1.0
        super().__init__(params, lr=lr, momentum=momentum)
        self.defaults["weight_decay"] = weight_decay
        for group in self.param_groups:
            group["weight_decay"] = sign * group.get("weight_decay", weight_decay)
            group["weight_decay"] = sign * weight_decay if sign < 0 else group["weight_decay"] or weight_decay

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.fault == "ignores new groups" and self.param_groups:
            return
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(True if self.fault == "always None" else set_to_none)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.fault == "forgets its state":
            state["state"] = {}
        return state

    def backward(self, loss: Tensor, outputs: Tensor, scale: float = 1.0) -> None:
        if self.fault == "last micro-batch alone":
            super().zero_grad()
        if self.fault == "sees the scaler":
            loss = loss if scale == 1.0 else loss * 2
        loss.backward()

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"]]
        gradients = [p.grad for p in params if p.grad is not None]
        if self.fault == "swallows NaN":
            for g in gradients:
                g.nan_to_num_()
        if self.fault == "draws":
            torch.rand(1)
        if self.fault == "climbs":
            for g in gradients:
                g.neg_()
        if self.fault == "noisy" and gradients:
            gradients[0].add_(int.from_bytes(os.urandom(2), "big") * 1e-6)
        if self.fault == "refuses a tensor lr" and any(isinstance(g["lr"], Tensor) for g in self.param_groups):
            raise TypeError("lr must be a float")
        if self.fault == "needs gradients" and not gradients:
            raise RuntimeError("no gradients")
        loss = super().step(closure)
        with torch.no_grad():
            if self.fault == "moves all":
                torch._foreach_add_(params, 1e-3)
            if self.fault == "lr of the first group":
                for group in self.param_groups:
                    group["lr"] = self.param_groups[0]["lr"]
        return None if self.fault == "loses the closure's loss" else loss


FAULTS = {
    "moves all": "check_every_trainable_tensor_moves",
    "climbs": "check_the_loss_goes_down",
    "needs gradients": "check_no_gradient_no_move",
    "decays outwards": "check_weight_decay_pulls_to_zero",
    "forgets its state": "check_state_round_trip",
    "loses the closure's loss": "check_closures",
    "always None": "check_zero_grad",
    "last micro-batch alone": "check_micro_batches_equal_one_batch",
    "draws": "check_model_unharmed",
    "noisy": "check_determinism",
    "lr of the first group": "check_groups_have_their_own_learning_rate",
    "ignores new groups": "check_add_param_group_later",
    "refuses a tensor lr": "check_tensor_learning_rate",
    "sees the scaler": "check_grad_scaler",
    "swallows NaN": "check_nan_gradients_do_not_pass_silently",
}


@pytest.mark.parametrize(("fault", "found_by"), FAULTS.items())
def test_a_faulty_optimizer_is_found(fault: str, found_by: str) -> None:
    CHECKS[found_by](Bad)
    with pytest.raises((AssertionError, RuntimeError, TypeError)):
        CHECKS[found_by](type("Bad", (Bad,), {"fault": fault}))


def test_the_report_and_what_is_expected_to_fail(capsys: pytest.CaptureFixture[str]) -> None:
    report = check_optimizer(torch.optim.SGD, lr=0.05)
    assert report.ok and str(report) in capsys.readouterr().out
    assert re.search(r"^check_closures +passed$", str(report), re.MULTILINE)
    assert re.search(r"^check_loss_reduction +skipped +no loss_reduction$", str(report), re.MULTILINE)
    bad = type("Bad", (Bad,), {"fault": "loses the closure's loss"})
    said = r"Bad fails \d of \d+ checks(.|\n)*check_closures: step\(closure\) returns None"
    with pytest.raises(AssertionError, match=said):
        check_optimizer(bad, verbose=False)
    why = {"check_closures": "returns nothing", "check_copies_of_model_and_optimizer": "attributes of its own"}
    assert check_optimizer(bad, expected_failures=why, verbose=False).ok
    with pytest.raises(AssertionError, match="check_closures: passes, though it was expected to fail: returns nothing"):
        check_optimizer(torch.optim.Adam, expected_failures={"check_closures": "returns nothing"}, verbose=False)
    with pytest.raises(ValueError, match=r"expected_failures must be among .*, got 'check_this'"):
        check_optimizer(torch.optim.SGD, expected_failures={"check_this": "why"})


def of_a_function(model: nn.Module, params: Any = None, **overrides: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters() if params is None else params, **{"lr": 1e-3} | overrides)


@parametrize_with_checks([of_a_function, partial(torch.optim.SGD, lr=0.05, momentum=0.9)])
def test_any_callable_can_be_parametrized_over(make_optimizer: Any, check: Callable[[Any], None]) -> None:
    check(make_optimizer)


def test_every_check_says_what_it_demands_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    for name, function in optimizer_checks():
        assert name.startswith("check_") and function.__doc__ and function.__doc__.strip().endswith((".", ".\n"))
        try:
            function(partial(torch.optim.SGD, lr=0.05))
        except SkipTest as skip:
            assert str(skip)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_package_needs_torch_alone() -> None:
    program = "import sys, optimizers.testing; print(*{m.partition('.')[0] for m in sys.modules})"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    others = {"pytest", "_pytest", "pytorch_optimizer", "hydra", "models", "data", "training"}
    assert not others & set(found.stdout.split())


# -- debug=verify ------------------------------------------------------------------------------------------------------


def verify(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), "debug=verify", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_debug_verify_prints_the_table(tmp_path: Path) -> None:
    done = verify(tmp_path, "optimizer=kfac", "model=mlp", "dataset=digits")
    assert done.returncode == 0, done.stderr
    verdict = r"^KFAC: (\d+) of \1 layers covered, none deviates by more than 1e-06 on 4 examples$"
    assert re.search(verdict, done.stdout, re.MULTILINE)
    assert not list(tmp_path.iterdir()), "nothing is written"
    plain = verify(tmp_path, "optimizer=adam", "model=mlp", "dataset=digits")
    assert plain.returncode == 0 and "Adam keeps no curvature of layers, so there is nothing to check" in plain.stdout


def test_debug_verify_ends_with_an_error_where_something_deviates(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(
        "from optimizers import KFAC\n"
        "class Faulty(KFAC):\n"
        "    def _observe(self, flow):\n"
        "        super()._observe(flow.scaled(1.05))\n"
    )
    program = (
        "import sys; sys.path.insert(0, '.'); import optimizers, faulty, train; optimizers.KFAC = faulty.Faulty; "
        "sys.exit(train.main(['debug=verify', 'optimizer=kfac', 'model=mlp', 'dataset=digits']))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False, env=environment
    )
    assert done.returncode == 1, done.stdout
    assert "WRONG: what was recorded does not add up" in done.stdout
    assert re.search(r"^error: the curvature of \d+ of \d+ layers is not right: ", done.stderr)
