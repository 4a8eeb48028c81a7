"""What an optimizer keeps between steps, in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

#: What parts of ``state_dict()["curvature"]`` are called here; the others keep their names.
CALLED = {"layers": "factors", "samples": "samples", "inverses": "inverses"}

#: Where a parameter's state repeats its layer's curvature for distributed checkpoints.
REPEATED = "curvature"


def held(optimizer: Optimizer) -> dict[str, int]:
    """Bytes of the tensors in ``optimizer.state_dict()``, each counted once, by what they are.

    Args:
        optimizer: any, wrapped or not; its tensors may have no data.

    Returns:
        By name: of a parameter's entry (``momentum_buffer``, ``exp_avg``), ``factors``, ``inverses``, ... They hold no
        gradients, parameters or buffers.
    """
    found: dict[str, int] = {}
    seen: dict[Any, Tensor] = {}  # tensors too, so that no place is used twice meanwhile
    for kind, tensor in _parts(optimizer.state_dict()):
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape)
        if place not in seen and not tensor.is_meta:  # a meta tensor is another process's
            seen[place] = tensor
            found[kind] = found.get(kind, 0) + tensor.numel() * tensor.element_size()
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def total(optimizer: Optimizer) -> int:
    """Bytes of all that an optimizer keeps."""
    return sum(held(optimizer).values())


def _parts(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a state with what they are."""
    for entry in state["state"].values():
        for key, value in entry.items():
            if key != REPEATED:
                for tensor in tensors(value):
                    yield str(key), tensor
    for key, value in state.get("curvature", {}).items():
        for tensor in tensors(value):
            yield CALLED.get(key, key), tensor
    for key, value in state.items():
        if key not in ("state", "curvature", "param_groups"):
            for tensor in tensors(value):
                yield str(key), tensor
    for tensor in tensors(state.get("param_groups", [])):
        yield "groups", tensor


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
