"""Data sets of one's own: what torch or Hugging Face take for one becomes a `DataModule`, in one call.

``def make(): return wrap(MyDataset(train=True), test=MyDataset(train=False))`` in a file mydata.py, and the command
``python train.py dataset._target_=mydata.make``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from data.base import DataError, DataModule
from data.sources.given import Source, open_source, splits_of
from data.sources.streamed import StreamedLoader
from data.splits import cut, limited, random_order, spread, stratified_order
from data.tasks.mixing import Classifying

MEASURED = 500  # images that mean and standard deviation are measured on

#: Options of `wrap` that a command may give, `dataset.batch_size=32`, whatever the callable takes that calls it.
ASKED = (
    "batch_size", "eval_batch_size", "val_fraction", "test_fraction", "split_seed", "limit_train", "limit_val",
    "limit_test", "workers", "mixup", "cutmix",
)  # fmt: skip


class _Place:
    """What `wrap` is told while a run's data set is built, so that no function in between has to pass it on."""

    def __init__(self) -> None:
        self.place: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}
        self.heard = False

    def told(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Options: what a command asks for, or else what was said to `wrap`, or else the place."""
        self.heard = True
        return {**self.place, **said, **self.asked}


_PLACE = _Place()


@contextmanager
def served_to(asked: Mapping[str, Any], **place: Any) -> Iterator[_Place]:
    """Within it, `wrap` serves this process of a run.

    Args:
        asked: some of ``ASKED``, which win over what `wrap` is given.
        place: seed, device, rank and world_size, unless it is given others.

    Yields:
        What knows, by ``heard``, whether it was called.
    """
    before = dict(vars(_PLACE))
    _PLACE.place, _PLACE.asked, _PLACE.heard = place, dict(asked), False
    try:
        yield _PLACE
    finally:
        vars(_PLACE).update(before)


def wrap(
    train: Any,
    val: Any = None,
    test: Any = None,
    *,
    name: str = "own",
    task: str | None = None,
    batch_size: int | None = None,
    eval_batch_size: int | None = None,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    split_seed: int | None = None,
    limit_train: float | None = None,
    limit_val: float | None = None,
    limit_test: float | None = None,
    mixup: float | None = None,
    cutmix: float | None = None,
    inputs: str | None = None,
    targets: str | None = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    normalised: tuple[Sequence[float], Sequence[float]] | None = None,
    facts: Mapping[str, Any] | None = None,
    workers: int | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> DataModule:
    """Any data set that has a length and items, as what a run learns from.

    A torch ``Dataset``, a ``DataLoader`` (its data set, batch size, workers and ``collate_fn``; the order is the run's,
    so that it can be resumed), a Hugging Face data set or a dictionary of them by split, a list. Items are
    ``(input, target)``, a mapping, or an input alone; inputs are tensors, arrays or images. Bytes (uint8, images) are
    brought to 0..1 and normalised; floats are served as they are. What is random in a data set's transforms is a
    function of seed, epoch and example, whatever the number of workers and processes.

    Args:
        train: what is learned from.
        val: what the best weights are chosen by; None: ``val_fraction`` of ``train``.
        test: what is reported once; None: ``test_fraction`` of ``train``, before ``val`` is taken off it.
        name: of the set.
        task: ``classification``; ``reconstruction``, where inputs in 0..1 are targets; or a task of your own by its
            dotted name, ``mytask.Regression``. None: classification.
        batch_size: of all ranks together; None: the ``DataLoader``'s, or 64.
        eval_batch_size: for validation and test, of all ranks together; None: 256.
        val_fraction: see ``val``; None: 0.1.
        test_fraction: see ``test``; None: 0.2.
        split_seed: which examples go where, of what is split here; None: 0.
        limit_train: share of the train split that is used; None: all.
        limit_val: share of the validation split that is used; None: all.
        limit_test: share of the test split that is used; None: all.
        mixup: α by which labelled images of a training batch are blended, 0.8, say; None: they are not.
        cutmix: α by which rectangles of them are exchanged; None: they are not.
        inputs: key of the input where items are mappings; None: by the usual names.
        targets: likewise of the target.
        class_names: names of the classes, by target; None: the data set's own, or their numbers.
        num_classes: how many; None: as many as have names, or as targets tell.
        mean: a value a channel, in units of 0..1, subtracted from bytes; None: measured on some of the train split.
        std: by which they are then divided; None: likewise.
        normalised: mean and std that the data set's own transform has normalised its floats by; what predictions of
            image files are told, for nothing else can tell.
        facts: further ones for the model, such as ``{"vocabulary": 500}``, or in the place of those found:
            ``in_channels``, ``image_size`` (images), ``in_features`` (vectors), ``input_shape``, ``num_classes``
            (classes), ``num_outputs`` (other targets).
        workers: processes that read ahead; None: the ``DataLoader``'s, or none.
        seed: of order and transforms; None: the run's, or 0.
        device: of the batches; None: the run's, or the CPU.
        rank: this process; None: the run's, or 0.
        world_size: how many there are; None: the run's, or 1.

    Raises:
        ValueError: for an option out of its range.
        DataError: for what is no such data set, and for items that cannot be learned from.
    """
    if isinstance(train, Mapping):
        train, val, test = splits_of(train, val, test)
    sources = {split: open_source(split, part, inputs, targets) for split, part in
               {"train": train, "val": val, "test": test}.items() if part is not None}  # fmt: skip
    source = sources["train"]
    _require_likeness(sources)
    given = {
        "batch_size": source.batch_size if batch_size is None else batch_size, "eval_batch_size": eval_batch_size,
        "val_fraction": val_fraction, "test_fraction": test_fraction, "split_seed": split_seed,
        "limit_train": limit_train, "limit_val": limit_val, "limit_test": limit_test, "workers": workers,
        "mixup": mixup, "cutmix": cutmix, "seed": seed, "device": device, "rank": rank, "world_size": world_size,
    }  # fmt: skip
    said = {key: value for key, value in given.items() if value is not None}
    options: dict[str, Any] = {"batch_size": 64, "eval_batch_size": 256} | _PLACE.told(said)
    workers = options.pop("workers", None)
    loading = Classifying(**options, augment="none")
    first = source.example(0)
    asked = task or "classification"
    if (loading.mixup or loading.cutmix) and (asked != "classification" or first[0].dim() != 3):
        name = "mixup" if loading.mixup else "cutmix"
        raise ValueError(f"{name} is for labelled images, and this data set is for {asked}, of {list(first[0].shape)}")
    names, labels = list(class_names or source.class_names()), None
    found: dict[str, Any] = _shapes(first[0])
    if asked == "classification":
        _require_label(first[1])
        labels = source.labels(int(first[1]))
        count = num_classes or len(names) or _count(sources.values(), labels)
        _require_classes(count, sum(map(len, sources.values())))
        names = names or [str(number) for number in range(count)]
        if len(names) != count:
            raise ValueError(f"class_names must be as many as num_classes, got {len(names)} names of {count} classes")
        found["num_classes"] = count
    elif asked == "reconstruction":
        found["likelihood"] = "bernoulli"
    elif "." not in asked:
        raise ValueError(f"task must be classification, reconstruction or a dotted name of your own, got {asked!r}")
    elif isinstance(first[1], Tensor):
        found["num_outputs"] = first[1].numel()
    found |= facts or {}

    mixed = loading.split_seed
    order = stratified_order(labels, mixed) if labels is not None else random_order(len(source), mixed)
    test_rows, rest = cut(order, 0.0 if "test" in sources else loading.test_fraction)
    val_rows, train_rows = cut(rest, 0.0 if "val" in sources else loading.val_fraction)
    rows = {"train": train_rows, "val": val_rows, "test": test_rows}
    rows |= {split: torch.arange(len(part)) for split, part in sources.items() if split != "train"}
    limits = {split: f"limit_{split}" for split in rows}
    rows = {split: limited(which, limits[split], getattr(loading, limits[split])) for split, which in rows.items()}

    for part in sources.values():
        part.channels = source.channels
        part.classes = found.get("num_classes") if asked == "classification" else None
        part.reproduced = asked == "reconstruction"
    mix = loading.mixture(found["num_classes"]) if asked == "classification" else None
    statistics: tuple[Sequence[float], Sequence[float]] | None = None
    if first[0].dtype == torch.uint8:
        statistics = ([0.0], [1.0]) if asked == "reconstruction" else _statistics(source, rows["train"], mean, std)
    elif normalised is not None and any(value <= 0 for value in normalised[1]):
        raise ValueError(f"normalised must have a std of values above 0, got {list(normalised[1])}")
    elif mean is not None or std is not None:
        raise ValueError("mean and std are for bytes, and this data set yields floats: give normalised, if they were")

    def loader(split: str) -> OwnLoader:
        part = sources.get(split, source)
        return OwnLoader(
            part, rows[split], statistics=statistics, normalised=normalised,
            workers=part.workers if workers is None else workers, mix=mix, **loading.serving(split == "train"),
        )  # fmt: skip

    return DataModule(name, asked, found, loader("train"), loader("val"), loader("test"), names)


class OwnLoader(StreamedLoader):
    """Serves a user's data set; see `wrap`.

    Args:
        store: the data set.
        rows: which of its items.
        statistics: mean and std of bytes; None: it yields floats.
        normalised: mean and std by which floats have been normalised; None: nobody knows.
        workers: processes that read ahead.
        options: see InMemoryLoader.
    """

    def __init__(
        self,
        store: Source,
        rows: Tensor,
        *,
        statistics: tuple[Sequence[float], Sequence[float]] | None,
        normalised: tuple[Sequence[float], Sequence[float]] | None,
        workers: int,
        **options: Any,
    ) -> None:
        self.served_as_they_are = statistics is None
        mean, std = statistics or normalised or ([0.0], [1.0])
        self.known = statistics is not None or normalised is not None
        super().__init__(store, rows, workers=workers, prefetch=2, mean=mean, std=std, **options)

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """See DataModule.

        Raises:
            DataError: the data set yields floats, which are as its own transforms made them.
        """
        if self.served_as_they_are and hasattr(self, "_scale"):
            raise DataError(
                "this data set yields floats, and the model's weights are for images normalised otherwise: let it "
                "yield bytes (uint8), or give the model no published weights"
            )
        super().normalise(mean, std)

    def preparation(self) -> dict[str, Any] | None:
        """See InMemoryLoader; of floats, only who made them knows."""
        return super().preparation() if self.known and len(self.store.shape) == 3 else None

    def _finished(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not self.served_as_they_are:
            inputs, targets = super()._finished(inputs, targets)
        return (inputs, inputs.flatten(1).clone()) if self.store.reproduced else (inputs, targets)


def _require_likeness(sources: Mapping[str, Source]) -> None:
    """See to it that the inputs of all splits are of one kind; in size they may differ, which models tell of."""
    shapes = {split: list(source.shape) for split, source in sources.items()}
    for split, shape in shapes.items():
        if len(shape) != len(shapes["train"]):
            raise DataError(
                f"inputs of the {split} set are {shape} and those of the train set {shapes['train']}: give two sets of "
                "one kind. Inputs and their targets together are one, torch.utils.data.TensorDataset(inputs, targets)"
            )


def _count(sources: Any, labels: Tensor | None) -> int:
    """How many classes there are, from all targets of all splits."""
    most = -1 if labels is None else int(labels.max())
    for number, source in enumerate(sources):
        if number or labels is None:
            most = max(most, *(int(source.example(row)[1]) for row in range(len(source))))
    return most + 1


def _require_label(target: Tensor) -> None:
    if target.dim() or target.is_floating_point() or target.is_complex():
        raise DataError(
            f"targets of the data set are {str(target.dtype).removeprefix('torch.')} {list(target.shape)}, and a "
            "classification's are whole numbers: give wrap a task of your own, task='mytask.Regression', or "
            "task='reconstruction' for inputs without targets"
        )


def _require_classes(count: int, examples: int) -> None:
    if count < 2:
        raise DataError(
            "the data set has one class (all targets are 0, or it has none, or a single name), and a classification is "
            "of two at least: task='reconstruction' is for inputs without targets"
        )
    if count > max(10 * examples, 100_000):
        raise DataError(
            f"a target of the data set is {count - 1}, and classes are numbered from 0: let it yield their numbers, or "
            "give num_classes"
        )


def _shapes(example: Tensor) -> dict[str, Any]:
    """What its inputs tell a model."""
    found: dict[str, Any] = {"input_shape": list(example.shape)}
    if example.dim() == 3:
        found["in_channels"] = len(example)
        if example.shape[1] == example.shape[2]:
            found["image_size"] = example.shape[1]
    elif example.dim() == 1:  # a vector is an image of one pixel to what takes images apart
        found |= {"in_features": len(example), "in_channels": len(example), "image_size": 1}
    return found


def _statistics(
    source: Source, rows: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation a channel, given or measured."""
    if mean is None or std is None:
        some = spread(rows, min(MEASURED, len(rows))).tolist()
        moments = torch.stack([_moments(source.example(row)[0]) for row in some]).mean(0)
        width = (moments[1] - moments[0].square()).clamp(min=0).sqrt()
        mean = moments[0].tolist() if mean is None else mean
        std = torch.where(width > 0, width, 1.0).tolist() if std is None else std
    if any(value <= 0 for value in std):
        raise ValueError(f"std must hold values above 0, got {list(std)}")
    return mean, std


def _moments(pixels: Tensor) -> Tensor:
    values = pixels.double().flatten(1) / 255
    return torch.stack([values.mean(1), values.square().mean(1)])
