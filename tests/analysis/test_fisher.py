"""Fisher quality: every error against dense matrices, every operator against the block that it was read from."""

from __future__ import annotations

import csv
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from analysis import fisher
from analysis.fisher import reading
from analysis.fisher.blocks import ExactBlock
from analysis.fisher.measure import exact, see
from analysis.fisher.methods import METHODS, Settings
from analysis.fisher.operators import KEPT, operator_norm
from optimizers import Bernoulli, Categorical
from optimizers.curvature.layers import adapt
from scripts import fisher_quality
from tests import dense

DAMPING = 0.05
MATRICES = ["diagonal", "adafisher", "adafisher_raw", "kfac", "kfac_tikhonov", "kfac_reduce", "ekfac", "kpsvd",
            "kpsvd_tikhonov", "deflation", "kfac_corrected", "lanczos", "two_level"]  # fmt: skip


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False))


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


def problem(net: str, kind: str = "exact", examples: int = 6, **options: object) -> fisher.Problem:
    model = {"mlp": mlp, "convnet": convnet}[net]()
    generator = torch.Generator().manual_seed(1)
    shape = (5,) if net == "mlp" else (2, 7, 7)
    inputs = torch.randn(examples, *shape, generator=generator)
    if isinstance(options.get("likelihood"), Bernoulli):
        targets: Tensor = torch.rand(examples, 3, generator=generator)
    else:
        targets = torch.randint(3, (examples,), generator=generator)
    settings = Settings(**{"likelihood": Categorical(), "damping": DAMPING, "fisher": kind, "updates": 5} | options)
    return fisher.Problem(net, 0, model, inputs, targets, settings)


@cache
def measured(net: str) -> list[fisher.Row]:
    return fisher.measure(problem(net), METHODS.values(), tolerance=1e-12)


def dense_blocks(p: fisher.Problem) -> dict[str, Tensor]:
    """Each affine layer's block of the exact Gauss-Newton matrix, by autograd alone."""
    torch.set_default_dtype(torch.float64)
    try:
        model = p.twin()
        found = {}
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            own = list(module.parameters())
            loss = p.settings.likelihood.nll
            matrix = dense.gauss_newton(model, loss, p.inputs.double(), p._case.targets, own)
            index = dense.as_matrix_order(module)
            found[name] = matrix[index][:, index]
        return found
    finally:
        torch.set_default_dtype(torch.float32)


def relative(error: Tensor, size: Tensor) -> tuple[float, float]:
    return tuple(float(torch.linalg.norm(error, o) / torch.linalg.norm(size, o)) for o in ("fro", 2))


def block_shape(p: fisher.Problem, name: str) -> tuple[int, int, int]:
    layer = adapt(name, dict(p.model.named_modules())[name])
    return layer.groups, layer.d_out, layer.columns


@pytest.mark.parametrize("net", ["mlp", "convnet"])
def test_errors_are_those_of_dense_matrices(net: str) -> None:
    """Of every method: the optimizer's own dense block and its own solve, against what autograd assembles."""
    p = problem(net)
    blocks = dense_blocks(p)
    at = {(row.method, row.layer): row for row in measured(net)}
    eye = {name: torch.eye(len(block), dtype=torch.float64) for name, block in blocks.items()}
    for method in [m for m in MATRICES if (m, next(iter(blocks))) in at]:
        model = p.twin()
        optimizer = METHODS[method].build(model, p.params(model), p.settings)
        p.step_on(model, optimizer)
        for name, block in blocks.items():
            row, shape = at[method, name], block_shape(p, name)
            own = optimizer.blocks[name].to_dense()
            expected = relative(block - own, block)
            assert (row.fisher_frobenius, row.fisher_operator) == pytest.approx(expected, abs=1e-8), (method, name)
            inverse = torch.linalg.inv(block + DAMPING * eye[name])
            solved = dense_solve(optimizer, name, shape)
            expected = relative(inverse - solved, inverse)
            assert (row.inverse_frobenius, row.inverse_operator) == pytest.approx(expected, abs=1e-8), (method, name)


def dense_solve(optimizer: torch.optim.Optimizer, name: str, shape: tuple[int, int, int]) -> Tensor:
    """A layer's damped inverse as a matrix, by the optimizer's own products."""
    size = math.prod(shape)
    if not hasattr(optimizer, "_stacks"):
        layer = optimizer.blocks[name].layer
        return torch.diag(1 / layer.vector([optimizer._fisher[p][1] for p in layer.parameters]))
    for stack in optimizer._stacks:
        for block, inverse in stack.members():
            if block.layer.name == name:
                rows = torch.eye(size, dtype=torch.float64)
                return torch.stack([block.solve(inverse, row.view(shape)).flatten() for row in rows])
    raise AssertionError(name)


def test_fishlegs_errors_are_those_of_its_own_dense_inverse() -> None:
    p = problem("convnet")
    blocks = dense_blocks(p)
    (row,) = [r for r in measured("convnet") if (r.method, r.layer) == ("fishleg", "3")]
    curvature = see(p, METHODS["fishleg"]).curvature
    layer = adapt("3", p.twin()[3])
    factors = {key: t for key, t in curvature["layers"]["3"].items()}
    inverse = torch.linalg.inv(blocks["3"] + DAMPING * torch.eye(len(blocks["3"]), dtype=torch.float64))
    torch.set_default_dtype(torch.float64)
    learned = dense.learned_inverse(factors)
    torch.set_default_dtype(torch.float32)
    expected = relative(inverse - learned, inverse)
    assert (row.inverse_frobenius, row.inverse_operator) == pytest.approx(expected, abs=1e-8)
    assert math.isnan(row.fisher_frobenius)
    assert reading.approximation(curvature, layer) is None
    assert float((learned - torch.eye(len(learned)) / DAMPING).norm()) > 0.01  # something was learned


@pytest.mark.parametrize("kind", ["exact", "sampled"])
def test_approximations_are_those_of_their_formulas(kind: str) -> None:
    """K-FAC and its kin against matrices made of gradients that were sent back one by one."""
    p = problem("mlp", kind)
    rows = measured("mlp") if kind == "exact" else fisher.measure(p, METHODS.values(), tolerance=1e-12)
    truth = exact(p)
    torch.set_default_dtype(torch.float64)
    try:
        model = p.twin()
        uses = dense.Uses(model)
        outputs = uses.run(p.inputs.double())
        loss = nn.CrossEntropyLoss(reduction="sum")
        owners = torch.arange(len(outputs))
        if kind == "exact":
            seeds = dense.draws("exact", loss, outputs, p.targets, p.targets, owners, len(outputs))
        else:
            generator = torch.Generator().manual_seed(0)
            drawn = p.settings.likelihood.sample(outputs.detach(), generator)
            seeds = dense.draws("sampled", loss, outputs, p.targets, drawn, owners, len(outputs))
        references = dense.layer_references(model, uses, outputs, seeds)
        for name, reference in references.items():
            assert torch.allclose(ExactBlock(truth.samples[name]).gram.trace(), reference.block.trace(), rtol=1e-10)
            for method, own in (
                ("diagonal", reference.diagonal()), ("kfac", reference.kronecker()),
                ("ekfac", reference.eigen_corrected()), ("kpsvd", reference.nearest(1)),
                ("deflation", reference.nearest(2)), ("kfac_corrected", reference.corrected()),
            ):  # fmt: skip
                (row,) = [r for r in rows if (r.method, r.layer) == (method, name)]
                expected = relative(reference.block - own, reference.block)
                assert (row.fisher_frobenius, row.fisher_operator) == pytest.approx(expected, abs=1e-8), method
    finally:
        torch.set_default_dtype(torch.float32)


def test_directions_are_held_against_dense_natural_gradients() -> None:
    p = problem("mlp")
    rows = {row.method: row for row in measured("mlp") if not row.layer}
    torch.set_default_dtype(torch.float64)
    try:
        model = p.twin()
        params = list(model.parameters())
        matrix = dense.gauss_newton(model, p.settings.likelihood.nll, p.inputs.double(), p.targets, params)
        loss = p.settings.likelihood.nll(model(p.inputs.double()), p.targets)
        g = dense.flatten(list(torch.autograd.grad(loss, params)))
        blocks = matrix.clone()
        blocks[:24, 24:] = 0
        blocks[24:, :24] = 0
        full, block = (dense.damped_solve(m, g, DAMPING) for m in (matrix, blocks))
        for method, d in (("gradient", g), ("block", block)):
            found = rows[method]
            for key, best, m in (("block", block, blocks), ("full", full, matrix)):
                damped = m + DAMPING * torch.eye(len(m))
                cosine = float(d @ best / d.norm() / best.norm())
                expected = math.degrees(math.acos(min(cosine, 1.0)))
                assert getattr(found, f"angle_{key}") == pytest.approx(expected, abs=1e-4)
                share = float((g @ d) ** 2 / (d @ damped @ d) / (g @ best))
                assert getattr(found, f"decrease_{key}") == pytest.approx(share, abs=1e-8)
        assert rows["block"].decrease_block == pytest.approx(1, abs=1e-9)
        best = max(row.decrease_full for row in rows.values())
        assert best <= 1 + 1e-9
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("net", ["mlp", "convnet"])
def test_the_order_of_the_kpsvd_study_holds_in_the_frobenius_norm(net: str) -> None:
    """By construction: rank two <= KPSVD <= K-FAC, and EKFAC's diagonal is the best one in K-FAC's basis."""
    rows = measured(net)
    verdicts = fisher.order(rows, ["fisher_frobenius"])
    assert len(verdicts) == 4
    assert all(v.holds == v.of > 0 for v in verdicts), verdicts
    assert fisher.order(rows, ["inverse_frobenius"])  # which nothing promises
    by = {(r.method, r.layer): r for r in rows}
    for layer in {r.layer for r in rows if r.layer}:
        assert by["ekfac", layer].fisher_frobenius <= by["kfac", layer].fisher_frobenius + 1e-9
        assert by["deflation", layer].fisher_frobenius < by["kpsvd", layer].fisher_frobenius < 1


def test_an_order_that_does_not_hold_is_told() -> None:
    def row(method: str, value: float) -> fisher.Row:
        return fisher.Row("net", 3, 0.1, method, "fc", 10, 1, fisher_frobenius=value)

    good = fisher.order([row("kpsvd", 0.1), row("kfac", 0.2)], ["fisher_frobenius"])
    bad = fisher.order([row("kpsvd", 0.3), row("kfac", 0.2)], ["fisher_frobenius"])
    assert [(v.holds, v.of) for v in good] == [(1, 1)] and [(v.holds, v.of) for v in bad] == [(0, 1)]
    assert bad[0].fails == (("fc", 3, 0.3, 0.2),)


def test_operator_norms_by_iteration() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(40, 40, dtype=torch.float64)
    matrix = matrix + matrix.T
    exact_norm = float(torch.linalg.eigvalsh(matrix).abs().max())
    assert operator_norm(lambda v: matrix @ v, (40,), 1e-12)[0] == pytest.approx(exact_norm, rel=1e-10)
    loose, bound = operator_norm(lambda v: matrix @ v, (40,), 1e-3)
    assert exact_norm * (1 - bound) <= loose <= exact_norm * (1 + 1e-12) and bound <= 1e-3
    assert operator_norm(lambda v: 0 * v, (40,))[0] == 0
    assert operator_norm(lambda v: 3 * v, (40,))[0] == pytest.approx(3)
    _, bound = operator_norm(lambda v: matrix @ v, (40,), 1e-12, limit=5)
    assert bound > 1e-3  # and says so
    wide = torch.linspace(-1, 0.9, KEPT + 1, dtype=torch.float64)  # too wide for its vectors to be kept
    wide[7] = -1.4
    assert operator_norm(lambda v: wide * v, wide.shape, 1e-6)[0] == pytest.approx(1.4, rel=1e-9)


def test_profiles_are_curvature_along_dense_eigenvectors() -> None:
    p = problem("mlp")
    truth = dense_blocks(p)["2"]
    values, vectors = torch.linalg.eigh(truth)
    found = {one.method: one for one in fisher.profiles(p, [METHODS["kfac"], METHODS["fishleg"]]) if one.layer == "2"}
    assert set(found) == {"kfac"}
    model = p.twin()
    optimizer = METHODS["kfac"].build(model, p.params(model), p.settings)
    p.step_on(model, optimizer)
    along = (vectors * (optimizer.blocks["2"].to_dense() @ vectors)).sum(0) / values
    count = len(found["kfac"].ratios)
    assert 2 <= count < len(values)
    assert torch.allclose(found["kfac"].eigenvalues, values.flip(0)[:count], rtol=1e-8)
    assert torch.allclose(found["kfac"].ratios, along.flip(0)[:count], rtol=1e-6)
    model = p.twin()
    loss = p.settings.likelihood.nll(model(p.inputs.double()), p.targets)
    g = torch.autograd.grad(loss, model[2].weight)[0].flatten()
    d = see(p, METHODS["kfac"]).direction["2.weight"].flatten()
    d = d * (g @ d) / (d @ truth @ d + DAMPING * d @ d)
    assert torch.allclose((found["kfac"].steps).abs(), (vectors.mT @ d).abs().flip(0)[:count], rtol=1e-6)
    natural = torch.linalg.solve(truth + DAMPING * torch.eye(len(truth), dtype=torch.float64), g)
    assert torch.allclose(found["kfac"].best.abs(), (vectors.mT @ natural).abs().flip(0)[:count], rtol=1e-6)


def test_some_layers_alone_and_what_cannot_be() -> None:
    p = problem("mlp")
    p.layers = ["2"]
    rows = fisher.measure(p, [METHODS["kfac"]])
    assert {row.layer for row in rows} == {"2", ""} and {row.size for row in rows} == {12}
    p.layers = ["1"]
    with pytest.raises(ValueError, match="no layer '1'"):
        fisher.measure(p, [METHODS["kfac"]])


def test_the_command_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--nets", "mlp", "--methods", "kfac,kpsvd,deflation", "--examples", "12", "--out", str(tmp_path)]
    assert fisher_quality.main([*common, "--steps", "0", "--layers", "3"]) == 0
    first = (tmp_path / "fisher_quality.jsonl").read_text()
    assert fisher_quality.main([*common, "--steps", "0,2", "--layers", "3", "--profile"]) == 0
    both = (tmp_path / "fisher_quality.jsonl").read_text()
    assert both.startswith(first) and both.count("\n") == 2 * first.count("\n") - 1
    names = {path.name for path in tmp_path.iterdir()}
    assert {"fisher_quality.csv", "fisher_quality.md", "mlp_errors.png", "mlp_training.png", "mlp_profile.png"} <= names
    assert "KPSVD before K-FAC (expand) | 2 of 2" in (tmp_path / "fisher_quality.md").read_text()
    capsys.readouterr()
    assert fisher_quality.main([*common, "--steps", "0", "--layers", "1"]) == 1
    assert "layers=3, here it is 1" in capsys.readouterr().err
    assert fisher_quality.main(["--methods", "kfacc", "--out", str(tmp_path)]) == 1
    assert "did you mean 'kfac'" in capsys.readouterr().err
    assert fisher_quality.main(["--nets", "mlp", "--layers", "nowhere", "--fresh", "--out", str(tmp_path)]) == 1
    assert "is in no name of" in capsys.readouterr().err


def test_a_run_folder_is_looked_at_at_its_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what the run's own optimizer had averaged by then is a line of its own."""
    run = Path(__file__).parents[1] / "cli" / "stored_run"
    methods = ["--methods", "kfac,kpsvd", "--examples", "16", "--tolerance", "1e-12", "--out", str(tmp_path)]
    assert fisher_quality.main([str(run), *methods]) == 0
    assert "the iteration ended at its limit" in capsys.readouterr().out  # which is said
    with (tmp_path / "fisher_quality.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["net"], row["step"]) for row in rows} == {("stored_run", "2")}
    at = {(row["method"], row["layer"]): row for row in rows}
    assert set(at) == {(m, n) for m in ("kfac", "kpsvd", "own") for n in ("1", "3", "")} - {("own", "")}
    for layer in ("1", "3"):  # K-FAC's average over one batch, of a sample, is no better than K-FAC on this batch
        kfac, own = (float(at[method, layer]["fisher_frobenius"]) for method in ("kfac", "own"))
        assert 0 < kfac < own < 10
        assert at["own", layer]["inverse_frobenius"] == ""
    assert fisher_quality.main([str(run), *methods, "--steps", "7"]) == 1
    assert "steps that are there: 2" in capsys.readouterr().err
    assert fisher_quality.main([str(tmp_path / "nowhere"), *methods]) == 1
