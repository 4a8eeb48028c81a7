"""Loss surfaces: their values are those of models rebuilt at the coordinates; snapshots lie where they are drawn."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from analysis import landscape
from analysis.landscape.losses import Examples, Format, Ground, Statistics
from analysis.landscape.page import LIBRARY
from analysis.landscape.surface import around, to_csv, tracks_csv, under
from analysis.landscape.survey import survey
from data import digits
from training.errors import UserError
from training.show.snapshots import NAME, Snapshots, Writer, state
from training.tasks.classification import Classification

TASK = Classification(10)


class Net(nn.Module):
    """All that directions tell apart: convolutions, transposed ones too, a linear layer, norms, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 3, groups=2)
        self.frozen = nn.Conv2d(4, 4, 1)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(4 * 25, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.conv(inputs)))
        return self.head(torch.relu(self.frozen(self.up(hidden))).flatten(1))


@pytest.fixture(scope="module")
def examples() -> Examples:
    return Examples.first(digits(batch_size=50, augment="none").train, 130, 60)


def net() -> nn.Module:
    torch.manual_seed(1)
    model = Net()
    model.train()
    for _ in range(3):
        model(torch.randn(20, 1, 8, 8))
    return model


def walked(folder: Path, label: str, seed: int, count: int = 9) -> landscape.Way:
    """A way of a net that is pulled to some place and shaken."""
    model = net()
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    goal = {n: p + 0.3 * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
    writer = Writer(folder / NAME, model)
    for step in range(count):
        writer.append(model, 10 * step, 0.0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.lerp_(goal[name], 0.2).add_(torch.randn(p.shape, generator=generator), alpha=0.01)
            model.norm.running_mean.add_(0.01)
    writer.close()
    return landscape.Way.of(label, Snapshots(folder))


def loss_of(model: nn.Module, examples: Examples, estimate: int) -> float:
    """The reference: the mean loss of a model that was built for it, batch statistics averaged by hand."""
    if estimate:
        seen: list[tuple[Tensor, Tensor]] = []
        model.norm.train()
        for inputs, _ in examples.batches[:estimate]:
            maps = model.conv(inputs)
            seen.append((maps.mean((0, 2, 3)), maps.var((0, 2, 3))))
        means, variances = (torch.stack(part).mean(0) for part in zip(*seen, strict=True))
        model.norm.running_mean, model.norm.running_var = means.detach(), variances.detach()
    model.eval()
    inputs, targets = (torch.cat(part) for part in zip(*examples.batches, strict=True))
    return nn.functional.cross_entropy(model(inputs), targets).item()


def test_directions_have_the_lengths_of_filters() -> None:
    model = net()
    with torch.no_grad():
        model.head.weight[3] = 0
    found = landscape.random_direction(model, 5)
    for name, dims in {"conv.weight": (1, 2, 3), "head.weight": (1,)}.items():
        here, there = (torch.linalg.vector_norm(t, dim=dims) for t in (found[name], model.get_parameter(name)))
        torch.testing.assert_close(here, there)
    up, there = (t.reshape(2, 3, 2, 9).transpose(1, 2).reshape(4, -1) for t in (found["up.weight"], model.up.weight))
    torch.testing.assert_close(up.norm(dim=1), there.norm(dim=1))
    assert found["head.weight"][3].abs().max() == 0, "a dead filter stays dead"
    assert "frozen.weight" not in found
    assert all(found[name].abs().max() == 0 for name in ("conv.bias", "norm.weight", "norm.bias", "head.bias"))
    scaled = landscape.random_direction(model, 5, "layer", "scale")
    for name, direction in scaled.items():
        torch.testing.assert_close(direction.norm(), model.get_parameter(name).detach().norm())
    plain = landscape.random_direction(model, 5, "none", "scale")
    torch.testing.assert_close(plain["conv.weight"] * (found["conv.weight"] / plain["conv.weight"])[:, :1, :1, :1],
                               found["conv.weight"])  # fmt: skip
    with pytest.raises(ValueError, match="normalise must be one of filter, layer, none, got 'rows'"):
        landscape.random_direction(model, 5, "rows")  # type: ignore[arg-type]


@pytest.mark.parametrize("statistics, calibrate, batches", [("estimated", 100, 2), ("fixed", 500, 0)])
def test_losses_are_those_of_models_rebuilt_at_the_coordinates(
    examples: Examples, statistics: str, calibrate: int, batches: int
) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    surface = around(model, TASK, examples, label="net", resolution=5, span=0.8, seed=3, statistics=statistics,
                     calibrate=calibrate)  # fmt: skip
    assert model.training and all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    directions = [landscape.random_direction(model, seed) for seed in (3, 1003)]
    for i, j in ((0, 0), (2, 2), (4, 1), (1, 3)):
        built = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in built.named_parameters():
                if p.requires_grad:
                    p.add_(surface.x[i] * directions[0][name] + surface.y[j] * directions[1][name])
        assert surface.values["loss"][j, i] == pytest.approx(loss_of(built, examples, batches), abs=1e-6)
    line = around(model, TASK, examples, label="net", dimensions=1, resolution=5, span=0.8, seed=3,
                  statistics=statistics, calibrate=calibrate)  # fmt: skip
    np.testing.assert_allclose(line.values["loss"], surface.values["loss"][2], atol=1e-6)
    said = "re-estimated at each point on 120 examples" if batches else "statistics fixed"
    assert any(said in note for note in surface.notes) and "130 examples" in surface.notes


@pytest.mark.parametrize("statistics", ["estimated", "fixed"])
def test_a_surface_in_bfloat16_is_near_and_says_so(examples: Examples, statistics: Statistics) -> None:
    plain, rounded = (
        around(net(), TASK, examples, label="net", resolution=4, statistics=statistics, precision=precision)
        for precision in get_args(Format)
    )
    wanted, found = plain.values["loss"], rounded.values["loss"]
    assert not np.array_equal(wanted, found)
    np.testing.assert_allclose(found, wanted, rtol=0.02)
    assert "130 examples, in bfloat16" in rounded.notes and "130 examples" in plain.notes
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, got 'fp16'"):
        around(net(), TASK, examples, label="net", precision="fp16")  # type: ignore[arg-type]


def test_the_pass_that_is_evaluated_is_fused_where_it_can_be(examples: Examples) -> None:
    model = net()
    plane = landscape.Plane(state(model)[0], (landscape.random_direction(model),))
    ground = Ground(model, TASK, examples, plane, statistics="fixed")
    point = ("plane", (0.3,))
    fused = ground.measure(point)
    assert ground._fused is not None and len(ground._fused._convolutions) == 2
    copied = pickle.loads(pickle.dumps(ground))
    assert "_fused" not in vars(copied) and copied.measure(point) == fused
    ground.__dict__["_fused"] = None
    assert ground.measure(point) == pytest.approx(fused, abs=1e-6)


def test_points_of_a_plane_project_to_their_coordinates() -> None:
    model = net()
    plane = landscape.Plane(state(model)[0], tuple(landscape.random_direction(model, seed) for seed in (0, 1)))
    for spot in ((0.0, 0.0), (0.3, -1.7), (-2.0, 0.01)):
        found = plane.project(plane.at(spot))
        assert found.coordinates == pytest.approx(spot, abs=1e-6) and found.left_out < 1e-12
    aside = plane.at((1.0, 2.0))
    aside["conv.bias"] = aside["conv.bias"] + 3.0  # which no direction changes
    found = plane.project(aside)
    assert found.coordinates == pytest.approx((1.0, 2.0), abs=1e-6) and found.distance == pytest.approx(3 * 6**0.5)
    with pytest.raises(ValueError, match="parallel"):
        landscape.Plane(plane.origin, (plane.directions[0],) * 2).project(aside)


@pytest.mark.parametrize("through", ["start", "end", "mean"])
def test_the_plane_of_ways_is_that_of_a_dense_decomposition(tmp_path: Path, through: str) -> None:
    ways = [walked(tmp_path / name, name, seed) for seed, name in enumerate(("one", "two", "three"))]
    principal = landscape.principal_plane(ways, through)
    rows = np.stack([torch.cat([w.flatten() for w in s.weights.values()]).double() for way in ways for s in way])
    centred = rows - {"start": rows[0], "end": rows[8::9].mean(0), "mean": rows.mean(0)}[through]
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(principal.explained[:5], (values**2 / (values**2).sum())[:5], rtol=1e-5)
    seen = np.array([p.coordinates for own in principal.projections for p in own])
    np.testing.assert_allclose(np.abs(seen), np.abs(left[:, :2] * values[:2]), atol=2e-5)
    rest = centred - (centred @ right[:2].T) @ right[:2]
    distances = [p.distance for own in principal.projections for p in own]
    np.testing.assert_allclose(distances, np.linalg.norm(rest, axis=1), rtol=1e-4, atol=1e-6)
    cosines = [p.cosine for own in principal.projections for p in own]
    lengths = np.linalg.norm(centred, axis=1)
    shares = np.divide(np.linalg.norm(rest, axis=1), lengths, out=np.zeros(27), where=lengths > 0) ** 2
    np.testing.assert_allclose(cosines, np.sqrt(1 - shares), atol=1e-5)
    for way, own in zip(ways, principal.projections, strict=True):
        for snapshot, told in zip(way, own, strict=True):
            found = principal.plane.project(snapshot.weights)
            assert found.coordinates == pytest.approx(told.coordinates, abs=2e-5)
            assert (found.cosine, found.distance) == pytest.approx((told.cosine, told.distance), rel=1e-4, abs=1e-6)


def test_snapshots_are_evaluated_themselves_and_where_they_are_projected_to(tmp_path: Path, examples: Examples) -> None:
    ways = [walked(tmp_path / name, name, seed) for seed, name in enumerate(("one", "two"))]
    plane = landscape.principal_plane(ways).plane
    seen = np.array([plane.project(snapshot.weights).coordinates for way in ways for snapshot in way])
    surface = under(net(), TASK, examples, ways, label="ways", resolution=4, calibrate=60)
    for track, way in zip(surface.tracks, ways, strict=True):
        assert track.steps.tolist() == [10 * k for k in range(9)]
        snapshots = list(way)
        for number in (0, 8):
            built = net()
            built.load_state_dict(snapshots[number].weights | snapshots[number].buffers, strict=False)
            assert track.true["loss"][number] == pytest.approx(loss_of(built, examples, 1), abs=1e-6)
            built.load_state_dict(plane.at(track.coordinates[number]), strict=False)
            assert track.projected["loss"][number] == pytest.approx(loss_of(built, examples, 1), abs=1e-6)
    assert surface.x[0] < seen[:, 0].min() and surface.y[-1] > seen[:, 1].max()
    fixed = under(net(), TASK, examples, ways[:1], label="way", resolution=2, statistics="fixed")
    built = net()
    last = list(ways[0])[-1]
    built.load_state_dict(last.weights | last.buffers, strict=False)
    assert fixed.tracks[0].true["loss"][-1] == pytest.approx(loss_of(built, examples, 0), abs=1e-6)


def test_runs_that_make_no_plane_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least three snapshots"):
        landscape.principal_plane([walked(tmp_path / "short", "short", 0, count=2)])
    writer = Writer(tmp_path / "other.snapshots", nn.Linear(2, 2))
    writer.append(nn.Linear(2, 2), 0, 0.0)
    writer.close()
    other = landscape.Way.of("other", Snapshots(tmp_path / "other.snapshots"))
    with pytest.raises(ValueError, match="parameters of other have other names"):
        landscape.principal_plane([walked(tmp_path / "one", "one", 0), other])


class Stop(Exception):
    pass


def test_a_survey_that_was_stopped_goes_on_to_the_same_result(tmp_path: Path, examples: Examples) -> None:
    model = net()
    plane = landscape.Plane(state(model)[0], (landscape.random_direction(model),))
    ground = Ground(model, TASK, examples, plane)
    points = [("plane", (float(x),)) for x in np.linspace(-1, 1, 7)]
    whole = survey(ground, points)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        survey(ground, points, folder=tmp_path, progress=stop)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes() + b'[3, {"loss": 0.1')  # which a kill may leave
    seen: list[int] = []
    assert survey(ground, points, folder=tmp_path, progress=lambda done, total: seen.append(done)) == whole
    assert seen == [3, 4, 5, 6, 7]
    ground.calibrate = 60
    survey(ground, points, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "another survey"
    ground.calibrate = 500
    several = survey(ground, points[:4], workers=2)
    assert [v["loss"] for v in several] == pytest.approx([v["loss"] for v in whole[:4]], abs=1e-6)
    with pytest.raises(ValueError, match="workers must be at least 1"):
        survey(ground, points, workers=0)


def drawn(page: Path) -> str:
    """The page after a browser without a network has drawn it."""
    command = ["chromium", "--headless", "--no-sandbox", "--enable-unsafe-swiftshader", "--virtual-time-budget=8000",
               "--dump-dom", page.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_pictures_tables_and_the_page(tmp_path: Path, examples: Examples) -> None:
    ways = [walked(tmp_path / name, name, seed, 5) for seed, name in enumerate(("one", "two"))]
    ways[0] = dataclasses.replace(ways[0], label="</script>")
    surface = under(net(), TASK, examples, ways, label="ways", resolution=5)
    landscape.plot([surface]).savefig(tmp_path / "ways.png", dpi=50)
    flat = around(net(), TASK, examples, label="net", resolution=3)
    flat.values["loss"][0, 0] = np.inf  # what blows up is left white
    landscape.plot([flat, flat], "accuracy").savefig(tmp_path / "flat.png", dpi=50)
    landscape.plot([flat]).savefig(tmp_path / "flat.png", dpi=50)
    line = around(net(), TASK, examples, label="net", dimensions=1, resolution=3)
    landscape.plot([line, line]).savefig(tmp_path / "line.png", dpi=50)
    with pytest.raises(ValueError, match="metric must be one of loss, accuracy, got 'perplexity'"):
        landscape.plot([line], "perplexity")
    assert to_csv(surface).splitlines()[0] == "x,y,loss,accuracy" and len(to_csv(surface).splitlines()) == 26
    table = tracks_csv(surface).splitlines()
    assert len(table) == 11 and float(table[-1].split(",")[7]) == pytest.approx(surface.tracks[1].true["loss"][-1])

    kept = [surface, flat, line]
    again = landscape.from_record(landscape.to_record(kept))
    assert landscape.to_record(again) == landscape.to_record(kept)
    assert np.isnan(again[1].values["loss"][0, 0]) and len(again[2].y) == 0
    for before, after in ((surface, again[0]), (line, again[2])):
        pairs = [[axes.get_title(loc="left") for axes in landscape.plot([it]).axes] for it in (before, after)]
        assert pairs[0] == pairs[1]
    assert tracks_csv(again[0]).splitlines()[0] == table[0]
    with pytest.raises(UserError, match="no record of surfaces"):
        landscape.from_record("{}")

    page = tmp_path / "page.html"
    page.write_text(landscape.to_page([surface, flat], (tmp_path / "ways.png").read_bytes()))
    text = page.read_text()
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', text)[1])
    assert data["surfaces"][1]["values"]["loss"][0][0] is None
    assert data["surfaces"][0]["tracks"][0]["true"]["loss"] == pytest.approx(surface.tracks[0].true["loss"], rel=1e-6)
    own = text.replace(LIBRARY.read_text(encoding="utf-8"), "")
    assert page.stat().st_size < 3_000_000 and len(own) < len(text) and not re.search(r'(src|href)="(?!data:)', own)
    assert "default-src 'none'" in own, "whatever the library would load, the browser does not"
    assert "MIT" in (Path(landscape.__file__).parent / "plotly" / "LICENSE").read_text()
    with pytest.raises(ValueError, match="dims must be 2"):
        landscape.to_page([line], b"")
    if shutil.which("chromium"):
        shown = drawn(page)
        assert 'data-drawn="yes"' in shown and "last step" in shown
