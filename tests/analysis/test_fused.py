"""Models for evaluation whose convolutions take along what follows them: outputs are the model's, or it is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from analysis.landscape.fused import Fused
from models import cifar_resnet


class Residual(nn.Module):
    """Sums of every kind: of what is used again, of what is not, of a constant, of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=k % 2 == 0) for k in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4, affine=k != 1) for k in range(3))
        self.gain = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("drift", torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        one, two, three, four, five, six = self.convolutions
        a = F.relu(self.norms[0](one(x)))
        b = torch.relu(a + self.norms[1](two(a)))  # a is used again below
        c = (three(b) + b).relu_()  # b is not
        d = F.relu(four(c) + 1.0)
        e = F.relu(self.norms[2](five(d)) + a[:, :, :1, :1] * self.gain)
        f = (six(e) + e).relu()  # read and written at once
        return f.mean((2, 3)) + (self.drift * 2).flatten()


class Twice(nn.Module):
    """What a convolution returns is seen by two: nothing may be taken along."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.convolution(x)
        return F.relu(self.last(F.relu(first) - first))


def varied(model: nn.Module, seed: int) -> None:
    """Other weights and other statistics, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * p.abs().mean() * torch.randn(p.shape, generator=generator))
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                assert norm.running_mean is not None and norm.running_var is not None
                norm.running_mean.normal_(0, 0.3, generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)
        for name, buffer in model.named_buffers():
            if name == "drift":
                buffer.normal_(generator=generator)


@pytest.mark.parametrize(
    ("make", "channels", "count"),
    [
        (lambda: cifar_resnet(depth=8, width=8, in_channels=3, num_classes=5), 3, 7),
        (lambda: models.densenet121(num_classes=5), 3, 59),
        (lambda: models.mobilenet_v3_small(num_classes=5), 3, 43),
        (Residual, 4, 5),
        (Twice, 4, 1),
    ],
    ids=["resnet", "densenet", "mobilenet", "residual", "twice"],
)
def test_outputs_are_those_of_the_model_at_any_weights(
    make: Callable[[], nn.Module], channels: int, count: int
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    varied(model, 1)
    inputs = torch.randn(4, channels, 32, 32)
    fused = Fused(model, inputs)
    assert sum("fused" in name for name, _ in fused.model.named_children()) == count
    rounded = Fused(model, inputs, torch.bfloat16)
    for seed in (2, 3):
        varied(model, seed)
        fused.refresh()
        rounded.refresh()
        inputs = torch.randn(6, channels, 32, 32)
        kept = inputs.clone()
        with torch.no_grad():
            wanted = model(inputs)
            torch.testing.assert_close(fused.model(inputs), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
            with torch.autocast("cpu", torch.bfloat16):
                there = model(inputs).float()
                error = (rounded.model(inputs).float() - wanted).norm() / wanted.norm()
            assert error < 1.5 * (there - wanted).norm() / wanted.norm() + 1e-3, "as far away as autocast is"
        assert torch.equal(inputs, kept)


class Deciding(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Noisy(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn(1))


def _net(kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    return kind(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()


def _hooked() -> nn.Sequential:
    net = _net()
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    return net


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), "no convolution is followed"),
        (lambda: _net(Deciding), "torch.fx cannot follow it"),
        (lambda: _net(Noisy), "outputs would be others"),
        (_hooked, "hooks see single layers"),
        (lambda: _net().double(), "no convolution is followed"),
    ],
    ids=["none", "deciding", "noisy", "hooked", "double"],
)
def test_what_cannot_be_fused_is_refused(make: Callable[[], nn.Module], said: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=said):
        Fused(make().eval(), torch.randn(2, 3, 8, 8))
