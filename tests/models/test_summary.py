"""Multiply-adds against published values, parameters against the models' own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import models
from models.summary import amount, summarize

FACTS = {"in_channels": 3, "num_classes": 1000, "image_size": 224}
# As published with torchvision's weights, in units of 1e9; ViT with attention's two products.
PUBLISHED = {
    "resnet18": (lambda: models.resnet(18, **FACTS), 1.814, 11_689_512),
    "resnet50": (lambda: models.resnet(50, **FACTS), 4.089, 25_557_032),
    "vit_b_16": (lambda: models.torchvision_model("vit_b_16", **FACTS), 17.564, 86_567_656),
    "mobilenetv3_large": (lambda: models.mobilenetv3("large", **FACTS), 0.217, 5_483_032),
    "mobilenetv3_small": (lambda: models.mobilenetv3("small", **FACTS), 0.057, 2_542_856),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiply_adds_and_parameters_are_the_published_ones(name: str) -> None:
    build, giga, parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = build()
        layers = summarize(model, torch.empty(2, 3, 224, 224))
    assert sum(layer.multiply_adds for layer in layers) / 1e9 == pytest.approx(giga, abs=6e-4)
    assert sum(layer.parameters for layer in layers) == parameters == sum(p.numel() for p in model.parameters())


def test_each_layer_has_its_own_and_nothing_twice() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(2, 4, 3)
            self.twice = nn.Linear(16, 16)
            self.tied = nn.Linear(16, 16, bias=False)
            self.tied.weight = self.twice.weight
            self.free = nn.Parameter(torch.zeros(16))
            self.never = nn.Linear(3, 3)
            self.never.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(self.twice(self.first(x).flatten(1)))
            return self.tied(x + self.free) @ torch.ones(16, 5)

    model = Net().eval()
    found = {layer.name: layer for layer in summarize(model, torch.rand(3, 2, 4, 4))}
    assert not model.training
    assert {name: layer.multiply_adds for name, layer in found.items()} == {
        "": 16 * 5, "first": 4 * 2 * 9 * 4, "twice": 2 * 256, "tied": 256, "never": 0,
    }  # fmt: skip
    assert {name: layer.parameters for name, layer in found.items()} == {
        "": 16, "first": 76, "twice": 272, "never": 12, "tied": 0,
    }  # fmt: skip
    assert found["first"].output == (3, 4, 2, 2) and found["twice"].calls == 2 and found["never"].output == ()
    assert found["never"].trained == 0 and found["twice"].trained == 272


def test_attention_counts_its_two_products() -> None:
    width, length = 8, 5
    attention = nn.MultiheadAttention(width, 2, batch_first=True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    (layer, *rest) = summarize(Net(), torch.rand(2, length, width))
    assert layer.multiply_adds == 4 * length * width**2 + 2 * length**2 * width
    assert [one.name for one in rest] == ["attention.out_proj"] and layer.output == (2, length, width)


def test_amounts_have_three_digits_and_a_letter() -> None:
    assert [amount(x) for x in (0, 7, 1500, 999.9, 1.814e9, 5e12)] == ["0", "7", "1.5 k", "1 k", "1.81 G", "5 T"]
    assert amount(1024.0, "B") == "1.02 kB" and amount(12, "B") == "12 B"
