"""Other packages' optimizers in our loop: what their steps are, what resumes, what cannot be asked for."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.optim import Optimizer

from optimizers import packaged
from optimizers.packaged import DRAWING, LIMITS, hidden_weights, muon, pytorch_optimizer, torch_optim
from optimizers.shampoo import shampoo
from tests.optimizers.problems import EmbeddingModel, ViTBlock, conv_net, images, mlp
from training.errors import UserError
from training.loop.rng import seed_everything
from training.runs.record import RunConfig
from training.settings import schema
from training.settings.composition import CONFIG_FOLDER, compose, prepare

package = pytest.importorskip("pytorch_optimizer")

BASELINES = ("shampoo", "soap", "lamb", "lion")
EXTRA = {"Ranger21": {"num_iterations": 12}}  # mandatory options
DEAF = next(names for reason, names in LIMITS.items() if "learning rate" in reason)
SWITCHED = next(names for reason, names in LIMITS.items() if "other weights" in reason)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 6), nn.Tanh(), nn.Linear(6, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, seed: int = 0) -> None:
    for step in steps:
        x, y = images(4)
        seed_everything(seed + step)
        optimizer.zero_grad()
        F.cross_entropy(model(x + 0.1 * step), y).backward()
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def from_file(name: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    node = yaml.safe_load((CONFIG_FOLDER / "optimizer" / f"{name}.yaml").read_text())
    checked = schema.check(node, "optimizer", "optimizer")
    options = {key: value for key, value in checked.items() if key != "_target_"}
    target = schema.locate(checked["_target_"], "optimizer")
    return lambda model: target(model if name == "muon" else model.parameters(), **options)


def by_name(origin: packaged.Package, name: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: origin(model.parameters(), name=name, **EXTRA.get(name, {}))


BUILDS = {
    **{name: from_file(name) for name in (*BASELINES, "muon", "torch", "pytorch_optimizer")},
    **{
        f"{origin}:{name}": by_name(origin, name)
        for origin in (torch_optim, pytorch_optimizer)
        for name in origin.names()
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BUILDS)
def test_resumes_bit_for_bit_and_draws_only_where_said(name: str) -> None:
    """Twelve steps, so that what happens every ten does; interrupted after three, and with other random numbers."""
    straight, resumed, elsewhere = net(), net(), net()
    optimizer = BUILDS[name](straight)
    train(straight, optimizer, range(3))
    file = io.BytesIO()
    torch.save([straight.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    model_state, optimizer_state = torch.load(file, weights_only=True)
    train(straight, optimizer, range(3, 12))
    again = BUILDS[name](resumed)
    resumed.load_state_dict(model_state)
    again.load_state_dict(optimizer_state)
    train(resumed, again, range(3, 12))
    assert torch.equal(weights(resumed), weights(straight))
    assert not torch.equal(weights(straight), weights(net()))
    train(elsewhere, BUILDS[name](elsewhere), range(12), seed=1000)
    assert torch.equal(weights(elsewhere), weights(straight)) == (name.partition(":")[2] not in DRAWING)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for names in LIMITS.values() for name in names])
def test_limits_are_limits_still(name: str) -> None:
    for origin in (torch_optim, pytorch_optimizer):
        if (kind := origin.classes().get(name)) is None:
            continue
        with pytest.raises(ValueError, match=f"^name must not be {name}, which "):
            origin.choose(name)
        if name in SWITCHED:
            assert callable(getattr(kind, "eval"))  # noqa: B009 - torch's base class has none
            continue
        if name in DEAF:
            assert moves_without_a_rate(kind)
            continue
        model = net()
        with pytest.raises(Exception):  # noqa: B017 - each fails in its own way, and that it does is what counts
            optimizer = kind(model.parameters(), lr=1e-3)  # type: ignore[call-arg]
            train(model, optimizer, range(2))
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            torch.load(file, weights_only=True)


def moves_without_a_rate(make: Callable[..., Optimizer]) -> bool:
    """Whether weights move at a learning rate of nearly zero."""
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, make(model.parameters(), lr=1e-12), range(5))
    return not all(torch.allclose(p, old, rtol=0, atol=1e-6) for p, old in zip(model.parameters(), before, strict=True))


def test_adafactor_heeds_its_rate_and_can_be_told_not_to() -> None:
    assert not moves_without_a_rate(partial(pytorch_optimizer, name="AdaFactor"))
    assert moves_without_a_rate(partial(pytorch_optimizer, name="AdaFactor", relative_step=True))
    assert not moves_without_a_rate(partial(pytorch_optimizer, name="StableAdamW"))


def test_every_limit_is_of_a_class_there_is() -> None:
    known = {*torch_optim.classes(), *pytorch_optimizer.classes()}
    assert {name for names in LIMITS.values() for name in names} | {*DRAWING} <= known


# -- what the steps are ------------------------------------------------------------------------------------------------


def gradients(shape: Sequence[int], steps: int) -> list[Tensor]:
    return [torch.randn(*shape) for _ in range(steps)]


def given(build: Callable[[list[Tensor]], torch.optim.Optimizer], start: Tensor, grads: list[Tensor]) -> Tensor:
    parameter = start.clone().requires_grad_()
    optimizer = build([parameter])
    for g in grads:
        parameter.grad = g.clone()
        optimizer.step()
    return parameter.detach()


def root(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**power) @ vectors.T


@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 2, 2)])
def test_shampoo_is_algorithm_two(shape: tuple[int, ...], float64: None) -> None:
    """Gupta et al. 2018: each dimension's matrix to the power -1/(2 order)."""
    start, grads = torch.randn(shape), gradients(shape, 4)
    expected, matrices = start.clone(), [0.1 * torch.eye(n) for n in shape]
    for g in grads:
        step = g
        for i in range(len(shape)):
            unfolded = g.movedim(i, 0).flatten(1)
            matrices[i] = matrices[i] + unfolded @ unfolded.T
            step = torch.tensordot(root(matrices[i], -1 / (2 * len(shape))), step.movedim(i, 0), 1).movedim(0, i)
        expected = expected - 0.05 * step
    def own(ps: list[nn.Parameter]) -> Optimizer:
        return shampoo(ps, lr=0.05, graft=None, preconditioning_compute_steps=1, matrix_eps=0.1)

    torch.testing.assert_close(given(own, start, grads), expected, rtol=1e-8, atol=1e-10)


def test_shampoos_roots_need_no_svd() -> None:
    """LAPACK's gives up on a multiple of the identity with few directions more, which is what the sums are at first."""
    start, grads = torch.zeros(64, 8), [1e-3 * torch.randn(64, 8)]
    with torch.profiler.profile() as profile:
        given(lambda ps: shampoo(ps, preconditioning_compute_steps=1), start, grads)
    called = {event.key for event in profile.key_averages()}
    assert "aten::linalg_eigh" in called and not any("svd" in name for name in called)


def test_a_closures_own_svd_is_one(float64: None) -> None:
    """Only the optimizer's matrices are symmetric."""
    p, matrix = nn.Parameter(torch.ones(3)), torch.randn(3, 3)
    optimizer = shampoo([p])

    def closure() -> Tensor:
        loss = p.sum() * torch.linalg.svd(matrix)[1].sum()
        loss.backward()
        return loss

    torch.testing.assert_close(optimizer.step(closure), 3 * torch.linalg.matrix_norm(matrix, "nuc"))


def test_shampoo_steps_are_as_long_as_adams(float64: None) -> None:
    """Anil et al. 2020: tensor by tensor, in its own direction."""
    start, grads = torch.randn(3, 5), gradients((3, 5), 1)
    options = {"preconditioning_compute_steps": 1}
    step = given(lambda ps: shampoo(ps, lr=0.02, **options), start, grads) - start
    own = given(lambda ps: shampoo(ps, lr=0.02, graft=None, **options), start, grads) - start
    adam = given(lambda ps: torch.optim.Adam(ps, lr=0.02), start, grads) - start
    torch.testing.assert_close(step, own * adam.norm() / own.norm())


def test_soap_is_adam_in_the_eigenbasis(float64: None) -> None:
    """Vyas et al. 2025, between two updates of the basis: Adam on the rotated gradients; the first one only gathers."""
    start, grads = torch.randn(4, 3), gradients((4, 3), 6)
    found = given(lambda ps: package.SOAP(ps, lr=0.05, weight_decay=0.0, eps=1e-12), start, grads)
    first = grads[0]
    left, right = (torch.linalg.eigh(m)[1] for m in (first @ first.T, first.T @ first))
    rotated = [left.T @ g @ right for g in grads[1:]]
    adam = given(
        lambda ps: torch.optim.Adam(ps, lr=0.05, betas=(0.95, 0.95), eps=1e-12), left.T @ start @ right, rotated
    )
    torch.testing.assert_close(found, left @ adam @ right.T, rtol=1e-6, atol=1e-8)


def test_lamb_scales_each_step_to_the_weights(float64: None) -> None:
    """You et al. 2020, Algorithm 2 with the weights' norm counted up to 10.

    The package corrects the first moment's bias outside the scaling, where it makes the first steps longer (ten times
    at first), rather than inside, where it would do nothing: a known difference.
    """
    start, grads = torch.randn(4, 3), gradients((4, 3), 3)
    expected, m, v = start.clone(), torch.zeros(4, 3), torch.zeros(4, 3)
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = m / (v.sqrt() + 1e-12) + 0.01 * expected
        expected = expected - 0.02 / (1 - 0.9**t) * min(float(expected.norm()), 10) / step.norm() * step
    options: dict[str, Any] = {"weight_decay": 0.01, "weight_decouple": False, "eps": 1e-12}
    torch.testing.assert_close(given(lambda ps: package.Lamb(ps, lr=0.02, **options), start, grads), expected)


def test_lion_takes_the_sign_of_an_average(float64: None) -> None:
    """Chen et al. 2023, Algorithm 2."""
    start, grads = torch.randn(4, 3), gradients((4, 3), 3)
    expected, m = start.clone(), torch.zeros(4, 3)
    for g in grads:
        expected = expected - 0.02 * ((0.9 * m + 0.1 * g).sign() + 0.1 * expected)
        m = 0.99 * m + 0.01 * g
    torch.testing.assert_close(given(lambda ps: package.Lion(ps, lr=0.02, weight_decay=0.1), start, grads), expected)


# -- Muon --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "hidden"),
    [
        (conv_net, ["0.weight", "3.weight", "6.weight"]),
        (mlp, ["1.weight"]),
        (EmbeddingModel, ["linear.weight"]),
        (lambda: EmbeddingModel(tied=True), ["linear.weight"]),
        (ViTBlock, ["patch.weight", "attention.out_proj.weight", "mlp.0.weight", "mlp.2.weight"]),
        (lambda: nn.Linear(3, 2), []),
    ],
)
def test_hidden_weights(make: Callable[[], nn.Module], hidden: list[str]) -> None:
    model = make()
    chosen = hidden_weights(nn.DataParallel(model))
    assert [n for n, p in model.named_parameters() if any(p is w for w in chosen)] == hidden


def test_muon_orthogonalizes_hidden_weights_and_leaves_the_rest_to_adamw() -> None:
    model, (x, y) = net(), images(4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = muon(model, lr=0.1, adamw_lr=0.01, adamw_weight_decay=0.1)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    for name in ("0.weight", "3.weight"):
        weight = model.get_parameter(name)
        change, g = (before[name] - weight.detach()).flatten(1), weight.grad.flatten(1)  # type: ignore[union-attr]
        u, s, vt = torch.linalg.svd(g, full_matrices=False)
        scale = 0.1 * max(1.0, change.shape[0] / change.shape[1]) ** 0.5
        inner = u.T @ change @ vt.T / scale
        assert bool(((inner.diagonal() > 0.5) & (inner.diagonal() < 1.3))[s > 1e-2 * s[0]].all()), inner.diagonal()
        assert (inner - inner.diagonal().diag()).abs().max() < 0.1  # bfloat16 products
    rest = [p for p in model.parameters() if all(p is not h for h in hidden_weights(model))]
    copies = [before[n].clone().requires_grad_() for n, p in model.named_parameters() if any(p is r for r in rest)]
    for copy, p in zip(copies, rest, strict=True):
        copy.grad = p.grad
    torch.optim.AdamW(copies, lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1).step()
    for copy, p in zip(copies, rest, strict=True):
        torch.testing.assert_close(copy, p)


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", -1), ("momentum", 1), ("weight_decay", -1), ("ns_steps", 0), ("adamw_lr", -1), ("adamw_betas", (1, 0.9)),
     ("adamw_weight_decay", -0.1)],
)  # fmt: skip
def test_muon_refuses(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{option}"):
        muon(net(), **{option: value})


# -- the command line --------------------------------------------------------------------------------------------------


def test_options_of_any_class_by_its_name() -> None:
    command = ["optimizer=torch", "optimizer.name=RMSprop", "optimizer.lr=1", "+optimizer.momentum=0.5"]
    run = prepare(command)
    assert isinstance(run, RunConfig) and run.command == command
    values = compose(command).values["optimizer"]
    assert {**values, "name": "RMSprop", "lr": 1.0, "momentum": 0.5} == values
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = schema.build(values, "optimizer", through=lambda target, **o: target(net().parameters(), **o))
    assert type(optimizer) is torch.optim.RMSprop and optimizer.param_groups[0]["momentum"] == 0.5


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("optimizer=torch optimizer.name=Radm", r"^optimizer.name must be .* got 'Radm' \(did you mean 'RAdam'\?\)$"),
        ("optimizer=torch optimizer.name=LBFGS", r"^optimizer.name must not be LBFGS, which calls the model itself"),
        ("optimizer=pytorch_optimizer optimizer.name=SophiaH", r"^optimizer.name must not be SophiaH, which needs"),
        ("optimizer=pytorch_optimizer optimizer.name=SAM", r"^optimizer.name must not be SAM, which wraps another"),
        ("optimizer=torch optimizer.name=[1]", r"^optimizer.name must be text, got \[1\]$"),
        ("optimizer=torch +optimizer.bettas=[0.9,0.99]", r"^optimizer.bettas: NAdam .* \(did you mean 'betas'\?\)$"),
        ("optimizer=torch +optimizer.betas=[0.9]", r"^optimizer.betas must be a list of 2 values"),
        ("optimizer=torch optimizer.eps=1", r"not in the file of this optimizer: add it with \+optimizer.eps=1$"),
        ("optimizer=torch +optimizer.lr=1", r"cannot be added with \+: write optimizer.lr=1$"),
        ("optimizer=torch +model.widht=1", r"cannot be added with \+; "),
        ("optimizer=pytorch_optimizer +optimizer.foo=1", r"^optimizer.foo: StableAdamW has no such option; it takes "),
        ("optimizer=pytorch_optimizer optimizer.name=Ranger21", r"^optimizer.num_iterations is missing: Ranger21"),
        ("optimizer=pytorch_optimizer optimizer.lr=-1", r"^optimizer: learning rate must be positive"),
        ("optimizer=soap optimizer.lr=-1", r"^optimizer: learning rate must be positive"),
        ("optimizer=shampoo optimizer.momentum=2", r"^optimizer.momentum must be in the range"),
        ("optimizer=lion +optimizer.foo=1", r"cannot be added with \+; optimizer has no key 'foo'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(command: str, says: str) -> None:
    with pytest.raises(UserError) as refusal:
        prepare([*command.split(), "model=mlp"])
    assert re.search(says, str(refusal.value)), refusal.value
    assert "\n" not in str(refusal.value)


def test_a_typo_is_not_swallowed_by_a_class_that_takes_anything() -> None:
    with pytest.raises(
        UserError, match=r"^optimizer.momentm: Shampoo has no such option \(did you mean 'momentum'\?\)"
    ):
        schema.check({"_target_": "pytorch_optimizer.Shampoo", "momentm": 0.5}, "optimizer", "optimizer")


def test_a_class_that_draws_is_refused_beside_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pytorch_optimizer.choose("Kron") is package.Kron
    monkeypatch.setattr(packaged.communication, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"^name must not be Kron in several processes"):
        pytorch_optimizer(net().parameters(), name="Kron")
    assert pytorch_optimizer.choose("AdaBelief") is package.AdaBelief
