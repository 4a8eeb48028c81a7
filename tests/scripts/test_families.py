"""The script on families of models: what it looks at, what it calls trained, how it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from optimizers import AdaFisher
from scripts.studies import families


def test_every_model_belongs_to_a_family() -> None:
    known = families.families()
    assert set(timm.list_models()) <= {name for package, names in known.values() if package == "timm" for name in names}
    theirs = {name for package, names in known.values() if package == "torchvision" for name in names}
    assert set(torchvision.models.list_models(module=torchvision.models)) == theirs


def test_a_family_is_its_smallest_model() -> None:
    assert families.smallest("torchvision", ["resnet34", "resnet18", "resnet50"]) == ("resnet18", 11_689_512)


def test_two_models_and_what_is_done_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "families.json"
    assert families.main(["test_nfnet", "--json", str(file)]) == 0
    first = json.loads(file.read_text())
    assert first["test_nfnet"]["side"] == 32 and set(first["test_nfnet"]["verdicts"].values()) == {"ok"}
    assert first["test_nfnet"]["others"].keys() == {"layer with extra parameters (gain)"}
    first["test_nfnet"]["covered"] = 0.5
    file.write_text(json.dumps(first))
    assert families.main(["test_nfnet", "mnasnet0_5", "--json", str(file), "--markdown"]) == 0
    *_, nfnet, mnasnet = capsys.readouterr().out.splitlines()
    assert nfnet.startswith("| test_nfnet | `test_nfnet` |") and "| 50.0 % | 9.2 % | layer with" in nfnet
    assert mnasnet == "| mnasnet0_5 | `mnasnet0_5` | 2,218,512 | 32 | ok | ok | ok | 100.0 % | 100.0 % |  |"


@pytest.mark.usefixtures("float64")
def test_what_stays_is_named() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 10))
    assert families.trained(net, AdaFisher(net), 4) == "ok"
    assert families.trained(net, AdaFisher(net, lr=0.0), 4) == "2 parameters with a gradient stay (1.bias, ...)"
    net[1].weight.data.fill_(torch.inf)
    assert families.trained(net, AdaFisher(net, lr=0.0), 4) == "the loss is no longer finite"


@pytest.mark.usefixtures("float64")
def test_a_gradient_that_comes_in_the_second_step_counts() -> None:
    """Behind a weight that starts at zero nothing is pulled in the first step; it must move in the second."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(48, 4), nn.Linear(4, 10)
            nn.init.zeros_(self.outer.weight)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.outer(self.inner(images.flatten(1)))

    net = Branch()
    assert families.trained(net, AdaFisher(net), 4) == "ok"
    net = Branch()
    stuck = AdaFisher(net, lr=1e-3)
    step = stuck.step

    def forgetful() -> None:
        before = [p.detach().clone() for p in net.inner.parameters()]
        step()
        with torch.no_grad():
            for parameter, value in zip(net.inner.parameters(), before, strict=True):
                parameter.copy_(value)

    stuck.step = forgetful
    assert families.trained(net, stuck, 4) == "2 parameters with a gradient stay (inner.bias, ...)"


def test_an_unknown_name_ends_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert families.main(["densent", "--json", str(tmp_path / "families.json")]) == 1
    sentence = "error: there is no family and no model 'densent' (did you mean 'densenet'?)\n"
    assert capsys.readouterr().err == sentence and not any(tmp_path.iterdir())
