"""Whatever a model's layout: every layer has the curvature of its definition, or a warning says which has not and why.

The definitions are assembled by autograd from what the losses of single examples send through the model
(``tests.dense``), which needs to know nothing of which row belongs to which example.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from optimizers import (
    EKFAC,
    KFAC,
    KPSVD,
    AdaFisher,
    AdaFisherW,
    AdaHessian,
    Categorical,
    Deflation,
    ExactNaturalGradient,
    FishLeg,
    KFACCorrected,
    Lanczos,
    TwoLevelKFAC,
)
from tests import dense

pytestmark = pytest.mark.usefixtures("float64")

D, H, C = 4, 3, 3  # widths of inputs, of what is hidden, and of outputs

UNFIT, MIXED, AROUND = "no dimension of its rows", "examples are mixed", "do not reproduce its gradient"
UNSEEN, BEHIND = "without gradients: inside a reentrant checkpoint", "comes through a reentrant checkpoint"


class Worst(Categorical):
    """Draws are no draws: the class that the model holds for the least likely."""

    def sample(self, outputs: Tensor, generator: Any = None, *, rank: int = 0, world_size: int = 1) -> Tensor:
        return outputs.argmin(-1)


@dataclass
class Case:
    """A model and what is to be found in it.

    Attributes:
        build: the model.
        call: arguments of a batch of (examples, positions).
        outputs: what is handed over of what the model returns.
        sizes: (examples, positions) of two batches.
        reasons: layers without curvature, and a part of the sentence that says why.
        heard: likewise where gradients are heard of in the backward pass of the loss; None: the same.
        owners: which example each observation belongs to, of outputs with one a row and so many examples; None: the
            outputs' leading dimension is the examples'.
        examples: how many examples the observations of a batch are of.
        plain: the same function in the plainest layout, whose steps are the same; None: there is none.
    """

    build: Callable[[], nn.Module]
    call: Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]]
    outputs: Callable[[Any], Tensor] = lambda out: out
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((5, 3), (4, 6))
    reasons: dict[str, str] = field(default_factory=dict)
    heard: dict[str, str] | None = None
    owners: Callable[[int, int], Tensor] | None = None
    examples: Callable[[int, int], int] = lambda b, t: b
    plain: Callable[[], nn.Module] | None = None


def sequences(b: int, t: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(b, t, D),), {}


def vectors(b: int, t: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(b, D),), {}


def tokens(b: int, t: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randint(0, 6, (b, t)),), {}


class SequenceFirst(nn.Module):
    """Layers see [positions, batch, ...] inside a model of [batch, positions, ...]."""

    def __init__(self, inside: bool = True, pooled: bool = True) -> None:
        super().__init__()
        self.i, self.n, self.l = nn.Linear(D, H), nn.LayerNorm(H), nn.Linear(H, C)
        self.inside, self.pooled = inside, pooled

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(0, 1) if self.inside else x
        h = self.n(self.i(h).tanh())
        if self.pooled:
            return self.l(h.mean(0 if self.inside else 1))
        h = self.l(h)
        return h.transpose(0, 1) if self.inside else h


class Positions(nn.Module):
    """Position ids that all examples share, as in nanoGPT."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.p, self.o = nn.Embedding(6, H), nn.Embedding(9, H), nn.Linear(H, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.o((self.e(x) + self.p(torch.arange(x.shape[1]))).tanh())


class Queries(nn.Module):
    """Learned queries that look at each example, and go through a layer of their own before."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(2, H))
        self.own, self.n, self.k, self.o = nn.Linear(H, H), nn.LayerNorm(H), nn.Linear(D, H), nn.Linear(H, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.n(self.own(self.q)), self.k(x)
        return self.o(((q @ k.mT).softmax(-1) @ k).mean(1))


class Windows(nn.Module):
    """Windows of a sequence folded into the batch."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.i, self.c = nn.Linear(D, H), nn.Conv1d(H, H, 2, padding=1)
        self.n, self.g, self.o = nn.LayerNorm(H), nn.GroupNorm(1, H), nn.Linear(H, C)

    def forward(self, x: Tensor) -> Tensor:
        b = len(x)
        windows = x.unflatten(1, (-1, 3))  # [batch, windows, 3, D]
        if self.order == "fast":
            windows = windows.transpose(0, 1)
        h = self.n(self.i(windows.flatten(0, 1)).tanh()) if self.order != "plain" else self.n(self.i(windows).tanh())
        if self.order == "plain":  # the same, without folding: one window at a time
            parts = [self.g(self.c(h[:, w].mT)).tanh() for w in range(h.shape[1])]
            return self.o(torch.stack(parts, 1).mean((1, 3)))
        h = self.g(self.c(h.mT)).tanh().mean(2)
        h = h.unflatten(0, (b, -1) if self.order == "slow" else (-1, b))
        return self.o(h.mean(1 if self.order == "slow" else 0))


def windows(b: int, t: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(b, 3 * t, D),), {}


class Plain(nn.Module):
    """Linear, norm and Linear on vectors, called in some way."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.way = way
        self.a, self.n, self.b = nn.Linear(D, H), nn.LayerNorm(H), nn.Linear(H, C)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = kwargs["features"]["x"] if kwargs else args[-1]
        if self.way == "keyword":
            return self.b(input=self.n(input=self.a(input=x)).tanh())
        y = self.b(self.n(self.a(x)).tanh())
        if self.way == "gathered":
            return y[: len(y) // 2] if y.dim() == 2 else y[x[..., 0] > x[..., 0].median()]
        if self.way == "flattened":
            return y.flatten(0, 1)
        return (y, x.sum()) if self.way == "tuple" else y


class Early(nn.Module):
    """Positions are rows from the first layer on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(D, H), nn.LayerNorm(H), nn.Linear(H, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.n(self.a(x.flatten(0, 1))).tanh())


class Mixing(nn.Module):
    """Positions see one another, and outputs are flattened; early, so are the rows of the layers."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early
        self.a, self.b = nn.Linear(D, H), nn.Linear(H, C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if self.early else self.a(x)
        h = h.cumsum(1).tanh()
        return self.b(h.flatten(0, 1)) if self.early else self.b(h).flatten(0, 1)


class Twice(nn.Module):
    """A norm and a layer that are called three times in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.n, self.f, self.o = nn.Linear(D, H), nn.LayerNorm(H), nn.Linear(H, H), nn.Linear(H, C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x)
        for _ in range(3):
            h = h + self.f(self.n(h)).tanh()
        return self.o(h)


class Siamese(nn.Module):
    """An encoder on the two halves of each example: in two calls, or in one of both."""

    def __init__(self, together: bool = False) -> None:
        super().__init__()
        self.e = nn.Sequential(nn.Linear(D, H), nn.LayerNorm(H), nn.Tanh())
        self.o, self.together = nn.Linear(H, C), together

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        u, v = self.e(torch.cat([a, b])).chunk(2) if self.together else (self.e(a), self.e(b))
        return self.o(u * v)


def halves(b: int, t: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(b, D), torch.randn(b, D)), {}


class Checkpointed(nn.Module):
    """A part inside a checkpoint of either kind, between layers outside of it."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.i, self.o = nn.Linear(D, H), nn.Linear(H, C)
        self.m = nn.Sequential(nn.Linear(H, H), nn.LayerNorm(H), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        h = self.i(x)
        return self.o(self.m(h) if self.reentrant is None else checkpoint(self.m, h, use_reentrant=self.reentrant))


class Attention(nn.Module):
    """Torch's attention between positions, or of one sequence to another."""

    def __init__(self, batch_first: bool, cross: bool) -> None:
        super().__init__()
        self.first, self.cross = batch_first, cross
        self.attn = nn.MultiheadAttention(D, 2, batch_first=batch_first)
        self.o = nn.Linear(D, C)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q, k = (t if t is None or self.first else t.transpose(0, 1) for t in (x, other))
        h = self.attn(q, k, k)[0] if self.cross else self.attn(q, q, q)[0]
        return self.o(h.tanh().mean(1 if self.first else 0))


def two_sequences(b: int, t: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(b, t, D), torch.randn(b, t + 1, D)), {}


class Encoder(nn.Module):
    """nn.TransformerEncoder as torch has it, [positions, batch, dim], around which the batch is first."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 5, dropout=0.0)
        self.t, self.o = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.t(x.transpose(0, 1)).transpose(0, 1))


class Cell(nn.Module):
    """An LSTM's cell of two Linears, one step after another."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h, self.o = nn.Linear(D, 4 * H), nn.Linear(H, 4 * H, bias=False), nn.Linear(H, C)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), H)
        for step in x.unbind(1):
            i, f, g, o = (self.x(step) + self.h(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.o(h)


class Functional(nn.Module):
    """A weight used without the layer's own call, or beside it in an operation of another kind."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.l, self.n, self.o = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "plain":
            h = self.n(self.l(x)).tanh()
        elif self.way == "functional":
            h = F.linear(x, self.l.weight, self.l.bias)
            if hasattr(self, "told"):
                self.told(self.l, x, h)
            h = F.layer_norm(h, (D,), self.n.weight, self.n.bias).tanh()
        else:
            h = self.n(self.l(x)).tanh() + x @ self.l.weight.T
        return self.o(h)


CASES: dict[str, Case] = {
    "sequence-first": Case(SequenceFirst, sequences, plain=lambda: SequenceFirst(False)),
    "sequence-first-long": Case(SequenceFirst, sequences, sizes=((3, 6), (6, 3))),  # positions: a multiple of examples
    "square": Case(SequenceFirst, sequences, sizes=((4, 4), (3, 5)), plain=lambda: SequenceFirst(False)),
    "square-tokens": Case(
        lambda: SequenceFirst(pooled=False), sequences, sizes=((4, 4), (3, 3)),
        plain=lambda: SequenceFirst(False, False),
    ),
    "position-ids": Case(Positions, tokens, reasons={"p": UNFIT}),
    "position-ids-square": Case(Positions, tokens, sizes=((4, 4), (3, 3)), reasons={"p": MIXED}),
    "queries": Case(Queries, sequences, reasons={"own": UNFIT, "n": UNFIT}),
    "windows-slow": Case(lambda: Windows("slow"), windows, sizes=((4, 2), (3, 3)), plain=lambda: Windows("plain")),
    "windows-fast": Case(lambda: Windows("fast"), windows, sizes=((4, 2), (3, 3)), plain=lambda: Windows("plain")),
    "gathered-positions": Case(
        lambda: Plain("gathered"), sequences, sizes=((4, 3), (4, 3)), reasons=dict.fromkeys("anb", UNFIT),
        owners=lambda b, t: torch.arange(b * t // 2), examples=lambda b, t: b * t // 2,
    ),
    "gathered-examples": Case(
        lambda: Plain("gathered"), vectors, sizes=((6, 1), (8, 1)), reasons=dict.fromkeys("anb", MIXED),
        owners=lambda b, t: torch.arange(b // 2), examples=lambda b, t: b // 2,
    ),
    "flattened": Case(
        lambda: Plain("flattened"), sequences, owners=lambda b, t: torch.arange(b).repeat_interleave(t), plain=Plain
    ),
    "flattened-early": Case(
        Early, sequences, owners=lambda b, t: torch.arange(b * t), examples=lambda b, t: b * t
    ),
    "flattened-mixing": Case(
        lambda: Mixing(False), sequences, owners=lambda b, t: torch.arange(b).repeat_interleave(t)
    ),
    "flattened-early-mixing": Case(
        lambda: Mixing(True), sequences, owners=lambda b, t: torch.arange(b).repeat_interleave(t)
    ),
    "keyword": Case(lambda: Plain("keyword"), vectors, plain=Plain),
    "twice": Case(Twice, vectors),
    "twice-positions": Case(Twice, sequences),
    "siamese": Case(Siamese, halves),
    "siamese-together": Case(lambda: Siamese(True), halves, plain=Siamese),
    "checkpoint": Case(lambda: Checkpointed(False), vectors, plain=lambda: Checkpointed(None)),
    "checkpoint-reentrant": Case(
        lambda: Checkpointed(True), vectors, reasons={"i": BEHIND, "m.0": UNSEEN, "m.1": UNSEEN}, heard={"i": BEHIND}
    ),
    "self-attention": Case(
        lambda: Attention(True, False), sequences
    ),
    "self-attention-sequence-first": Case(
        lambda: Attention(False, False), sequences, plain=lambda: Attention(True, False)
    ),
    "cross-attention": Case(lambda: Attention(True, True), two_sequences),
    "cross-attention-sequence-first": Case(
        lambda: Attention(False, True), two_sequences, plain=lambda: Attention(True, True)
    ),
    "transformer-encoder": Case(Encoder, sequences),
    "lstm-cell": Case(Cell, sequences),
    "functional": Case(lambda: Functional("functional"), vectors, plain=lambda: Functional("plain")),
    "transposed": Case(lambda: Functional("transposed"), vectors, reasons={"l": AROUND}),
    "edges-first": Case(
        Plain, lambda b, t: ((torch.randint(0, b, (2, 3 * b)), torch.randn(b, D)), {}), plain=Plain
    ),
    "dict": Case(Plain, lambda b, t: ((), {"features": {"ids": torch.arange(7), "x": torch.randn(b, D)}}), plain=Plain),
    "tuple": Case(lambda: Plain("tuple"), vectors, outputs=lambda out: out[0], plain=Plain),
}  # fmt: skip

OPTIONS: dict[str, Any] = {"lr": 0.0, "update_every": 1, "decay": 0.0}
METHODS: dict[str, tuple[type, Callable[[dense.LayerReference], Tensor], float]] = {
    "AdaFisher": (AdaFisher, dense.LayerReference.kronecker_diagonal, 1e-8),
    "AdaFisherW": (AdaFisherW, dense.LayerReference.kronecker_diagonal, 1e-8),
    "KFAC": (KFAC, dense.LayerReference.kronecker, 1e-8),
    "EKFAC": (EKFAC, dense.LayerReference.eigen_corrected, 1e-8),
    # Iterations stop at one part in a million.
    "KPSVD": (KPSVD, lambda layer: layer.nearest(1), 1e-6),
    "Deflation": (Deflation, lambda layer: layer.nearest(2), 1e-6),
    "Lanczos": (Lanczos, lambda layer: layer.nearest(2), 1e-6),
    "KFACCorrected": (KFACCorrected, dense.LayerReference.corrected, 1e-6),
    "TwoLevelKFAC": (TwoLevelKFAC, dense.LayerReference.kronecker, 1e-8),
    "ExactNaturalGradient": (ExactNaturalGradient, lambda layer: layer.block, 1e-8),
}
CELLS = [
    (case, method, fisher)
    for case in CASES
    for method in METHODS
    for fisher in (["empirical"] if method.startswith("Ada") else ["sampled", "empirical", "exact"])
]


def built(name: str, plain: bool = False) -> nn.Module:
    torch.manual_seed(0)
    build = CASES[name].plain if plain else CASES[name].build
    assert build is not None
    model = build()
    for p in model.parameters():  # norms at ones and zeros would hide mistakes
        with torch.no_grad():
            p.add_(torch.randn_like(p), alpha=0.5)
    return model


def batch(name: str, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(10 + index)
    return CASES[name].call(*CASES[name].sizes[index])


def targets_for(outputs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(len(outputs))
    return torch.randint(0, C, outputs.shape[:-1], generator=generator)


references: dict[tuple[str, str, int], dict[str, dense.LayerReference]] = {}


def reference(name: str, fisher: str, index: int) -> dict[str, dense.LayerReference]:
    """By layer, worked out once for all methods."""
    if (name, fisher, index) not in references:
        case, model = CASES[name], built(name)
        if name == "checkpoint-reentrant":
            model.reentrant = None
        args, kwargs = batch(name, index)
        b, t = case.sizes[index]
        uses = dense.Uses(model)
        outputs = case.outputs(uses.run(*args, **kwargs))
        targets = targets_for(outputs).flatten()
        owners = torch.arange(b).repeat_interleave(len(targets) // b) if case.owners is None else case.owners(b, t)
        flat = outputs.flatten(0, -2)

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(outputs, targets, reduction="sum")

        seeds = dense.draws(fisher, loss, flat, targets, flat.argmin(-1), owners, case.examples(b, t))
        references[name, fisher, index] = dense.layer_references(model, uses, flat, seeds)
    return references[name, fisher, index]


def options(method: type, fisher: str) -> dict[str, Any]:
    if issubclass(method, AdaFisher):
        return {**OPTIONS, "normalize": "none", "ema": "average"}
    found = {**OPTIONS, "fisher": fisher, "likelihood": Worst(), "batch_fraction": 1.0, "kl_clip": None}
    if method is ExactNaturalGradient:
        del found["decay"]
    if method is EKFAC:
        found["basis"] = "eigh"  # as the definition has it
    return found if method is ExactNaturalGradient else {**found, "refresh_every": 1}


def advance(optimizer: Any, model: nn.Module, name: str, index: int) -> None:
    args, kwargs = batch(name, index)
    optimizer.zero_grad()
    outputs = CASES[name].outputs(model(*args, **kwargs))
    loss = F.cross_entropy(outputs.flatten(0, -2), targets_for(outputs).flatten())
    optimizer.backward(loss, outputs)
    optimizer.step()


@pytest.mark.parametrize("name, method, fisher", CELLS, ids=["-".join(cell) for cell in CELLS])
def test_curvature_is_its_definition_or_its_absence_is_told(name: str, method: str, fisher: str) -> None:
    kind, definition, tolerance = METHODS[method]
    case, model = CASES[name], built(name)
    reasons = case.reasons
    if fisher == "empirical" and case.heard is not None:
        reasons = case.heard
    optimizer = kind(model, **options(kind, fisher))
    for index in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            advance(optimizer, model, name, index)
        said = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        rows = {row[0]: row[1] for row in optimizer.coverage().rows}
        expected = reference(name, fisher, index)
        found = optimizer.curvature_matrices()
        own = set(optimizer.blocks)
        assert own == {n for n, m in model.named_modules() if list(m.parameters(recurse=False)) and n}, own
        assert own - found.keys() == set(reasons), rows
        for layer, why in reasons.items():
            assert rows[layer].startswith("fallback: "), rows
            assert why in rows[layer], rows
        if reasons and index == 0:
            assert len(said) == 1
            assert f"no curvature for {len(reasons)} of {len(own)} layers" in said[0]
            assert all(f"{layer}: " in said[0] for layer in reasons)
        else:
            assert not said
        for layer, matrix in found.items():
            right = definition(expected[layer]) if expected[layer].A is not None else expected[layer].diagonal()
            right = expected[layer].block if method == "ExactNaturalGradient" else right
            assert (matrix - right).norm() <= tolerance * right.norm(), layer
            if method == "TwoLevelKFAC":
                block = optimizer.samples[layer].to_dense()
                assert (block - expected[layer].block).norm() <= 1e-8 * expected[layer].block.norm(), layer


class Chosen(nn.Module):
    """A layer on all nodes of a graph, of which some are chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(D, C)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return self.l(x)[chosen]


@pytest.mark.parametrize("chosen", [[0, 1, 2], [0, 1, 4], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("aligned", [[0, 3, 4], [0, 4, 2]], ids=str)
@pytest.mark.parametrize(
    "kind, fisher", [(KFAC, "exact"), (ExactNaturalGradient, "empirical"), (AdaFisher, "empirical")]
)
def test_rows_that_were_in_line_by_chance_are_found_out_when_they_are_not(
    kind: type, fisher: str, aligned: list[int], chosen: list[int]
) -> None:
    model = Chosen()
    optimizer = kind(model, **options(kind, fisher))
    for rows in (aligned, chosen):
        x, y = torch.randn(6, D), torch.tensor([0, 1, 2])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.zero_grad()
            outputs = model(x, torch.tensor(rows))
            optimizer.backward(F.cross_entropy(outputs, y), outputs)
            optimizer.step()
    assert any("no curvature for 1 of 1 layers" in str(w.message) for w in caught)
    assert optimizer.coverage().fraction == 0
    assert not optimizer.curvature_matrices()


PLAIN = [name for name, case in CASES.items() if case.plain is not None]


@pytest.mark.parametrize("kind", [FishLeg, AdaHessian])
@pytest.mark.parametrize("name", PLAIN)
def test_steps_are_those_of_the_plain_model(name: str, kind: type) -> None:
    weights = []
    for plain in (True, False):
        model = built(name, plain)
        optimizer = kind(model, lr=0.05, **({"likelihood": Categorical()} if kind is FishLeg else {}))
        for step in range(4):
            args, kwargs = batch(name, step % 2)
            optimizer.zero_grad()
            outputs = model(*args, **kwargs)
            outputs = outputs if plain else CASES[name].outputs(outputs)
            targets = torch.randint(0, C, (outputs.numel() // C,), generator=torch.Generator().manual_seed(step))
            optimizer.backward(F.cross_entropy(outputs.flatten(0, -2), targets), outputs)
            optimizer.step()
        weights.append({n: p.detach() for n, p in model.named_parameters()})
    for key, right in weights[0].items():
        assert torch.allclose(weights[1][key], right, rtol=1e-8, atol=1e-10), key


@pytest.mark.parametrize("kind", [AdaHessian, FishLeg])
def test_a_reentrant_checkpoint_is_no_silent_loss(kind: type) -> None:
    """An error that says what to do, or the steps that there are without it."""
    weights = []
    for reentrant in (None, True):
        torch.manual_seed(0)
        model = Checkpointed(reentrant)
        optimizer = kind(model, lr=0.05, **({"likelihood": Categorical()} if kind is FishLeg else {}))
        outputs = model(torch.randn(5, D))
        loss = F.cross_entropy(outputs, torch.arange(5) % C)
        if reentrant and kind is AdaHessian:
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                optimizer.backward(loss, outputs)
            return
        optimizer.backward(loss, outputs)
        optimizer.step()
        weights.append([p.detach() for p in model.parameters()])
    for found, right in zip(*weights, strict=True):
        assert torch.allclose(found, right, rtol=1e-8, atol=1e-10)
