"""The two players' nets: sizes as published, any image size, critics that judge each image alone; feature nets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import data
from models import GAN, dcgan, resnet_gan
from models.features import FOLDER, SHAPES, features
from optimizers.curvature.layers import adapt


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_sizes() -> None:
    """The reference net for 64 × 64 images; its discriminator has batch norms and no biases, ours biases alone."""
    net = dcgan(in_channels=3, image_size=64)
    assert count(net.generator) == 3_576_704
    norms, biases = 2 * (128 + 256 + 512), 64 + 128 + 256 + 512
    assert count(net.critic) == 2_765_568 - norms + biases


def test_sizes_by_the_table_of_the_paper() -> None:
    """Layer by layer from appendix F: 3 × 3 convolutions of 128 channels, 1 × 1 shortcuts where the size changes."""

    def conv(before: int, after: int, side: int) -> int:
        return before * after * side**2 + after

    up = 2 * conv(128, 128, 3) + conv(128, 128, 1) + 2 * 2 * 128
    net = resnet_gan(in_channels=3, image_size=32)
    assert count(net.generator) == (128 + 1) * 4 * 4 * 128 + 3 * up + 2 * 128 + conv(128, 3, 3)
    first = conv(3, 128, 3) + conv(128, 128, 3) + conv(3, 128, 1)
    down = 2 * conv(128, 128, 3) + conv(128, 128, 1)
    assert count(net.critic) == first + down + 2 * 2 * conv(128, 128, 3) + 128 + 1


@pytest.mark.parametrize(
    ("factory", "size", "channels", "options"),
    [
        *((dcgan, size, 1, {}) for size in (5, 8, 25, 28, 32)),
        (dcgan, 28, 3, {"batch_norm": False, "layer_norm": True}),
        *((resnet_gan, size, 3, {}) for size in (8, 32)),
        (resnet_gan, 32, 1, {"batch_norm": False}),
    ],
)
def test_from_latents_to_images_to_scores(
    factory: Callable[..., GAN], size: int, channels: int, options: dict[str, Any]
) -> None:
    net = factory(latent=7, width=4, in_channels=channels, image_size=size, **options)
    latents = torch.randn(5, 7)
    images = net.generator(latents)
    assert images.shape == (5, channels, size, size) and images.abs().max() <= 1
    scores = net.critic(images)
    assert scores.shape == (5, 1)
    torch.testing.assert_close(net(latents), scores)
    alone = torch.cat([net.critic(image[None]) for image in images])
    torch.testing.assert_close(scores, alone, msg="a critic judges each image alone")
    assert scores.std() > 1e-3, "the signal reaches the score"
    for name, module in net.named_modules():
        if list(module.parameters(recurse=False)):
            assert adapt(name, module) is not None, f"{name} has no curvature"


def test_a_halved_shortcut_is_the_published_one() -> None:
    from models.generative.gan import Block

    block, x = Block(3, 4, scale=0.5), torch.randn(2, 3, 8, 8)
    last = block.conv2(block.between(block.conv1(block.enter(x))))
    expected = nn.functional.avg_pool2d(last + block.shortcut(x), 2)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(
    ("factory", "option", "says"),
    [
        (dcgan, {"latent": 0}, "latent must be at least 1, got 0"),
        (resnet_gan, {"width": 0}, "width must be at least 1, got 0"),
        (dcgan, {"crit_repeats": 0}, "crit_repeats must be at least 1, got 0"),
        (resnet_gan, {"penalty": -1.0}, "penalty must be at least 0, got -1.0"),
        (dcgan, {"image_size": 4}, "images of at least 5 pixels a side, got 4"),
        (resnet_gan, {"image_size": 28}, "divisible by 8, got 28: choose dcgan"),
    ],
)
def test_what_is_refused(factory: Callable[..., GAN], option: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        factory(**({"in_channels": 1, "image_size": 32} | option))


@pytest.mark.parametrize("name", list(SHAPES))
def test_features(name: str) -> None:
    assert (FOLDER / f"{name}.safetensors").stat().st_size < 150_000
    net = features(name)
    assert not net.training and count(net) < 40_000
    for channels, size in ((1, 8), (1, 28), (3, 32), (3, 64)):
        assert net(torch.rand(2, channels, size, size) * 2 - 1).shape == (2, net.num_features)
    with pytest.raises(ValueError, match="features must be one of mnist, cifar10, got 'svhn'"):
        features("svhn")


def test_features_know_what_they_see(shared_data: Callable[[str], Path]) -> None:
    mnist = data.mnist_generation(str(shared_data("mnist")), download=False)
    photos = data.image_folder_generation(str(shared_data("cifar10-subset")))
    for name, sets, least in (("mnist", mnist, 0.97), ("cifar10", photos, 0.5)):
        net, hits = features(name), []
        for images, labels in sets.test.epoch(0):
            hits.append(net.classify(images).argmax(1) == labels)
        assert torch.cat(hits).double().mean() > least, name
