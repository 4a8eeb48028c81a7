"""trainer.recompute: less memory, and not a number that differs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import build_model, cct, gpt, mlp, resnet, swin
from optimizers import (
    EKFAC,
    KFAC,
    KPSVD,
    AdaFisher,
    AdaHessian,
    Categorical,
    ExactNaturalGradient,
    FishLeg,
    TwoLevelKFAC,
)
from tests.training.small_run import differences, final_state, fit
from training import Trainer, UserError
from training.loop.backward import backward
from training.loop.recompute import blocks_of, recomputing

METHODS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "adafisher": lambda model: AdaFisher(model, update_every=1),
    "adahessian": lambda model: AdaHessian(model, lr=0.1, hessian_every=1),
    **{
        f"{kind.__name__}-{fisher}": lambda model, kind=kind, fisher=fisher: kind(
            model, likelihood=Categorical(), fisher=fisher, update_every=1, refresh_every=1
        )
        for kind, fisher in [(KFAC, "sampled"), (KFAC, "empirical"), (EKFAC, "sampled"), (KPSVD, "exact")]
    },
    "exact_ng": lambda model: ExactNaturalGradient(model, likelihood=Categorical(), damping=0.1),
    "twolevel": lambda model: TwoLevelKFAC(model, likelihood=Categorical(), damping=0.1),
    "auto": lambda model: KFAC(model, likelihood=Categorical(), damping="auto", lr="auto", momentum="auto"),
    "fishleg": lambda model: FishLeg(model, likelihood=Categorical()),
}  # fmt: skip


class Block(nn.Module):
    """A residual block of convolutions, with what is random and what counts batches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.Dropout(0.3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.drop(self.norm(self.conv(x)).tanh())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 1)
        self.blocks = nn.ModuleList([Block(3), Block(3)])
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x.mean((2, 3)))


def trained(method: str, recompute: bool) -> tuple[nn.Module, Any]:
    """After three steps."""
    torch.manual_seed(0)
    model = Net()
    optimizer = METHODS[method](model)
    with recomputing(model, recompute):
        for _ in range(3):
            inputs, targets = torch.randn(8, 2, 4, 4), torch.randint(0, 4, (8,))
            optimizer.zero_grad()
            outputs = model(inputs)
            backward(optimizer, F.cross_entropy(outputs, targets), outputs, targets=targets)
            optimizer.step()
    return model, optimizer


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", METHODS)
def test_gradients_curvature_and_statistics_are_the_same(method: str) -> None:
    """Forward hooks see a block twice, and what they recorded counts once; BatchNorm counts once, too."""
    (plain, one), (again, other) = (trained(method, recompute) for recompute in (False, True))
    assert int(again.state_dict()["blocks.0.norm.num_batches_tracked"]) in (3, 6), "three steps, and auto's own passes"
    for (name, a), b in zip(plain.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    if matrices := getattr(one, "curvature_matrices", None):
        for name, expected in matrices().items():
            torch.testing.assert_close(other.curvature_matrices()[name], expected, rtol=1e-8, atol=1e-12)
    assert "forward" not in vars(again.blocks[0]), "as it was before"


def kept(model: nn.Module, inputs: Tensor, recompute: bool) -> int:
    """Bytes that a forward pass saves for the backward pass, but for the blocks' own inputs."""
    seen: dict[int, Tensor] = {}
    with (
        recomputing(model, recompute),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ),
    ):
        model(inputs)
    return sum(t.untyped_storage().nbytes() for t in seen.values())


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (lambda: resnet(18, in_channels=3, num_classes=4, image_size=32), 8),
    "cct": (lambda: cct(layers=3, width=32, heads=2, in_channels=3, num_classes=4, image_size=16), 3),
}


@pytest.mark.parametrize("name", NETS)
def test_blocks_of_real_nets(name: str) -> None:
    build, count = NETS[name]
    model = build()
    assert len(blocks_of(model, True)) == count
    copied = copy.deepcopy(model)
    side = 16 if name == "cct" else 32
    inputs = torch.randn(2, 3, side, side)
    more, less = (kept(model, inputs, recompute) for recompute in (False, True))
    assert less < more / 2, f"{less} of {more} bytes"
    model.load_state_dict(copied.state_dict())
    torch.manual_seed(3)
    model(inputs).sum().backward()
    with recomputing(copied, True):
        other = copy.deepcopy(copied)  # what a copy computes again is its own
        torch.manual_seed(3)
        other(inputs).sum().backward()
    assert all(p.grad is None for p in copied.parameters())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_innermost_blocks_and_names() -> None:
    net = swin("tiny", in_channels=3, num_classes=4, image_size=32)
    found = blocks_of(net, True)
    assert len(found) == 12 and all(".blocks." in name for name in found), list(found)
    assert list(blocks_of(net, r"^layers\.[01]$")) == ["layers.0", "layers.1"]
    text = build_model(gpt, {"vocabulary": 9, "sequence": 8, "words": []}, layers=2, width=8, heads=2)
    assert len(blocks_of(text, True)) == 2
    small = build_model(mlp, {"in_channels": 1, "num_classes": 3, "image_size": 4}, hidden=[5])
    with pytest.raises(UserError, match=r"^trainer.recompute: the model has no blocks in a Sequential .*REGEX"):
        blocks_of(small, True)
    with pytest.raises(UserError, match=r"no modules in whose names '\^encoder' is found; at its top there are"):
        blocks_of(small, "^encoder")
    with pytest.raises(UserError, match=r"recompute=\^blocks\$: blocks is a list of modules, which runs nothing"):
        blocks_of(Net(), "^blocks$")
    with pytest.raises(ValueError, match=r"^recompute must be true, false or a regular expression, got '\('"):
        Trainer(max_steps=1, recompute="(")
    with pytest.raises(ValueError, match=r"^recompute must be false where compile is true"):
        Trainer(max_steps=1, recompute=True, compile=True)


def test_buffers_that_a_pass_changes_are_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x) * self.calls

    model = nn.Sequential(Counts(), nn.Linear(3, 2))
    with recomputing(model, True), pytest.raises(UserError, match="Counts changes buffers of its own in each pass"):
        model(torch.randn(2, 3))


def test_a_run_may_go_on_with_it(tmp_path: Path) -> None:
    whole = {"optimizer": "kfac", "max_steps": 8, "recompute": "^3$"}
    fit(tmp_path / "plain", **(whole | {"recompute": False}))
    fit(tmp_path / "again", **whole)
    assert list(differences(final_state(tmp_path / "plain"), final_state(tmp_path / "again"))) == []
