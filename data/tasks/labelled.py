"""Classification: labelled images become three loaders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from data.base import DataModule
from data.memory import Augmentation, ImageStore, InMemoryLoader, pixel_statistics
from data.options import Loading
from data.splits import cut, limited, stratified_order
from data.tasks.mixing import Classifying, distorted

Labelled = tuple[Tensor, Tensor]  # images uint8 [N, C, H, W], targets int64 [N]


@dataclass(frozen=True)
class LabelledImages:
    """What a builder has read. Splits that it does not have are taken off ``train``."""

    train: Labelled
    class_names: list[str]
    val: Labelled | None = None
    test: Labelled | None = None
    statistics: tuple[list[float], list[float]] | None = None  # mean and std; None: of the train split
    flip: bool = True  # whether a mirrored image still shows its class


def labelled_set(name: str, images: LabelledImages, loading: Loading) -> DataModule:
    """Split what was read into train, val and test, and make their loaders."""
    channels, size, _ = images.train[0].shape[1:]
    augmentation, mix = augmentation_of(loading.augment, size, images.flip), None
    if isinstance(loading, Classifying):
        mix = loading.mixture(len(images.class_names))
        if distortion := loading.distortion():
            augmentation = replace(augmentation, distort=partial(distorted, distortion=distortion))

    # One stratified order, cut in up to three: [test | val | train].
    order = stratified_order(images.train[1], loading.split_seed)
    test_rows, rest = cut(order, 0.0 if images.test else loading.test_fraction)
    val_rows, train_rows = cut(rest, 0.0 if images.val else loading.val_fraction)
    mean, std = images.statistics or pixel_statistics(images.train[0], train_rows)

    pool = ImageStore(*images.train, padding=augmentation.crop, device=loading.device)
    val, test = (ImageStore(*part, device=loading.device) if part else None for part in (images.val, images.test))
    if val:
        val_rows = stratified_order(val.targets.cpu(), loading.split_seed)
    if test:
        test_rows = torch.arange(len(test))

    def loader(store: ImageStore, rows: Tensor, training: bool = False) -> InMemoryLoader:
        return InMemoryLoader(
            store,
            rows,
            mean=mean,
            std=std,
            augmentation=augmentation,
            mix=mix,
            **loading.serving(training),
        )

    return DataModule(
        name=name,
        task="classification",
        facts={"in_channels": channels, "num_classes": len(images.class_names), "image_size": size},
        train=loader(pool, limited(train_rows, "limit_train", loading.limit_train), training=True),
        val=loader(val or pool, limited(val_rows, "limit_val", loading.limit_val)),
        test=loader(test or pool, limited(test_rows, "limit_test", loading.limit_test)),
        class_names=images.class_names,
    )


def augmentation_of(augment: str, size: int, flip: bool) -> Augmentation:
    """As published for 32 pixels (crop 4, hole 16); smaller images get a crop of an eighth and a hole of half."""
    if augment == "none":
        return Augmentation()
    return Augmentation(crop=min(4, size // 8), flip=flip, cutout=min(16, size // 2) if augment == "cutout" else 0)
