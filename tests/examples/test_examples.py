"""examples/: each trains with every kind of method, and goes on from its library's own checkpoint bit for bit."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from curvlab.optimizers import KFAC, AdaFisherW, AdaHessian, Categorical, FishLeg
from torch import nn

from examples._load import load
from tests.conftest import ROOT

NEEDED = {
    "plain_pytorch": "torch",
    "lightning_module": "lightning",
    "transformers_trainer": "transformers",
    "accelerate_loop": "accelerate",
    "timm_training": "timm",
    "torchvision_reference": "torchvision",
    "peft_lora": "peft",
}
INSTALL = "pip install -r requirements-examples.txt"
SMOOTHED = ("torchvision_reference",)


def adahessian(model: nn.Module, params: Any = None, **options: Any) -> AdaHessian:
    options = {"lr": 0.1, "hessian_every": 2} | options
    return AdaHessian(model if params is None else params, model=model, **options)


def methods(likelihood: Categorical) -> dict[str, Callable[..., Any]]:
    """Intervals that a cut after six steps does not fall together with."""
    return {
        "kfac": partial(KFAC, lr=0.05, update_every=4, refresh_every=5, likelihood=likelihood),
        "adafisherw": partial(AdaFisherW, lr=0.03, update_every=4),
        "adahessian": adahessian,
        "fishleg": partial(FishLeg, lr=0.2, aux_every=4, likelihood=likelihood),
    }


def test_a_folder_of_data_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` lies beside the examples once data were made; transformers asks whether a package is called so."""
    (tmp_path / "datasets").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", sys)  # whatever stands there now comes back in the end
    del sys.modules["datasets"]
    found = find_spec("datasets")
    assert found is not None
    if found.origin is not None:
        pytest.skip("the package datasets is installed, and comes first")
    load("plain_pytorch")
    assert find_spec("datasets") is None


def test_there_is_one_for_each_library_and_all_are_short() -> None:
    files = {path.stem: path for path in (ROOT / "examples").glob("[!_]*.py")}
    assert files.keys() == NEEDED.keys()
    assert all(len(path.read_text().splitlines()) <= 40 for path in files.values())
    readme = (ROOT / "README.md").read_text()
    assert all(f"(examples/{name}.py)" in readme for name in files)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["kfac", "adafisherw", "adahessian", "fishleg"])
@pytest.mark.parametrize("name", NEEDED)
def test_the_loss_falls_and_a_resumed_run_goes_on_bit_for_bit(name: str, method: str, tmp_path: Path) -> None:
    pytest.importorskip(NEEDED[name], reason=f"{NEEDED[name]} is not installed: {INSTALL}")
    main = load(name).main
    make = methods(Categorical(0.1 if name in SMOOTHED else 0.0))[method]

    def run(steps: int, folder: str, resume: bool = False) -> tuple[nn.Module, list[float]]:
        torch.manual_seed(0 if not resume else 1)
        return main(make, steps, str(tmp_path / folder), resume)

    whole, losses = run(10, "whole")
    run(6, "cut")
    resumed, rest = run(10, "cut", resume=True)
    assert rest and rest == losses[-len(rest) :]
    own, other = whole.state_dict(), resumed.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("page", ["README.md", "docs/loops.md"])
def test_what_the_pages_show_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / page).read_text()
    if page == "README.md":
        text = text.split("**Use the optimizers alone.**")[1].split("\n**")[0].split("\n## ")[0]
    inputs = torch.randn(8, 5)
    targets = inputs[:, :3].argmax(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    names: dict[str, Any] = {
        "model": model, "loader": [(inputs, targets)], "inputs": inputs, "targets": targets, "KFAC": KFAC,
        "Categorical": Categorical, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "MyOptimizer": torch.optim.Adagrad,
    }  # fmt: skip
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == {"README.md": 1, "docs/loops.md": 2}[page]
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    said = capsys.readouterr().out
    assert "KroneckerFactors" in said
    assert page == "README.md" or ("2 of 2 layers covered" in said and "passed" in said)


def test_each_runs_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for more in (["--steps", "2"], ["--steps", "3", "--resume"]):
        monkeypatch.setattr("sys.argv", ["examples", "plain_pytorch", *more])
        runpy.run_module("examples", run_name="__main__")
    losses = [float(line) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3 and losses[-1] < losses[0]
