"""Image files of every kind: the same pixels, upright, from every decoder, or a sentence; and what is passed over."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

import data
from data.sources.folders import FolderSplits, find_splits, find_tiny_imagenet, read_images
from data.sources.images import SUFFIXES, decode, read_header
from data.sources.streamed import ImageFiles

RANDOM = np.random.default_rng(0)
# Four quarters, each of one colour: a lossy format keeps them, and each orientation has them in another order.
QUARTERS = np.zeros((16, 16, 3), np.uint8)
QUARTERS[:8, :8], QUARTERS[:8, 8:], QUARTERS[8:, :8], QUARTERS[8:, 8:] = (
    (220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30),
)  # fmt: skip


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels as a camera that was held otherwise stores them (EXIF 2.3, figure of the tag 0x0112)."""
    flipped: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[::-1],  # row 0 is the right side, column 0 the top
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: a.swapaxes(0, 1)[:, ::-1],  # row 0 is the left side, column 0 the bottom
    }
    return np.ascontiguousarray(flipped[orientation](upright))


def photograph(path: Path, upright: np.ndarray, orientation: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {"quality": 100, "subsampling": 0}
    Image.fromarray(stored(upright, orientation)).save(path, exif=exif, **({} if path.suffix == ".tif" else options))
    return path


def by_image_folder(file: Path, size: int) -> Tensor:
    """The image out of memory, as image_folder and the autoencoders' folders decode it."""
    return read_images([file], size, 1.0)[0]


def by_image_files(file: Path, size: int) -> Tensor:
    """The image decoded when it is wanted, as for dataset=imagenet."""
    served = ImageFiles([(file, 0)], size, size, crop=False)[torch.tensor([0]), torch.tensor([0])]
    if isinstance(served, str):
        raise data.DataError(served)
    return served[0][0]


DECODERS = [by_image_folder, by_image_files]


@pytest.mark.parametrize("suffix", [".jpg", ".jfif", ".png", ".tif", ".webp", ".mpo"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright_in_every_decoder(tmp_path: Path, suffix: str, orientation: int) -> None:
    file = photograph(tmp_path / f"photo{suffix}", QUARTERS, orientation)
    expected = torch.from_numpy(QUARTERS).permute(2, 0, 1).int()
    for decoder in DECODERS:
        assert (decoder(file, 16).int() - expected).abs().max() < 12, decoder
    with Image.open(file) as image:
        assert torch.equal(by_image_folder(file, 16), to_tensor(ImageOps.exif_transpose(image).convert("RGB")))


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_upright_picture(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = RANDOM.integers(0, 256, (10, 24, 3), dtype=np.uint8)
    file = photograph(tmp_path / f"photo{suffix}", upright, orientation)
    assert read_header(file) == ((24, 10), "RGB")
    assert decode(file, "RGB").size == (24, 10)
    with pytest.raises(data.DataError, match=r"photo.* has 24 × 10 pixels: set dataset.image_size"):
        read_images([file], None, 1.0)


def test_an_orientation_behind_the_pixels_and_one_in_xmp_count_too(tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(stored(QUARTERS, 6)).save(file, quality=100, subsampling=0, xmp=xmp)
    png = photograph(tmp_path / "photo.png", QUARTERS, 6)
    content = png.read_bytes()
    at = content.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(content[at : at + 4], "big")
    tail = content.index(b"IEND") - 4
    png.write_bytes(content[:at] + content[end:tail] + content[at:end] + content[tail:])
    for path in (file, png):
        for decoder in DECODERS:
            assert (decoder(path, 16).int() - torch.from_numpy(QUARTERS).permute(2, 0, 1)).abs().max() < 12, path


@pytest.mark.parametrize("record", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*"])
def test_a_damaged_record_leaves_the_picture_as_it_is_stored(tmp_path: Path, record: bytes) -> None:
    file = tmp_path / "photo.jpg"
    Image.fromarray(QUARTERS).save(file, quality=100, exif=record)
    for decoder in DECODERS:
        assert torch.equal(decoder(file, 16), to_tensor(Image.open(file)))


def test_an_orientation_that_there_is_none_of_is_none(tmp_path: Path) -> None:
    for orientation in (0, 9, 255):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(QUARTERS).save(tmp_path / "photo.png", exif=exif)
        assert torch.equal(by_image_files(tmp_path / "photo.png", 16), to_tensor(Image.fromarray(QUARTERS)))


# ---------------------------------------------------------------------------------------------------------- depths

RAMP = np.linspace(0, 65535, 256).reshape(16, 16)
DEEP = {
    "16 bits.png": lambda path: Image.fromarray(RAMP.astype(np.uint16)).save(path),
    "16 bits.tif": lambda path: Image.fromarray(RAMP.astype(np.uint16)).save(path),
    "32 bits.tif": lambda path: Image.fromarray(RAMP.astype(np.int32)).save(path),
    "float.tif": lambda path: Image.fromarray(RAMP.astype(np.float32)).save(path),
    "16 bits.pgm": lambda path: Image.fromarray(RAMP.astype(np.uint16)).save(path),
    "float.pfm": lambda path: Image.fromarray(RAMP.astype(np.float32)).save(path),
    "lab.tif": lambda path: Image.new("LAB", (16, 16), (50, 20, 20)).save(path),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", DEEP)
def test_depths_that_would_be_clipped_are_refused_in_every_decoder(tmp_path: Path, name: str, decoder: Any) -> None:
    DEEP[name](tmp_path / name)
    sentence = "has colours that are not read" if "lab" in name else r"has more than 8 bits a channel \(mode "
    with pytest.raises(data.DataError, match=f"{name} {sentence}.*: convert it to "):
        decoder(tmp_path / name, 16)
    with pytest.raises(data.DataError, match=f"{name} {sentence}"):
        decode(tmp_path / name, "L")


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_kind_of_colours_gives_what_it_means(tmp_path: Path, decoder: Any) -> None:
    photo = Image.fromarray(QUARTERS)
    grey = photo.convert("L")
    palette = photo.quantize(8)
    expected = {
        "rgba.png": (photo.convert("RGBA"), photo),
        "la.png": (grey.convert("LA"), grey.convert("RGB")),
        "palette.png": (palette, palette.convert("RGB")),
        "palette.gif": (palette, palette.convert("RGB")),
        "cmyk.tif": (photo.convert("CMYK"), photo.convert("CMYK").convert("RGB")),
        "bitmap.png": (grey.convert("1"), grey.convert("1").convert("RGB")),
        "palette.webp": (photo, photo),
    }
    for name, (image, wanted) in expected.items():
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        assert torch.equal(decoder(tmp_path / name, 16).expand(3, 16, 16), to_tensor(wanted)), name
    # 16 bits a channel in colour, which Pillow brings to 8 by the upper half
    deep = tmp_path / "deep.ppm"
    deep.write_bytes(b"P6 16 16 65535\n" + (QUARTERS.astype(">u2") * 257).tobytes())
    assert torch.equal(decoder(deep, 16), to_tensor(photo))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["palette", "palette of degrees", "RGBA", "LA", "key"])
def test_transparent_parts_have_their_stored_colours_and_are_said_aloud(
    tmp_path: Path, kind: str, decoder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    photo = Image.fromarray(QUARTERS)
    file = tmp_path / "clear.png"
    options: dict[str, Any] = {}
    if kind.startswith("palette"):
        image, options = photo.quantize(4), {"transparency": 0 if kind == "palette" else bytes([0, 90, 180, 255])}
    elif kind == "key":
        image, options = photo, {"transparency": (220, 30, 30)}
    else:
        image = photo.convert(kind)
        image.putalpha(Image.new("L", (16, 16), 40))
    image.save(file, **options)
    wanted = (image.convert("L") if kind == "LA" else image).convert("RGB")
    assert torch.equal(decoder(file, 16).expand(3, 16, 16), to_tensor(wanted))
    assert f"{tmp_path} has images with transparent parts" in caplog.text


# --------------------------------------------------------------------------------------------------------- damages


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".bmp", ".tif", ".webp", ".ppm", ".tga", ".jp2"])
def test_a_truncated_image_is_named(tmp_path: Path, suffix: str, decoder: Any) -> None:
    file = tmp_path / f"cut{suffix}"
    Image.fromarray(RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    content = file.read_bytes()
    for length in (0, 5, len(content) // 2):
        file.write_bytes(content[:length])
        with pytest.raises(data.DataError, match=rf"cut{suffix} cannot be read as an image: repair it, or remove it"):
            decoder(file, 64)


def test_what_needs_another_program_is_not_opened_under_any_name(tmp_path: Path) -> None:
    file = tmp_path / "drawing.jpg"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n")
    for decoder in DECODERS:
        with pytest.raises(data.DataError, match=r"drawing.jpg cannot be read as an image"):
            decoder(file, 16)


# ------------------------------------------------------------------------------------------------- which files count


def fill(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        kind = {".jfif": "JPEG", ".jpe": "JPEG", ".mpo": "JPEG", ".avif": "PNG"}.get(Path(name).suffix.lower())
        Image.fromarray(QUARTERS).save(folder / name, format=kind)


def test_every_suffix_of_an_image_is_found(tmp_path: Path) -> None:
    names = ["a.jfif", "b.JFIF", "c.jpe", "d.tga", "e.jp2", "f.PNM", "g.dib", "h.JPG", "i.avif", "j.mpo", "k.pcx"]
    fill(tmp_path / "cat", names)
    fill(tmp_path / "dog", names)
    splits = find_splits(tmp_path)
    assert [file.name for file, target in splits.files["train"] if target == 0] == names
    assert read_images([file for file, _ in splits.files["train"]], None, 1.0).shape == (22, 3, 16, 16)
    assert not SUFFIXES & {".eps", ".mpg", ".h5", ".pdf", ".txt"}


def test_files_passed_over_are_counted_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            fill(tmp_path / split / name, ["a.png", "b.jpg"])
    for name in ("train/cat/a.HEIC", "train/dog/b.heic", "val/cat/sub/c.txt", "train/cat/.DS_Store", "labels.csv",
                 "val/dog/._a.png", "train/dog/README", "train/.cache/x/a.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    fill(tmp_path / "train", ["stray.png"])
    assert len(find_splits(tmp_path).files["train"]) == 4
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    line = record.getMessage()
    assert line.startswith(f"{tmp_path}: 9 files are passed over as no images: 3 × hidden, 2 × .heic, ")
    for part in ("1 × .txt", "1 × .csv", "1 × without a suffix", "1 × .png outside the class folders"):
        assert part in line


def test_nothing_is_said_where_nothing_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat", "dog"):
        fill(tmp_path / name, ["a.png"])
    find_splits(tmp_path)
    assert not caplog.records


def test_classes_without_images_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat", "dog", "eel"):
        fill(tmp_path / "train" / name, ["a.png"])
    fill(tmp_path / "val" / "cat", ["a.png"])
    (tmp_path / "val" / "dog").mkdir()
    find_splits(tmp_path)
    assert f"{tmp_path / 'val'} has no images of 2 of 3 classes: dog, eel" in caplog.text
    (tmp_path / "train" / "eel" / "a.png").rename(tmp_path / "train" / "eel" / "a.heic")
    with pytest.raises(data.DataError, match=r"eel holds no images: remove it, or fill it .*1 × .heic"):
        find_splits(tmp_path)


def tiny(root: Path) -> FolderSplits:
    for name in ("n01", "n02"):
        fill(root / "train" / name / "images", ["a.JPEG"])
        (root / "train" / name / f"{name}_boxes.txt").write_text("a.JPEG\t0\t0\t3\t3\n")
    fill(root / "val" / "images", ["v.JPEG"])
    return find_tiny_imagenet(root)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_the_texts_of_tiny_imagenet_may_come_from_any_system(
    tmp_path: Path, mark: bytes, end: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "val_annotations.txt").write_bytes(mark + b"v.JPEG\tn02\t0\t0\t1\t1" + end)
    (tmp_path / "words.txt").write_bytes(mark + end.join([b"n01\tgoldfish, Carassius", "n02\tbébé".encode()]) + end)
    splits = tiny(tmp_path)
    assert splits.class_names == ["goldfish", "bébé"] and [target for _, target in splits.files["test"]] == [1]
    assert not caplog.records, "the lists of boxes are a part of the set"
    (tmp_path / "words.txt").write_bytes(b"n01\tb\xe9b\xe9\n")
    with pytest.raises(data.DataError, match=r"words.txt cannot be read as text \(byte 5, in line 1, is 0xe9"):
        tiny(tmp_path)
