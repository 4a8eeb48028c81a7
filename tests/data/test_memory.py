"""The in-memory loader against plain per-image loops, and its promises about order, ranks and resuming."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from data import Augmentation, ImageStore, InMemoryLoader
from data.memory import pixel_statistics

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
EVERYTHING = Augmentation(crop=2, flip=True, cutout=4)


def random_images(count: int, size: int = 8, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Images of random bytes, so that no two windows look alike; the target is the image's index."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count)


def make_loader(count: int = 24, padding: int = 2, rows: Tensor | None = None, **options) -> InMemoryLoader:
    images, targets = random_images(count)
    options = {"batch_size": 6, "mean": MEAN, "std": STD, "training": True, "augmentation": EVERYTHING} | options
    device = options.get("device", "cpu")
    store = ImageStore(images, targets, padding=padding, device=device)
    return InMemoryLoader(store, torch.arange(count) if rows is None else rows, **options)


def normalise(image: Tensor) -> Tensor:
    """One byte image [C, H, W] by the definition."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    return (image / 255 - mean) / std


def pad(image: Tensor, padding: int) -> Tensor:
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    return padded


def crops_and_flips(image: Tensor, padding: int) -> dict[tuple[int, int, bool], Tensor]:
    """Every outcome of crop and flip for one image, normalised, by (top, left, flipped)."""
    _, height, width = image.shape
    padded, found = pad(image, padding), {}
    for top, left in itertools.product(range(2 * padding + 1), repeat=2):
        window = normalise(padded[:, top : top + height, left : left + width])
        found[top, left, False], found[top, left, True] = window, window.flip(-1)
    return found


def same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
    )


# --------------------------------------------------------------------------------------------- what a batch holds


@pytest.mark.parametrize("channels, size", [(1, 8), (3, 7)])
def test_without_augmentation_a_batch_is_the_normalised_images(channels: int, size: int) -> None:
    images, targets = random_images(10, size, channels)
    store = ImageStore(images, targets, padding=3)  # padded for the train split, unseen by this one
    loader = InMemoryLoader(
        store, torch.tensor([7, 2, 9, 4]), batch_size=3, mean=[0.1] * channels, std=[0.5] * channels, training=False
    )
    inputs, labels = (torch.cat(parts) for parts in zip(*loader.epoch(0), strict=True))
    assert labels.tolist() == [7, 2, 9, 4] and labels.dtype == torch.int64
    assert inputs.dtype == torch.float32 and inputs.is_contiguous()
    torch.testing.assert_close(inputs, (images[[7, 2, 9, 4]] / 255 - 0.1) / 0.5, rtol=0, atol=2e-6)


def test_crop_and_flip_are_those_of_a_per_image_loop() -> None:
    images, _ = random_images(24)
    loader = make_loader(augmentation=Augmentation(crop=2, flip=True))
    outcomes = [crops_and_flips(image, 2) for image in images]
    seen = []
    for epoch in range(20):
        for inputs, targets in loader.epoch(epoch):
            for output, target in zip(inputs, targets.tolist(), strict=True):
                matches = [key for key, image in outcomes[target].items() if torch.allclose(image, output, atol=1e-5)]
                assert len(matches) == 1
                seen += matches
    assert {key[:2] for key in seen} == set(itertools.product(range(5), repeat=2))  # every shift happens
    assert 0.4 < sum(flipped for *_, flipped in seen) / len(seen) < 0.6  # 480 draws: 4.4 sigma


def test_crop_only_never_flips_and_a_smaller_crop_stays_in_the_middle_of_a_larger_padding() -> None:
    images, _ = random_images(24)
    for inputs, targets in make_loader(padding=3, augmentation=Augmentation(crop=1)).epoch(0):
        for output, target in zip(inputs, targets.tolist(), strict=True):
            outcomes = crops_and_flips(images[target], 1)
            matches = [key for key, image in outcomes.items() if torch.allclose(image, output, atol=1e-5)]
            assert len(matches) == 1 and not matches[0][2]


@pytest.mark.parametrize("side", [3, 4])
def test_cutout_is_one_square_clipped_at_the_border_and_filled_with_the_mean(side: int) -> None:
    images, _ = random_images(24)
    loader = make_loader(augmentation=Augmentation(cutout=side))
    centres = set()
    for epoch in range(40):
        for inputs, targets in loader.epoch(epoch):
            for output, target in zip(inputs, targets.tolist(), strict=True):
                whole = normalise(images[target])
                matches = []
                for row, column in itertools.product(range(8), repeat=2):
                    expected = whole.clone()
                    top, left = row - side // 2, column - side // 2
                    expected[:, max(top, 0) : top + side, max(left, 0) : left + side] = 0
                    if torch.allclose(expected, output, atol=1e-5):
                        matches.append((row, column))
                assert len(matches) == 1
                centres.update(matches)
    assert centres == set(itertools.product(range(8), repeat=2))


def test_augmentation_works_on_copies() -> None:
    loader = make_loader()
    first = list(loader.epoch(0))
    kept = [(inputs.clone(), targets.clone()) for inputs, targets in first]
    for inputs, _ in loader.epoch(1):
        inputs.zero_()
    assert same(first, kept)  # batches share no memory
    assert same(list(loader.epoch(0)), kept)  # nor do they with the store


# ------------------------------------------------------------------------------------------ order and determinism


def test_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    first = list(make_loader().epoch(3))
    torch.rand(17)  # torch's global generator plays no part
    assert same(first, list(make_loader().epoch(3)))
    assert not same(first, list(make_loader().epoch(4)))
    assert not same(first, list(make_loader(seed=1).epoch(3)))


@pytest.mark.parametrize("start", range(5))
def test_starting_at_a_batch_equals_skipping_to_it(start: int) -> None:
    loader = make_loader()
    assert same(list(loader.epoch(2, start)), list(loader.epoch(2))[start:])


def test_training_serves_each_example_once_an_epoch_in_a_new_order() -> None:
    loader = make_loader()
    orders = [torch.cat([targets for _, targets in loader.epoch(epoch)]).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert orders[0] != orders[1] != orders[2] and sorted(orders[0]) != orders[0]


def test_training_drops_the_partial_batch_and_evaluation_keeps_it() -> None:
    training, evaluation = make_loader(count=20), make_loader(count=20, training=False)
    assert (len(training), training.num_examples) == (3, 18)
    assert (len(evaluation), evaluation.num_examples) == (4, 20)
    assert [len(targets) for _, targets in training.epoch(0)] == [6, 6, 6]
    assert [len(targets) for _, targets in evaluation.epoch(0)] == [6, 6, 6, 2]


def test_evaluation_neither_shuffles_nor_augments() -> None:
    loader = make_loader(training=False, padding=2)
    assert same(list(loader.epoch(0)), list(loader.epoch(5)))
    inputs, targets = next(loader.epoch(0))
    assert targets.tolist() == list(range(6))
    torch.testing.assert_close(inputs[0], normalise(random_images(24)[0][0]), rtol=0, atol=2e-6)


def test_neighbouring_seeds_epochs_and_batches_draw_different_numbers() -> None:
    keys = list(itertools.product(range(3), repeat=3))
    plans = []
    for seed, epoch, _ in keys[::3]:
        batches = list(make_loader(seed=seed, augmentation=Augmentation()).epoch(epoch))
        plans.append(torch.cat([targets for _, targets in batches]))
    assert len({tuple(plan.tolist()) for plan in plans}) == len(plans)


# ---------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_what_one_process_sees(world_size: int) -> None:
    alone = list(make_loader().epoch(1))
    shares = [list(make_loader(rank=rank, world_size=world_size).epoch(1)) for rank in range(world_size)]
    assert {len(share) for share in shares} == {len(alone)}
    for index, whole in enumerate(alone):
        for part, expected in enumerate(whole):
            together = torch.cat([share[index][part] for share in shares])
            assert torch.equal(together, expected)


@pytest.mark.parametrize("count, world_size", [(7, 2), (10, 3), (13, 4), (12, 4)])
def test_evaluation_counts_each_example_once_over_ranks(count: int, world_size: int) -> None:
    loaders = [
        make_loader(count=count, training=False, batch_size=6, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    shares = [targets for loader in loaders for _, targets in loader.epoch(0)]
    assert sorted(torch.cat(shares).tolist()) == list(range(count))
    assert all(len(share) for share in shares)  # an empty share is skipped, not served


def test_an_evaluation_batch_need_not_divide_among_the_ranks() -> None:
    shares = [make_loader(training=False, batch_size=5, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(int(t) for loader in shares for _, targets in loader.epoch(0) for t in targets) == list(range(24))


# -------------------------------------------------------------------------------------------------- normalisation


def test_pixel_statistics_are_those_of_the_chosen_rows() -> None:
    images, _ = random_images(3000, size=2)
    images[:, 2] = 51  # a channel that never varies
    rows = torch.arange(0, 3000, 2)
    mean, std = pixel_statistics(images, rows)
    pixels = images[rows].double() / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert std[:2] == pytest.approx(pixels.std((0, 2, 3), correction=0)[:2].tolist(), rel=1e-12)
    assert mean[2] == pytest.approx(0.2) and std[2] == pytest.approx(1.0)


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 25}, "batch_size must be at most the 24 examples that are left to train on, got 25: lower it"),
        ({"world_size": 4}, "batch_size must be divisible by the number of processes, got 6 for 4"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"padding": 1}, "crop must be at most the store's padding of 1, got 2"),
        ({"rows": torch.arange(0), "training": False}, "rows must name at least one example"),
    ],
)
def test_bad_options_end_in_a_sentence(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_loader(**options)


@pytest.mark.parametrize("start", [-1, 5])
def test_a_start_beyond_the_epoch_is_refused_at_once(start: int) -> None:
    with pytest.raises(ValueError, match="start must be from 0 to the 4 batches"):
        make_loader().epoch(0, start)


def test_a_store_refuses_what_is_not_bytes_or_not_labelled() -> None:
    images, targets = random_images(4)
    with pytest.raises(ValueError, match="images must be uint8"):
        ImageStore(images.float(), targets)
    with pytest.raises(ValueError, match="targets must be as many as the 4 images, got 3"):
        ImageStore(images, targets[:3])


# --------------------------------------------------------------------------------------------------------- device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("limit", [0, 2**31], ids=["store on the host", "store on the GPU"])
def test_a_gpu_sees_the_batches_that_a_cpu_sees(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.memory.MAX_BYTES_ON_ACCELERATOR", limit)
    loader = make_loader(device="cuda")
    assert loader.store.device.type == ("cuda" if limit else "cpu")
    for (inputs, targets), (expected, labels) in zip(loader.epoch(1), make_loader().epoch(1), strict=True):
        assert inputs.is_cuda and torch.equal(targets.cpu(), labels)
        torch.testing.assert_close(inputs.cpu(), expected, rtol=0, atol=1e-6)
