"""Four nets that a study of Fisher approximations begins with, trained a little, each on data that is at hand.

One hidden layer and a small convolutional net on scikit-learn's digits, the thin ResNet-20 on the same images, and the
auto-encoder 784-400-200-100-50-25-6-... on generated CURVES, which the study of Koroko et al. (2022) looks at.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.readers import read_digits
from data.sources.synthetic import draw_curves
from models import autoencoder, cifar_resnet, mlp
from optimizers import Bernoulli, Categorical, Likelihood
from optimizers.natural_gradient import Fisher

CURVES = 2000  # images
#: Of ResNet-20: both ends, and the first block of each stage.
BLOCKS = ("conv1", *(f"layer{stage}.0.conv{k}" for stage in (1, 2, 3) for k in (1, 2)), "fc")
#: Of the auto-encoder: all but the first and the last one, whose 314,000 weights each take as long as all the others.
INNER = (*(f"encoder.{k}" for k in (3, 5, 7, 9, 11)), *(f"decoder.{k}" for k in (0, 2, 4, 6, 8)))


@dataclass(frozen=True)
class Net:
    """A net with its data.

    Attributes:
        name: on the command line.
        title: in figures.
        build: the model.
        data: inputs and targets of all examples.
        likelihood: of its outputs.
        fisher: what is feasible: the exact Fisher matrix takes a pass an output.
        examples: of the batch that is looked at.
        layers: those that are looked at; None: all.
        steps: of the training, at which it is looked at.
        damping: lambda.
        updates: of FishLeg's inverse.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    likelihood: Likelihood
    fisher: Fisher
    examples: int
    layers: Sequence[str] | None = None
    steps: Sequence[int] = (10, 100, 400)
    damping: float = 1e-2
    updates: int = 200


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's handwritten digits, ``[1797, 1, 8, 8]`` of mean 0 and deviation 1, and their classes."""
    images, targets = read_digits().train
    images = images.float()
    return (images - images.mean()) / images.std(), targets.long()


def curves() -> tuple[Tensor, Tensor]:
    """Generated CURVES, and their pixels in a row."""
    images = draw_curves(CURVES).float() / 255
    return images, images.flatten(1)


def convnet() -> nn.Module:
    """Two convolutions and one Linear, for digits."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


NETS = {
    net.name: net
    for net in (
        Net(
            "mlp", "one hidden layer, digits", lambda: mlp([32], in_channels=1, image_size=8, num_classes=10), digits,
            Categorical(), "exact", 128,
        ),
        Net(
            "autoencoder", "auto-encoder 784-400-200-100-50-25-6-... of CURVES, inner layers",
            lambda: autoencoder([400, 200, 100, 50, 25, 6], in_channels=1, image_size=28), curves,
            Bernoulli(), "sampled", 128, INNER, (10, 400), damping=1e-1, updates=100,
        ),
        Net("convnet", "two convolutions, digits", convnet, digits, Categorical(), "exact", 64),
        Net(
            "resnet20", "ResNet-20, first block of each stage, digits",
            lambda: cifar_resnet(20, in_channels=1, num_classes=10), digits,
            Categorical(), "exact", 32, BLOCKS, (10, 400),
        ),
    )
}  # fmt: skip


def trained(net: Net, steps: Sequence[int], seed: int, batch_size: int = 64) -> Iterator[tuple[int, nn.Module]]:
    """The net as Adam (rate 1e-3) trains it, at some steps. Its batch norms are as training leaves them.

    Args:
        net: which.
        steps: at which.
        seed: of starting values and of the batches.
        batch_size: of training.

    Yields:
        A step, and a copy of the model there, in the order of the steps.
    """
    inputs, targets = net.data()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = net.build()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    last = max(steps)
    for step in range(last + 1):
        if step in steps:
            yield step, copy.deepcopy(model)
        if step == last:
            return
        rows = torch.randint(len(inputs), (batch_size,), generator=generator)
        optimizer.zero_grad()
        net.likelihood.nll(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()


def batch(net: Net, examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Examples to look at.

    Args:
        net: whose.
        examples: how many.
        seed: which.

    Raises:
        ValueError: there are not so many.
    """
    inputs, targets = net.data()
    if not 1 <= examples <= len(inputs):
        raise ValueError(f"examples must be from 1 to {len(inputs)} for {net.name}, got {examples}")
    rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:examples]
    return inputs[rows], targets[rows]
