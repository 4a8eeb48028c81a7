"""What the problems need and the framework has not: data sets and slim nets."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from data import DataModule, InMemoryLoader, image_folder
from models import plain_layers
from models.parts.stems import set_first
from models.wrapped import create_timm


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
