"""Weights that others trained, or an earlier run: read from a file, fitted to a model, and accounted for."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

# Where programs put the weights inside a checkpoint: ours, Lightning's, many scripts'.
WRAPPERS = ("model", "state_dict", "model_state_dict")
# What DistributedDataParallel and torch.compile put before a name.
PREFIXES = ("module.", "_orig_mod.")
EXTRA_TOKENS = 8  # at most so many class and register tokens stand before the positions of a grid

# Mean and std a channel, in units of 0..1, of the pixels that weights were trained on.
Statistics = tuple[Sequence[float], Sequence[float]]
# Downloads what a package publishes.
Published = Callable[[], tuple[Mapping[str, Tensor], Statistics]]


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
    """

    source: str
    total: int
    loaded: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = {
            "adapted": self.adapted,
            "replaced by fresh ones (other shape)": self.replaced,
            "fresh (not in the file)": self.fresh,
            "not used": self.unused,
        }
        count = len(self.loaded) + len(self.adapted)
        lines = [f"{count} of {self.total} tensors loaded from {self.source}"]
        return "; ".join([*lines, *(f"{what}: {_few(names)}" for what, names in parts.items() if names)])


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], Path]:
    """The state dict in a file, names without wrappers' prefixes.

    Args:
        path: a state dict or a checkpoint that holds one (.pt, .pth), a .safetensors file, or a run folder (its best
            weights).

    Returns:
        The tensors, on the CPU, and the file they are from.

    Raises:
        ValueError: there is no such file, or none that can be read, or it holds no weights.
    """
    path = Path(path)
    file = path / "checkpoints" / "best.pt" if path.is_dir() else path
    if not file.is_file():
        what = "no checkpoints/best.pt in this folder" if path.is_dir() else "there is no such file"
        raise ValueError(f"{path}: {what}; give a checkpoint, a state dict or a run folder")
    content = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{file} holds no state dict (a mapping from names to tensors)")
    return {_bare(name): value for name, value in content.items() if isinstance(value, Tensor)}, file


def load(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> Loaded:
    """Copy into a model whatever fits it; nothing else of it changes.

    A tensor fits under its name and with its shape. Where the shape is another, two kinds are adapted: the first
    convolution's input channels, summed up for one channel and else repeated at the same expected response; and the
    positions of a grid, resampled (Dosovitskiy et al., 2021, section 3.2). All others, a head for other classes among
    them, stay fresh.

    Args:
        model: changed in place.
        weights: a state dict, of the model as it is or as it was before ``models.plain.plain_layers``.
        source: what to call them.

    Returns:
        The account.

    Raises:
        ValueError: nothing that is trained fits.
    """
    weights = dict(weights)
    for prefix, module in model.named_modules():
        if rename := getattr(module, "rename", None):
            rename(weights, f"{prefix}." if prefix else "")
    own = model.state_dict()
    stem = next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)
    account = Loaded(source, len(own), unused=[name for name in weights if name not in own])
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
            "choose the model that the file is of"
        )
    own.update(new)  # keeps the versions of its layers' formats, which some ask for
    model.load_state_dict(own)
    return account


def load_pretrained(model: nn.Module, pretrained: bool | str, published: Published) -> None:
    """Do what the option ``pretrained`` of a model says; the account is kept as ``model.loaded``.

    Published weights expect pixels normalised as in their training: with which mean and std, ``model.statistics`` says.
    Of a file that is not known, and images stay normalised by their own.

    Args:
        model: changed in place.
        pretrained: false: nothing; true: the published weights; else a path, see ``read_weights``.
        published: downloads the published weights, and knows the statistics of the images they expect.

    Raises:
        ValueError: they cannot be had, or do not fit.
    """
    if pretrained is False:
        return
    if pretrained is True:
        try:
            weights, statistics = published()
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"pretrained weights cannot be downloaded ({_first_line(error)}): give pretrained=PATH of a file that "
                "holds them, or try again with a connection"
            ) from error
        model.loaded = load(model, weights, "the published weights")  # type: ignore[assignment]
        model.statistics = statistics  # type: ignore[assignment]
        return
    try:
        weights, file = read_weights(pretrained)
        model.loaded = load(model, weights, str(file))  # type: ignore[assignment]
    except ValueError as error:
        raise ValueError(f"pretrained={error}") from error


def published_by_torchvision(name: str) -> Published:
    """What downloads a torchvision model's newest weights."""

    def published() -> tuple[Mapping[str, Tensor], Statistics]:
        newest = torchvision.models.get_model_weights(name).DEFAULT
        expected = newest.transforms()
        return newest.get_state_dict(progress=False, check_hash=True), (expected.mean, expected.std)

    return published


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


def _safetensors(file: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: it is damaged, or no safetensors file") from error


def _pickled(file: Path) -> Any:
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if (broken := archive.testzip()) is not None:
                    raise ValueError(f"{file} is damaged (checksum of {broken!r})")
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} cannot be read: it is damaged, or no file of tensors that torch.save wrote"
        ) from error


def _bare(name: Any) -> str:
    text = str(name)
    while text.startswith(PREFIXES):
        text = text.split(".", 1)[1]
    return text


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
