"""Plain convolutional classifiers and the nets that are small enough to be worked out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from models.parts.initialisation import initialise

SIZES = [(1, 28), (1, 25), (3, 32), (1, 8), (3, 33)]


def facts(in_channels: int, image_size: int, num_classes: int = 10) -> dict[str, int]:
    return {"in_channels": in_channels, "image_size": image_size, "num_classes": num_classes}


def build(name: str, given: dict[str, int], **options: Any) -> nn.Module:
    required = {"deep_linear": {"hidden": [6, 5]}, "toynet": {"channels": [12, 24]}}
    return models.build_model(getattr(models, name), given, **(required.get(name, {}) | options))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("in_channels, size", SIZES)
@pytest.mark.parametrize("name", ["cuda_convnet", "vgg11", "deep_linear", "toynet"])
def test_images_of_every_size_become_one_logit_a_class(name: str, in_channels: int, size: int) -> None:
    net = build(name, facts(in_channels, size, num_classes=7)).eval()
    with torch.no_grad():
        assert net(torch.randn(2, in_channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", ["cuda_convnet", "vgg11", "deep_linear", "toynet"])
def test_a_seed_repeats_the_weights_and_layers_of_equal_shape_differ(name: str) -> None:
    options: dict[str, Any] = {"deep_linear": {"hidden": [9] * 4}, "toynet": {"channels": [9] * 3}}.get(name, {})

    def weights(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [p.detach() for p in build(name, facts(3, 32), **options).parameters() if p.dim() > 1]

    first, again = weights(1), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    pairs = [(a, b) for i, a in enumerate(first) for b in first[:i] if a.shape == b.shape]
    assert pairs or name == "cuda_convnet"  # its layers have shapes of their own
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_cuda_convnet_is_krizhevsky_s() -> None:
    net = build("cuda_convnet", facts(3, 32))
    convolutions = (3 * 32 + 32 * 32 + 32 * 64) * 25 + 32 + 32 + 64
    assert parameters(net) == convolutions + 64 * 4 * 4 * 10 + 10 == 89_578
    sides, x = [], torch.zeros(1, 3, 32, 32)
    for layer in net.children():
        x = layer(x)
        if isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d)):
            sides.append((type(layer), x.shape[-1]))
    assert sides == [(nn.MaxPool2d, 16), (nn.AvgPool2d, 8), (nn.AvgPool2d, 4)]


def test_the_last_pooling_window_counts_only_the_pixels_it_covers() -> None:
    """A constant image stays constant up to the edge, as it would not with padding."""
    pool = next(layer for layer in build("cuda_convnet", facts(3, 32)).children() if isinstance(layer, nn.AvgPool2d))
    assert torch.equal(pool(torch.ones(1, 1, 16, 16)), torch.ones(1, 1, 8, 8))


def test_cuda_convnet_refuses_images_that_it_leaves_nothing_of() -> None:
    sentence = (
        r"image_size must be at least 8 for cuda_convnet, which halves it three times, got 7: "
        r"choose another model or larger images"
    )
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        build("cuda_convnet", facts(3, 7))


def test_vgg11_has_the_usual_parameter_count() -> None:
    pairs = [(3, 64), (64, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 512), (512, 512)]
    weights, channels = sum(9 * a * b for a, b in pairs), sum(b for _, b in pairs)
    head = 512 * 10 + 10
    with torch.device("meta"):
        assert parameters(build("vgg11", facts(3, 32), batch_norm=False)) == weights + channels + head == 9_225_610
        # 9,231,114 where convolutions keep the bias that batch norm takes away
        assert parameters(build("vgg11", facts(3, 32))) == weights + 2 * channels + head == 9_231_114 - channels


@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_signal_survives_vgg11_at_the_start(batch_norm: bool) -> None:
    net = build("vgg11", facts(3, 32), batch_norm=batch_norm)
    with torch.no_grad():
        outputs = net(torch.randn(16, 3, 32, 32))
    assert 0.03 < outputs.std(0).mean() < 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("float64")
def test_deep_linear_is_affine(bias: bool) -> None:
    net = build("deep_linear", facts(2, 5), hidden=[9, 4, 8], bias=bias)
    for layer in net.children():
        if isinstance(layer, nn.Linear) and bias:
            nn.init.normal_(layer.bias)
    x, y = torch.randn(2, 3, 2, 5, 5)
    origin = net(torch.zeros(1, 2, 5, 5))
    torch.testing.assert_close(net(2 * x - 3 * y) - origin, 2 * (net(x) - origin) - 3 * (net(y) - origin))
    assert bool(origin.any()) is bias
    assert [type(layer) for layer in net.children()] == [nn.Flatten] + [nn.Linear] * 4
    assert parameters(net) == 50 * 9 + 9 * 4 + 4 * 8 + 8 * 10 + bias * (9 + 4 + 8 + 10)


def test_a_signal_survives_many_linear_layers() -> None:
    net = build("deep_linear", facts(1, 8), hidden=[64] * 40)
    assert 0.05 < net(torch.randn(100, 1, 8, 8)).std() < 20


def test_deep_linear_without_hidden_layers_is_logistic_regression() -> None:
    assert parameters(build("deep_linear", facts(1, 8), hidden=[])) == 64 * 10 + 10


def test_toynet_has_a_few_thousand_parameters() -> None:
    net = build("toynet", facts(3, 32))
    assert parameters(net) == (3 * 12 * 9 + 12) + (12 * 24 * 9 + 24) + (24 * 10 + 10) == 3_202
    kinds = [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
    assert [type(layer) for layer in net.children()] == kinds


@pytest.mark.parametrize(
    "name, options, sentence",
    [
        ("deep_linear", {"hidden": [3, 0]}, r"hidden must hold widths of at least 1, got \[3, 0\]"),
        ("toynet", {"channels": []}, r"channels must hold one or more numbers of at least 1, got \[\]"),
        ("toynet", {"channels": [4, -1]}, r"channels must hold one or more numbers of at least 1, got \[4, -1\]"),
    ],
)
def test_bad_options_end_in_a_sentence(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        build(name, facts(1, 8), **options)


def test_an_unknown_initialisation_ends_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"^init must be one of kaiming, xavier, sparse, default, got 'zero'$"):
        initialise(nn.Linear(2, 2), "zero")  # type: ignore[arg-type]
