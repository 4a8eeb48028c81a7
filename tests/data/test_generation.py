"""Images to be imitated: the sets of classification with pixels in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import data


def images(loader: data.BatchLoader, epoch: int = 0) -> torch.Tensor:
    return torch.cat([inputs for inputs, _ in loader.epoch(epoch)])


def test_digits() -> None:
    sets, labelled = data.digits_generation(batch_size=32), data.digits(batch_size=32, augment="none")
    assert (sets.name, sets.task) == ("digits_generation", "generation")
    assert sets.facts == {"in_channels": 1, "image_size": 8, "frechet": "mnist"}
    for split in ("train", "val", "test"):
        ours, theirs = (getattr(s, split) for s in (sets, labelled))
        found, known = images(ours), images(theirs)
        assert found.min() == -1 and found.max() == 1
        # One affine map of the pixels: the same images in the same order.
        scaled = (known - known.min()) / (known.max() - known.min()) * 2 - 1
        torch.testing.assert_close(found, scaled, atol=1e-5, rtol=0)


def test_an_evaluation_takes_so_many_of_all_kinds() -> None:
    sets = data.digits_generation(eval_images=50, eval_batch_size=20)
    assert (sets.val.num_examples, sets.test.num_examples) == (50, 50)
    assert sets.train.num_examples == data.digits_generation().train.num_examples
    labels = torch.cat([labels for _, labels in sets.test.epoch(0)])
    assert len(labels) == 50 and len(labels.unique()) == 10


def test_folders_sorted_by_class_are_not_cut_off(shared_data: Callable[[str], Path]) -> None:
    sets = data.image_folder_generation(str(shared_data("cifar10-subset")), eval_images=100, limit_train=0.1)
    assert sets.facts == {"in_channels": 3, "image_size": 32, "frechet": "cifar10"}
    labels = torch.cat([labels for _, labels in sets.test.epoch(0)])
    assert labels.bincount().tolist() == [10] * 10


def test_mnist(shared_data: Callable[[str], Path]) -> None:
    sets = data.mnist_generation(str(shared_data("mnist")), download=False, limit_train=0.01)
    inputs, _ = next(sets.train.epoch(0))
    assert inputs.shape == (64, 1, 28, 28) and inputs.min() == -1
    assert sets.val.num_examples == sets.test.num_examples == 2000


def test_two_ranks_share_each_batch() -> None:
    whole = data.digits_generation(batch_size=32)
    parts = [data.digits_generation(batch_size=32, rank=rank, world_size=2) for rank in range(2)]
    joint = torch.cat([next(part.train.epoch(3))[0] for part in parts])
    torch.testing.assert_close(joint, next(whole.train.epoch(3))[0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"frechet": "svhn"}, "frechet must be mnist, cifar10 or inception, got 'svhn'"),
        ({"eval_images": 1}, "eval_images must be at least 2, got 1"),
        ({"limit_val": 0.007}, "limit_val must leave at least 2 images"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_what_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        data.digits_generation(**options)
