"""What an optimizer tells of its layers while training equals what dense matrices of the same layers say."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optimizers
from optimizers import Categorical, CurvatureOptimizer, build_optimizer
from optimizers.adahessian.hutchinson import block_expand
from optimizers.curvature.spectra import NARROW, Spectrum, spectrum_of

DAMPING = 0.02
BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "kfac": ("KFAC", {}),
    "tikhonov": ("KFAC", {"damping_mode": "tikhonov"}),
    "even": ("KFAC", {"pi": False}),
    "units": ("KFAC", {"damping_unit": "layer"}),
    "ekfac": ("EKFAC", {"rank": None, "basis": "eigh"}),
    "kpsvd": ("KPSVD", {"batch_fraction": 1.0}),
    "twolevel": ("TwoLevelKFAC", {}),
    "exact": ("ExactNaturalGradient", {}),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    conv = [nn.Conv2d(2, 3, 3), nn.Tanh(), nn.BatchNorm2d(3), nn.Flatten()]
    return nn.Sequential(*conv, nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def trained(name: str, steps: int = 2, **options: Any) -> tuple[nn.Module, CurvatureOptimizer, dict[Tensor, Tensor]]:
    """A net and its optimizer after some steps, and what the last one added to the parameters."""
    model = net()
    optimizer: Any = build_optimizer(getattr(optimizers, name), model, likelihood=Categorical(), **options)
    draw = torch.Generator().manual_seed(1)
    before: list[Tensor] = []
    for _ in range(steps):
        x = torch.randn(24, 2, 4, 4, generator=draw, dtype=torch.float64)
        y = torch.randint(0, 4, (24,), generator=draw)
        optimizer.zero_grad()
        outputs = model(x)
        optimizer.backward(F.cross_entropy(outputs, y), outputs)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
    return model, optimizer, {p: p.detach() - old for p, old in zip(model.parameters(), before, strict=True)}


def damped(optimizer: Any, name: str, block: Any, dense: Tensor) -> Tensor:
    """The matrix that is inverted, from the block's factors alone."""
    eye = torch.eye(len(dense), dtype=dense.dtype)
    options = optimizer.options
    damping = DAMPING * (float(dense.diagonal().mean()) if optimizer.damping_unit == "layer" else 1.0)
    factored = getattr(options, "damping_mode", "") == "factored" and {"A", "G"} <= block.factors.keys()
    if not factored or "S" in block.factors or name == "exact":
        return dense + damping * eye
    a, g = block.factors["A"][0], block.factors["G"][0]
    pi = math.sqrt(float(a.diagonal().mean() / g.diagonal().mean())) if options.pi else 1.0
    left = g + math.sqrt(damping) / pi * torch.eye(len(g)).to(g)
    return torch.kron(left, a + pi * math.sqrt(damping) * torch.eye(len(a)).to(a))


@pytest.mark.parametrize("case", BLOCKS)
def test_shares_and_conditions_are_those_of_dense_blocks(case: str) -> None:
    kind, options = BLOCKS[case]
    intervals = {} if case == "exact" else {"update_every": 1, "refresh_every": 1}
    _, optimizer, step = trained(kind, damping=DAMPING, **intervals, **options)
    told, matrices = optimizer.layer_diagnostics(), optimizer.curvature_matrices()
    assert told.keys() == matrices.keys() == {"0", "2", "4", "6"}
    expected = 0.0
    for name, dense in matrices.items():
        unit = float(dense.diagonal().mean()) if options.get("damping_unit") == "layer" else 1.0
        values = torch.linalg.eigvalsh(dense)
        assert told[name]["above_damping"] == pytest.approx(float((values > DAMPING * unit).double().mean()), abs=1e-12)
        inverted = damped(optimizer, case, optimizer.blocks[name], dense)
        ends = torch.linalg.eigvalsh(inverted)
        assert told[name]["condition"] == pytest.approx(float(ends[-1] / ends[0]), rel=1e-8)
        assert "floored" not in told[name]
        layer = optimizer.blocks[name].layer
        d = torch.cat([step[p].reshape(len(step[p]), -1) for p in layer.parameters], 1) if name != "2" else None
        d = torch.cat([step[p] for p in layer.parameters]) if d is None else d
        expected += float(d.flatten() @ inverted @ d.flatten())
    if case != "exact":  # whose matrix has blocks between layers, too
        assert optimizer.quadratic(step) == pytest.approx(expected, rel=1e-8)


def test_the_exact_matrix_counts_between_layers() -> None:
    for blocks, whole in (("layer", False), ("full", True)):
        _, optimizer, step = trained("ExactNaturalGradient", damping=DAMPING, blocks=blocks)
        shown = [optimizer.blocks[name].dots([step[p] for p in optimizer.blocks[name].layer.parameters])
                 for name in optimizer.blocks]  # fmt: skip
        rows = torch.stack(shown)
        square = float((rows.sum(0) if whole else rows).square().sum())
        length = sum(float(d.square().sum()) for d in step.values())
        assert optimizer.quadratic(step) == pytest.approx(square + DAMPING * length, rel=1e-8)


def test_the_kl_clip_is_told() -> None:
    _, optimizer, _ = trained("KFAC", lr=3.0, kl_clip=1e-3)
    told = optimizer.layer_diagnostics()
    assert {row["kl_scale"] for row in told.values()} == {optimizer.diagnostics()["curvature/kl_scale"]} != {1.0}
    assert "kl_scale" not in trained("KFAC", kl_clip=None)[1].layer_diagnostics()["0"]


def test_floored_directions_of_two_terms() -> None:
    # A conv's pairs may be antisymmetric, of which nothing is told; the Linear layers are not shared.
    _, optimizer, _ = trained("Deflation", damping=1e-6, rank=None, batch_fraction=1.0)
    told, shares = optimizer.layer_diagnostics(), []
    for name in ("4", "6"):
        block: Any = optimizer.blocks[name]
        a, g, c, d = (block.factors[key][0] for key in "AGCD")
        pi = math.sqrt(float(a.diagonal().mean() / g.diagonal().mean()))
        first = torch.kron(g + 1e-3 / pi * torch.eye(len(g)).to(g), a + 1e-3 * pi * torch.eye(len(a)).to(a))
        root = torch.linalg.inv(torch.linalg.cholesky(first))
        values = 1 + torch.linalg.eigvalsh(root @ torch.kron(d, c) @ root.mT)
        shares.append(float((values <= optimizer.options.floor).double().mean()))
        assert told[name]["floored"] == pytest.approx(shares[-1], abs=1e-12)
        assert "condition" not in told[name]
    assert max(shares) > 0, "nothing was floored, and nothing tested"


@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_adafisher_tells_of_its_diagonal(mode: str) -> None:
    options = {"normalize": "none", "ema": "average", "damping_mode": mode, "damping": DAMPING, "update_every": 1}
    _, optimizer, step = trained("AdaFisher", **options)
    length = 0.0
    for name, row in optimizer.layer_diagnostics().items():
        dense = optimizer.curvature_matrices()[name].diagonal()
        shift = DAMPING * (float(dense.mean()) if mode == "relative" else 1.0)
        assert row["above_damping"] == pytest.approx(float((dense > shift).double().mean()), abs=1e-12)
        assert row["condition"] == pytest.approx(float((dense.max() + shift) / (dense.min() + shift)), rel=1e-8)
        layer = optimizer.blocks[name].layer
        length += float(layer.vector([step[p] for p in layer.parameters]).square() @ (dense + shift))
    assert optimizer.quadratic(step) == pytest.approx(length, rel=1e-8)
    assert trained("AdaFisher")[1].quadratic(step) is None, "scaled factors are in no units of the loss"


def test_adahessian_tells_of_its_denominators() -> None:
    model, optimizer, step = trained("AdaHessian")
    state, beta, eps = optimizer.state, optimizer.param_groups[0]["betas"][1], optimizer.param_groups[0]["eps"]
    before = len(state)
    roots = {p: (state[p]["exp_hessian_sq"] / (1 - beta ** state[p]["hessian_step"])).sqrt() for p in step}
    told, length = optimizer.layer_diagnostics(), 0.0
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False)]
        if own:
            full = [block_expand(roots[p], p.shape, optimizer.block_size).flatten() for p in own]
            values = torch.cat(full)
            ends = (values.max() + eps) / (values.min() + eps)
            assert told[name]["condition"] == pytest.approx(float(ends), rel=1e-6)
            length += sum(float((step[p].flatten().square() * (v + eps)).sum()) for p, v in zip(own, full, strict=True))
    assert optimizer.quadratic(step) == pytest.approx(length, rel=1e-8)
    assert len(optimizer.state) == before, "asking leaves no state behind"


@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "Deflation", "AdaFisher", "AdaHessian", "FishLeg", "NewtonMuon"])
def test_asking_changes_nothing(name: str) -> None:
    _, optimizer, step = trained(name)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.layer_diagnostics(), optimizer.quadratic(step)

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return all(map(same, a, b)) if isinstance(a, list | tuple) else a == b

    assert same(before, optimizer.state_dict())


def test_a_quadrature_stands_for_a_wide_spectrum() -> None:
    draw = torch.Generator().manual_seed(3)
    d = 3 * NARROW
    # As of K-FAC's factors: a decay over decades, and a null space.
    values = torch.cat([torch.logspace(1, -4, d // 2, dtype=torch.float64), torch.zeros(d - d // 2).double()])
    basis = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64))[0]
    found, counts = spectrum_of((basis * values @ basis.mT).unsqueeze(0))
    assert float(counts.sum()) == pytest.approx(d, rel=1e-9)
    other = torch.logspace(0, -3, 40, dtype=torch.float64)  # of a narrow factor, whose eigenvalues are exact
    for damping in (1e-1, 1e-2, 1e-3):
        spectrum = Spectrum(other[:, None] * found, damping, counts=counts.expand(40, -1))
        exact = Spectrum(other[:, None] * values, damping)
        assert float(spectrum.above_damping()) == pytest.approx(float(exact.above_damping()), abs=0.07)
        assert float(spectrum.condition()) == pytest.approx(float(exact.condition()), rel=0.2)
    # An invariant subspace ends the process early: no eigenvalue is made up.
    flat, counts = spectrum_of(2 * torch.eye(d).unsqueeze(0))
    assert float(Spectrum(flat, 0.0, counts=counts).condition()) == pytest.approx(1.0, rel=1e-5)
    assert float((counts * flat).sum()) == pytest.approx(2 * d, rel=1e-5)
