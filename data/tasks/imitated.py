"""Generation: labelled images become loaders with pixels in [-1, 1], which is what a generator's tanh yields.

The labels are served too, and not learned from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from data.base import DataModule
from data.memory import InMemoryLoader
from data.options import Kind, Loading
from data.splits import spread
from data.tasks.labelled import LabelledImages, labelled_set


@dataclass(frozen=True)
class Imitating(Loading):
    """How a set is split and served: what all image sets share, and what there is to say of generation.

    Args:
        frechet: whose features compare real and generated images in evaluation.
        eval_images: how many real images, and as many generated ones, an evaluation takes at most.
        augment: none.
        seed: of the order.

    Raises:
        ValueError: for an option out of its range.
    """

    kind: ClassVar[Kind | None] = Kind("generation", ("in_channels", "image_size", "frechet"))
    frechet: Literal["mnist", "cifar10", "inception"] = "mnist"
    eval_images: int = 2000
    augment: Literal["none"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frechet not in ("mnist", "cifar10", "inception"):
            raise ValueError(f"frechet must be mnist, cifar10 or inception, got {self.frechet!r}")
        if self.eval_images < 2:
            raise ValueError(f"eval_images must be at least 2, got {self.eval_images}")


def imitated_set(name: str, images: LabelledImages, loading: Imitating) -> DataModule:
    """Split what was read as for classification; pixels in [-1, 1], at most ``eval_images`` in an evaluation."""
    labelled = labelled_set(name, images, loading)

    def loader(of: InMemoryLoader) -> InMemoryLoader:
        rows, grey = of.rows, [0.5] * of.store.shape[0]
        if not of.training:
            rows = spread(rows, min(loading.eval_images, len(rows)))
        return InMemoryLoader(
            of.store, rows, batch_size=of.batch_size, mean=grey, std=grey, training=of.training, seed=of.seed,
            device=of.device, rank=of.rank, world_size=of.world_size,
        )  # fmt: skip

    sets = (labelled.train, labelled.val, labelled.test)
    train, val, test = (loader(part) for part in sets if isinstance(part, InMemoryLoader))
    if val.num_examples < 2:
        raise ValueError("limit_val must leave at least 2 images, whose spread is compared")
    facts = {key: labelled.facts[key] for key in ("in_channels", "image_size")}
    facts |= {"frechet": loading.frechet}
    return replace(labelled, task="generation", facts=facts, train=train, val=val, test=test)
