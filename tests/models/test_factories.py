"""Model factories: shapes, published parameter counts, stems, and facts of the data set."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import models
from training.settings import schema

ROOT = Path(__file__).resolve().parents[2]
DIGITS = {"in_channels": 1, "num_classes": 10, "image_size": 8}
CIFAR = {"in_channels": 3, "num_classes": 100, "image_size": 32}
IMAGENET = {"in_channels": 3, "num_classes": 1000, "image_size": 224}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def forward(model: nn.Module, facts: dict[str, int]) -> torch.Tensor:
    inputs = torch.randn(2, facts["in_channels"], facts["image_size"], facts["image_size"])
    with torch.no_grad():
        return model.eval()(inputs)


# The counts torchvision publishes with its weights.
@pytest.mark.parametrize(
    "depth, count", [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)]
)
def test_resnets_on_imagenet_have_the_published_parameter_counts(depth: int, count: int) -> None:
    with torch.device("meta"):
        assert parameters(models.build_model(models.resnet, IMAGENET, depth=depth)) == count


def test_resnet18_on_cifar_has_the_usual_parameter_count() -> None:
    net = models.build_model(models.resnet, CIFAR | {"num_classes": 10}, depth=18)
    assert parameters(net) == 11_173_962  # the well-known CIFAR ResNet-18
    assert net.get_submodule("conv1").weight.std().item() == pytest.approx(
        (2 / (9 * 64)) ** 0.5, rel=0.1
    )  # He, fan out


@pytest.mark.parametrize("facts", [DIGITS, CIFAR, IMAGENET | {"image_size": 65}], ids=["digits", "cifar", "imagenet"])
@pytest.mark.parametrize("depth", [18, 50])
def test_resnets_map_images_to_one_logit_a_class(facts: dict[str, int], depth: int) -> None:
    assert forward(models.build_model(models.resnet, facts, depth=depth), facts).shape == (2, facts["num_classes"])


@pytest.mark.parametrize(
    "stem, image_size, small",
    [("auto", 64, True), ("auto", 65, False), ("cifar", 224, True), ("imagenet", 32, False)],
)
@pytest.mark.parametrize("in_channels", [1, 3, 4])
def test_the_stem_suits_the_image_size_and_the_channels(
    stem: str, image_size: int, small: bool, in_channels: int
) -> None:
    facts = {"in_channels": in_channels, "num_classes": 10, "image_size": image_size}
    net = models.build_model(models.resnet, facts, depth=18, stem=stem)
    conv = net.get_submodule("conv1")
    assert isinstance(conv, nn.Conv2d) and conv.in_channels == in_channels and conv.bias is None
    assert (conv.kernel_size, conv.stride) == (((3, 3), (1, 1)) if small else ((7, 7), (2, 2)))
    assert isinstance(net.get_submodule("maxpool"), nn.Identity if small else nn.MaxPool2d)


def test_zero_init_residual_makes_the_blocks_start_as_the_identity() -> None:
    for zero in (True, False):
        net = models.build_model(models.resnet, DIGITS, depth=18, zero_init_residual=zero)
        assert bool(net.get_submodule("layer1.0.bn2").weight.eq(0).all()) is zero


def test_mlp_has_the_layers_it_was_asked_for() -> None:
    net = models.build_model(models.mlp, DIGITS, hidden=[20, 15], activation="tanh", dropout=0.5, batch_norm=True)
    block = [nn.Linear, nn.BatchNorm1d, nn.Tanh, nn.Dropout]
    assert [type(layer) for layer in net.children()] == [nn.Flatten, *block, *block, nn.Linear]
    linears = [layer for layer in net.children() if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linears] == [(64, 20), (20, 15), (15, 10)]
    assert [layer.bias is None for layer in linears] == [True, True, False]
    plain = models.build_model(models.mlp, CIFAR, hidden=[7])
    assert [type(layer) for layer in plain.children()] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
    assert forward(plain, CIFAR).shape == (2, 100)


def test_mlp_without_hidden_layers_is_logistic_regression() -> None:
    assert parameters(models.build_model(models.mlp, DIGITS, hidden=[])) == 64 * 10 + 10


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"hidden": [8, 0]}, r"hidden must hold widths of at least 1, got \[8, 0\]"),
        ({"hidden": [8], "activation": "swish"}, "activation must be one of relu, tanh, sigmoid, gelu, got 'swish'"),
        ({"hidden": [8], "dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_options_of_the_mlp_end_in_a_sentence(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        models.build_model(models.mlp, DIGITS, **options)


def test_bad_options_of_the_resnet_end_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"^depth must be one of 18, 34, 50, 101 and 152, got 20$"):
        models.build_model(models.resnet, DIGITS, depth=20)
    with pytest.raises(ValueError, match=r"^stem must be auto, cifar or imagenet, got 'small'$"):
        models.build_model(models.resnet, DIGITS, depth=18, stem="small")


# ----------------------------------------------------------------------------------------------------- build_model


def test_facts_reach_the_parameters_that_name_them_and_options_win() -> None:
    def factory(width: int, *, num_classes: int, image_size: int = 5, other: int = 3) -> nn.Module:
        return nn.Linear(width + image_size + other, num_classes)

    net = models.build_model(factory, DIGITS, width=2)
    assert isinstance(net, nn.Linear) and (net.in_features, net.out_features) == (2 + 8 + 3, 10)
    net = models.build_model(factory, DIGITS, width=2, image_size=1)
    assert isinstance(net, nn.Linear) and net.in_features == 2 + 1 + 3


def test_a_fact_that_the_data_set_lacks_ends_in_a_sentence() -> None:
    def language_model(*, vocab_size: int) -> nn.Module:
        return nn.Embedding(vocab_size, 4)

    with pytest.raises(
        ValueError, match=r"^language_model needs vocab_size, which this data set does not have \(it has"
    ):
        models.build_model(language_model, DIGITS)


TEXT: dict[str, Any] = {"vocabulary": 20, "sequence": 6, "words": [str(word) for word in range(20)]}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml")))
def test_every_yaml_builds_its_model_and_leaves_no_option_out(name: str) -> None:
    path = ROOT / "configs" / "model" / f"{name}.yaml"
    node = schema.check(cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(path))), "model", "model")
    factory = schema.locate(node["_target_"], "model")
    facts = TEXT if name.startswith("gpt") else DIGITS
    assert set(node) - {"_target_"} == set(inspect.signature(factory).parameters) - set(facts)
    if "depth" in node and name.startswith("resnet"):
        assert f"resnet{node['depth']}" == name
    rebuilds = "autoencoder" in name
    given = {fact: value for fact, value in facts.items() if not (rebuilds and fact == "num_classes")}
    net = schema.build(node, "model", through=models.build_model, facts=given)
    if facts is TEXT:
        assert net(torch.zeros(2, 6, dtype=torch.int64)).shape == (2, 6, 20)
        return
    if isinstance(net, models.GAN):
        assert net(torch.zeros(2, net.latent)).shape == (2, 1)
        return
    assert forward(net, DIGITS).shape == (2, 8 * 8 if rebuilds else 10)


def test_a_classifier_says_that_it_needs_classes() -> None:
    for factory in (models.cuda_convnet, models.vgg11, models.deep_linear, models.toynet):
        options = {name: [4] for name in ("hidden", "channels") if name in inspect.signature(factory).parameters}
        with pytest.raises(ValueError, match=rf"^{factory.__name__} needs num_classes, which this data set does not"):
            models.build_model(factory, {"in_channels": 1, "image_size": 28}, **options)
