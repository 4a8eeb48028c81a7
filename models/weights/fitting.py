"""Weights fitted to a model by name and shape, and the account of what became of each tensor."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.weights.wording import few

log = logging.getLogger(__name__)

# An averaged copy is named by such a part of its prefix.
AVERAGED = re.compile(r"ema|average|avg|swa|teacher|target|shadow|momentum|key_encoder|encoder_k")
LONGEST_PREFIX = 4  # parts
EXTRA_TOKENS = 8  # at most so many class and register tokens stand before the positions of a grid


@dataclass
class Loaded:
    """What became of each tensor; ``str`` of it is a line for the user.

    Attributes:
        source: where the weights are from.
        total: tensors of the model.
        loaded: names of those that are now as in the source.
        adapted: those brought to the model's shape, described.
        replaced: those that stayed fresh because they have another shape (a head, a stem), described.
        fresh: names of those that the source does not have.
        unused: names of those that the model does not have.
        prefix: what the source has in front of the model's names, as a wrapper of it puts there.
    """

    source: str
    total: int
    loaded: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    prefix: str = ""

    def __str__(self) -> str:
        parts = {
            "adapted": self.adapted,
            "replaced by fresh ones (other shape)": self.replaced,
            "fresh (not in the file)": self.fresh,
            "not used": self.unused,
        }
        count = len(self.loaded) + len(self.adapted)
        lines = [f"{count} of {self.total} tensors loaded from {self.source}"]
        return "; ".join([*lines, *(f"{what}: {few(names)}" for what, names in parts.items() if names)])


def load(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> Loaded:
    """Copy into a model whatever fits it; nothing else of it changes.

    A tensor fits under its name and with its shape. Where the shape is another, two kinds are adapted: the first
    convolution's input channels, summed up for one channel and else repeated at the same expected response; and the
    positions of a grid, resampled (Dosovitskiy et al., 2021, section 3.2). All others, a head for other classes among
    them, stay fresh.

    Where the names fit better without a prefix (``model.`` of Lightning, ``module.``, ``backbone.``, ``net.``, several
    of them, ...), it is taken off; whatever has another one, a loss or an averaged copy, is not used.

    Args:
        model: changed in place.
        weights: a state dict, of the model as it is or as it was before ``models.parts.plain.plain_layers``.
        source: what to call them.

    Returns:
        The account.

    Raises:
        ValueError: nothing that is trained fits.
    """
    given_names = weights
    own = model.state_dict()
    weights, prefix = _fitted(weights, model, own)
    stem = next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)
    account = Loaded(source, len(own), unused=[name for name in weights if name not in own], prefix=prefix)
    new: dict[str, Tensor] = {}
    for name, mine in own.items():
        if name not in weights:
            account.fresh.append(name)
        elif (given := weights[name]).shape == mine.shape:
            account.loaded.append(name)
            new[name] = given
        else:
            change = f"{name} {list(given.shape)} -> {list(mine.shape)}"
            adapted = _channels(given, mine.shape) if name == f"{stem}.weight" else None
            adapted = _positions(given, mine.shape) if "pos" in name and given.is_floating_point() else adapted
            (account.replaced if adapted is None else account.adapted).append(change)
            if adapted is not None:
                new[name] = adapted
    if not any(name in new for name, _ in model.named_parameters()):
        raise ValueError(
            f"{source}: none of its {len(weights)} tensors fits this model by name and shape: "
            f"choose the model that the file is of (it has {_shapes(given_names)}; the model has {_shapes(own)})"
        )
    if prefix:
        log.info("%s: its names begin with %r, which is left out", source, prefix)
    own.update(new)  # keeps the versions of its layers' formats, which some ask for
    model.load_state_dict(own)
    return account


def _channels(given: Tensor, shape: torch.Size) -> Tensor | None:
    """The kernels of a first convolution for another number of input channels, or None if more than that differs."""
    if given.dim() != 4 or (given.shape[0], given.shape[2:]) != (shape[0], shape[2:]):
        return None
    if shape[1] == 1:
        return given.sum(1, keepdim=True)
    before, after = given.shape[1], shape[1]
    return given[:, torch.arange(after) % before] * (before / after)


def _positions(given: Tensor, shape: torch.Size) -> Tensor | None:
    """A square grid of positions at another size, bicubic; None for anything else.

    ``[1, positions, width]`` (after class tokens, which stay) or ``[offsets, heads]``, the table of a window.
    """
    if given.dim() != len(shape) or given.dim() not in (2, 3) or given.shape[-1] != shape[-1]:
        return None
    before, after = given.shape[-2], shape[-2]
    extra = next((n for n in range(EXTRA_TOKENS) if all(map(_is_square, (before - n, after - n)))), None)
    if extra is None or (given.dim() == 3 and (given.shape[0], shape[0]) != (1, 1)):
        return None
    table = given.reshape(before, -1)
    side, wanted = math.isqrt(before - extra), math.isqrt(after - extra)
    grid = table[extra:].T.reshape(1, -1, side, side).float()
    grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", antialias=wanted < side)
    return torch.cat([table[:extra], grid.flatten(2)[0].T.to(table.dtype)]).reshape(shape)


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _fitted(
    weights: Mapping[str, Tensor], model: nn.Module, own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str]:
    """Weights under the model's names, and the prefix that was taken off for it, "" for most."""
    renaming = [
        (rename, f"{where}." if where else "")
        for where, module in model.named_modules()
        if (rename := getattr(module, "rename", None))
    ]

    def without(prefix: str) -> dict[str, Tensor]:
        bare = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        # Others keep their names, and are no match for what has the prefix: a copy, a loss; or a head that has none.
        found = {**{name: value for name, value in weights.items() if not name.startswith(prefix)}, **bare}
        for rename, where in renaming:
            rename(found, where)
        return found

    def fit(found: Mapping[str, Tensor]) -> tuple[int, int]:
        same = [name for name in found if name in own]
        return sum(found[name].shape == own[name].shape for name in same), len(same)

    counts: Counter[str] = Counter()
    ends = Counter(name.split(".", 1)[0] for name in own)
    for name in weights:
        parts = name.split(".")
        for length in range(1, min(LONGEST_PREFIX, len(parts) - 1) + 1):
            # What is left has to begin as a name of the model does.
            if parts[length] in ends:
                counts[".".join(parts[:length]) + "."] += 1
    best, prefix = without(""), ""
    score = fit(best)
    # In the order of the file, averaged copies last: of equals, the first one is taken.
    for candidate in sorted(counts, key=lambda text: bool(AVERAGED.search(text.lower()))):
        if counts[candidate] <= score[0]:
            continue  # cannot be better
        found = without(candidate)
        # A few names fit by chance, as those of a block fit a smaller model: half of the model has to be there, or half
        # of what has the prefix, if that is half of the file.
        new = fit(found)
        much = 2 * new[1] >= len(own) or 2 * new[1] >= counts[candidate] >= len(weights) / 2
        if new > score and much:
            best, prefix, score = found, candidate, new
    return best, prefix


def _shapes(weights: Mapping[str, Tensor]) -> str:
    """Examples of names, with their shapes."""
    return few([f"{name} {list(value.shape)}" for name, value in weights.items()], most=2)
