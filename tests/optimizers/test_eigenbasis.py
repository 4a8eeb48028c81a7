"""EKFAC's bases: orthogonal iteration against ``eigh``, reflections against matrices, moments in the basis in use."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizers import EKFAC, Categorical
from optimizers.curvature import linalg
from tests import dense
from tests.optimizers.problems import images, mlp
from tests.optimizers.test_natural_gradient import around, criterion, damped_dense, relative, train

# Of a basis: how many matrices, their width, how many leading columns.
FORMS = {"matrix": (2, 9, 9), "reflections": (1, 11, 4), "stacked reflections": (3, 8, 3), "one": (1, 3, 1)}


def gaussian(n: int, d: int, rows: int) -> Tensor:
    """Second moments of random rows."""
    x = torch.randn(n, rows, d)
    return x.mT @ x / rows


def aligned(found: Tensor, expected: Tensor) -> float:
    """How far each column is from one of the expected ones, at most, whatever their signs."""
    return float((1 - (found * expected).sum(-2).abs()).max())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", FORMS)
def test_what_is_done_in_a_basis_is_done_with_its_matrix(form: str) -> None:
    n, d, r = FORMS[form]
    columns = torch.randn(n, d, r)
    basis = linalg.orthonormal(columns)
    q, eye = linalg.as_matrix(basis), torch.eye(d)
    torch.testing.assert_close(q.mT @ q, eye.expand(n, d, d))
    leading = linalg.leading_columns(basis)
    torch.testing.assert_close(leading, q[..., :r])
    torch.testing.assert_close(leading @ (leading.mT @ columns), columns)
    triangle = leading.mT @ columns
    torch.testing.assert_close(triangle, triangle.triu(), atol=1e-12, rtol=0)
    rows = torch.randn(n, 5, d)
    torch.testing.assert_close(linalg.turned(rows, basis), rows @ q)
    torch.testing.assert_close(linalg.turned(rows, basis, back=True), rows @ q.mT)
    torch.testing.assert_close(linalg.turned(rows.mT, basis, left=True), q.mT @ rows.mT)
    torch.testing.assert_close(linalg.turned(rows.mT, basis, left=True, back=True), q @ rows.mT)
    other = linalg.orthonormal(torch.randn(n, d, r))
    torch.testing.assert_close(linalg.overlaps(other, basis), linalg.as_matrix(other).mT @ q)


@pytest.mark.parametrize("columns", [torch.zeros(1, 7, 3), torch.eye(7)[:, :3].unsqueeze(0), torch.ones(1, 7, 3)])
def test_columns_that_need_or_allow_no_reflection(columns: Tensor) -> None:
    q = linalg.as_matrix(linalg.orthonormal(columns))
    torch.testing.assert_close(q.mT @ q, torch.eye(7).unsqueeze(0), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", FORMS)
def test_iterations_on_a_fixed_matrix_end_where_eigh_does(form: str) -> None:
    n, d, r = FORMS[form]
    matrices = gaussian(n, d, 40)
    vectors = torch.linalg.eigh(matrices)[1].flip(-1)[..., :r]
    basis, before = linalg.orthonormal(torch.randn(n, d, r)), torch.ones(n)
    for index in range(2000):
        columns = linalg.leading_columns(basis)
        images = columns.mT @ matrices @ columns
        squares = (matrices @ columns).square().sum((-2, -1))
        expected = 1 - images.diagonal(dim1=-2, dim2=-1).square().sum(-1) / squares
        basis, off = linalg.iterated(matrices, basis)
        if index < 5:
            torch.testing.assert_close(off, expected)
            assert bool((off < before).all()), "nearer with every step"
            before = off
    assert aligned(linalg.leading_columns(basis), vectors) < 1e-8
    assert float(linalg.iterated(matrices, basis)[1].max()) < 1e-8
    assert aligned(linalg.leading_columns(linalg.eigenbasis(matrices, r)).sort(-1)[0], vectors.sort(-1)[0]) >= 0


@pytest.mark.parametrize("r", [3, 12])
def test_a_null_space_stays_where_it_is(r: int) -> None:
    """Rounding alone would choose another basis of it in every refresh."""
    x = torch.zeros(1, 2, 12)
    x[..., :2] = torch.randn(2, 2)
    matrices = x.mT @ x
    basis = linalg.eigenbasis(matrices, r)
    later = basis
    for _ in range(20):
        later = linalg.iterated(matrices, later)[0]
    q = linalg.as_matrix(later)
    torch.testing.assert_close(q.mT @ q, torch.eye(12).unsqueeze(0), atol=1e-5, rtol=0)
    columns = linalg.leading_columns(later)[..., 2:]
    turned = (linalg.leading_columns(basis).mT @ columns).abs()
    assert float(turned.amax(-2).min()) > 0.999


OPTIONS: dict[str, Any] = {
    "lr": 0.0, "momentum": 0.0, "fisher": "empirical", "kl_clip": None, "batch_fraction": 1.0, "update_every": 1,
    "early_updates": False,
}  # fmt: skip


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("name", ["linear", "linear on tokens", "conv", "grouped"])
def test_moments_are_of_the_basis_in_use(name: str, rank: int | None) -> None:
    """A new batch in every step, refreshes in every other one: S is what the average of the moments is by hand."""
    model, layer, inputs, _ = around(name)
    optimizer = EKFAC(model, decay=0.6, refresh_every=2, rank=rank, damping=0.1, **OPTIONS)
    block = optimizer.blocks["1"]
    kept: list[Tensor] | None = None
    for step in range(6):
        batch = torch.randn_like(inputs), torch.randint(0, 3, (len(inputs),))
        fishers, _ = dense.layer_blocks(model, layer, criterion, *batch)
        train(optimizer, model, batch, 1)
        keep = min(1 - 1 / (step + 1), 0.6)
        bases = [torch.kron(g, a) for g, a in zip(block.basis("G"), block.basis("A"), strict=True)]
        approximations = []
        for i, (fisher, basis) in enumerate(zip(fishers, bases, strict=True)):
            torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)))
            moments = (basis.T @ fisher @ basis).diagonal()
            if kept is not None:
                moments = keep * (basis.T @ kept[i] @ basis).diagonal() + (1 - keep) * moments
            torch.testing.assert_close(block.factors["S"][i].flatten(), moments)
            approximations.append(basis @ moments.diag() @ basis.T)
        kept = approximations
    assert optimizer.refreshes == 3
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer.param_groups[0]["lr"] = 1.0
    train(optimizer, model, batch, 1)
    step_taken = dense.flatten([b - p.detach() for p, b in zip(layer.parameters(), before, strict=True)])
    order = dense.as_matrix_order(layer)
    gradient = dense.flatten([p.grad for p in layer.parameters()])[order]
    expected = torch.linalg.solve(torch.block_diag(*damped_dense(optimizer, "1", 0.1)), gradient)
    assert relative(step_taken[order], expected) < 1e-8


@pytest.mark.usefixtures("float64")
def test_on_the_same_batch_the_bases_become_those_of_eigh() -> None:
    model, _, inputs, targets = around("linear")
    found = []
    for basis in ("iterate", "eigh"):
        net = copy.deepcopy(model)
        optimizer = EKFAC(net, decay=0.0, refresh_every=1, basis=basis, **OPTIONS)
        other = torch.randn_like(inputs)
        train(optimizer, net, (other, targets), 1)  # where the iteration starts from
        train(optimizer, net, (inputs, targets), 200)
        found.append(optimizer.curvature_matrices()["1"])
        made = optimizer.diagnostics()["curvature/decompositions"]
        assert made == (4 if basis == "iterate" else 4 * 201)
    assert relative(*found) < 1e-6


@pytest.mark.parametrize("rank", [None, 2])
def test_a_basis_that_has_lost_its_factor_is_made_anew_and_counted(rank: int | None) -> None:
    model, batch = mlp(), images(64)
    options: dict[str, Any] = {"rank": rank, "update_every": 100, "refresh_every": 1, "early_updates": False}
    optimizer = EKFAC(model, likelihood=Categorical(), lr=1e-3, **options)
    train(optimizer, model, batch, 3)
    assert optimizer.diagnostics()["curvature/decompositions"] == 4, "once for each of two layers' factors"
    block = optimizer.blocks["3"]
    far = block.basis("A").sum(-1, keepdim=True) / 7**0.5  # as far as can be from every one of its vectors
    block.factors["A"] = far @ far.mT + 0.01 * torch.diag(torch.arange(7.0))
    train(optimizer, model, batch, 1)
    assert optimizer.diagnostics()["curvature/decompositions"] == 5
    leading = linalg.leading_columns(block.factors["U_A"]).sum(0)
    largest = torch.linalg.eigh(block.factors["A"][0])[1][:, -1]
    assert float((leading.T @ largest).abs().max()) > 0.9999, "an eigenvector"
    state = copy.deepcopy(optimizer.state_dict())
    again = EKFAC(model, likelihood=Categorical(), **options)
    again.load_state_dict(state)
    assert again.diagnostics()["curvature/decompositions"] == 5
    train(again, model, batch, 1)
    assert again.diagnostics()["curvature/decompositions"] == 5


def test_a_factor_that_is_not_finite_leaves_the_last_basis_in_use() -> None:
    model, batch = mlp(), images()
    optimizer = EKFAC(model, likelihood=Categorical(), update_every=100, refresh_every=1)
    train(optimizer, model, batch, 1)
    block = optimizer.blocks["3"]
    before = block.factors["U_A"].clone()
    block.factors["A"] = torch.full_like(block.factors["A"], float("nan"))
    losses = train(optimizer, model, batch, 2)
    assert torch.equal(block.factors["U_A"], before)
    assert optimizer.diagnostics()["curvature/fallbacks"] >= 1
    assert all(torch.tensor(losses).isfinite())


def test_a_routine_that_fails_without_a_word_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """As LAPACK's does on some processors, in float32, for finite matrices with many eigenvalues near zero."""
    plain, matrices = torch.linalg.eigh, gaussian(3, 6, 4)

    def mute(given: Tensor) -> Any:
        values, vectors = plain(given)
        if given.dtype == torch.float32 and given.dim() == 3:
            values[1], vectors[1] = torch.nan, torch.nan
        return values, vectors

    expected = plain(matrices)[0]
    monkeypatch.setattr(torch.linalg, "eigh", mute)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda given: mute(given)[0])
    values, vectors = linalg.eigh(matrices)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vectors * values.unsqueeze(-2) @ vectors.mT, matrices, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linalg.eigvalsh(matrices), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("unit", ["absolute", "layer"])
def test_a_factor_that_defeats_its_decomposition_has_no_inverse_until_it_does_not(
    monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    model, batch = mlp(), images()
    options: dict[str, Any] = {"damping_unit": unit, "lr": 1e-2, "early_updates": False}
    optimizer = EKFAC(model, likelihood=Categorical(), update_every=1, refresh_every=2, **options)
    plain = linalg.eigenbasis

    def defeated(matrices: Tensor, rank: int) -> Tensor:
        return plain(matrices, rank) * (torch.nan if matrices.shape[-1] == 7 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(linalg, "eigenbasis", defeated)
        losses = train(optimizer, model, batch, 3)
    assert optimizer.diagnostics()["curvature/fallbacks"] >= 1
    inverted = {id(block) for stack in optimizer._stacks for block in stack.blocks}
    assert [name for name, block in optimizer.blocks.items() if id(block) not in inverted] == ["3"]
    losses += train(optimizer, model, batch, 3)
    assert {id(block) for stack in optimizer._stacks for block in stack.blocks} == {*map(id, optimizer.blocks.values())}
    assert losses[-1] < losses[0] and all(p.isfinite().all() for p in model.parameters())


def test_a_wide_factor_has_its_rank_in_reflections() -> None:
    model = nn.Sequential(nn.Linear(299, 40), nn.Linear(40, 3))
    shapes = EKFAC(model, likelihood=Categorical(), rank=128).blocks["0"].shapes()
    assert shapes["U_A"] == (1, 300, 256) and shapes["U_G"] == (1, 40, 40)
    shapes = EKFAC(model, likelihood=Categorical(), rank=None).blocks["0"].shapes()
    assert shapes["U_A"] == (1, 300, 300)
    for options, sentence in (
        ({"basis": "qr"}, "basis must be one of iterate, eigh, got 'qr'"),
        ({"rank": 0}, r"rank must be in \[1, inf\), got 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            EKFAC(model, likelihood=Categorical(), **options)
