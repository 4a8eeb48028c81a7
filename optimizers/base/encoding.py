"""State as tensors and numbers in dictionaries, and back; brought where a layer is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..curvature.approximations import statistics_dtype


def adopted(tensors: Mapping[str, Tensor], weight: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies of a layer's tensors where its weight is; what is absent stays so.

    Args:
        tensors: by name.
        weight: the layer's.
        dtype: of floating-point ones; None: that of statistics of such a weight.
    """
    dtype = dtype or statistics_dtype(weight)
    return {
        key: t.to("meta" if t.is_meta else weight.device, dtype if t.is_floating_point() else None, copy=True)
        for key, t in tensors.items()
    }


def encoded(value: Any) -> Any:
    """Nested values as tensors, numbers and dicts of them, which is all that a distributed checkpoint flattens."""
    if isinstance(value, str):
        return {"text": torch.tensor(list(value.encode()), dtype=torch.uint8)}
    # Marks are tensors, which torch takes in from a checkpoint even where the state here has none.
    if value is None:
        return {"none": torch.zeros(1, dtype=torch.int64)}
    if isinstance(value, (list, tuple)):
        length = torch.tensor([len(value)])
        return {"list": length} | {str(i): encoded(item) for i, item in enumerate(value)}
    if not isinstance(value, dict):
        return value
    if not value:
        return {"empty": torch.zeros(1, dtype=torch.int64)}
    found = {key: encoded(item) for key, item in value.items()}
    return value if all(found[key] is value[key] for key in value) else found


def decoded(value: Any) -> Any:
    """Inverse of ``encoded``."""
    if not isinstance(value, dict):
        return value
    if value.keys() == {"text"}:
        return bytes(value["text"].tolist()).decode()
    if value.keys() == {"none"}:
        return None
    if value.keys() == {"empty"}:
        return {}
    if "list" in value:
        return [decoded(value[str(i)]) for i in range(int(value["list"]))]
    # Torch adds what a checkpoint holds to what was there: an empty dictionary may have been filled.
    return {key: decoded(item) for key, item in value.items() if key != "empty"}


def tensors_in(value: Any) -> int:
    """How many tensors there are in nested dictionaries."""
    if isinstance(value, dict):
        return sum(tensors_in(item) for item in value.values())
    return int(isinstance(value, Tensor))
