"""Two-level K-FAC against dense matrices: coarse spaces, their Galerkin matrices, corrected directions, state."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizers import KFAC, Categorical, TwoLevelKFAC
from optimizers.curvature import linalg
from tests import dense
from tests.optimizers.problems import PROBLEMS, images, mlp
from tests.optimizers.test_exact import NETS, dense_fisher, problem, step
from tests.optimizers.test_natural_gradient import damped_dense, relative, train

SPACES: dict[str, dict[str, Any]] = {
    "nicolaides": {"coarse": "nicolaides"},
    "nicolaides krylov": {"coarse": "nicolaides", "krylov": True},
    "residual": {"coarse": "residual"},
    "residual krylov": {"coarse": "residual", "krylov": True},
    "tselepidis": {"coarse": "tselepidis"},
    "spectral": {"coarse": "spectral"},
}
DAMPING = 0.05


def layers_of(optimizer: Any, model: nn.Module) -> list[tuple[str, Tensor]]:
    """Each layer's name and where its parameters lie, in the order of its matrix, among all of the model's."""
    named, start = {}, 0
    for name, parameter in model.named_parameters():
        named[name] = torch.arange(start, start + parameter.numel())
        start += parameter.numel()
    found = []
    for name in optimizer.blocks:
        module = model.get_submodule(name)
        where = torch.cat([named[f"{name}.{key}"] for key, _ in module.named_parameters(recurse=False)])
        affine = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
        found.append((name, where[dense.as_matrix_order(module)] if affine else where))
    return found


def kept_vectors(optimizer: Any, model: nn.Module) -> Tensor:
    """R0 by rows as the optimizer has it, in its order."""
    places = dict(layers_of(optimizer, model))
    rows = []
    for vectors in optimizer._space.vectors:
        for name, vector in zip(optimizer._names, optimizer._apart(vectors), strict=True):
            rows.append(torch.zeros(sum(p.numel() for p in model.parameters())))
            rows[-1][places[name]] = vector.flatten()
    return torch.stack(rows)


def preconditioner(optimizer: Any, model: nn.Module) -> Tensor:
    """P, dense, in the order of the parameters."""
    size = sum(p.numel() for p in model.parameters())
    result = torch.zeros(size, size)
    for name, where in layers_of(optimizer, model):
        factors = optimizer.blocks[name].factors
        blocks = [torch.diag(factors["D"][0] + DAMPING)] if "D" in factors else damped_dense(optimizer, name, DAMPING)
        result[where.unsqueeze(1), where] = torch.block_diag(*blocks)
    return result


def coarse_vectors(space: str, optimizer: Any, model: nn.Module, fisher: Tensor, gradient: Tensor) -> Tensor:
    """R0 by rows, from the definitions."""
    inverse = torch.linalg.inv(preconditioner(optimizer, model))
    damped = fisher + DAMPING * torch.eye(len(fisher))
    whole = torch.ones_like(gradient)
    if space.startswith("residual"):
        whole = inverse @ (gradient - damped @ (inverse @ gradient))
    rows = []
    for name, where in layers_of(optimizer, model):
        row = torch.zeros_like(gradient)
        row[where] = whole[where]
        if space == "spectral":
            vectors = torch.linalg.eigh(optimizer.curvature_matrices()[name])[1]
            row[where] = vectors[:, 0]
        rows.append(row)
        if space.endswith("krylov"):
            rows.append(inverse @ row)
    return torch.stack(rows)


def observed(name: str, options: dict[str, Any], fisher: str) -> tuple[Any, nn.Module, Tensor, Tensor, Tensor]:
    """After one step of size 1: optimizer, model, dense Fisher matrix, gradient, direction."""
    model, inputs, targets = problem(name)
    matrix = dense_fisher(model, inputs, targets, fisher, Categorical())
    settings = {"damping": DAMPING, "fisher": fisher} | options
    optimizer, direction, gradient = step(TwoLevelKFAC, model, inputs, targets, **settings)
    return optimizer, model, matrix, gradient, direction


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("fisher", ["sampled", "empirical", "exact"])
@pytest.mark.parametrize("space", [name for name in SPACES if name != "spectral"])
@pytest.mark.parametrize("net", NETS)
def test_a_step_is_the_dense_correction(net: str, space: str, fisher: str) -> None:
    optimizer, model, matrix, gradient, direction = observed(net, SPACES[space], fisher)
    fine = torch.linalg.solve(preconditioner(optimizer, model), gradient)
    coarse = coarse_vectors(space, optimizer, model, matrix, gradient)
    expected = dense.two_level_direction(matrix, DAMPING, gradient, fine, coarse, additive=space == "tselepidis")
    assert relative(direction, expected) < 1e-8
    assert relative(direction, fine) > 1e-4, "the correction is there to be seen"


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("net", ["mlp", "cnn", "mixed", "sequence"])
def test_the_spectral_vectors_have_the_smallest_eigenvalue(net: str) -> None:
    """In the order of ``G (x) A``; which one, where several do, is anyone's choice."""
    optimizer, model, matrix, gradient, direction = observed(net, SPACES["spectral"], "empirical")
    coarse, places = kept_vectors(optimizer, model), dict(layers_of(optimizer, model))
    for name, row in zip(optimizer._names, coarse, strict=True):
        block, vector = optimizer.curvature_matrices()[name], row[places[name]]
        smallest = torch.linalg.eigvalsh(block)[0]
        torch.testing.assert_close(block @ vector, smallest * vector, rtol=1e-8, atol=1e-10 * float(block.norm()))
        assert float(vector.abs().max()) == pytest.approx(1.0)
    fine = torch.linalg.solve(preconditioner(optimizer, model), gradient)
    expected = dense.two_level_direction(matrix, DAMPING, gradient, fine, coarse)
    assert relative(direction, expected) < 1e-8


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("space", [name for name in SPACES if name != "tselepidis"])
@pytest.mark.parametrize("net", NETS)
def test_the_error_is_never_larger_than_that_of_kfac(net: str, space: str) -> None:
    """In the norm of F + damping, whatever the vectors: a projection brings nothing farther."""
    start, inputs, targets = problem(net)
    for seed, damping in ((0, 1e-3), (1, 1e-2), (2, 0.1), (3, 1.0)):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in start.parameters():
                p.add_(0.3 * torch.randn_like(p))
        damped = dense_fisher(start, inputs, targets, "empirical", Categorical())
        damped = damped + damping * torch.eye(len(damped))
        errors = []
        for method, options in ((TwoLevelKFAC, SPACES[space]), (KFAC, {})):
            model = copy.deepcopy(start)
            _, direction, gradient = step(
                method, model, inputs, targets, fisher="empirical", damping=damping, **options
            )
            error = direction - torch.linalg.solve(damped, gradient)
            errors.append(float(error @ damped @ error))
        assert errors[0] <= errors[1] * (1 + 1e-9)


class Spanning(TwoLevelKFAC):
    """With every unit vector of every layer."""

    def _vectors(self, like: list[Tensor]) -> list[list[Tensor]]:
        sizes = [(len(s.blocks), t.numel() // len(s.blocks)) for s, t in zip(self._stacks, like, strict=True)]
        return [
            [
                (torch.eye(size)[k] if k < size else torch.zeros(size)).repeat(count).view_as(t)
                for (count, size), t in zip(sizes, like, strict=True)
            ]
            for k in range(max(size for _, size in sizes))
        ]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("net", ["mlp", "cnn", "tokens"])
def test_a_space_that_spans_everything_is_the_exact_solve(net: str) -> None:
    model, inputs, targets = problem(net)
    matrix = dense_fisher(model, inputs, targets, "empirical", Categorical())
    _, direction, gradient = step(Spanning, model, inputs, targets, fisher="empirical", damping=DAMPING)
    assert relative(direction, dense.damped_solve(matrix, gradient, DAMPING)) < 1e-8


@pytest.mark.usefixtures("float64")
def test_the_coarse_matrix_and_the_right_hand_side() -> None:
    """``R0 (F + L) R0ᵀ`` with the damping of each layer's group, off the diagonal of a layer's two vectors too."""
    model, inputs, targets = problem("cnn")
    params = list(model.parameters())
    matrix = dense_fisher(model, inputs, targets, "empirical", Categorical())
    groups = [{"params": params[:2], "damping": 0.3}, {"params": params[2:], "damping": 0.02}]
    split = sum(p.numel() for p in params[:2])
    damping = torch.cat([torch.full((split,), 0.3), torch.full((len(matrix) - split,), 0.02)])
    optimizer, _, _ = step(TwoLevelKFAC, model, inputs, targets, params=groups, fisher="empirical", krylov=True, lr=0.0)
    space, coarse = optimizer._space, kept_vectors(optimizer, model)
    expected = coarse @ (matrix + torch.diag(damping)) @ coarse.T
    found = space.root @ space.root.T / space.scale / space.scale.unsqueeze(1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dependent_vectors_do_no_harm(dtype: torch.dtype) -> None:
    """The same space twice over is the space."""

    class Twice(TwoLevelKFAC):
        def _vectors(self, like: list[Tensor]) -> list[list[Tensor]]:
            (ones,) = super()._vectors(like)
            return [ones, [3 * v for v in ones], [torch.zeros_like(v) for v in ones]]

    directions = []
    for method in (TwoLevelKFAC, Twice):
        model, inputs, targets = problem("cnn")
        _, direction, _ = step(method, model.to(dtype), inputs.to(dtype), targets, fisher="empirical", damping=1e-3)
        directions.append(direction)
    assert relative(*directions) < (1e-8 if dtype == torch.float64 else 1e-3)


@pytest.mark.usefixtures("float64")
def test_tselepidis_averages_its_matrix_over_updates() -> None:
    model, inputs, targets = problem("mlp")
    optimizer = TwoLevelKFAC(
        model, lr=0.0, coarse="tselepidis", fisher="empirical", update_every=2, refresh_every=3, decay=0.6,
        batch_fraction=1.0, early_updates=False,
    )  # fmt: skip
    mean = torch.zeros(2, 2)
    ones = torch.zeros(2, sum(p.numel() for p in model.parameters()))
    ones[0, :25] = ones[1, 25:] = 1.0
    for index in range(7):
        x = inputs * (1 + 0.1 * index)
        train(optimizer, model, (x, targets), 1)
        if index % 2 == 0:
            keep = min(1 - 1 / (index // 2 + 1), 0.6)
            new = ones @ dense_fisher(model, x, targets, "empirical", Categorical()) @ ones.T
            mean = keep * mean + (1 - keep) * new
        torch.testing.assert_close(optimizer._averaged, mean)


@pytest.mark.parametrize("space", SPACES)
def test_samples_and_space_are_renewed_when_due(space: str) -> None:
    model, batch = mlp(), images()
    optimizer = TwoLevelKFAC(
        model, lr=1e-3, likelihood=Categorical(), update_every=2, refresh_every=3,
        early_updates=False, **SPACES[space],
    )  # fmt: skip
    seen = []
    for index in range(7):
        train(optimizer, model, (batch[0] + index, batch[1]), 1)
        kept = optimizer._space
        seen.append((float(optimizer.samples["1"].factors["x"].sum()), None if kept is None else id(kept)))
    assert [a[0] != b[0] for a, b in itertools.pairwise(seen)] == [False, True] * 3
    if space.startswith("residual"):
        assert {kept for _, kept in seen} == {None}
    else:  # updates at 0, 2, 4, 6; refreshes at 0, 3, 6
        changes = [a[1] != b[1] for a, b in itertools.pairwise(seen)]
        assert changes[0] is False and changes[4] is False


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("problem_name", ["conv", "vit", "embedding"])
def test_coverage_bytes_are_what_is_allocated(problem_name: str, space: str) -> None:
    model, batch = PROBLEMS[problem_name][0](), PROBLEMS[problem_name][1]()
    optimizer = TwoLevelKFAC(model, likelihood=Categorical(), lr=1e-4, **SPACES[space])
    train(optimizer, model, batch, 2)
    held = [t for s in optimizer.samples.values() for t in (*s.factors.values(), s._prepared[1])]
    held += [t for block in optimizer.blocks.values() for t in block.factors.values()]
    held += [t for stack in optimizer._stacks for t in stack.cache.values()]
    held += [t for cache in optimizer._rough[1] for t in cache.values()]
    if optimizer._space is not None:
        held += [t for vectors in optimizer._space.vectors for t in vectors] + [optimizer._space.images]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    assert optimizer.coverage().bytes == pytest.approx(sum(storages.values()), rel=0.1)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("case", ["zero", "dead", "constant", "batch of one"])
def test_degenerate_statistics(case: str, space: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    inputs, targets = images(1 if case == "batch of one" else 6)
    inputs = {"zero": torch.zeros_like(inputs), "constant": torch.ones_like(inputs)}.get(case, inputs)
    if case == "dead":
        nn.init.constant_(model[1].bias, -100.0)
    optimizer = TwoLevelKFAC(
        model, likelihood=Categorical(), lr=0.01, damping=1e-9, update_every=2, refresh_every=3, **SPACES[space]
    )
    assert all(torch.tensor(train(optimizer, model, (inputs, targets), 20)).isfinite())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_coarse_vectors_in_bfloat16_are_vectors_like_any_other(net: str) -> None:
    """The correction is the projection on them, so the error is K-FAC's at most; in float64 nothing is narrowed."""
    model, inputs, targets = problem(net)
    model, inputs = model.float(), inputs.float()
    settings = {"fisher": "empirical", "damping": DAMPING}
    damped = dense_fisher(copy.deepcopy(model).double(), inputs.double(), targets, "empirical", Categorical())
    damped = damped + DAMPING * torch.eye(len(damped)).double()
    directions, errors = [], []
    for method, options in (
        (TwoLevelKFAC, {"coarse": "residual", "coarse_dtype": "bfloat16"}),
        (TwoLevelKFAC, {"coarse": "residual", "coarse_dtype": "float32"}),
        (KFAC, {}),
    ):
        _, direction, gradient = step(method, copy.deepcopy(model), inputs, targets, **settings, **options)
        error = direction.double() - torch.linalg.solve(damped, gradient.double())
        errors.append(float(error @ damped @ error))
        directions.append(direction)
    assert max(errors[:2]) < errors[2]
    assert 0 < relative(*directions[:2]) < 0.02
    for coarse_dtype in ("auto", "bfloat16"):
        wide = copy.deepcopy(model).double()
        optimizer, direction, _ = step(
            TwoLevelKFAC, wide, inputs.double(), targets, coarse="residual", coarse_dtype=coarse_dtype, **settings
        )
        assert {t.dtype for cache in optimizer._rough[1] for t in cache.values()} == {torch.float64}
        assert direction.dtype == torch.float64


@pytest.mark.parametrize("options", [{}, {"max_factor_dim": 5}, {"damping_mode": "tikhonov"}], ids=str)
@pytest.mark.parametrize("net", ["mlp", "cnn", "mixed", "sequence"])
def test_whatever_inverses_are_narrowed_from(net: str, options: dict[str, Any]) -> None:
    """Diagonals, eigenbases, inverses that are in bfloat16 anyway, for sizes that no processor multiplies at once."""
    model, inputs, targets = problem(net)
    model, inputs = model.float(), inputs.float() if inputs.is_floating_point() else inputs
    settings = {"fisher": "empirical", "damping": DAMPING, "coarse": "residual"} | options
    for solve_dtype, coarse_dtype in (("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
        narrow = {"solve_dtype": solve_dtype, "coarse_dtype": coarse_dtype}
        optimizer, _, gradient = step(TwoLevelKFAC, copy.deepcopy(model), inputs, targets, **settings, **narrow)
        assert bool(gradient.isfinite().all())
        for stack, smoothed in zip(optimizer._stacks, optimizer._smoothers(), strict=True):
            block = stack.blocks[0]
            one = block.to_matrix([torch.randn_like(p) for p in block.layer.parameters])
            matrix = torch.cat([one] * len(stack.blocks))
            found, expected = smoothed(matrix), block.solve(stack.cache, matrix)
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert relative(found, expected) < 0.02


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [40, 150, 4000])
def test_the_smallest_eigenvalue_of_a_large_matrix(rows: int, dtype: torch.dtype) -> None:
    """Of full rank or not: an eigenvector of a matrix as near as was asked for, and no eigenvalue is far below its own.

    Where the iteration does not get there, a decomposition does.
    """
    x = torch.rand(2, rows, 120, dtype=dtype)
    matrices = x.mT @ x / rows
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
    for tolerance in (0.01, 0.0):
        values, vectors = linalg.smallest(matrices, tolerance)
        residual = (matrices @ vectors.unsqueeze(-1)).squeeze(-1) - values.unsqueeze(-1) * vectors
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2, dtype=dtype))
        rounding = 1e-5 if dtype == torch.float32 else 1e-12
        assert bool((residual.norm(dim=-1) <= (tolerance + 10 * rounding) * mean).all())
        lowest = torch.linalg.eigvalsh(matrices)[:, 0]
        assert bool(((values - lowest).abs() <= (2 * tolerance + rounding) * mean).all())


def test_arguments() -> None:
    for options, sentence in (
        ({"coarse_dtype": "half"}, "coarse_dtype must be one of auto, float32, bfloat16, got 'half'"),
        ({"coarse": "fine"}, "coarse must be one of nicolaides, residual, tselepidis, spectral, got 'fine'"),
        ({"coarse": "spectral", "krylov": True}, "krylov must be false for coarse='spectral'"),
        ({"damping_mode": "both"}, "damping_mode must be one of factored, tikhonov, got 'both'"),
        ({"max_factor_dim": 0}, r"max_factor_dim must be in \[1, inf\), got 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            TwoLevelKFAC(mlp(), **{"likelihood": Categorical()} | options)


def test_a_wide_factor_kept_as_its_diagonal() -> None:
    model, batch = mlp(), images()
    optimizer = TwoLevelKFAC(
        model, likelihood=Categorical(), lr=0.05, coarse="spectral", max_factor_dim=8, update_every=1, refresh_every=1
    )
    losses = train(optimizer, model, batch, 5)
    assert losses[-1] < losses[0]
    vector = optimizer._apart(optimizer._space.vectors[0])[0]
    assert int((vector != 0).any(1).sum()) == 1, "a diagonal's eigenvectors are unit vectors"


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("space", ["nicolaides", "residual krylov", "tselepidis"])
def test_the_kl_clip(space: str) -> None:
    """Of a projection the quadratic form itself; of the additive form, which is symmetric, ``vᵀ g``."""
    model, inputs, targets = problem("mlp")
    params = list(model.parameters())
    groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "lr": 2.0}]
    damped = dense_fisher(model, inputs, targets, "empirical", Categorical()) + DAMPING * torch.eye(43)
    rates = torch.cat([torch.full((25,), 0.5), torch.full((18,), 2.0)])
    options = {"params": groups, "fisher": "empirical", "damping": DAMPING, "kl_clip": 1e-4}
    optimizer, taken, gradient = step(TwoLevelKFAC, model, inputs, targets, **options | SPACES[space])
    (scale,) = map(float, optimizer._length.scales.values())
    assert 0 < scale < 1
    bounded = scale * (taken * rates) @ gradient if space == "tselepidis" else taken @ damped @ taken
    assert float(bounded) == pytest.approx(1e-4, rel=1e-8)


@pytest.mark.usefixtures("float64")
def test_a_correction_that_leads_uphill_is_left_out_and_counted() -> None:
    """With a Fisher matrix that K-FAC's factors know nothing of, the step is K-FAC's wherever it would be uphill."""
    uphill = 0
    for seed in range(20):
        torch.manual_seed(seed)
        model, inputs, targets = problem("mlp")
        optimizer = TwoLevelKFAC(
            model, lr=0.0, momentum=0.0, kl_clip=None, fisher="empirical", damping=1e-3, refresh_every=1,
            update_every=100, early_updates=False,
        )  # fmt: skip
        train(optimizer, model, (inputs, targets), 1)
        torch.manual_seed(seed)
        for samples in optimizer.samples.values():
            samples.factors["g"] = 10 * torch.randn_like(samples.factors["g"])
        train(optimizer, model, (inputs, targets), 1)
        gradients = [torch.cat([p.grad.flatten() for p in layer.parameters()]) for layer in (model[0], model[2])]
        moves = [
            torch.cat([optimizer.state[p]["momentum_buffer"].flatten() for p in layer.parameters()])
            for layer in (model[0], model[2])
        ]
        slope = sum(float(g @ v) for g, v in zip(gradients, moves, strict=True))
        assert slope > 0
        uphill += int(optimizer.diagnostics()["curvature/uphill"])
    assert 0 < uphill < 20
