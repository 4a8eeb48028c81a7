"""Mixed and distorted images: what is served, to how many processes, from which batch on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data import DataModule, digits, image_folder, imagenet

MIXED = {"mixup": 0.8, "cutmix": 1.0, "randaugment": 9}


def served(data: DataModule, epoch: int = 1, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [(inputs.clone(), targets.clone()) for inputs, targets in data.train.epoch(epoch, start)]


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) for left, right in pairs for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("options", [{"mixup": 0.5}, {"cutmix": 1.0}, MIXED, {"randaugment": 12}], ids=str)
def test_any_number_of_ranks_sees_what_one_process_does(options: dict[str, float]) -> None:
    """Images at the border of a share are mixed with those of the next rank."""
    whole = served(digits(seed=3, batch_size=64, **options))
    ranks = [served(digits(seed=3, batch_size=64, rank=rank, world_size=4, **options)) for rank in range(4)]
    joined = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
    assert same(whole, joined)
    assert not torch.equal(ranks[0][0][0], ranks[1][0][0])
    assert same(whole, served(digits(seed=3, batch_size=64, **options))), "a function of the seed"
    assert not same(whole, served(digits(seed=4, batch_size=64, **options)))


def test_the_middle_of_an_epoch_needs_no_past() -> None:
    data = digits(seed=1, **MIXED)
    state = torch.get_rng_state()
    assert same(served(data)[7:], served(data, start=7))
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator stays as it is"


def test_mixed_targets_are_the_parts_of_the_image() -> None:
    """Blends are undone by hand, from the plain images and the targets."""
    plain, blended = digits(seed=2, augment="none"), digits(seed=2, augment="none", mixup=0.7)
    for (images, labels), (mixed, targets) in zip(served(plain)[:4], served(blended)[:4], strict=True):
        hard = torch.nn.functional.one_hot(labels, 10).float()
        share = targets.amax(1)[labels != labels.roll(1)][0]
        found = [lam for lam in (share, 1 - share) if torch.allclose(images.lerp(images.roll(1, 0), 1 - lam), mixed)]
        assert found, "each with the one before it, of the whole batch"
        torch.testing.assert_close(targets, hard * found[0] + hard.roll(1, 0) * (1 - found[0]))


def test_a_rectangle_counts_by_its_area() -> None:
    plain, cut = digits(seed=2, augment="none"), digits(seed=2, augment="none", cutmix=1.0)
    for (images, labels), (mixed, targets) in zip(served(plain)[:6], served(cut)[:6], strict=True):
        assert bool(((mixed == images) | (mixed == images.roll(1, 0))).all())
        differs = (images != images.roll(1, 0)).any(0).any(0)  # pixels that tell the two apart
        taken = (mixed != images).any(0).any(0)
        rows, columns = taken.any(1).nonzero(), taken.any(0).nonzero()
        area = (int(rows.max() - rows.min()) + 1) * (int(columns.max() - columns.min()) + 1) if taken.any() else 0
        own = float(targets[torch.arange(len(labels)), labels][labels != labels.roll(1)][0])
        if bool(differs.all()):
            assert own == pytest.approx(1 - area / 64, abs=1e-6)
        torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)))


def test_without_options_all_is_as_it_was_and_evaluation_is_never_mixed() -> None:
    plain, strong = digits(seed=5), digits(seed=5, **MIXED)
    for split in ("val", "test"):
        assert same(list(getattr(plain, split).epoch(0)), list(getattr(strong, split).epoch(0)))
    images, labels = served(plain)[0]
    assert labels.dtype == torch.int64
    distorted, kept = served(digits(seed=5, randaugment=9))[0]
    assert torch.equal(labels, kept) and distorted.shape == images.shape, "the same crops of the same images"
    changed = (distorted != images).flatten(1).any(1).float().mean()
    assert 0.3 < float(changed) < 1


def test_images_in_files_too(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in "ab":
            (tmp_path / part / kind).mkdir(parents=True)
            for index in range(10):
                pixels = draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / kind / f"{index}.png")
    options = {"batch_size": 4, "val_fraction": 0.2, "seed": 1}
    size = {"image_size": 10, "resize": 12}
    whole = served(imagenet(str(tmp_path), **size, workers=0, **options, **MIXED))
    ranks = [
        served(imagenet(str(tmp_path), **size, workers=rank, **options, **MIXED, rank=rank, world_size=2))
        for rank in range(2)
    ]
    assert same(whole, [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)])
    assert whole[0][1].shape == (4, 2)
    colours = image_folder(root=str(tmp_path), flip=True, **options, **MIXED)
    assert served(colours)[0][0].shape == (4, 3, 12, 12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mixup": -1.0}, r"^mixup must be at least 0, got -1.0$"),
        ({"cutmix": float("nan")}, r"^cutmix must be at least 0, got nan$"),
        ({"randaugment": 31}, r"^randaugment must be from 0 to 30, or null, got 31$"),
    ],
)
def test_ranges(options: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        digits(**options)
