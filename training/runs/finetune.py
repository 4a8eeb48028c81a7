"""Which weights of a pretrained model are trained, and how fast: the entry ``finetune`` of the configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module, freeze: str | None, lr_mult: Mapping[str, float], lr: float | None
) -> list[dict[str, Any]]:
    """Freeze parameters, and put the others into groups with learning rates of their own.

    A pattern is a regular expression that is looked for in the parameters' names. Statistics of batch norms are no
    parameters and go on being gathered in frozen layers.

    Args:
        model: frozen parameters no longer require gradients.
        freeze: pattern of the parameters to leave as they are; None: none.
        lr_mult: factors of the learning rate by pattern; the first pattern found in a name counts.
        lr: learning rate of the parameters that no pattern is found in; None: the optimizer's default, with which
            nothing can be multiplied.

    Returns:
        Groups for an optimizer: those parameters first, then the patterns' in their order.

    Raises:
        ValueError: a pattern is no regular expression or is found in no name, a factor is not positive, or nothing is
            left to train.
    """
    named = dict(model.named_parameters())
    if freeze is not None:
        for name in _matches("freeze", freeze, named):
            named.pop(name).requires_grad_(False)
    named = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if not named:
        raise ValueError(f"freeze {freeze!r} leaves nothing to train: choose a pattern that spares some parameters")
    if lr is None and lr_mult:
        raise ValueError("lr_mult needs a learning rate to multiply: give the optimizer's lr")
    rate = {} if lr is None else {"lr": lr}
    groups = []
    for pattern, factor in lr_mult.items():
        if not 0 < factor < math.inf:
            raise ValueError(f"lr_mult of {pattern!r} must be above 0 (freeze leaves parameters alone), got {factor}")
        chosen = _matches("lr_mult", pattern, named)
        scaled = {key: value * factor for key, value in rate.items()}
        groups.append({"params": [named.pop(name) for name in chosen], **scaled})
    return [{"params": list(named.values()), **rate}, *groups] if named else groups


def _matches(option: str, pattern: str, names: Mapping[str, Any]) -> list[str]:
    """The names that a pattern is found in."""
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ValueError(f"{option} {pattern!r} is no regular expression ({error})") from error
    if not found:
        some = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
        raise ValueError(f"{option} {pattern!r} is found in no name of a trained parameter; they begin with {some}")
    return found
