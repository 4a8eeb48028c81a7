"""Kronecker factors: against dense float64 references, and every number against its definition."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis import factors
from analysis.factors import fit, kept, matrices, noise
from optimizers import KFAC, AdaFisher, Categorical
from scripts import factors as command
from tests import dense
from tests.conftest import ROOT
from tests.optimizers.problems import ViTBlock, images
from training.errors import UserError


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    parts = (nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 3, 2, bias=False), nn.Flatten(), nn.Linear(12, 3))
    return nn.Sequential(*parts)


def data(batch: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (batch,), generator=generator)


class Attending(nn.Module):
    """Queries, keys and values with a layer each, over tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        seen = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.head(seen).mean(1)[:, :3]


@pytest.fixture(scope="module")
def matrix() -> Tensor:
    """A factor with strong and weak directions, ``[1, d, d]``."""
    rows = torch.randn(30, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows = rows * torch.logspace(0, -3, 9, dtype=torch.float64) + 0.3
    return (rows.mT @ rows / 30).unsqueeze(0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("net", ["conv", "attention"])
def test_factors_equal_dense_references(net: str, sharing: str) -> None:
    model, (x, y) = conv_net() if net == "conv" else Attending(), data()
    if net == "attention":
        x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(2))
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]  # two batches of different sizes are one of all examples
    before = copy.deepcopy(model.state_dict())
    found = factors.observe(model, Categorical(), batches, labels="empirical", sharing=sharing)  # type: ignore[arg-type]
    double = copy.deepcopy(model).double()
    layers = {n: m for n, m in double.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert list(found.layers) == list(layers) and found.examples == 6
    double.zero_grad()
    F.cross_entropy(double(x), y).backward()
    for name, layer in layers.items():
        wanted = dense.kronecker_factors(double, layer, F.cross_entropy, x, y, sharing)
        for got, reference in zip((found.layers[name].A, found.layers[name].G), wanted, strict=True):
            # A key's gradients sum to zero over positions: all of G is rounding then.
            assert (got - reference).norm() <= 1e-12 * reference.norm() + 1e-30, name
        weight = layer.weight.grad.flatten(1).reshape(found.layers[name].gradient[..., : layer.weight[0].numel()].shape)
        assert torch.allclose(found.layers[name].gradient[..., : weight.shape[-1]], weight, rtol=1e-11, atol=1e-14)
        whole = [p.detach().norm() for p in layer.parameters()]
        assert found.layers[name].size == pytest.approx(float(torch.stack(whole).norm()))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.usefixtures("float64")
def test_exact_and_sampled_labels_are_those_of_kfac() -> None:
    model, (x, y) = conv_net().double(), data()
    for labels in ("exact", "sampled"):
        found = factors.observe(model, Categorical(), [(x, y)], labels=labels, seed=5, layers="4")  # type: ignore[arg-type]
        twin = copy.deepcopy(model)
        optimizer = KFAC(twin, likelihood=Categorical(), fisher=labels, seed=5)
        outputs = twin(x)
        optimizer.backward(F.cross_entropy(outputs, y), outputs)
        optimizer.step()
        assert list(found.layers) == ["4"]
        for key in "AG":
            assert torch.equal(getattr(found.layers["4"], key), optimizer.blocks["4"].factors[key]), labels
    p = model(x).softmax(-1).detach()
    reference = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0)
    exact = factors.observe(model, Categorical(), [(x, y)], labels="exact").layers["4"].G[0]
    assert torch.allclose(exact, reference, atol=1e-14)


def test_all_kinds_of_layers_modes_and_wide_factors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(ViTBlock(), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 4))
    x, y = images(8)
    state = torch.get_rng_state()
    seen = {mode: factors.observe(model, Categorical(), [(x, y)], mode=mode) for mode in ("train", "eval")}  # type: ignore[arg-type]
    assert torch.equal(state, torch.get_rng_state()) and model[2].num_batches_tracked == 0
    assert {f.kind for f in seen["train"].layers.values()} >= {"Conv2d", "MultiheadAttention", "Linear"}
    assert "NonDynamicallyQuantizableLinear" in {f.kind for f in seen["train"].layers.values()}
    assert "0.token" in seen["train"].left_out and "0.norm1.weight" in seen["train"].left_out
    assert not torch.allclose(seen["train"].layers["3"].A, seen["eval"].layers["3"].A)
    running = copy.deepcopy(model).double().eval()
    wanted = dense.kronecker_factors(running, running[3], F.cross_entropy, x.double(), y)[0]
    assert torch.allclose(seen["eval"].layers["3"].A, wanted, rtol=1e-12)
    narrow = factors.observe(model, Categorical(), [(x, y)], max_dim=20)
    assert not narrow.layers["0.patch"].full and narrow.layers["3"].full
    numbers, spectra = factors.measure(narrow.layers["0.patch"], factors.Plan())
    assert spectra is None and numbers["mean_A"] > 0 and "rank_A" not in numbers


def test_layers_are_chosen_by_name() -> None:
    model, batch = conv_net(), data()
    assert list(factors.observe(model, Categorical(), [batch], layers="^[02]$").layers) == ["0", "2"]
    with pytest.raises(ValueError, match="found in the name of no layer; there are 0, 2, 4"):
        factors.observe(model, Categorical(), [batch], layers="attention")
    with pytest.raises(ValueError, match="must be a regular expression"):
        factors.observe(model, Categorical(), [batch], layers="(")
    with pytest.raises(ValueError, match="at least one batch"):
        factors.observe(model, Categorical(), [])
    assert [len(y) for _, y in factors.taken([batch, batch], 8)] == [6, 2]


def test_numbers_of_a_factor_equal_their_definitions(matrix: Tensor) -> None:
    m = matrix[0].numpy()
    values = matrices.spectrum(matrix)
    reference = np.sort(np.linalg.eigvalsh(m))[::-1]
    assert values[0].numpy() == pytest.approx(reference, rel=1e-9, abs=1e-14)
    assert matrices.condition(values) == pytest.approx(np.linalg.cond(m), rel=1e-6)
    assert matrices.condition(values, 0.1) == pytest.approx((reference[0] + 0.1) / (reference[-1] + 0.1))
    assert matrices.rank(values) == np.linalg.matrix_rank(m) == 9
    assert matrices.participation(values) == pytest.approx(np.trace(m) ** 2 / (m**2).sum())
    assert matrices.dimension(values, 0.01) == pytest.approx(np.trace(m @ np.linalg.inv(m + 0.01 * np.eye(9))))
    off = np.abs(m).sum(1) - np.abs(np.diag(m))
    assert matrices.dominance(matrix).numpy() == pytest.approx(np.diag(m) / off)
    assert matrices.diagonal_share(matrix) == pytest.approx((np.diag(m) ** 2).sum() / (m**2).sum())
    assert matrices.drift(matrix, 2 * matrix) == pytest.approx(0.5)
    assert matrices.fourier(matrix)[0].numpy() == pytest.approx(np.abs(np.fft.fftshift(np.fft.fft2(m))), rel=1e-12)
    circulant = torch.stack([torch.arange(9.0).roll(k) for k in range(9)]).double()
    assert matrices.ridge_share(circulant) == pytest.approx(1) and matrices.ridge_share(matrix) < 0.99


def test_singular_factors_and_zeros() -> None:
    lone = torch.ones(1, 3, 3, dtype=torch.float64)
    values = matrices.spectrum(lone)
    assert matrices.rank(values) == 1 and matrices.participation(values) == pytest.approx(1)
    assert matrices.condition(values) == math.inf
    zeros = torch.zeros(1, 3, 3)
    assert matrices.rank(matrices.spectrum(zeros)) == 0 and matrices.participation(matrices.spectrum(zeros)) == 0
    assert math.isnan(matrices.diagonal_share(zeros)) and math.isnan(matrices.ridge_share(zeros))
    assert matrices.diagonal_share(torch.eye(3) * 1e-30) == 1  # squares of such entries vanish in float32


def test_gershgorin_contains_all_eigenvalues(matrix: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    several = [matrix, torch.diag(torch.arange(4.0)).unsqueeze(0), torch.ones(1, 5, 5), torch.zeros(1, 2, 2)]
    several += [(r := torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)) + r.mT for _ in range(20)]
    for one in several:
        discs, values = matrices.Discs.of(one), matrices.spectrum(one).flatten()
        assert bool(discs.contain(values).all())
        low, high = discs.bounds
        slack = 1e-12 * max(1.0, abs(high))
        assert low - slack <= float(values.min()) and float(values.max()) <= high + slack
    m = matrix[0].numpy()
    radii = np.abs(m).sum(1) - np.abs(np.diag(m))
    assert matrices.Discs.of(matrix).radii.numpy() == pytest.approx(radii)
    assert not bool(matrices.Discs.of(matrix).contain(torch.tensor([matrices.Discs.of(matrix).bounds[1] + 1])).any())


def test_perturbation_and_its_ratio_equal_their_definitions(matrix: Tensor) -> None:
    m = matrix[0]
    noisy = noise.perturbed(matrix, 0.05, seed=1)[0]
    added = noisy - m
    assert torch.allclose(added, added.T, rtol=0, atol=1e-12) and bool((added.diagonal() == 0).all())
    assert torch.allclose(noise.perturbed(matrix, 0.1, seed=1)[0] - m, 2 * added)
    upper = sum(float(noisy[i, j]) ** 2 for i in range(9) for j in range(i + 1, 9))
    ratio = 10 * math.log10(sum(float(m[i, i]) ** 2 for i in range(9)) / upper)
    assert noise.snr(matrix, noisy.unsqueeze(0)) == pytest.approx(ratio)
    found = noise.Perturbation.of(matrix, 0.05, seed=1)
    wanted = np.sort(np.linalg.eigvalsh(noisy.numpy()))[::-1]
    before = np.sort(np.linalg.eigvalsh(m.numpy()))[::-1]
    assert found.snr == pytest.approx(ratio) and found.eigenvalues[0].numpy() == pytest.approx(wanted)
    assert found.change == pytest.approx(np.linalg.norm(wanted - before) / np.linalg.norm(before))
    assert found.reach == pytest.approx(np.linalg.norm(added.numpy(), 2)) and found.negative == (wanted < 0).sum()
    assert np.abs(wanted - before).max() <= found.reach * (1 + 1e-12)
    big = torch.eye(200, dtype=torch.float64).unsqueeze(0)
    drawn = noise.perturbed(big, 0.3)[0].triu(1)
    assert float(drawn[drawn != 0].std()) == pytest.approx(0.3, rel=0.02)
    sigma = noise.sigma_for(big, 3.0)
    assert noise.snr(big, noise.perturbed(big, sigma)) == pytest.approx(3, abs=0.1)
    with pytest.raises(ValueError, match=r"above the .* dB that this factor has without any noise"):
        noise.sigma_for(matrix, 90.0)


@pytest.mark.usefixtures("float64")
def test_what_adafisher_keeps_is_what_it_has() -> None:
    model, (x, y) = conv_net().double(), data()
    seen = factors.observe(model, Categorical(), [(x, y)], labels="empirical")
    twin = copy.deepcopy(model)
    optimizer = AdaFisher(twin, lr=1e-3, damping=1e-3)
    F.cross_entropy(twin(x), y).backward()
    optimizer.step()
    for name, layer in seen.layers.items():
        own = optimizer.blocks[name].factors  # one update: an average of nothing else
        h, s = kept.diagonals(layer)
        assert torch.allclose(own["H"], kept.minmax(h), rtol=1e-10)
        assert torch.allclose(own["S"], kept.minmax(s), rtol=1e-10)
        wanted = own["S"].unsqueeze(-1) * own["H"].unsqueeze(-2) + 1e-3
        assert torch.allclose(kept.denominator(layer, 1e-3), wanted, rtol=1e-10)
        spectra = matrices.spectrum(layer.A), matrices.spectrum(layer.G)
        found = kept.Kept.of(layer, spectra, 1e-3)
        block = torch.block_diag(*(torch.kron(g, a) for a, g in zip(layer.A, layer.G, strict=True)))
        if len(layer.A) == 1:
            share = block.diagonal().square().sum() / block.square().sum()
            assert found.frobenius == pytest.approx(float(share))
        assert found.top == pytest.approx(float(block.diagonal().max() / torch.linalg.eigvalsh(block)[-1]))
        gradient = layer.gradient.flatten()
        cosine = F.cosine_similarity(gradient, gradient / wanted.flatten(), dim=0)
        assert found.cosine == pytest.approx(float(cosine))
        assert found.damped == pytest.approx(float((wanted < 2e-3).double().mean()))
        assert 0 <= found.spectrum_A < 2 and found.decades_after <= math.log10(1 + 1e3)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("net", ["conv", "attention"])
def test_nearness_to_a_product_equals_dense_matrices(net: str) -> None:
    model = (conv_net() if net == "conv" else Attending()).double()
    x, y = data(12)
    if net == "attention":
        x = torch.randn(12, 5, 4, generator=torch.Generator().manual_seed(4))
    parts = factors.halves([(x, y)])
    assert [len(part[0][1]) for part in parts] == [6, 6]
    seen = [factors.observe(model, Categorical(), part, labels="empirical", samples=True) for part in parts]
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or getattr(module, "groups", 1) > 1:
            continue
        blocks, products = [], []
        for part in parts:
            fisher = dense.layer_blocks(model, module, F.cross_entropy, *part[0])[0][0]
            a, g = dense.kronecker_factors(model, module, F.cross_entropy, *part[0])
            blocks.append(fisher)
            products.append(torch.kron(g[0], a[0]))
        mixed = float((blocks[0] * products[1]).sum() + (blocks[1] * products[0]).sum()) / 2
        both, own = float((blocks[0] * blocks[1]).sum()), float((products[0] * products[1]).sum())
        found = fit.Fit.between(seen[0].layers[name], seen[1].layers[name])
        assert found.cosine == pytest.approx(mixed / math.sqrt(both * own), rel=1e-10)
        assert found.scale == pytest.approx(mixed / own, rel=1e-10)
        flows = [dense.layer_flow(model, module, F.cross_entropy, *part[0])[1] for part in parts]
        rows = [g.flatten(1).T if net == "conv" and g.dim() > 1 else g.view(-1, g.shape[-1]) for f in flows for g in f]
        claimed = sum(float(g.square().sum()) for g in rows)
        assert found.shared == pytest.approx(sum(float(g.sum(0).square().sum()) for g in rows) / claimed, abs=1e-9)
        if name == "key":
            assert found.shared < 1e-12
        assert found.error == pytest.approx(math.sqrt(max(both - 2 * mixed + own, 0) / both), rel=1e-8)
    with pytest.raises(ValueError, match="must have whole factors and samples"):
        fit.Fit.between(*[factors.observe(model, Categorical(), part).layers[name] for part in parts])


@pytest.mark.usefixtures("float64")
def test_numbers_of_a_product_equal_dense_matrices() -> None:
    model, batch = conv_net().double(), data()
    layer = factors.observe(model, Categorical(), [batch], labels="exact").layers["4"]
    damping = 1e-2
    numbers, spectra = factors.measure(layer, factors.Plan(damping=damping))
    assert spectra is not None
    block = torch.kron(layer.G[0], layer.A[0])
    values, vectors = torch.linalg.eigh(block)
    assert spectra.product.flatten().sort().values.numpy() == pytest.approx(values.clamp(min=0).numpy(), abs=1e-14)
    damped = block + damping * torch.eye(len(block))
    gradient = layer.gradient.flatten()
    direction = torch.linalg.solve(damped, gradient)
    assert numbers["mean"] == pytest.approx(float(values.mean()))
    assert numbers["condition_damped"] == pytest.approx(float(torch.linalg.cond(damped)), rel=1e-6)
    assert numbers["dimension"] == pytest.approx(float(torch.linalg.solve(damped, block).trace()) / len(block))
    assert numbers["above"] == pytest.approx(float((values > damping).double().mean()))
    assert numbers["gradient_above"] == pytest.approx(
        float((vectors.T @ gradient)[values > damping].square().sum() / gradient.square().sum())
    )
    assert numbers["amplified"] == pytest.approx(damping * float(direction.norm() / gradient.norm()))
    assert numbers["relative_step"] == pytest.approx(float(direction.norm()) / layer.size)
    tiny = 1e-12 * float(values[-1])
    assert numbers["zero"] == pytest.approx(float((values < tiny).double().mean()))  # labels' scores sum to zero
    assert numbers["zero"] > 0.3


def test_a_study_is_told_whole_and_repeats_itself() -> None:
    model, (x, y) = conv_net(), data(12)
    texts = []
    for _ in range(2):
        plan = factors.Plan(pictured="^4$", seed=2)
        study = factors.Study("net", factors.View(seed=1), plan)
        twin = copy.deepcopy(model)
        for step in (0, 10):
            study.look(step, twin, Categorical(), [(x, y)], fit=[(x, y)])
            with torch.no_grad():
                twin[4].weight.mul_(1.5)
        texts.append(factors.to_json(study))
    assert texts[0] == texts[1]
    record = json.loads(texts[0])
    assert [point["step"] for point in record["points"]] == [0, 10] and record["labels"] == "sampled"
    last = {row["layer"]: row for row in record["points"][1]["layers"]}
    assert last["4"]["drift_from"] == 0 and last["4"]["drift_G"] > 0 and last["4"]["drift_A"] == 0
    assert all(row["contained_A"] == row["contained_G"] == 1 for row in last.values())
    assert len(record["points"][1]["noise"]) == 2 * 3
    again = factors.from_record(factors.to_record(study))
    assert factors.to_json(again) == texts[0] and factors.to_record(again) == factors.to_record(study)
    for (name, drawn), (_, other) in zip(factors.pictures(study), factors.pictures(again), strict=True):
        for axes, twin_axes in zip(drawn.axes, other.axes, strict=True):
            for line, twin_line in zip(axes.get_lines(), twin_axes.get_lines(), strict=True):
                pair = [it.get_xydata() for it in (line, twin_line)]
                assert np.allclose(*pair, rtol=1e-3, atol=1e-9), name  # of four digits
    with pytest.raises(UserError, match="no record of factors"):
        factors.from_record("{}")
    page = factors.to_markdown(study)
    assert "labels sampled from the model (Monte Carlo)" in page and page.count("| 4 |") == 2
    assert study.series("4", "drift_A")[0] == [10]
    both = factors.runs([study, dataclasses.replace(study, name="again")], "4", ["mean_G", "fit_cosine"])
    drawn = [line.get_ydata() for line in both.axes[0].get_lines()]
    assert [list(values) for values in drawn] == [study.series("4", "mean_G")[1]] * 2
    with pytest.raises(ValueError, match="is in none of the runs"):
        factors.runs([study], "nowhere")


def test_names_are_spread_evenly() -> None:
    assert factors.spread("abcdefg", 3) == ["a", "d", "g"] and factors.spread("ab", 4) == ["a", "b"]
    assert factors.spread("abc", 1) == ["c"]
    with pytest.raises(ValueError, match="damping must be above 0"):
        factors.Plan(damping=0.0)


def test_the_command_looks_at_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "tests" / "cli" / "stored_run", tmp_path / "one")
    asked = ["--examples", "12", "--fit", "8", "--pictured", "1", "--labels", "empirical", "--layers", "3"]
    assert command.main(["one", *asked]) == 0
    out, record = capsys.readouterr().out, json.loads((tmp_path / "one" / "factors" / "factors.json").read_text())
    assert "true labels (empirical Fisher)" in out and record["examples"] == 12
    assert [point["step"] for point in record["points"]] == [0, 2]
    files = {path.name: path.stat().st_size for path in (tmp_path / "one" / "factors").iterdir()}
    assert len(files) == 11 and all(files.values()), "three texts and eight pictures"
    study = factors.from_record((tmp_path / "one" / "factors" / "study.json").read_text())
    assert json.loads(factors.to_json(study)) == record
    for wrong, said in {
        "one --layers nowhere": "is found in the name of no layer; there are",
        "one --steps 1": "has none of [1]; there are 0, 2",
        "one --noise x": "must be numbers such as 0.01,0.1",
        "nowhere": "there is no such file or folder",
        "one --damping 0": "damping must be above 0",
    }.items():
        assert command.main(wrong.split()) == 1
        assert said in capsys.readouterr().err, wrong
