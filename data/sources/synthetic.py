"""Images that are made rather than read: curves through random points, faces turned and enlarged at random."""

from __future__ import annotations

import logging
import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data.sources.downloads import alone

CHUNK = 2000  # images made at once: bounded memory

# The pen of `draw_curves`. With these the mean image's entropy is 0.157 a pixel, as of the published images.
CURVE_SIZE = 28
CURVE_MARGIN = 3.0  # the points keep this distance from the border; a curve may bulge beyond
CURVE_STEPS = 96  # points at which a curve is evaluated: closer together than the pen is wide
PEN_WIDTH = 0.75  # standard deviation of its profile, in pixels
PEN_INK = 1.27  # how dark the middle of a stroke is: 1 - exp(-ink) on a straight one

# How `turn_faces` sees a face.
FACE_SIZE = 25
FACE_TURN = (-90.0, 90.0)  # degrees
FACE_SCALE = (1.4, 1.8)  # from sqrt(2) on, a window turned at will stays inside the photograph

# What a damaged .npz raises, by the place of the damage.
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)

log = logging.getLogger(__name__)


def draw_curves(count: int, seed: int = 0) -> Tensor:
    """Curves through three random points each, drawn with a soft pen.

    Between the points, which are uniform in a square, a curve is the parabola that passes them at times proportional
    to their distances. Its ink is the line integral of a round Gaussian pen along it, saturated by 1 - exp(-x), so
    that strokes are smooth at their edges and no darker where they are drawn slowly.

    Args:
        count: how many.
        seed: the same seed draws the same curves.

    Returns:
        uint8 ``[count, 1, 28, 28]``, 0 for no ink.
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = CURVE_MARGIN, CURVE_SIZE - 1 - CURVE_MARGIN
    points = torch.empty(count, 3, 2).uniform_(low, high, generator=generator)
    images = torch.empty(count, 1, CURVE_SIZE, CURVE_SIZE, dtype=torch.uint8)
    for drawn, through in zip(images.split(CHUNK), points.split(CHUNK), strict=True):
        drawn[:, 0] = _draw(through)
    return images


def _draw(points: Tensor) -> Tensor:
    """The curves through ``points [n, 3, 2]`` as bytes ``[n, 28, 28]``."""
    first, second = (points[:, 1:] - points[:, :-1]).norm(dim=-1).unbind(1)
    # When the middle point is passed; kept off the ends, where the parabola would run far out.
    middle = (first / (first + second)).nan_to_num(0.5).clamp(0.1, 0.9)[:, None]
    time = (torch.arange(CURVE_STEPS) + 0.5) / CURVE_STEPS
    before, between, after = middle, middle * (middle - 1), 1 - middle
    # Lagrange's polynomials for times 0, middle and 1, and their derivatives.
    basis = torch.stack([(time - middle) * (time - 1) / before, time * (time - 1) / between,
                         time * (time - middle) / after], dim=2)  # fmt: skip
    slopes = torch.stack([(2 * time - 1 - middle) / before, (2 * time - 1) / between,
                          (2 * time - middle) / after], dim=2)  # fmt: skip
    position, velocity = basis @ points, slopes @ points
    length = velocity.norm(dim=-1) / CURVE_STEPS
    # The Gaussian factorises over the axes: a batched product of matrices sums it along the curve.
    pixels = torch.arange(float(CURVE_SIZE))[:, None]
    across, down = (torch.exp(-(pixels - place[:, None]).square() / (2 * PEN_WIDTH**2)) for place in position.unbind(2))
    line = (down * length[:, None]) @ across.mT / (math.sqrt(2 * math.pi) * PEN_WIDTH)  # 1 on a long straight line
    return (255 * (1 - torch.exp(-PEN_INK * line))).round().to(torch.uint8)


def turn_faces(photographs: Tensor, variants: int, seed: int = 0) -> Tensor:
    """Each face several times: turned, enlarged and brought to 25 × 25 pixels.

    Args:
        photographs: uint8 ``[n, H, H]``.
        variants: images made of each.
        seed: the same seed makes the same images; the first of many variants are those that few would be.

    Returns:
        uint8 ``[variants * n, 1, 25, 25]``, the first variant of every face first.
    """
    generator = torch.Generator().manual_seed(seed)
    # A pixel of the result covers up to two of the photograph: smoothed, so that none is left out.
    binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
    smooth = functional.pad(photographs[:, None].float(), (1, 1, 1, 1), mode="replicate")
    smooth = functional.conv2d(smooth, (binomial[:, None] * binomial)[None, None])
    images = torch.empty(variants, len(photographs), 1, FACE_SIZE, FACE_SIZE, dtype=torch.uint8)
    for turned in images:
        degrees, scale = (
            torch.empty(len(photographs)).uniform_(*bounds, generator=generator) for bounds in (FACE_TURN, FACE_SCALE)
        )
        angle = torch.deg2rad(degrees)
        cos, sin, zero = angle.cos() / scale, angle.sin() / scale, torch.zeros_like(angle)
        window = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
        grid = functional.affine_grid(window, [len(photographs), 1, FACE_SIZE, FACE_SIZE], align_corners=False)
        seen = functional.grid_sample(smooth, grid, padding_mode="border", align_corners=False)
        turned.copy_(seen.round().clamp(0, 255))
    return images.flatten(0, 1)


def kept(folder: Path, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make`` returns, from a file if an earlier run has left it there.

    The name says all that the content depends on, its version included. A damaged file (its checksum tells) is made
    anew; other processes wait meanwhile.

    Args:
        folder: where the file lies; made if need be.
        name: of the file, without suffix.
        make: returns named tensors.
    """
    path = folder / f"{name}.npz"
    try:
        with alone(folder):
            if path.exists():
                try:
                    with np.load(path) as saved:
                        return {key: torch.from_numpy(saved[key]) for key in saved.files}
                except UNREADABLE as error:
                    log.warning("%s is damaged (%s): it is made anew.", path, error)
            made = make()
            partial = folder / f".{name}.tmp.npz"
            try:
                np.savez(partial, **{key: tensor.numpy() for key, tensor in made.items()})  # type: ignore[arg-type]
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            return made
    except OSError as error:
        log.warning("%s cannot be written (%s): its content is made anew in every run.", path, error)
        return make()
