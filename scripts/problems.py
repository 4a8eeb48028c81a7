"""Twelve small problems that default values are chosen on, or checked on: what each is, and the few pieces it needs.

A problem is a command line of train.py, with `--config-dir scripts/configs` for what that has not. All of them take
seconds with a first-order method on one core, which is why images are small, nets are slim and texts are short.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from data import DataModule, InMemoryLoader, image_folder
from models import plain_layers
from models.parts.stems import set_first
from models.wrapped import create_timm

CONFIGS = Path(__file__).resolve().parent / "configs"
#: A loss must be below this share of the best constant output's, or nothing was learned.
LEARNED = 0.95
#: Loss a character of the text's, by the frequencies of the characters alone.
UNIGRAM = 3.16


@dataclass(frozen=True)
class Problem:
    """One model on one data set for some steps.

    Attributes:
        name: what the command line calls it.
        title: what the table calls it.
        overrides: of the default configuration: data set and model.
        steps: of the optimizer.
        tuning: whether default values may be chosen by it; otherwise it is held out.
        folder: of its data, in that of all data sets; None: nothing has to be there.
        metric: of the test set, what is compared.
        least: for an accuracy: below it, nothing was learned.
        constant: for a loss: that of the best output that is the same for every example, where the data set does not
            know it.
        rates: whether each optimizer is tried at several learning rates, too: six problems whose runs take seconds.
    """

    name: str
    title: str
    overrides: tuple[str, ...]
    steps: int
    tuning: bool
    folder: str | None = None
    metric: Literal["accuracy", "loss"] = "accuracy"
    least: float = 0.0
    constant: float | None = None
    rates: bool = False

    def learned(self, value: float, plateau: float | None = None) -> bool:
        """Whether a value of the metric shows that something was learned.

        Args:
            value: of the test set.
            plateau: the constant output's loss as the data set knows it.
        """
        if self.metric == "accuracy":
            return value >= self.least
        constant = self.constant if self.constant is not None else plateau
        return constant is None or value < LEARNED * constant


#: Why six are to choose by, and six are not.
SPLIT = (
    "Every kind is on both sides: fully connected classifiers, auto-encoders, convolutions with batch norm, attention, "
    "and one problem that is badly conditioned by design (the regression to choose by, the deep narrow net held out). "
    "So values are chosen with each kind in view, and checked on other nets and other data of the same kind."
)

#: Six to choose default values by, then six that no choice may look at. ``SPLIT`` says why it is these.
PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            "digits_mlp", "digits, MLP",
            ("dataset=digits", "dataset.augment=none", "model=mlp", "model.hidden=[128,64]"),
            steps=300, tuning=True, least=0.8, rates=True,
        ),
        Problem(
            "curves", "a third of CURVES, auto-encoder",
            ("dataset=curves", "dataset.limit_train=0.3", "dataset.batch_size=128", "model=autoencoder_curves"),
            steps=300, tuning=True, metric="loss", rates=True,
        ),
        Problem(
            "mnist_conv_autoencoder", "a tenth of MNIST, convolutional auto-encoder",
            (
                "dataset=mnist_autoencoder", "dataset.download=false", "dataset.limit_train=0.1",
                "dataset.limit_val=0.1", "dataset.batch_size=64", "model=conv_autoencoder",
            ),
            steps=200, tuning=True, folder="mnist", metric="loss", rates=True,
        ),
        Problem(
            "cifar10_resnet20", "CIFAR-10 subset at 16 × 16, ResNet-20",
            (
                "dataset=small_photos", "dataset.root=${paths.data}/cifar10-subset", "dataset.batch_size=32",
                "model=resnet20",
            ),
            steps=200, tuning=True, folder="cifar10-subset", least=0.2,
        ),
        Problem(
            "wikitext2_gpt_mini", "WikiText-2's slice by characters, GPT mini of half the width",
            (
                "dataset=text_file", "dataset.path=${paths.data}/wikitext-2/valid.txt", "dataset.level=character",
                "dataset.max_vocabulary=64", "dataset.sequence=32", "dataset.batch_size=8", "dataset.limit_val=0.2",
                "dataset.test_fraction=0.05", "model=gpt1_mini", "model.width=128", "model.dropout=0",
                # It normalises after each sum: without a warm-up AdamW, too, stays with the characters' frequencies.
                "scheduler.warmup=0.2",
            ),
            steps=300, tuning=True, folder="wikitext-2", metric="loss", constant=UNIGRAM,
        ),
        Problem(
            "ill_conditioned", "ill-conditioned linear regression",
            ("dataset=ill_conditioned", "model=deep_linear", "model.hidden=[]"),
            steps=1000, tuning=True, metric="loss", rates=True,
        ),
        Problem(
            "mnist_mlp", "a tenth of MNIST, MLP",
            (
                "dataset=mnist", "dataset.download=false", "dataset.augment=none", "dataset.limit_train=0.1",
                "dataset.limit_val=0.1", "model=mlp",
            ),
            steps=300, tuning=False, folder="mnist", least=0.8, rates=True,
        ),
        Problem(
            "deep_relu", "digits, deep narrow ReLU net",
            ("dataset=digits", "dataset.augment=none", "model=mlp", "model.hidden=[32,32,32,32,32,32]"),
            steps=500, tuning=False, least=0.5, rates=True,
        ),
        Problem(
            "mnist_autoencoder", "a tenth of MNIST, auto-encoder",
            (
                "dataset=mnist_autoencoder", "dataset.download=false", "dataset.limit_train=0.1",
                "dataset.limit_val=0.1", "dataset.batch_size=128", "model=autoencoder_mnist",
            ),
            steps=100, tuning=False, folder="mnist", metric="loss",
        ),
        Problem(
            "digits_resnet18", "digits, slim ResNet-18",
            ("dataset=digits", "model=slim_resnet18"),
            steps=150, tuning=False, least=0.8,
        ),
        Problem(
            "tiny_imagenet_mobilenetv3", "Tiny-ImageNet's slice, MobileNetV3 small of half the width",
            (
                "dataset=tiny_imagenet", "dataset.download=false", "dataset.batch_size=32", "model=timm",
                # torchvision's averages of batch norm need more steps than these to forget where they started.
                "model.name=mobilenetv3_small_050",
            ),
            steps=200, tuning=False, folder="tiny-imagenet-200", least=0.15,
        ),
        Problem(
            "cifar10_vit_tiny", "CIFAR-10 subset at 16 × 16, slim ViT-tiny",
            (
                "dataset=small_photos", "dataset.root=${paths.data}/cifar10-subset", "dataset.batch_size=32",
                "model=slim_vit",
            ),
            steps=200, tuning=False, folder="cifar10-subset", least=0.2,
        ),
    )
}  # fmt: skip


# -- what the framework has not ------------------------------------------------------------------------------------


class _Rows:
    """Rows of two tensors in batches; a `data.BatchLoader`.

    Args:
        inputs: ``[n, ...]``.
        targets: ``[n, ...]``.
        batch_size: of all ranks together.
        training: shuffle every epoch and drop the last partial batch.
        seed: of the order.
        rank: this process.
        world_size: how many processes share each batch.
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, batch_size: int, training: bool, seed: int, rank: int, world_size: int
    ) -> None:
        self.inputs, self.targets, self.batch_size, self.training = inputs, targets, batch_size, training
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.num_examples = len(inputs) // batch_size * batch_size if training else len(inputs)

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `data.BatchLoader`."""
        rows = torch.arange(len(self.inputs))
        if self.training:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            rows = torch.randperm(len(rows), generator=generator)
        for batch in rows[: self.num_examples].split(self.batch_size)[start:]:
            share = batch.tensor_split(self.world_size)[self.rank].to(self.inputs.device)
            yield self.inputs[share], self.targets[share]


def ill_conditioned(
    condition: float = 1e4,
    noise: float = 0.1,
    examples: int = 4000,
    batch_size: int = 64,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> DataModule:
    """Ten outputs that are linear in 64 inputs whose covariance has eigenvalues from 1 down to 1 / ``condition``.

    The eigenvalues are in geometric progression, the eigenvectors at random angles to the axes, so that no diagonal
    scaling helps. Along each of them lies the same share of a target's variance, which is 1 besides the noise: what is
    left of the loss is about the share of the directions that were not learned. The problem is the same for all seeds.

    Args:
        condition: largest eigenvalue as a multiple of the smallest.
        noise: standard deviation of what is added to the targets.
        examples: to train on; to validate and to test, half as many each.
        batch_size: of all ranks together.
        seed: of the order.
        device: of the batches.
        rank: this process.
        world_size: how many processes there are.

    Raises:
        ValueError: for a value out of its range.
    """
    if condition < 1:
        raise ValueError(f"condition must be at least 1, got {condition}")
    if noise < 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    if not world_size <= batch_size <= examples:
        raise ValueError(f"batch_size must be from {world_size} to the {examples} examples, got {batch_size}")
    side, outputs = 8, 10
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scales = torch.logspace(0, -1, side**2, base=condition, dtype=torch.float64).sqrt()
    angles, _ = torch.linalg.qr(draw(side**2, side**2))
    signs = draw(side**2, outputs).sign()
    places = torch.device(device)
    splits = []
    for count in (examples, examples // 2, examples // 2):
        along = draw(count, side**2)
        targets = along @ signs / side + noise * draw(count, outputs)
        inputs = (along * scales @ angles.T).view(count, 1, side, side)
        splits.append((inputs.float().to(places), targets.float().to(places)))
    train, val, test = (_Rows(*tensors, batch_size, k == 0, seed, rank, world_size) for k, tensors in enumerate(splits))
    facts = {"in_channels": 1, "image_size": side, "num_classes": outputs, "likelihood": "gaussian"}
    plateau = float(splits[0][1].var(0, correction=0).mean())
    return DataModule("ill_conditioned", "reconstruction", facts, train, val, test, [], plateau)


def small_photos(
    root: str,
    image_size: int = 16,
    batch_size: int = 64,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> DataModule:
    """A folder of images (`data.image_folder`), made small and read once for all the runs of a process.

    Args:
        root: the folder.
        image_size: shorter side resized to this, and the centre square cut.
        batch_size: of all ranks together.
        seed: of order and augmentation.
        device: of the batches.
        rank: this process.
        world_size: how many processes there are.

    Raises:
        DataError: the folder is absent or holds no images.
    """
    read = _photos(root, image_size, batch_size, str(device), rank, world_size)
    assert isinstance(read.train, InMemoryLoader)
    train = copy.copy(read.train)
    train.seed = seed
    return replace(read, train=train)


@cache
def _photos(root: str, image_size: int, batch_size: int, device: str, rank: int, world_size: int) -> DataModule:
    return image_folder(
        root, image_size=image_size, batch_size=batch_size, device=device, rank=rank, world_size=world_size
    )


def slim_resnet18(width: int = 16, *, in_channels: int, num_classes: int) -> nn.Module:
    """ResNet-18 (He et al., 2016) with fewer channels, but for the 64 of its stem, which is the one for small images.

    Args:
        width: channels of the first stage; the others have two, four and eight times as many.
        in_channels: of the images.
        num_classes: outputs.

    Returns:
        A module from ``[b, in_channels, height, width]`` (of any size) to logits ``[b, num_classes]``.

    Raises:
        ValueError: for a width below 1.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    net = create_timm("resnet18", in_channels, num_classes, channels=tuple(width * 2**stage for stage in range(4)))
    set_first(net, "conv1", in_channels, kernel_size=3, stride=1, padding=1)
    net.maxpool = nn.Identity()
    return plain_layers(net)


def slim_vit(
    width: int = 96,
    layers: int = 6,
    heads: int = 3,
    patch_size: int = 4,
    *,
    in_channels: int,
    num_classes: int,
    image_size: int,
) -> nn.Module:
    """ViT-Tiny (Dosovitskiy et al., 2021) narrower and less deep.

    Args:
        width: of a token.
        layers: blocks.
        heads: of each attention.
        patch_size: side of a patch.
        in_channels: of the images.
        num_classes: outputs.
        image_size: side of the images.

    Returns:
        A module from ``[b, in_channels, image_size, image_size]`` to logits ``[b, num_classes]``.

    Raises:
        ValueError: for a size that does not divide another.
    """
    if width % heads:
        raise ValueError(f"width must be divisible by the {heads} heads, got {width}")
    if image_size % patch_size:
        raise ValueError(f"patch_size must divide the images' side of {image_size}, got {patch_size}")
    net = create_timm(
        "vit_tiny_patch16_224", in_channels, num_classes, img_size=image_size, patch_size=patch_size, embed_dim=width,
        depth=layers, num_heads=heads,
    )  # fmt: skip
    return plain_layers(net)
