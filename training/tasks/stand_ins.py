"""Made-up data of the kind that a model is for, where its shapes alone matter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from training.tasks.build import build
from training.tasks.task import Task


def stand_in(asks: Collection[str], facts: Mapping[str, int], seed: int) -> tuple[Task, dict[str, Any], Tensor, Tensor]:
    """A task, the facts of its data, and a batch of them.

    Args:
        asks: names of the facts that a model's factory asks for: they tell what it is for.
        facts: ``batch_size``; of images ``in_channels``, ``image_size``, ``num_classes``; of texts ``sequence``,
            ``vocabulary``.
        seed: of the numbers.

    Returns:
        Task, what the model's factory is told, inputs, targets.
    """
    generator = torch.Generator().manual_seed(seed)
    size = facts["batch_size"]
    if "vocabulary" in asks:
        words = [str(token) for token in range(facts["vocabulary"])]
        told: dict[str, Any] = {"vocabulary": len(words), "sequence": facts["sequence"], "words": words}
        window = torch.randint(0, len(words), (size, facts["sequence"] + 1), generator=generator)
        return build("language_modelling", told), told, window[:, :-1], window[:, 1:]
    told = {key: facts[key] for key in ("in_channels", "image_size", "num_classes")}
    shape = (size, told["in_channels"], told["image_size"], told["image_size"])
    if "num_classes" in asks:
        labels = torch.randint(0, told["num_classes"], (size,), generator=generator)
        return build("classification", told), told, torch.randn(shape, generator=generator), labels
    images = torch.rand(shape, generator=generator)  # what has no classes gives its images back
    return build("reconstruction", told | {"likelihood": "bernoulli"}), told, images, images.flatten(1)
