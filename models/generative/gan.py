"""Two nets that play against each other: a generator makes images, a critic tells them from real ones."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.parts.initialisation import initialise

SLOPE = 0.2  # of the critic's leaky ReLU below zero (Radford et al., 2016)
BASE = 4  # side that a deep convolutional generator begins with, at most


class GAN(nn.Module):
    """A generator and a critic, with the rules of their game (Gulrajani et al., 2017).

    Args:
        generator: from latents ``[b, latent]`` to images in [-1, 1], ``[b, in_channels, image_size, image_size]``.
        critic: from images to scores ``[b, 1]``. Its norms must not mix examples, or the penalty loses its meaning.
        latent: length of a latent vector; its entries are standard normal.
        crit_repeats: the critic's steps a step of the generator.
        penalty: lambda, weight of the critic's gradient penalty; 0: none.

    Raises:
        ValueError: for a number out of its range.
    """

    def __init__(
        self, generator: nn.Module, critic: nn.Module, *, latent: int, crit_repeats: int, penalty: float
    ) -> None:
        super().__init__()
        if crit_repeats < 1:
            raise ValueError(f"crit_repeats must be at least 1, got {crit_repeats}")
        if penalty < 0:
            raise ValueError(f"penalty must be at least 0, got {penalty}")
        self.generator, self.critic = generator, critic
        self.latent, self.crit_repeats, self.penalty = latent, crit_repeats, penalty

    def forward(self, latents: Tensor) -> Tensor:
        """The critic's scores of what the generator makes of latents: what the generator is trained on."""
        return self.critic(self.generator(latents))


def dcgan(
    latent: int = 100,
    width: int = 64,
    batch_norm: bool = True,
    layer_norm: bool = False,
    crit_repeats: int = 5,
    penalty: float = 10.0,
    *,
    in_channels: int,
    image_size: int,
) -> GAN:
    """Deep convolutional players (Radford et al., 2016, arXiv 1511.06434), as critics need them for a gradient penalty.

    From 4 × 4 or less, transposed convolutions with stride 2 double the side until the image is there; the critic is
    the mirror. Kernels are 4 × 4, or 3 × 3 where an odd side is doubled. The published discriminator has batch norms,
    which mix examples; the critic has none, or layer norms in their place (Gulrajani et al., 2017, section 4).

    Args:
        latent: length of a latent vector.
        width: channels of the layer next to the image; those further in have twice, four times, ... as many.
        batch_norm: normalise the generator's hidden layers.
        layer_norm: normalise the critic's hidden layers but the first, each example by itself.
        crit_repeats: the critic's steps a step of the generator.
        penalty: weight of the critic's gradient penalty.
        in_channels: of the images.
        image_size: side of the images.

    Raises:
        ValueError: for a number out of its range.
    """
    _check(latent, width)
    sides = [image_size]  # the image's first
    while sides[-1] > BASE:
        sides.append((sides[-1] + 1) // 2)
    if len(sides) < 2:
        raise ValueError(f"dcgan needs images of at least {BASE + 1} pixels a side, got {image_size}: choose another")
    depths = [in_channels, *(width * 2**level for level in range(len(sides) - 1))]

    made: list[nn.Module] = [
        nn.Unflatten(1, (latent, 1, 1)),
        nn.ConvTranspose2d(latent, depths[-1], sides[-1], bias=not batch_norm),
        *_hidden(depths[-1], batch_norm),
    ]
    judged: list[nn.Module] = []
    for level in range(len(sides) - 1, 0, -1):
        kernel = 3 if sides[level - 1] % 2 else 4
        last = level == 1
        made.append(nn.ConvTranspose2d(depths[level], depths[level - 1], kernel, 2, 1, bias=not (batch_norm or last)))
        made += [nn.Tanh()] if last else _hidden(depths[level - 1], batch_norm)
        norm: list[nn.Module] = [nn.GroupNorm(1, depths[level])] if layer_norm and not last else []
        judged = [nn.Conv2d(depths[level - 1], depths[level], kernel, 2, 1), *norm, nn.LeakyReLU(SLOPE), *judged]
    judged += [nn.Conv2d(depths[-1], 1, sides[-1], bias=False), nn.Flatten()]

    generator, critic = nn.Sequential(*made), nn.Sequential(*judged)
    for layer in generator:
        if isinstance(layer, nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, std=0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, mean=1.0, std=0.02)
    for layer in critic:
        if isinstance(layer, nn.Conv2d):  # without batch norms, weights of 0.02 would let every signal die away
            initialise(layer, "kaiming", "linear" if layer is critic[-2] else "leaky_relu")
    return GAN(generator, critic, latent=latent, crit_repeats=crit_repeats, penalty=penalty)


def _hidden(channels: int, batch_norm: bool) -> list[nn.Module]:
    """What follows a hidden layer of the generator."""
    return [nn.BatchNorm2d(channels), nn.ReLU()] if batch_norm else [nn.ReLU()]


def resnet_gan(
    latent: int = 128,
    width: int = 128,
    batch_norm: bool = True,
    crit_repeats: int = 5,
    penalty: float = 10.0,
    *,
    in_channels: int,
    image_size: int,
) -> GAN:
    """Residual players for small images (Gulrajani et al., 2017, arXiv 1704.00028, appendix F).

    The generator doubles an eighth of the image's side three times; the critic halves it twice, adds two blocks at
    that size and averages over what is left. The published nets have 128 channels throughout, and the critic no norms.

    Args:
        latent: length of a latent vector.
        width: channels of every block.
        batch_norm: normalise in the generator's blocks.
        crit_repeats: the critic's steps a step of the generator.
        penalty: weight of the critic's gradient penalty.
        in_channels: of the images.
        image_size: side of the images, divisible by 8.

    Raises:
        ValueError: for a number out of its range.
    """
    _check(latent, width)
    if image_size % 8:
        raise ValueError(f"resnet_gan needs images of a side that is divisible by 8, got {image_size}: choose dcgan")
    base = image_size // 8
    generator = nn.Sequential(
        nn.Linear(latent, width * base**2),
        nn.Unflatten(1, (width, base, base)),
        *(Block(width, width, scale=2, batch_norm=batch_norm) for _ in range(3)),
        *_hidden(width, batch_norm),
        nn.Conv2d(width, in_channels, 3, padding=1),
        nn.Tanh(),
    )
    critic = nn.Sequential(
        Block(in_channels, width, scale=0.5, first=True),
        Block(width, width, scale=0.5),
        Block(width, width),
        Block(width, width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 1),
    )
    for player in (generator, critic):
        for layer in player.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                narrow = layer is critic[-1] or layer is generator[-2]
                straight = narrow or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
                initialise(layer, "kaiming", "linear" if straight else "relu")
    return GAN(generator, critic, latent=latent, crit_repeats=crit_repeats, penalty=penalty)


class Block(nn.Module):
    """A residual block: (norm,) ReLU, convolution, (norm,) ReLU, convolution, beside a shortcut.

    Args:
        before: channels that come in.
        after: channels that go out.
        scale: 2: pixels are doubled before the first convolution; 0.5: averaged, after the second; 1: neither.
        batch_norm: normalise before each ReLU.
        first: the input is an image: nothing comes before the first convolution.
    """

    def __init__(
        self, before: int, after: int, scale: float = 1, batch_norm: bool = False, first: bool = False
    ) -> None:
        super().__init__()
        self.scale = scale
        entry = [] if first else _hidden(before, batch_norm)
        self.enter = nn.Sequential(*entry)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.between = nn.Sequential(*_hidden(after, batch_norm))
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Identity() if scale == 1 and before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """From ``[b, before, h, w]`` to ``[b, after, scale * h, scale * w]``."""
        y = self.conv1(self._doubled(self.enter(x)))
        y = self._halved(self.conv2(self.between(y)))
        # A 1 × 1 convolution and a mean may change places; on the smaller image it is cheaper.
        return y + self.shortcut(self._doubled(self._halved(x)))

    def _doubled(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.scale == 2 else x

    def _halved(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.scale == 0.5 else x


def _check(latent: int, width: int) -> None:
    for name, value in {"latent": latent, "width": width}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
