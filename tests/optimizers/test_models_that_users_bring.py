"""Models, losses and habits as they are found in other people's training scripts: the right value, or a sentence."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from optimizers import (
    EKFAC,
    KFAC,
    KPSVD,
    AdaFisher,
    AdaFisherW,
    AdaHessian,
    Bernoulli,
    Categorical,
    Deflation,
    ExactNaturalGradient,
    FishLeg,
    Gaussian,
    KFACCorrected,
    Lanczos,
    LearnedGaussian,
    Likelihood,
    TwoLevelKFAC,
)
from tests import dense

pytestmark = pytest.mark.usefixtures("float64")

NATURAL = [KFAC, EKFAC, KPSVD, Deflation, Lanczos, KFACCorrected, TwoLevelKFAC, ExactNaturalGradient]
WATCHING = [AdaFisher, AdaFisherW, *NATURAL]
ALL = [*WATCHING, FishLeg, AdaHessian]
FISHERS = ["sampled", "empirical", "exact"]


def made(kind: type, model: nn.Module, likelihood: Likelihood | None = None, **options: Any) -> Any:
    """An optimizer that takes curvature in each step, of the whole batch, in the units of the loss."""
    found: dict[str, Any] = {}
    if issubclass(kind, AdaFisher):
        found = {"update_every": 1, "normalize": "none", "ema": "average", "decay": 0.0}
        options.pop("fisher", None)
    elif kind in NATURAL:
        found = {"update_every": 1, "batch_fraction": 1.0, "likelihood": likelihood or Categorical(), "kl_clip": None}
        if kind is not ExactNaturalGradient:
            found |= {"refresh_every": 1, "decay": 0.0}
    elif kind is FishLeg:
        found = {"likelihood": likelihood or Categorical()}
    params = options.pop("params", None)
    if kind is AdaHessian and params is not None:
        return AdaHessian(params, model=model, **options)
    return kind(model, **found, **options) if params is None else kind(model, params, **found, **options)


def train(optimizer: Any, loss: Tensor, outputs: Any, **given: Any) -> None:
    optimizer.backward(loss, outputs, **given)
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def same(found: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 1e-8) -> None:
    assert found.keys() == right.keys()
    for name, matrix in right.items():
        assert matrix.norm() > 0, name
        assert (found[name] - matrix).norm() <= tolerance * matrix.norm(), name


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


# --- checkpoints ------------------------------------------------------------------------------------------------------


class InCheckpoint(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("kind", NATURAL)
def test_a_model_in_a_reentrant_checkpoint_says_what_to_do(kind: type) -> None:
    optimizer = made(kind, model := InCheckpoint(mlp(4, 5, 3), True))
    outputs = model(torch.randn(6, 4, requires_grad=True))
    with pytest.warns(UserWarning, match="no curvature for 2 of 2 layers.*use_reentrant=False"):
        train(optimizer, F.cross_entropy(outputs, torch.arange(6) % 3), outputs)
    assert optimizer.coverage().fraction == 0


@pytest.mark.parametrize("parts", ["whole", "first", "nested"])
def test_adahessian_trains_what_a_reentrant_checkpoint_holds_or_refuses(parts: str) -> None:
    inner = InCheckpoint(mlp(4, 4), True)
    model = {"whole": InCheckpoint(mlp(4, 3), True), "first": nn.Sequential(inner, nn.Tanh(), nn.Linear(4, 3))}.get(
        parts, InCheckpoint(nn.Sequential(inner, nn.Linear(4, 3)), True)
    )
    optimizer = AdaHessian(model)
    outputs = model(torch.randn(6, 4, requires_grad=True))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.backward(F.cross_entropy(outputs, torch.arange(6) % 3), outputs)


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", [Gaussian(), Bernoulli(), Gaussian(reduction="sum")], ids=["g", "b", "sum"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("kind", NATURAL)
def test_squeezed_outputs_are_outputs_of_one_feature(kind: type, fisher: str, likelihood: Likelihood) -> None:
    x, y = torch.randn(7, 4), torch.randint(0, 2, (7, 1)).double()
    found = []
    for squeezed in (False, True):
        torch.manual_seed(0)
        model = mlp(4, 3, 1)
        reduction = "sum" if likelihood.reduction == "sum" else "mean"
        optimizer = made(kind, model, likelihood, fisher=fisher, loss_reduction=reduction)
        outputs, targets = model(x), y
        if squeezed:
            outputs, targets = outputs.squeeze(1), y.squeeze(1)
        with silence():
            train(optimizer, likelihood.nll(outputs, targets), outputs)
        found.append((optimizer.curvature_matrices(), [p.detach() for p in model.parameters()]))
    same(found[1][0], found[0][0], 1e-7)
    for a, b in zip(found[1][1], found[0][1], strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("likelihood", [Gaussian(), Bernoulli(), LearnedGaussian()], ids=["gauss", "bits", "learned"])
def test_targets_are_never_broadcast(likelihood: Likelihood) -> None:
    with pytest.raises(ValueError, match="must have the outputs' shape"):
        likelihood.nll(torch.randn(6, 1), torch.zeros(6))
    with pytest.raises(ValueError, match="must have the outputs' shape"):
        likelihood.nll(torch.randn(6), torch.zeros(6, 1))


@pytest.mark.parametrize("kind", NATURAL)
@pytest.mark.parametrize("wrong", [tuple, list, lambda o: {"logits": o}], ids=["tuple", "list", "dict"])
def test_outputs_given_whole_are_refused_with_a_sentence(kind: type, wrong: Callable[..., Any]) -> None:
    optimizer = made(kind, model := mlp(4, 3))
    outputs = model(torch.randn(6, 4))
    given = wrong(outputs) if isinstance(wrong(outputs), dict) else wrong([outputs])
    with pytest.raises(TypeError, match=r"outputs must be one tensor .* outputs\.logits"):
        optimizer.backward(outputs.sum(), given)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("kind", NATURAL)
def test_an_example_without_a_batch_is_a_batch_of_one(kind: type, fisher: str) -> None:
    x, found = torch.randn(4), []
    for batched in (True, False):
        torch.manual_seed(0)
        optimizer = made(kind, model := mlp(4, 5, 3), fisher=fisher)
        outputs = model(x[None] if batched else x)
        with silence():
            train(optimizer, F.cross_entropy(outputs, torch.tensor([1]) if batched else torch.tensor(1)), outputs)
        found.append(optimizer.curvature_matrices())
    same(found[1], found[0])


def test_a_single_number_is_no_output() -> None:
    optimizer = made(KFAC, model := mlp(4, 1), Gaussian())
    outputs = model(torch.randn(4)).squeeze()
    with pytest.raises(ValueError, match="got a single number"):
        optimizer.backward(outputs.square(), outputs)


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (2, 3, 4)], ids=["image", "sequence"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("kind", [KFAC, EKFAC, KPSVD, ExactNaturalGradient])
def test_classes_may_be_in_the_second_dimension_as_torch_has_them(
    kind: type, fisher: str, shape: tuple[int, ...]
) -> None:
    x, y, found = torch.randn(shape), torch.randint(0, 5, (shape[0], *shape[2:])), []
    conv = nn.Conv2d if len(shape) == 4 else nn.Conv1d
    for last in (True, False):
        torch.manual_seed(0)
        optimizer = made(kind, model := conv(3, 5, 1), fisher=fisher)
        outputs = model(x)
        loss = F.cross_entropy(outputs, y)
        if last:
            outputs = outputs.movedim(1, -1)
            loss = F.cross_entropy(outputs.flatten(0, -2), y.flatten())
            optimizer.likelihood = Categorical(dim=-1)
        with silence():
            train(optimizer, loss, outputs)
        found.append(optimizer.curvature_matrices())
    same(found[1], found[0], 1e-6)


# --- what counts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("kind", WATCHING)
def test_examples_that_do_not_count_are_as_good_as_absent(kind: type, fisher: str) -> None:
    x, y, found = torch.randn(9, 4), torch.randint(0, 3, (9,)), []
    x[3:] *= 5
    for padded in (False, True):
        torch.manual_seed(0)
        optimizer = made(kind, model := mlp(4, 5, 3), fisher=fisher)
        targets = y.clone()
        targets[3:] = -100
        outputs, targets = (model(x), targets) if padded else (model(x[:3]), y[:3])
        with silence():
            train(optimizer, F.cross_entropy(outputs, targets), outputs)
        if kind in (KPSVD, Deflation, Lanczos, ExactNaturalGradient):
            found.append(optimizer.curvature_matrices())
        else:  # K-FAC's inputs are those of all examples
            key = "S" if issubclass(kind, AdaFisher) else "G"
            found.append({name: block.factors[key] for name, block in optimizer.blocks.items()})
    same(found[1], found[0], 2e-6)


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("kind", WATCHING)
def test_flattened_logits_have_the_curvature_of_the_sequences(kind: type, fisher: str, padding: bool) -> None:
    x, y, found = torch.randn(5, 3, 4), torch.randint(0, 3, (5, 3)), []
    if padding:
        y[1, 1:], y[3] = -100, -100
    for flat in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
        optimizer = made(kind, model, fisher=fisher)
        outputs = model(x)
        outputs = outputs.view(-1, 3) if flat else outputs
        with silence():
            train(optimizer, F.cross_entropy(outputs.flatten(0, -2), y.flatten()), outputs)
        found.append(optimizer.curvature_matrices())
    same(found[1], found[0], 1e-6)


@pytest.mark.parametrize("last", ["relu", "clamp", "hardtanh"])
def test_an_observation_with_no_residual_counts(last: str) -> None:
    torch.manual_seed(5)
    end = {"relu": F.relu, "clamp": lambda t: t.clamp(min=0.0), "hardtanh": lambda t: F.hardtanh(t, 0.0, 2.0)}[last]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return end(self.body(x))

    model, likelihood = Net(), Gaussian()
    x = torch.randn(4, 5, 3)
    y = model(x).detach() + torch.rand(4, 5, 1) * (model(x).detach() > 0)
    optimizer = made(ExactNaturalGradient, model, likelihood, fisher="exact", lr=0.0)
    outputs = model(x)
    params = list(model.body[0].parameters())
    jacobian = torch.stack(
        [dense.flatten(list(torch.autograd.grad(v, params, retain_graph=True))) for v in model(x).flatten()]
    )
    with pytest.warns(UserWarning, match=r"backward\(\.\.\., mask=\.\.\.\)"):
        train(optimizer, likelihood.nll(outputs, y), outputs)
    found = optimizer.curvature_matrices()["body.0"]
    assert torch.allclose(found.trace(), jacobian.square().sum() / 20, rtol=1e-10)


def test_a_mask_says_what_counts() -> None:
    found = []
    x, y, mask = torch.randn(6, 4), torch.randn(6, 2), torch.tensor([1, 1, 0, 1, 0, 0]).bool()
    for masked in (False, True):
        torch.manual_seed(0)
        optimizer = made(ExactNaturalGradient, model := mlp(4, 3, 2), Gaussian(), fisher="exact")
        outputs = model(x) if masked else model(x[mask])
        chosen = outputs[mask] if masked else outputs
        loss = 0.5 * (chosen - y[mask]).square().sum(1).mean()
        with silence():
            train(optimizer, loss, outputs, **({"mask": mask} if masked else {}))
        found.append(optimizer.curvature_matrices())
    same(found[1], found[0])


# --- layouts ----------------------------------------------------------------------------------------------------------


class TokensFirst(nn.Module):
    """Token ids [positions, batch] inside."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside = inside
        self.e, self.n, self.o = nn.Embedding(6, 4), nn.RMSNorm(4), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(self.e(x.T if self.inside else x)).tanh()
        return self.o(h.mean(0 if self.inside else 1))


class LastToken(nn.Module):
    """The last token of each sequence, gathered."""

    def __init__(self, gather: bool) -> None:
        super().__init__()
        self.gather = gather
        self.i, self.n, self.o = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(self.i(x)).tanh()
        if not self.gather:
            return self.o(h[:, -1])
        rows = torch.arange(len(x)) * x.shape[1] + x.shape[1] - 1
        return self.o(h)[torch.arange(len(x)), -1] if x.shape[1] % 2 else self.o(h.flatten(0, 1)[rows])


class Images(nn.Module):
    """Frames of a film folded into the batch, behind a convolution and a GroupNorm."""

    def __init__(self, folded: bool) -> None:
        super().__init__()
        self.folded = folded
        self.c, self.n, self.o = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        def look(frames: Tensor) -> Tensor:
            return self.n(self.c(frames)).tanh().mean((2, 3))

        if self.folded:
            h = look(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        else:
            h = torch.stack([look(frame) for frame in x.unbind(1)], 1)
        return self.o(h.mean(1))


LAYOUTS: dict[str, tuple[Callable[[bool], nn.Module], Callable[[], Tensor]]] = {
    "tokens-first": (TokensFirst, lambda: torch.randint(0, 6, (4, 5))),
    "tokens-first-square": (TokensFirst, lambda: torch.randint(0, 6, (4, 4))),
    "last-token-odd": (LastToken, lambda: torch.randn(5, 3, 4)),
    "frames": (Images, lambda: torch.randn(4, 3, 2, 5, 5)),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("kind", WATCHING)
def test_curvature_does_not_depend_on_how_rows_lie(kind: type, fisher: str, name: str) -> None:
    build, inputs = LAYOUTS[name]
    found, x = [], inputs()
    for special in (False, True):
        torch.manual_seed(0)
        optimizer = made(kind, model := build(special), fisher=fisher)
        outputs = model(x)
        with silence():
            train(optimizer, F.cross_entropy(outputs, torch.arange(len(x)) % 3), outputs)
        found.append(optimizer.curvature_matrices())
    if name == "last-token-odd":  # K-FAC counts all positions' inputs
        found = [{k: v for k, v in part.items() if k == "n"} for part in found]
    same(found[1], found[0], 2e-6)


class Shared(nn.Module):
    """Something that all examples share goes through a layer of its own."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.i, self.o = nn.Linear(4, 4), nn.Linear(4, 3)
        self.s: nn.Module = nn.Embedding(9, 4) if "ids" in what else mlp(2, 4)
        self.register_buffer("table", torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(x.shape[1])
        bias = {
            "ids": lambda: self.s(ids),
            "ids-of-one": lambda: self.s(ids[None]),
            "ids-expanded": lambda: self.s(ids.expand(x.shape[:2])),
            "table": lambda: self.s(self.table[: x.shape[1]]),
            "table-of-one": lambda: self.s(self.table[None, : x.shape[1]]),
            "table-expanded": lambda: self.s(self.table[: x.shape[1]].expand(len(x), -1, -1)),
        }[self.what]()
        return self.o((self.i(x) + bias).tanh())


@pytest.mark.parametrize("what", ["ids", "ids-of-one", "table", "table-of-one"])
@pytest.mark.parametrize("size", [(4, 5), (3, 3), (2, 4)], ids=str)
@pytest.mark.parametrize("kind", WATCHING)
def test_what_all_examples_share_is_told(kind: type, size: tuple[int, int], what: str) -> None:
    optimizer = made(kind, model := Shared(what))
    name = "s" if "ids" in what else "s.0"
    outputs = model(torch.randn(*size, 4))
    with pytest.warns(UserWarning, match=f"no curvature for 1 of 3 layers.*{name}: "):
        train(optimizer, F.cross_entropy(outputs.flatten(0, 1), torch.arange(size[0] * size[1]) % 3), outputs)
    assert dict(row[:2] for row in optimizer.coverage().rows)[name].startswith("fallback: ")
    assert optimizer.curvature_matrices().keys() == {"i", "o"}


@pytest.mark.parametrize("what", ["ids-expanded", "table-expanded"])
@pytest.mark.parametrize("kind", WATCHING)
def test_what_is_expanded_to_the_batch_has_curvature(kind: type, what: str) -> None:
    optimizer = made(kind, model := Shared(what))
    outputs = model(torch.randn(4, 5, 4))
    with silence():
        train(optimizer, F.cross_entropy(outputs.flatten(0, 1), torch.arange(20) % 3), outputs)
    assert optimizer.coverage().fraction == 1.0


class Pyramid(nn.Module):
    """A convolution, a norm and an embedding called more than once, on images of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.e, self.o = nn.Conv2d(2, 2, 3, padding=1), nn.GroupNorm(1, 2), nn.Embedding(4, 2), None
        self.o = nn.Linear(2, 3)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = self.e(ids) * self.e((ids + 1) % 4)
        for size in (4, 2):
            h = h + self.n(self.c(F.adaptive_avg_pool2d(x, size))).tanh().mean((2, 3))
        return self.o(h)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("kind", [AdaFisher, KFAC, EKFAC, KPSVD, TwoLevelKFAC])
def test_traces_of_layers_called_twice_are_those_of_the_block(kind: type, fisher: str) -> None:
    x, ids, found = torch.randn(5, 2, 4, 4), torch.arange(5) % 4, []
    for method in (ExactNaturalGradient, kind):
        torch.manual_seed(0)
        optimizer = made(method, model := Pyramid(), fisher="empirical" if kind is AdaFisher else fisher)
        outputs = model(x, ids)
        with silence():
            train(optimizer, F.cross_entropy(outputs, torch.arange(5) % 3), outputs)
        found.append({k: v.diagonal() for k, v in optimizer.curvature_matrices().items()})
    assert found[0].keys() == found[1].keys() == {"c", "n", "e", "o"}
    for name in ("n", "e"):
        assert torch.allclose(found[1][name], found[0][name], rtol=1e-10)
    if kind is EKFAC:
        for name in ("c", "o"):
            assert torch.allclose(found[1][name].sum(), found[0][name].sum(), rtol=1e-10)


class ByKeyword(nn.Module):
    def __init__(self, keyword: bool) -> None:
        super().__init__()
        self.keyword = keyword
        self.e, self.c, self.n, self.b = nn.Embedding(6, 4), nn.Conv1d(4, 4, 2), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        def call(layer: nn.Module, x: Tensor) -> Tensor:
            return layer(input=x) if self.keyword else layer(x)

        h = call(self.c, call(self.e, tokens).mT).tanh()
        return call(self.b, call(self.n, h).mean(2))


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("kind", WATCHING)
def test_layers_and_models_called_by_keyword_are_seen(kind: type, fisher: str) -> None:
    x, found = torch.randint(0, 6, (5, 3)), []
    for keyword in (False, True):
        torch.manual_seed(0)
        optimizer = made(kind, model := ByKeyword(keyword), fisher=fisher)
        outputs = model(tokens=x) if keyword else model(x)
        with silence():
            train(optimizer, F.cross_entropy(outputs, torch.arange(5) % 3), outputs)
        assert optimizer.coverage().fraction == 1.0
        found.append(optimizer.curvature_matrices())
    same(found[1], found[0])


# --- parameters that come, go and change ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_layers_added_later_have_curvature(kind: type) -> None:
    model = mlp(4, 5, 3)
    optimizer = made(kind, model, params=list(model[2].parameters()))
    optimizer.add_param_group({"params": list(model[0].parameters())})
    before = model[0].weight.detach().clone()
    outputs = model(torch.randn(6, 4))
    with silence():
        train(optimizer, F.cross_entropy(outputs, torch.arange(6) % 3), outputs)
    assert not torch.equal(model[0].weight, before)
    if kind is not AdaHessian:
        assert {row[0] for row in optimizer.coverage().rows} == {"0", "2"}
        assert optimizer.coverage().fraction == 1.0


@pytest.mark.parametrize("kind", WATCHING)
def test_parameters_from_outside_of_the_model_are_listed(kind: type) -> None:
    model, likelihood = mlp(4, 2), LearnedGaussian()
    optimizer = made(kind, model, likelihood, params=[*model.parameters(), *likelihood.parameters()])
    outputs = model(torch.randn(6, 4))
    train(optimizer, likelihood.nll(outputs, torch.randn(6, 2)), outputs)
    rows = [row for row in optimizer.coverage().rows if row[1].startswith("fallback: ")]
    assert [(row[1], row[3]) for row in rows] == [("fallback: not a parameter of the model", 1)]


@pytest.mark.parametrize("kind", WATCHING)
def test_a_frozen_parameter_that_was_left_out_costs_no_curvature(kind: type) -> None:
    x, found = torch.randn(6, 4), []
    for left_out in (False, True):
        torch.manual_seed(0)
        model = mlp(4, 5, 3)
        model[0].bias.requires_grad_(False)
        params = [p for p in model.parameters() if p.requires_grad] if left_out else None
        optimizer = made(kind, model, params=params)
        for _ in range(2):
            outputs = model(x)
            with silence():
                train(optimizer, F.cross_entropy(outputs, torch.arange(6) % 3), outputs)
        assert optimizer.coverage().fraction == 1.0
        found.append(model[0].weight.detach())
    assert torch.equal(found[0], found[1])


def pruned(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.3)


@pytest.mark.parametrize("change", [pruned, parametrizations.weight_norm, parametrizations.orthogonal])
@pytest.mark.parametrize("kind", WATCHING)
def test_a_weight_that_stops_being_one_loses_its_curvature_and_nothing_else(
    kind: type, change: Callable[[nn.Module], Any]
) -> None:
    model = mlp(4, 4, 3)
    optimizer = made(kind, model, lr=1e-3)

    def step() -> None:
        outputs = model(torch.randn(6, 4))
        train(optimizer, F.cross_entropy(outputs, torch.arange(6) % 3), outputs)

    step()
    change(model[0])
    with pytest.warns(UserWarning, match="0: its weight is computed from other tensors"):
        step()
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(5):
        step()
    rows = dict(row[:2] for row in optimizer.coverage().rows)
    assert rows["0"].startswith("fallback: its weight is computed from other tensors")
    assert not rows["2"].startswith("fallback")
    moved = max((p - q).abs().max() for p, q in zip(model.parameters(), before, strict=True))
    assert 0 < moved < 1


@pytest.mark.parametrize("change", [pruned, parametrizations.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("kind", WATCHING)
def test_weights_that_are_computed_from_the_start_have_true_reasons(
    kind: type, change: Callable[[nn.Module], Any]
) -> None:
    model = mlp(4, 4, 3)
    change(model[0])
    optimizer = made(kind, model)
    reasons = [row[1] for row in optimizer.coverage().rows if row[0].startswith("0")]
    assert reasons
    assert all(r.startswith("fallback: ") and "another optimizer" not in r for r in reasons), reasons


@pytest.mark.parametrize(
    "lazy", [lambda: nn.LazyLinear(3), lambda: nn.LazyConv2d(3, 2), nn.LazyBatchNorm1d], ids=["linear", "conv", "norm"]
)
@pytest.mark.parametrize("kind", [k for k in ALL if k is not AdaHessian])
def test_lazy_layers_are_refused_at_once(kind: type, lazy: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="is lazy and has no weights yet: run a batch"):
        made(kind, nn.Sequential(lazy()))


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["eval", "empty", "no-outputs"])
@pytest.mark.parametrize("kind", WATCHING)
def test_a_step_that_saw_nothing_is_still_due(kind: type, way: str) -> None:
    model = mlp(5, 4, 3)
    likelihood = {} if issubclass(kind, AdaFisher) else {"likelihood": Categorical()}
    optimizer = kind(model, update_every=50, **likelihood)
    for index in range(2):
        first = index == 0
        model.train(not (first and way == "eval"))
        x = torch.randn(0 if first and way == "empty" else 6, 5)
        outputs = model(x)
        if first and way == "no-outputs":
            outputs = model[2](model[0].weight.new_zeros(0, 4))
        loss = F.cross_entropy(outputs, (torch.arange(len(outputs)) % 3), reduction="sum")
        if first:
            with pytest.warns(UserWarning, match="no backward pass came through"):
                train(optimizer, loss, outputs)
        else:
            train(optimizer, loss, outputs)
    assert optimizer.coverage().fraction == 1.0
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", [FishLeg, AdaHessian])
def test_an_empty_batch_is_no_error(kind: type) -> None:
    optimizer = made(kind, model := mlp(5, 3))
    outputs = model(torch.randn(0, 5))
    train(optimizer, F.cross_entropy(outputs, torch.zeros(0, dtype=torch.long), reduction="sum"), outputs)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("kind", WATCHING)
def test_parts_called_by_themselves_accumulate_like_the_whole(kind: type, split: int) -> None:
    x, y, found = torch.randn(12, 4), torch.arange(12) % 3, []
    for whole in (True, False):
        torch.manual_seed(0)
        first, last = nn.Linear(4, 5), nn.Linear(5, 3)
        model = nn.Sequential(first, nn.Tanh(), last) if whole else nn.ModuleList([first, nn.Tanh(), last])
        optimizer = made(kind, model, fisher="empirical")
        with silence():
            for part in range(1 if whole else split):
                own = slice(None) if whole else slice(part, None, split)
                outputs = model(x[own]) if whole else last(first(x[own]).tanh())
                optimizer.backward(F.cross_entropy(outputs, y[own]) / (1 if whole else split), outputs)
            optimizer.step()
        found.append({k: v for k, v in optimizer.curvature_matrices().items()})
    same(found[1], found[0], 1e-6)


@pytest.mark.parametrize("kind", ALL)
def test_two_losses_on_one_graph_are_their_sum(kind: type) -> None:
    x, y, found = torch.randn(6, 4), torch.arange(6) % 3, []
    for twice in (False, True):
        torch.manual_seed(0)
        model = mlp(4, 5, 3)
        optimizer = made(kind, model, fisher="empirical") if kind in WATCHING else made(kind, model)
        outputs = model(x)
        loss = F.cross_entropy(outputs, y)
        if twice:
            optimizer.backward(0.25 * loss, outputs, retain_graph=True)
            optimizer.backward(0.75 * loss, outputs)
        else:
            optimizer.backward(loss, outputs)
        optimizer.step()
        matrices = optimizer.curvature_matrices() if kind in WATCHING else {}
        found.append((matrices, [p.detach() for p in model.parameters()]))
    same(found[1][0], found[0][0], 1e-6)
    for a, b in zip(found[1][1], found[0][1], strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("twice", [False, True])
def test_one_pass_that_is_gone_through_twice_without_a_word_is_told(twice: bool) -> None:
    optimizer = made(KFAC, model := mlp(4, 3), fisher="empirical")
    outputs = model(torch.randn(6, 4))
    loss = F.cross_entropy(outputs, torch.arange(6) % 3)
    if twice:
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.warns(UserWarning, match="retain_graph=True"):
            optimizer.step()
        assert not optimizer.curvature_matrices()
    else:
        loss.backward()
        with silence():
            optimizer.step()
        assert optimizer.curvature_matrices()


# --- losses -----------------------------------------------------------------------------------------------------------

LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Likelihood, Likelihood | None]] = {
    "mse": (F.mse_loss, Gaussian(0.5**0.5, reduction="mean"), Gaussian()),
    "mse-sum": (lambda o, y: F.mse_loss(o, y, reduction="sum") / len(o), Gaussian(0.5**0.5), None),
    "bits": (
        lambda o, y: F.binary_cross_entropy_with_logits(o, y.sigmoid()), Bernoulli(reduction="mean"), Bernoulli()
    ),
    "classes": (
        lambda o, y: F.cross_entropy(o, y.argmax(1), weight=torch.tensor([1.0, 2.0, 0.5])),
        Categorical(weight=[1.0, 2.0, 0.5]), Categorical(),
    ),
    "smooth": (lambda o, y: F.cross_entropy(o, y.argmax(1), label_smoothing=0.2), Categorical(0.2), None),
    "soft": (lambda o, y: F.cross_entropy(o, y.softmax(1)), Categorical(), None),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_curvature_has_the_scale_of_the_loss_or_a_warning_says_so(name: str) -> None:
    loss, right, wrong = LOSSES[name]
    model, x, y = mlp(4, 3), torch.randn(6, 4), torch.randn(6, 3)
    with silence():
        optimizer = made(ExactNaturalGradient, model, right, fisher="exact", lr=0.0)
        outputs = model(x)
        train(optimizer, loss(outputs, y), outputs)
    ggn = dense.gauss_newton(model, loss, x, y, list(model.parameters()))
    order = dense.as_matrix_order(model[0])
    assert torch.allclose(optimizer.curvature_matrices()["0"], ggn[order][:, order], rtol=1e-8, atol=1e-12)
    if wrong is not None:
        optimizer = made(ExactNaturalGradient, model, wrong, fisher="exact", lr=0.0)
        outputs = model(x)
        with pytest.warns(UserWarning, match=r"use (Gaussian|Bernoulli|Categorical)\("):
            train(optimizer, loss(outputs, y), outputs)


# --- what else looks at the graph -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["retain", "tensor-hook", "module-hook", "leaf"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("kind", [KFAC, ExactNaturalGradient, EKFAC])
def test_activations_have_the_gradient_of_the_loss_alone(kind: type, fisher: str, way: str) -> None:
    model, x, y = mlp(4, 4, 2), torch.randn(5, 4, requires_grad=True), torch.tensor([0, 1, 0, 1, 1])
    kept: list[Tensor] = []
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        kept.append(output)
        if way == "retain":
            output.retain_grad()
        elif way == "tensor-hook":
            output.register_hook(lambda g: seen.append(g))

    if way == "module-hook":
        model[1].register_full_backward_hook(lambda m, gi, go: seen.append(go[0]))
    model[1].register_forward_hook(hook)
    optimizer = made(kind, model, fisher=fisher)
    outputs = model(x)
    optimizer.backward(F.cross_entropy(outputs, y), outputs)
    z = kept[0].detach().requires_grad_()
    (right,) = torch.autograd.grad(F.cross_entropy(model[2](z), y), z)
    if way == "retain":
        seen.append(kept[0].grad)
    if way == "leaf":
        z = x.detach().requires_grad_()
        (right,) = torch.autograd.grad(F.cross_entropy(model[2](model[0](z).tanh()), y), z)
        seen.append(x.grad)
    assert len(seen) == 1
    assert torch.allclose(seen[0], right)


@pytest.mark.parametrize("kind", WATCHING)
def test_attention_of_torch_has_curvature(kind: type) -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), nn.Linear(4, 3))
    optimizer = made(kind, model)
    outputs = model(torch.randn(4, 5, 4))
    with silence():
        train(optimizer, F.cross_entropy(outputs.flatten(0, 1), torch.arange(20) % 3), outputs)
    assert optimizer.coverage().fraction == 1.0


class Stashing(nn.Module):
    """Keeps what it computes for whoever comes behind, as saliency maps ask of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.first(x)
        self.active = self.hidden.tanh()
        return self.last(self.active)


EVERY = {
    "kfac": partial(KFAC, likelihood=Categorical()),
    "kfac_exact": partial(KFAC, likelihood=Categorical(), fisher="exact"),
    "kfac_auto": partial(KFAC, likelihood=Categorical(), lr="auto", momentum="auto"),
    "ekfac": partial(EKFAC, likelihood=Categorical(), fisher="empirical"),
    "exact_ng": partial(ExactNaturalGradient, likelihood=Categorical()),
    "fishleg": partial(FishLeg, likelihood=Categorical(), aux_every=1, warmup_steps=0),
    "adafisher": AdaFisher,
    "adahessian": AdaHessian,
}


@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_whoever_asks_after_the_forward_pass_has_the_gradient_of_the_loss_alone(name: str, announced: bool) -> None:
    """Of activations that the model keeps, of its outputs and of what is made of them; by ``retain_grad`` and hooks."""
    model, x, y = Stashing(), torch.randn(8, 4), torch.arange(8) % 3
    optimizer = EVERY[name](model)
    for _ in range(2):
        optimizer.zero_grad()
        raw = model(x)
        outputs = raw * 2
        seen: list[tuple[int, Tensor]] = []
        tensors = [model.hidden, model.active, raw, outputs]
        for place, tensor in enumerate(tensors):
            tensor.retain_grad()
            tensor.register_hook(lambda g, place=place, seen=seen: seen.append((place, g.detach())))
        loss = F.cross_entropy(outputs, y)
        if announced:
            optimizer.before_backward(loss, outputs).backward()
        else:
            optimizer.backward(loss, outputs)
        hidden = F.linear(x, model.first.weight, model.first.bias)
        active = hidden.tanh()
        again = F.linear(active, model.last.weight, model.last.bias)
        twice = again * 2
        right = torch.autograd.grad(F.cross_entropy(twice, y), [hidden, active, again, twice])
        assert sorted(place for place, _ in seen) == [0, 1, 2, 3]
        for place, gradient in seen:
            torch.testing.assert_close(gradient, right[place])
            torch.testing.assert_close(tensors[place].grad, right[place])
            assert not tensors[place].grad.requires_grad
        optimizer.step()


@pytest.mark.parametrize("where", ["", "first"])
@pytest.mark.parametrize("name", EVERY)
def test_backward_hooks_of_modules_see_one_pass(name: str, where: str) -> None:
    """Registered after the optimizer was made, on the whole model or in it; their handles remove them."""
    model, x, y = Stashing(), torch.randn(8, 4), torch.arange(8) % 3
    optimizer = EVERY[name](model)
    module, seen = model.get_submodule(where), []
    handles = [
        module.register_full_backward_pre_hook(lambda *a: seen.append("before")),
        module.register_full_backward_hook(lambda *a: seen.append("behind")),
    ]
    for _ in range(3):
        seen.clear()
        optimizer.zero_grad()
        outputs = model(x)
        optimizer.backward(F.cross_entropy(outputs, y), outputs)
        optimizer.step()
        assert seen == ["before", "behind"]
    for handle in handles:
        handle.remove()
    assert not module._backward_hooks and not module._backward_pre_hooks


PARTS: dict[str, Callable[..., Any]] = {
    "kfac": partial(KFAC, likelihood=Categorical(), fisher="exact"),
    "exact_ng": partial(ExactNaturalGradient, likelihood=Categorical(), fisher="exact"),
    "fishleg": partial(FishLeg, likelihood=Categorical(), aux_every=1, warmup_steps=0),
    "adafisher": AdaFisher,
    "adahessian": lambda model, params: AdaHessian(params, model=model),
}


@pytest.mark.parametrize("second", PARTS)
@pytest.mark.parametrize("first", PARTS)
def test_two_methods_share_a_model(first: str, second: str) -> None:
    """Whoever calls backward and whoever is told before: each has its curvature, and all weights move alike."""

    def trained(swapped: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, x, y = Stashing(), torch.randn(8, 4), torch.arange(8) % 3
        one, other = PARTS[first](model, model.first.parameters()), PARTS[second](model, model.last.parameters())
        told, calls = (one, other) if swapped else (other, one)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", category=UserWarning)  # of curvature that one of them does without
            for _ in range(3):
                one.zero_grad()
                other.zero_grad()
                outputs = model(x)
                calls.backward(told.before_backward(F.cross_entropy(outputs, y), outputs), outputs)
                one.step()
                other.step()
        return [p.detach() for p in model.parameters()]

    for a, b in zip(trained(False), trained(True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_a_penalty_on_gradients_is_no_backward_pass(name: str, plain: bool) -> None:
    """A vanishing one changes nothing; a loss's own ``create_graph`` is not taken for the loop's pass."""
    if plain and name not in ("ekfac", "adafisher"):
        pytest.skip("needs to be told of the loss")

    def trained(penalty: float) -> list[Tensor]:
        torch.manual_seed(0)
        model, x, y = Stashing(), torch.randn(8, 4, requires_grad=True), torch.arange(8) % 3
        optimizer = EVERY[name](model)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="no curvature")
            for _ in range(3):
                optimizer.zero_grad()
                outputs = model(x)
                loss = F.cross_entropy(outputs, y)
                if penalty:
                    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
                    loss = loss + penalty * slope.square().sum()
                if plain:
                    loss.backward()
                else:
                    optimizer.backward(loss, outputs)
                optimizer.step()
        return [p.detach() for p in model.parameters()]

    before, tiny, large = trained(0.0), trained(1e-12), trained(0.5)
    for a, b in zip(before, tiny, strict=True):
        torch.testing.assert_close(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(before, large, strict=True))


OTHER: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "none": lambda model, x: None,
    "saliency": lambda model, x: torch.autograd.grad(model(x).sum(), x),
    "evaluation": lambda model, x: model(x.detach()),
    "jacobian": lambda model, x: torch.func.jacrev(lambda z: model(z).sum())(x.detach()),
}


@pytest.mark.parametrize("name", [*EVERY, "kfac_empirical"])
def test_what_somebody_else_asks_of_the_model_does_not_count(name: str) -> None:
    """In training mode, between the loop's own pass and its step."""

    def trained(other: str) -> list[Tensor]:
        torch.manual_seed(0)
        model, x, y = Stashing(), torch.randn(8, 4, requires_grad=True), torch.arange(8) % 3
        make = partial(KFAC, likelihood=Categorical(), fisher="empirical", update_every=1)
        optimizer = (EVERY | {"kfac_empirical": make})[name](model)
        for _ in range(3):
            optimizer.zero_grad()
            outputs = model(x)
            optimizer.backward(F.cross_entropy(outputs, y), outputs)
            OTHER[other](model, x)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    right = trained("none")
    for other in OTHER:
        for a, b in zip(right, trained(other), strict=True):
            torch.testing.assert_close(a, b, msg=other)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("name", [*EVERY, "kfac_empirical", "two_level"])
def test_micro_batches_may_all_go_forward_first(name: str, order: tuple[int, ...]) -> None:
    """As pipelines have them: their backward passes come later, each for its own."""
    more = {
        "kfac_empirical": partial(KFAC, likelihood=Categorical(), fisher="empirical", update_every=1),
        "two_level": partial(TwoLevelKFAC, likelihood=Categorical(), update_every=1),
    }
    torch.manual_seed(1)
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    parts = [slice(0, 4), slice(4, 6), slice(6, 12)]

    def trained(ahead: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Stashing()
        optimizer = (EVERY | more)[name](model)
        for _ in range(3):
            optimizer.zero_grad()
            outputs = {part: model(x[parts[part]]) for part in (range(3) if ahead else ())}
            for part in order:
                own = outputs[part] if ahead else model(x[parts[part]])
                optimizer.backward(F.cross_entropy(own, y[parts[part]], reduction="sum") / 12, own)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for a, b in zip(trained(False), trained(True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_a_model_in_a_file_needs_no_optimizer(name: str) -> None:
    """Once it is closed; and a copy's backward hooks are its own."""
    model = Stashing()
    optimizer = EVERY[name](model)
    copied = copy.deepcopy(model)
    optimizer.close()
    assert b"optimizers.curvature" not in pickle.dumps(model)
    seen: list[str] = []
    copied.register_full_backward_hook(lambda *a: seen.append("copy"))
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert not seen
    copied(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert seen == ["copy"]


def test_a_loop_that_no_longer_tells_is_told() -> None:
    model, x, y = Stashing(), torch.randn(8, 4), torch.arange(8) % 3
    optimizer = AdaFisher(model, update_every=1)
    outputs = model(x)
    optimizer.backward(F.cross_entropy(outputs, y), outputs)
    optimizer.step()
    F.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="tell of each that counts by optimizer.backward"):
        optimizer.step()


@pytest.mark.parametrize("name", EVERY)
def test_a_scaler_that_nobody_tells_of_is_told_of(name: str) -> None:
    def train(told: bool) -> list[str]:
        model, x, y = Stashing(), torch.randn(8, 4), torch.arange(8) % 3
        optimizer, scaler = EVERY[name](model), torch.amp.GradScaler("cpu", init_scale=1024.0)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                optimizer.zero_grad()
                outputs = model(x)
                loss = scaler.scale(F.cross_entropy(outputs, y))
                optimizer.backward(loss, outputs, scale=scaler.get_scale() if told else 1.0)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0 if told else 1e9)
                scaler.step(optimizer)
                scaler.update()
        return [str(one.message) for one in said if "divided by 1024" in str(one.message)]

    assert train(True) == []
    assert len(train(False)) == (name != "adafisher")  # whose statistics are scaled to [0, 1]
