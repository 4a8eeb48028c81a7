"""Auto-encoders: published widths, sizes that come back, linear codes, starting values, and a start that learns."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

import models
from models.parts.initialisation import initialise

ROOT = Path(__file__).resolve().parents[2]
MNIST = {"in_channels": 1, "image_size": 28}
FACES = {"in_channels": 1, "image_size": 25}
CIFAR = {"in_channels": 3, "image_size": 32}
SMALL = {"in_channels": 2, "image_size": 5}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def from_file(name: str, facts: dict[str, int], **changes: Any) -> nn.Module:
    node = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "model" / f"{name}.yaml"))
    assert isinstance(node, dict)
    factory = getattr(models, node.pop("_target_").removeprefix("models."))
    return models.build_model(factory, facts, **(node | changes))


def linears(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


# Hinton & Salakhutdinov (2006), supporting material; the code in the middle.
@pytest.mark.parametrize(
    "name, facts, widths",
    [
        ("curves", MNIST, [784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784]),
        ("mnist", MNIST, [784, 1000, 500, 250, 30, 250, 500, 1000, 784]),
        ("faces", FACES, [625, 2000, 1000, 500, 30, 500, 1000, 2000, 625]),
        ("cifar10", CIFAR, [3072, 2000, 1000, 500, 30, 500, 1000, 2000, 3072]),
    ],
)
def test_auto_encoders_have_the_published_widths(name: str, facts: dict[str, int], widths: list[int]) -> None:
    with torch.device("meta"):
        net = from_file(f"autoencoder_{name}", facts)
    assert [layer.in_features for layer in linears(net)] == widths[:-1]
    assert [layer.out_features for layer in linears(net)] == widths[1:]
    weights = sum(a * b for a, b in pairwise(widths))
    assert parameters(net) == weights + sum(widths[1:])


def test_the_curves_auto_encoder_has_the_parameters_counted_by_hand() -> None:
    # Weights: 2 (313600 + 80000 + 20000 + 5000 + 1250 + 150) = 840000; biases: 775 + 6 + 775 + 784.
    assert parameters(from_file("autoencoder_curves", MNIST)) == 840_000 + (400 + 200 + 100 + 50 + 25) * 2 + 6 + 784


@pytest.mark.parametrize("activation, kind", [("relu", nn.ReLU), ("tanh", nn.Tanh), ("sigmoid", nn.Sigmoid)])
@pytest.mark.parametrize("linear_code", [True, False])
def test_an_activation_follows_every_layer_but_the_code_and_the_last(
    activation: str, kind: type[nn.Module], linear_code: bool
) -> None:
    net = models.build_model(models.autoencoder, SMALL, hidden=[7, 3], activation=activation, linear_code=linear_code)
    code = [nn.Linear] if linear_code else [nn.Linear, kind]
    assert [type(layer) for layer in net.get_submodule("encoder").children()] == [nn.Flatten, nn.Linear, kind, *code]
    assert [type(layer) for layer in net.get_submodule("decoder").children()] == [nn.Linear, kind, nn.Linear]


def test_outputs_are_logits_in_the_order_of_the_flattened_image() -> None:
    net = models.build_model(models.autoencoder, SMALL, hidden=[50], linear_code=True, init="default")
    encode, decode = linears(net)
    with torch.no_grad():  # both layers the identity: the image must come back, negative values included
        for layer in (encode, decode):
            layer.weight.copy_(torch.eye(50))
            layer.bias.zero_()
        images = torch.randn(3, 2, 5, 5)
        assert torch.equal(net(images), images.flatten(1))


@pytest.mark.parametrize("facts", [MNIST, FACES, CIFAR, {"in_channels": 1, "image_size": 8}, SMALL], ids=str)
@pytest.mark.parametrize("name", ["autoencoder_curves", "conv_autoencoder"])
def test_every_image_size_comes_back(name: str, facts: dict[str, int]) -> None:
    images = torch.rand(2, facts["in_channels"], facts["image_size"], facts["image_size"])
    with torch.no_grad():
        assert from_file(name, facts)(images).shape == images.flatten(1).shape


@pytest.mark.parametrize("kernel_size, padding", [(2, 0), (3, 0), (3, 1), (4, 1), (5, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [14, 25, 28, 31, 32])
def test_transposed_convolutions_give_back_the_sizes(size: int, stride: int, kernel_size: int, padding: int) -> None:
    facts = {"in_channels": 1, "image_size": size}
    options = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "channels": [2, 3]}
    net = models.build_model(models.conv_autoencoder, facts, **options)
    image = torch.rand(1, 1, size, size)
    first, second = (layer for layer in net.get_submodule("encoder") if isinstance(layer, nn.Conv2d))
    with torch.no_grad():
        assert net(image).shape == (1, size**2)
        middle, code = first(image), net.get_submodule("encoder")(image)
        assert code.shape[1] == 3 and code.shape[-1] == second(middle).shape[-1]
        back = next(iter(net.get_submodule("decoder")))(code)
    assert back.shape == middle.shape, "the decoder passes through the sizes of the encoder"


def test_the_convolutional_auto_encoder_has_the_layers_it_was_asked_for() -> None:
    plain = models.build_model(models.conv_autoencoder, MNIST, channels=[4, 6])
    kinds = [[type(layer) for layer in plain.get_submodule(half).children()] for half in ("encoder", "decoder")]
    up = nn.ConvTranspose2d
    assert kinds == [[nn.Conv2d, nn.ReLU, nn.Conv2d], [up, nn.ReLU, up, nn.Flatten]]
    # As published for CIFAR-10: 6 and 16 channels, unpadded 5 × 5, batch norm everywhere but at the end.
    published = {"channels": [6, 16], "kernel_size": 5, "stride": 1, "padding": 0}
    net = models.build_model(models.conv_autoencoder, CIFAR, **published, batch_norm=True, linear_code=False)
    down, norm = [nn.Conv2d, nn.ReLU, nn.BatchNorm2d], [up, nn.ReLU, nn.BatchNorm2d]
    kinds = [[type(layer) for layer in net.get_submodule(half).children()] for half in ("encoder", "decoder")]
    assert kinds == [[*down, *down], [*norm, up, nn.Flatten]]
    assert net.get_submodule("encoder")(torch.rand(2, 3, 32, 32)).shape == (2, 16, 24, 24)
    convolutions = (3 * 6 * 25 + 6) + (6 * 16 * 25 + 16) + (16 * 6 * 25 + 6) + (6 * 3 * 25 + 3)
    assert parameters(net) == convolutions + 2 * (6 + 16 + 6)


@pytest.mark.parametrize(
    "factory, options, sentence",
    [
        ("autoencoder", {"hidden": []},
         r"hidden must hold one or more widths of at least 1, the last the code's, got \[\]"),
        ("autoencoder", {"hidden": [4, 0]}, r"hidden must hold .* got \[4, 0\]"),
        ("autoencoder", {"hidden": [4], "activation": "gelu"},
         "activation must be one of relu, tanh, sigmoid, got 'gelu'"),
        ("autoencoder", {"hidden": [4], "init": "he"},
         "init must be one of kaiming, xavier, sparse, default, got 'he'"),
        ("conv_autoencoder", {"channels": []}, r"channels must hold one or more numbers of at least 1, got \[\]"),
        ("conv_autoencoder", {"channels": [4, 0]}, r"channels must hold .* got \[4, 0\]"),
        ("conv_autoencoder", {"channels": [4], "kernel_size": 0}, "kernel_size must be at least 1, got 0"),
        ("conv_autoencoder", {"channels": [4], "stride": 0}, "stride must be at least 1, got 0"),
        ("conv_autoencoder", {"channels": [4], "padding": 2},
         r"padding must be between 0 and half of kernel_size \(1\), got 2"),
        ("conv_autoencoder", {"channels": [4, 4], "padding": 0, "stride": 3},
         "kernel_size must be at most 1, the padded side of what reaches layer 2, got 3: choose a smaller kernel, "
         "more padding or fewer channels"),
    ],
)  # fmt: skip
def test_bad_options_end_in_a_sentence(factory: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        models.build_model(getattr(models, factory), SMALL, **options)


# ---------------------------------------------------------------------------------------------------- starting values


@pytest.mark.parametrize("init", ["kaiming", "xavier", "sparse", "default"])
def test_a_seed_repeats_the_weights_and_layers_of_equal_shape_differ(init: str) -> None:
    def weights(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        net = models.build_model(models.autoencoder, SMALL, hidden=[20, 20, 20], init=init)
        return [layer.weight for layer in linears(net)]

    first, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    square = first[1:5]
    assert [tuple(w.shape) for w in square] == [(20, 20)] * 4
    assert not any(torch.equal(a, b) for i, a in enumerate(square) for b in square[:i])


def test_kaiming_keeps_the_size_of_the_activations() -> None:
    net = models.build_model(models.autoencoder, MNIST, hidden=[600] * 6, init="kaiming", linear_code=False)
    with torch.no_grad():
        x = torch.randn(500, 1, 28, 28)
        for layer in (*net.get_submodule("encoder"), *net.get_submodule("decoder")):
            x = layer(x)
            if isinstance(layer, nn.Linear) and layer is not linears(net)[-1]:
                assert x.square().mean().item() == pytest.approx(2, rel=0.5)  # the ReLU halves it
    assert x.square().mean().item() == pytest.approx(1, rel=0.5)


@pytest.mark.parametrize("stride", [1, 2])
def test_kaiming_keeps_the_size_of_activations_through_transposed_convolutions(stride: int) -> None:
    layer = nn.ConvTranspose2d(64, 32, 4, stride)
    initialise(layer, "kaiming", "relu")
    with torch.no_grad():
        out = layer(torch.randn(4, 64, 24, 24))[..., 4:-4, 4:-4]
    assert out.square().mean().item() == pytest.approx(2, rel=0.15)


def test_xavier_and_biases() -> None:
    net = models.build_model(models.autoencoder, MNIST, hidden=[100, 50], init="xavier")
    for layer in linears(net):
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


def test_sparse_gives_every_unit_fifteen_incoming_weights_or_all_it_has() -> None:
    net = models.build_model(models.autoencoder, MNIST, hidden=[400, 6], activation="tanh", init="sparse")
    for layer in linears(net):
        assert (layer.weight != 0).sum(1).eq(min(15, layer.in_features)).all()
        assert not layer.bias.any()
    drawn = linears(net)[0].weight[linears(net)[0].weight != 0]
    assert drawn.std().item() == pytest.approx(1, rel=0.05) and abs(drawn.mean().item()) < 0.05
    used = (linears(net)[0].weight != 0).any(0).float().mean()
    assert used > 0.99, "each unit chooses its own inputs"


def test_default_is_torch_s_own() -> None:
    torch.manual_seed(0)
    net = models.build_model(models.autoencoder, SMALL, hidden=[10], init="default")
    torch.manual_seed(0)
    for layer, theirs in zip(linears(net), (nn.Linear(50, 10), nn.Linear(10, 50)), strict=True):
        assert torch.equal(layer.weight, theirs.weight) and torch.equal(layer.bias, theirs.bias)


def curves(count: int) -> Tensor:
    """Soft quadratic curves through three random points, 28 × 28."""
    points = torch.rand(count, 1, 3, 2) * 20 + 4
    t = torch.linspace(0, 1, 30).view(1, -1, 1)
    path = (1 - t) ** 2 * points[:, :, 0] + 2 * t * (1 - t) * points[:, :, 1] + t**2 * points[:, :, 2]
    row, column = torch.arange(28.0).view(1, 1, -1, 1), torch.arange(28.0).view(1, 1, 1, -1)
    distance = (path[:, :, :1, None] - row).square() + (path[:, :, 1:, None] - column).square()
    return torch.exp(-distance.amin(1)).unsqueeze(1)


def test_the_default_start_leaves_the_plateau_where_every_image_gets_the_same_answer() -> None:
    images = curves(1000)
    targets = images.flatten(1)
    constant = F.binary_cross_entropy(targets.mean(0).expand_as(targets), targets)  # the best answer without looking

    def loss_after_training(init: str) -> float:
        torch.manual_seed(0)
        net = from_file("autoencoder_curves", MNIST, init=init)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for _ in range(10):
            for batch in torch.randperm(1000).split(50):
                optimizer.zero_grad()
                loss = F.binary_cross_entropy_with_logits(net(images[batch]), targets[batch], reduction="sum") / 50
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            return (F.binary_cross_entropy_with_logits(net(images), targets) / constant).item()

    assert loss_after_training("kaiming") < 0.9
    # Small starting weights, as torch's own, take longer: a limit of theirs, which the option is there for.
    assert loss_after_training("default") > 0.95
