"""callbacks=curvature: the run stays the same, and what it shows is what it says it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.training.small_run import SignalAt, differences, events, final_state, fit
from training import Interrupted
from training.loop import rng
from training.runs.run import Callback, Run
from training.settings.composition import compose
from training.show.watching.curvature import layers_in, plot_curvature
from training.show.watching.diagnostics import CurvatureDiagnostics, Products, layers_of

PLAIN: dict[str, Any] = {"model": {"dropout": 0.0, "batch_norm": False, "float64": True}, "writers": None}


class Witness(Callback):
    """Keeps, of every step, the batch, weights, gradients and loss, and puts the loss after it beside them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_batch(self, run: Run, turn: Any, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.steps.append({"batch": (inputs, targets), "rng": rng.get_state(torch.device("cpu"))})

    def on_gradients(self, run: Run, turn: Any, losses: Any) -> None:
        params = dict(run.model.named_parameters())
        self.steps[-1] |= {"loss": float(losses[0]), "w": {n: p.detach().clone() for n, p in params.items()}}
        self.steps[-1]["g"] = {n: p.grad.clone() for n, p in params.items()}

    def on_step(self, run: Run) -> None:
        last = self.steps[-1]
        last["u"] = {n: p.detach() - last["w"][n] for n, p in run.model.named_parameters()}
        with torch.no_grad():
            last["after"] = float(F.cross_entropy(run.model(last["batch"][0]), last["batch"][1]))


def curvature(folder: Path) -> list[dict[str, Any]]:
    return [event for event in events(folder) if event["event"] == "curvature"]


@pytest.mark.parametrize("optimizer, around", [("ekfac", "free"), ("adahessian", "graft")])
def test_a_run_that_is_looked_at_is_the_same_run(tmp_path: Path, optimizer: str, around: str) -> None:
    # With dropout and BatchNorm, whose masks and statistics another forward pass would move.
    options: dict[str, Any] = {"optimizer": optimizer, "around": around, "max_steps": 12, "accumulate": 2}
    fit(tmp_path / "plain", **options)
    fit(tmp_path / "seen", callbacks=[CurvatureDiagnostics(every=2)], **options)
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", callbacks=[SignalAt(7), CurvatureDiagnostics(every=2)], **options)
    fit(tmp_path / "parts", callbacks=[CurvatureDiagnostics(every=2)], resume=True, **options)
    plain = final_state(tmp_path / "plain")
    for name in ("seen", "parts"):
        state = final_state(tmp_path / name)
        assert list(differences(plain | {"callbacks": None}, state | {"callbacks": None})) == []
        rest = [event for event in events(tmp_path / name) if event["event"] != "curvature"]
        assert rest == events(tmp_path / "plain")
    assert curvature(tmp_path / "seen") == curvature(tmp_path / "parts")
    assert [event["step"] for event in curvature(tmp_path / "seen")] == [1, 2, 4, 6, 8, 10, 12]
    assert (tmp_path / "seen" / "curvature.png").exists()


def test_scalars_are_what_they_are_called(tmp_path: Path) -> None:
    witness = Witness()
    seeing = [CurvatureDiagnostics(every=3), witness]
    fit(tmp_path / "run", optimizer="kfac", callbacks=seeing, max_steps=9, clip_norm=0.01, **PLAIN)
    found = curvature(tmp_path / "run")
    assert [event["step"] for event in found] == [1, 3, 6, 9]
    for event in found:
        seen = witness.steps[event["step"] - 1]
        assert len(layers_in([event])) == 3
        for layer in layers_in([event]):
            own = [name for name in seen["w"] if name.rpartition(".")[0] == layer]
            g, u, w = (torch.cat([seen[key][name].flatten() for name in own]) for key in "guw")
            cosine = float(-(g @ u) / g.norm() / u.norm())
            assert event[f"curvature.angle/{layer}"] == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-8)
            assert event[f"curvature.update_ratio/{layer}"] == pytest.approx(float(u.norm() / w.norm()), rel=1e-8)
        g, u = (torch.cat([t.flatten() for t in seen[key].values()]) for key in "gu")
        assert event["curvature/decrease_linear"] == pytest.approx(float(-(g @ u)), rel=1e-8)
        assert event["curvature/decrease"] == pytest.approx(seen["loss"] - seen["after"], rel=1e-8)
        assert event["curvature/decrease_quadratic"] < event["curvature/decrease_linear"]
    # The gradient's prediction is the limit of short steps, also of clipped gradients.
    assert found[0]["curvature/decrease"] == pytest.approx(found[0]["curvature/decrease_linear"], rel=0.2)


def test_the_loss_is_measured_with_the_same_dropout(tmp_path: Path) -> None:
    """A step of length zero changes nothing: with other masks, or other statistics, it would seem to."""
    options = {"optimizer": "sgd", "lr": 0.0, "max_steps": 4, "accumulate": 2}
    fit(tmp_path / "run", callbacks=[CurvatureDiagnostics(every=1)], **options)
    found = curvature(tmp_path / "run")
    assert [event["curvature/decrease"] for event in found] == [0.0] * 4
    assert "curvature/angle" not in found[0], "no angle to a step of zero"


def test_layers_are_modules_or_what_has_curvature_as_one() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    model[0].weight.requires_grad_(False)
    found = layers_of(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    assert list(found.values()) == ["0", "1", "1"]
    whole = torch.nn.Linear(3, 2)
    assert set(layers_of(whole, torch.optim.SGD(whole.parameters(), lr=0.1)).values()) == {"(root)"}


def test_products_of_nothing_are_no_numbers() -> None:
    assert math.isnan(Products(0.0, 0.0, 1.0, 1.0).angle) and math.isnan(Products(0.0, 1.0, 1.0, 0.0).update_ratio)
    assert Products(-1.0, 1.0, 1.0 - 1e-17, 4.0).angle == 0.0


def test_it_is_an_onlooker_and_its_values_are_checked() -> None:
    runs = [compose(["model=mlp", f"callbacks={name}"]) for name in ("default", "curvature")]
    assert runs[0].id == runs[1].id
    for wrong, sentence in (({"every": 0}, "every must be at least 1"), ({"dpi": 0}, "dpi must be from 1 to 1200")):
        with pytest.raises(ValueError, match=sentence):
            CurvatureDiagnostics(**wrong)


def test_the_picture_has_a_panel_a_scalar_and_a_line_a_layer(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    layers = [f"block.{i}" for i in range(20)]
    lines = []
    for step in (1, 100, 200):
        event: dict[str, Any] = {"event": "curvature", "step": step}
        event |= {"curvature/decrease": 0.1, "curvature/decrease_linear": -0.2}
        for i, layer in enumerate(layers):
            event |= {f"curvature.angle/{layer}": 10 + i, f"curvature.condition/{layer}": 10.0**i}
        lines.append(json.dumps(event))
    path.write_text("\n".join(lines) + "\n")
    figure = plot_curvature(path)
    assert figure is not None
    titles = [axes.get_title() for axes in figure.axes]
    expected = ["condition of the damped matrix", "degrees from steepest descent", "decrease of the batch's loss"]
    assert titles[:3] == expected
    assert [len(axes.get_lines()) for axes in figure.axes[:3]] == [20, 21, 3]
    path.write_text(json.dumps({"event": "train", "step": 1}) + "\n")
    assert plot_curvature(path) is None
