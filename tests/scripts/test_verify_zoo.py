"""The check of what is recorded on the zoo: small models pass, a fault is found, and what is done stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optimizers.curvature.layers import LinearLayer
from scripts.studies import verify_zoo

SMALLEST = (
    "mlp", "deep_linear", "toynet", "conv_autoencoder", "autoencoder_curves", "autoencoder_mnist", "cuda_convnet",
    "resnet20", "resnet32", "gpt1_mini",
)  # fmt: skip


@pytest.mark.parametrize("optimizer", [*verify_zoo.OPTIMIZERS])
@pytest.mark.parametrize("name", SMALLEST)
def test_what_is_recorded_of_small_models_is_right(name: str, optimizer: str) -> None:
    row = next(row for row in verify_zoo.ROWS if row.name == name)
    found, _ = verify_zoo.checked(row, optimizer)
    assert found.verdict == "ok" and found.dtype == "float64"
    assert found.reproduced < 1e-6 and found.apart is not None and found.apart < 1e-6
    tied = name == "gpt1_mini"  # its embedding is the output layer
    assert found.layers - found.covered == tied and found.share > 0.98


def test_a_fault_is_found_and_what_is_done_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "verified.json"
    call = ["mlp", "--optimizers", "kfac", "--json", str(file), "--markdown"]
    gradients = LinearLayer.gradients
    with monkeypatch.context() as broken:
        broken.setattr(LinearLayer, "gradients", lambda self, g: 2 * gradients(self, g))
        assert verify_zoo.main(call) == 1
    assert "WRONG" not in capsys.readouterr().out  # the tables of layers are printed when asked for
    assert len(json.loads(file.read_text())["mlp kfac"]["wrong"]) == 3
    assert verify_zoo.main(call) == 0
    first = json.loads(file.read_text())
    assert first["mlp kfac"]["wrong"] == {} and first["mlp kfac"]["covered"] == 3
    first["mlp kfac"]["seconds"] = 12345.0
    file.write_text(json.dumps(first))
    assert verify_zoo.main(call) == 0
    assert "12345 s" in capsys.readouterr().out


def test_branches_that_start_at_zero_get_weights() -> None:
    row = next(row for row in verify_zoo.ROWS if row.name == "vit_tiny")
    model, *_ = verify_zoo.prepared(row)
    assert all(bool(p.any()) for p in model.parameters())


def test_an_unknown_name_ends_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_zoo.main(["resnet19"]) == 1
    assert capsys.readouterr().err.startswith("error: there is no model 'resnet19' (did you mean 'resnet1")
