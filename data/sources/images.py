"""Image files: which names are images, and the one place where one is opened, checked, set upright and decoded."""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from PIL import ExifTags, Image

from data.base import DataError

log = logging.getLogger(__name__)

# What Pillow opens and that is no picture of its own: it needs a program outside (EPS), or only the header is read.
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# MPO, a JPEG of two views, has a suffix that Pillow knows for writing alone.
SUFFIXES = frozenset(
    suffix
    for suffix, kind in Image.registered_extensions().items()
    if (kind in Image.OPEN or kind == "MPO") and kind not in NO_PICTURES
)
FORMATS = sorted(Image.OPEN.keys() - NO_PICTURES)  # by content: a file with another suffix does not get past it

GREY_MODES = {"1", "L", "LA"}
# Those of 8 bits a channel or fewer whose colours Pillow brings to red, green and blue.
MODES = GREY_MODES | {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"}
DEEP_MODES = {"I", "F"}  # 16 bits or more a pixel ("I;16" and its kin begin with I): Pillow would clip them to white

# What Pillow raises at a damaged file, by format.
DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, RuntimeError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

# From the EXIF orientation (which side of the stored picture is which) to what sets it upright.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {5, 6, 7, 8}  # the orientations that swap width and height


def read_header(file: Path, sized: bool = True) -> tuple[tuple[int, int], str]:
    """Size and mode of an image, without decoding it as far as its format allows.

    Args:
        file: the image.
        sized: its size is wanted; if not, it may be that of the picture as it is stored, lying on its side.

    Returns:
        Width and height of the upright image, and Pillow's mode.

    Raises:
        DataError: it cannot be read, or has more than 8 bits a channel or colours that cannot be brought to RGB.
    """
    with _opened(file) as image:
        width, height = image.size
        if sized and width != height:
            if image.format == "TIFF":
                image.load()  # Pillow sets these upright itself, in some versions only here
                width, height = image.size
            if _orientation(image) in SIDEWAYS:
                width, height = height, width
        return (width, height), image.mode


def decode(file: Path, mode: str) -> Image.Image:
    """An image as it is meant to be seen: upright, as its EXIF orientation has it.

    Of an image with transparent parts the colours that are stored there are taken, as torchvision does; a warning says
    so, once a folder.

    Args:
        file: the image.
        mode: Pillow's, of what is returned: ``L`` or ``RGB``.

    Returns:
        The decoded image.

    Raises:
        DataError: see ``read_header``.
    """
    with _opened(file) as image:
        image.load()
        turn = TRANSPOSITIONS.get(_orientation(image))
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            full = image.convert("RGBA")
            if full.getchannel("A").getextrema() != (255, 255):
                _say_transparent(file.parent)
            if image.mode in ("P", "PA"):
                image = full  # a palette with several degrees of transparency goes to RGB by way of this alone
        upright = image if turn is None else image.transpose(turn)
        return upright.convert(mode)


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """An image whose pixels can be right; what goes wrong with it inside the block becomes a sentence."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_mode(file, image.mode)
            yield image
    except FileNotFoundError as error:  # of a link, what it leads to
        raise DataError(f"there is no file {file.absolute()}: name another, or remove the link") from error
    except DECODING_ERRORS as error:
        raise DataError(f"{file.absolute()} cannot be read as an image: repair it, or remove it") from error


def _check_mode(file: Path, mode: str) -> None:
    if mode in DEEP_MODES or mode.startswith("I;"):
        raise DataError(f"{file.absolute()} has more than 8 bits a channel (mode {mode}): convert it to 8 bits")
    if mode not in MODES:
        raise DataError(f"{file.absolute()} has colours that are not read (mode {mode}): convert it to RGB")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (as stored) if there is none or none that can be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODING_ERRORS:
        # The record is damaged; so are the pixels only if loading them says so (a PNG is loaded to find its record).
        image.load()
        return 1
    return found if isinstance(found, int) else 1


@cache
def _say_transparent(folder: Path) -> None:
    """Once a folder, that is once a class."""
    log.warning(
        "%s has images with transparent parts, which are served with the colours that are stored there: flatten them "
        "onto a background if these mean nothing",
        folder,
    )
