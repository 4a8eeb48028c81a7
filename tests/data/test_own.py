"""`data.wrap`: what users have for a data set is served as ours are."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from data import DataError, DataModule, wrap
from data.own import served_to


class Pictures(Dataset):
    """Coloured images of bytes in three classes, moved at random if asked to."""

    classes = ("ant", "bee", "cat")

    def __init__(self, count: int = 90, size: int = 6, jitter: bool = False) -> None:
        self.count, self.size, self.jitter = count, size, jitter

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[Any, int]:
        pixels = np.random.default_rng(row).integers(0, 200, (self.size, self.size, 3), dtype=np.uint8)
        if self.jitter:
            pixels = pixels + random.randrange(20) + np.random.randint(20) + int(torch.randint(10, ()))
        return Image.fromarray(pixels.astype(np.uint8)), row % 3


class Hub:
    """The face of a Hugging Face data set: rows are dictionaries, columns are found by their names."""

    column_names = ("image", "label")

    class Label:
        names = ("no", "yes")

    def __init__(self, count: int = 40) -> None:
        self.count, self.features = count, {"image": object(), "label": self.Label}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return [row % 2 for row in range(self.count)]
        return {"image": Image.fromarray(np.full((4, 4), key, np.uint8)), "label": key % 2}


def batches(data: DataModule, split: str = "train", epoch: int = 0, start: int = 0) -> list[Any]:
    return list(getattr(data, split).epoch(epoch, start))


def test_images_are_normalised_bytes_and_every_example_is_served_once() -> None:
    data = wrap(Pictures(), batch_size=10, eval_batch_size=7)
    assert data.facts == {"input_shape": [3, 6, 6], "in_channels": 3, "image_size": 6, "num_classes": 3}
    assert data.class_names == ["ant", "bee", "cat"] and data.task == "classification"
    sizes = {split: sum(len(y) for _, y in batches(data, split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 60, "val": 7, "test": 18} == {"train": 60, "val": 7, "test": data.test.num_examples}
    everything = torch.cat([x for x, _ in batches(data)])
    assert everything.dtype == torch.float32
    assert torch.allclose(everything.mean((0, 2, 3)), torch.zeros(3), atol=0.05)
    assert torch.allclose(everything.std((0, 2, 3)), torch.ones(3), atol=0.05)
    rows = torch.cat([data.train.rows, data.val.rows, data.test.rows])
    assert sorted(rows.tolist()) == list(range(90))
    given = wrap(Pictures(), mean=[0.5] * 3, std=[0.25] * 3, split_seed=0, batch_size=10)
    pixels = np.array(Pictures()[int(given.test.rows[0])][0])
    first = batches(given, "test")[0][0][0]
    assert torch.allclose(first, torch.from_numpy(pixels / 255 * 4 - 2).permute(2, 0, 1).float(), atol=1e-6)
    data.normalise([0.5] * 3, [0.25] * 3)
    assert torch.equal(batches(data, "test")[0][0][0], first)


def test_order_and_transforms_are_a_function_of_seed_epoch_and_batch() -> None:
    def module(**options: Any) -> DataModule:
        return wrap(Pictures(jitter=True), batch_size=12, mean=[0.4] * 3, std=[0.2] * 3, **options)

    data = module(seed=3)
    before = torch.get_rng_state(), random.getstate()
    whole = batches(data, epoch=1)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    for got, (x, y) in zip(batches(module(seed=3), epoch=1, start=2), whole[2:], strict=True):
        assert torch.equal(got[0], x) and torch.equal(got[1], y)
    assert not torch.equal(batches(data, epoch=0)[0][0], whole[0][0])
    assert not torch.equal(batches(module(seed=4), epoch=1)[0][0], whole[0][0])
    ranks = [batches(module(seed=3, rank=rank, world_size=2), epoch=1) for rank in range(2)]
    for (x, y), one, two in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([one[0], two[0]]), x) and torch.equal(torch.cat([one[1], two[1]]), y)


def test_loaders_subsets_tensors_and_hubs() -> None:
    loader = DataLoader(Pictures(), batch_size=15, shuffle=True, num_workers=0)
    assert wrap(loader).train.batch_size == 15
    assert wrap(Subset(Pictures(), range(30)), batch_size=4).class_names == ["ant", "bee", "cat"]
    vectors = wrap(TensorDataset(torch.randn(50, 5), torch.arange(50) % 4), batch_size=8)
    assert vectors.facts["in_features"] == 5 and vectors.facts["num_classes"] == 4
    assert batches(vectors)[0][0].shape == (8, 5) and vectors.class_names == ["0", "1", "2", "3"]
    hub = wrap({"train": Hub(), "validation": Hub(10), "test": Hub(12)}, batch_size=8)
    assert hub.class_names == ["no", "yes"] and hub.facts["in_channels"] == 1
    assert (hub.val.num_examples, hub.test.num_examples) == (10, 12)
    listed = wrap([(torch.full((2, 3), float(row)), row % 2) for row in range(40)], batch_size=8)
    assert listed.facts == {"input_shape": [2, 3], "num_classes": 2}
    collated = DataLoader(Pictures(), batch_size=9, collate_fn=lambda rows: (
        torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1) for x, _ in rows]),
        torch.tensor([y for _, y in rows]),
    ))  # fmt: skip
    assert batches(wrap(collated))[0][0].shape == (9, 3, 6, 6)
    copied = wrap([torch.rand(1, 4, 4) for _ in range(30)], task="reconstruction", batch_size=5)
    x, y = batches(copied)[0]
    assert torch.equal(x.flatten(1), y) and copied.facts["likelihood"] == "bernoulli"
    truths = wrap([(torch.rand(2), row % 2 == 0) for row in range(40)], batch_size=8)
    assert batches(truths)[0][1].dtype == torch.int64 and truths.facts["num_classes"] == 2
    own = wrap(TensorDataset(torch.randn(30, 5), torch.randn(30, 2)), task="mine.Regression", batch_size=5)
    assert own.facts["num_outputs"] == 2 and own.task == "mine.Regression"


def test_labelled_images_are_mixed_as_ours_are() -> None:
    def served(split: str = "train", **options: Any) -> list[Any]:
        return batches(wrap(Pictures(), batch_size=12, mean=[0.4] * 3, std=[0.2] * 3, **options), split, epoch=1)

    plain, blended = served(), served(mixup=0.8)
    for (images, labels), (mixed, targets) in zip(plain, blended, strict=True):
        hard = torch.nn.functional.one_hot(labels, 3).float()
        part = targets.amax(1)[labels != labels.roll(1)][0]
        made = {share: images.lerp(images.roll(1, 0), 1 - share) for share in (part, 1 - part)}
        shares = [share for share, inputs in made.items() if torch.allclose(inputs, mixed, atol=1e-5)]
        assert shares, "each with the one before it"
        torch.testing.assert_close(targets, hard * shares[0] + hard.roll(1, 0) * (1 - shares[0]))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(served("val"), served("val", cutmix=1.0), strict=True))
    with served_to({"cutmix": 1.0}):
        assert batches(wrap(Pictures(), batch_size=12))[0][1].shape == (12, 3)


def test_a_run_tells_wrap_where_it_is_and_what_was_asked_for() -> None:
    with served_to({"batch_size": 6, "limit_test": 0.5}, seed=5, device="cpu", rank=1, world_size=2) as wrapping:
        data = wrap(Pictures(), batch_size=20)
        assert wrapping.heard and (data.train.batch_size, data.train.seed, data.train.rank) == (6, 5, 1)
        assert data.test.num_examples == 9
    assert wrap(Pictures(), batch_size=20).train.world_size == 1


class Broken(Pictures):
    def __getitem__(self, row: int) -> Any:
        if row == 7:
            raise OSError("no such file")
        return super().__getitem__(row)


class Ragged(Pictures):
    classes = ("even", "odd")

    def __getitem__(self, row: int) -> Any:
        return torch.zeros(3, 6, 6 + row % 2), 0


def weighted() -> DataLoader:
    return DataLoader(Pictures(), sampler=torch.utils.data.WeightedRandomSampler([1.0] * 90, 90))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: wrap(iter([1, 2])), r"has no length or no items by number: give a torch Dataset"),
        (lambda: wrap([]), r"the train set is empty"),
        (lambda: wrap(weighted()), r"a sampler of its own, and the order of examples is the run's"),
        (lambda: wrap(TensorDataset(torch.randn(9, 2), torch.randn(9))), r"a classification's are whole numbers"),
        (lambda: wrap([{"a": 1, "b": 2}] * 9), r"items of the data set have a, b: .* inputs='NAME'"),
        (lambda: wrap({"a": Pictures()}), r"a dictionary of splits needs one that is called train"),
        (lambda: wrap([(torch.rand(3), 0)] * 9), r"has one class \(all targets are 0, .* of two at least"),
        (lambda: wrap([torch.rand(3)] * 9), r"has one class .*: task='reconstruction' is for inputs without"),
        (lambda: wrap([(torch.rand(3), 10**9 * k) for k in range(9)]), r"is 8000000000, and classes are numbered from"),
        (lambda: wrap(torch.rand(9, 3), torch.rand(9)), r"inputs of the val set are \[\] and .*TensorDataset\(in"),
        (lambda: wrap(TensorDataset), r"the train set is the class TensorDataset itself: give one of it"),
        (lambda: wrap(Ragged(), normalised=([0.5] * 3, [0.0] * 3)), r"^normalised must have a std of values above 0"),
        (lambda: wrap([("text", 1)] * 9), r"of type str, no tensor, array or image"),
        (lambda: batches(wrap(Pictures(), test=Broken(), batch_size=30), "test"),
            r"failed with OSError: no such file \(test_own.py, line \d+\)"),
        (lambda: batches(wrap(Ragged(), batch_size=30, mean=[0.5] * 3, std=[1.0] * 3)), r"yields floats"),
        (lambda: batches(wrap(Ragged(), batch_size=30)), r"inputs of the data set differ in shape"),
        (lambda: batches(wrap(Pictures(), batch_size=30, num_classes=2, class_names=["a", "b"])), r"numbered from 0"),
        (lambda: wrap(Pictures(), batch_size=30, num_classes=2), r"3 names of 2 classes"),
        (lambda: wrap(Pictures(), task="segmentation"), r"task must be classification, reconstruction or"),
        (lambda: wrap(TensorDataset(torch.randn(9, 2), torch.arange(9) % 2), mixup=0.8),
            r"^mixup is for labelled images, and this data set is for classification, of \[2\]"),
        (lambda: wrap(Pictures(), task="reconstruction", cutmix=1.0), r"^cutmix is for labelled .* for reconstruction"),
        (lambda: wrap(Ragged()).normalise([0.5] * 3, [0.5] * 3), r"this data set yields floats"),
    ],
)  # fmt: skip
def test_what_is_no_data_set_says_so(build: Any, says: str) -> None:
    with pytest.raises((DataError, ValueError), match=says):
        build()


def test_data_sets_of_hugging_face() -> None:
    """The real library, in memory: splits, class names, pictures, columns, formats and transforms of its own."""
    hugging = pytest.importorskip("datasets", reason="the package datasets is not installed")
    draw = np.random.default_rng(0)
    features = hugging.Features({"image": hugging.Image(), "label": hugging.ClassLabel(names=["ant", "bee"])})

    def pictures(count: int) -> Any:
        images = [Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in range(count)]
        return hugging.Dataset.from_dict({"image": images, "label": [k % 2 for k in range(count)]}, features=features)

    both = wrap(hugging.DatasetDict({"train": pictures(40), "test": pictures(10)}), batch_size=4)
    assert both.class_names == ["ant", "bee"] and both.facts["num_classes"] == 2 and both.test.num_examples == 10
    images, labels = next(iter(both.train.epoch(0)))
    assert images.shape == (4, 3, 6, 6) and images.dtype == torch.float32 and labels.dtype == torch.int64
    formatted = wrap(pictures(40).with_format("torch"), batch_size=4)
    assert next(iter(formatted.train.epoch(0)))[0].shape == (4, 3, 6, 6)
    columns = {"length": [[1.0, 2.0, 3.0]] * 30, "label": [0, 1] * 15}
    table = wrap(hugging.Dataset.from_dict(columns), inputs="length", batch_size=5)
    assert table.facts["in_features"] == 3
    with pytest.raises(DataError, match=r"IterableDataset, which has no length.*itertools.islice"):
        wrap(pictures(4).to_iterable_dataset())
