"""Weights that others trained, or an earlier run: read from a file, fitted to a model, and accounted for."""

from __future__ import annotations

import io
import logging
import math
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

log = logging.getLogger(__name__)

# Where programs put the weights inside a checkpoint, the first one that is there first: ours, Lightning's, many
# scripts'. Averaged copies come last: they are what is wanted only where there is nothing else.
WRAPPERS = (
    "model", "state_dict", "model_state_dict", "model_state", "net", "network", "module", "params", "weights",
    "model_weights", "model_params", "net_state_dict", "state", "student", "backbone", "encoder", "generator",
    "ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "params_ema",
    "teacher",
)  # fmt: skip
DEEPEST = 4  # wrappers within each other
# What torch.compile, FSDP and activation checkpoints put into names, wherever the module is that they wrap.
INSERTED = re.compile(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
# An averaged copy is named by such a part of its prefix.
AVERAGED = re.compile(r"ema|average|avg|swa|teacher|target|shadow|momentum|key_encoder|encoder_k")
# What ``torch.load`` raises at a file that it does not read, by the kind of damage.
UNREADABLE = (
    OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error,
    zlib.error, zipfile.BadZipFile, pickle.UnpicklingError,
)  # fmt: skip
LONGEST_PREFIX = 4  # parts
# The beginnings of files that people give in place of weights, and what to say of them.
FOREIGN = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself: fetch that with git lfs pull"),
    (b"\x89HDF", "is an HDF5 file, as Keras writes: save its weights as a state dict of torch"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it and give the file inside"),
    (b"7z\xbc\xaf", "is a 7z archive: unpack it and give the file inside"),
    (b"\x93NUMPY", "is a file of numpy: save its arrays as a state dict of torch"),
    (b"GGUF", "is a GGUF file: give the weights as torch or safetensors has them"),
)
# What the pickle of a state dict asks for.
OF_TENSORS = re.compile(
    r"collections\.(?:OrderedDict|Counter)|_codecs\.encode|(?:builtins|__builtin__)\.(?:set|bytearray|complex)|"
    r"torch\._utils\._rebuild_\w+|torch\.\w+Storage|torch\.storage\.\w+Storage|torch\.Size|"
    r"torch\.device|torch\.(?:bfloat16|bool|u?int\d+|q?u?int\d+|float\d\w*|complex\d+|strided)|"
    r"torch\.(?:Tensor|nn\.parameter\.\w+|_tensor\.\w+)|torch\.serialization\._get_layout"
)
SAFETENSORS_MOST = 100_000_000  # bytes of a header, by the format

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
        return "; ".join([*lines, *(f"{what}: {_few(names)}" for what, names in parts.items() if names)])


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], Path]:
    """The state dict in a file, names without what torch.compile, FSDP and checkpointing put into them.

    Nothing that comes with a file is run: of a pickle, tensors and plain containers are read and nothing else.

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
    content = _unwrapped(_content(file), file)
    return {INSERTED.sub(r"\1", str(name)): value for name, value in content.items() if isinstance(value, Tensor)}, file


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
        weights: a state dict, of the model as it is or as it was before ``models.plain.plain_layers``.
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


def read_pickled(file: Path) -> Any:
    """What ``torch.save`` wrote to a file: tensors and plain containers, on the CPU; nothing else is unpickled.

    Args:
        file: it.

    Returns:
        The content.

    Raises:
        ValueError: it is damaged, of another kind, or holds other objects; the sentence says which.
    """
    try:
        kind = _archive(file)
    except (OSError, RuntimeError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
        raise _damaged(file) from error
    if kind:
        raise ValueError(f"{file} {kind}")
    try:
        with file.open("rb") as opened:  # a name would be read for its suffix
            return torch.load(opened, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if others := _other_objects(file):
            raise ValueError(
                f"{file} holds other objects than tensors ({_few(others)}), and to read these could run what came with "
                "it: where you trust it, write its state dict alone to a new file, "
                'torch.save(torch.load(FILE, weights_only=False)["state_dict"], NEW), with the key that it has there, '
                "or .state_dict() of it if it is a whole model"
            ) from error
        if zipfile.is_zipfile(file) and "operand" in str(error):
            raise ValueError(
                f"{file} was written with a protocol of pickle that is not read without running it: where you trust "
                "it, write it anew, torch.save(torch.load(FILE, weights_only=False), NEW)"
            ) from error
        raise _damaged(file) from error


def _archive(file: Path) -> str:
    """What to say of a zip archive that is damaged, or that is none of a state dict; else ""."""
    if not zipfile.is_zipfile(file):
        return ""
    with zipfile.ZipFile(file) as archive:
        if (broken := archive.testzip()) is not None:
            return f"is damaged (checksum of {broken!r})"
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        return "is a TorchScript archive, a program and not weights: save the state_dict() of the model"
    if not any(name.endswith("data.pkl") for name in names):
        held = _few(names)
        return f"is a zip archive that torch.save did not write (it holds {held}): give the file of weights inside"
    return ""


def _content(file: Path) -> Any:
    """What a file holds; which of the two formats it has is told by its first bytes, not by its name."""
    with file.open("rb") as opened:
        begin = opened.read(512)
    if not begin:
        raise ValueError(f"{file} is empty: download or save it anew")
    for mark, sentence in FOREIGN:
        if begin.startswith(mark):
            raise ValueError(f"{file} {sentence}")
    if begin[257:262] == b"ustar":
        raise ValueError(f"{file} is a tar archive: unpack it and give the file of weights inside")
    text = begin.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        raise ValueError(f"{file} is a web page, not weights: download the file itself")
    if text.startswith(b"{") and b'"' in text[:40]:
        raise ValueError(f"{file} is JSON, an index or a message, not weights: give the file of the tensors themselves")
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") <= SAFETENSORS_MOST:
        return _safetensors(file)
    if file.suffix == ".safetensors" and not zipfile.is_zipfile(file) and not begin.startswith((b"\x80", b"PK")):
        return _safetensors(file)
    return read_pickled(file)


def _safetensors(file: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: it is damaged, or no safetensors file") from error


def _damaged(file: Path) -> ValueError:
    with file.open("rb") as opened:
        begin = opened.read(4)
    if begin.startswith(b"PK") and not zipfile.is_zipfile(file):
        return ValueError(f"{file} is damaged: its end is missing, so copy or download it anew")
    return ValueError(f"{file} cannot be read: it is damaged, or no file of tensors that torch.save wrote")


def _other_objects(file: Path) -> list[str]:
    """The functions and classes that a pickle asks for and that are none of a state dict; nothing is unpickled."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                found = set(_globals(io.BytesIO(archive.read(name)), 1))
        else:  # of old: number, protocol and system in a pickle each, then the object
            with file.open("rb") as opened:
                found = set(_globals(opened, 4))
    except (OSError, StopIteration, ValueError):  # damaged, or the end of the last pickle
        return []
    known = torch.serialization.get_safe_globals()
    named = {f"{kind.__module__}.{kind.__qualname__}" for kind in known if isinstance(kind, type)}
    return sorted(name for name in found if name not in named and not OF_TENSORS.fullmatch(name))


def _globals(stream: Any, pickles: int) -> Iterator[str]:
    """The names of what pickles import, read off their instructions."""
    for _ in range(pickles):
        strings: list[str] = []
        try:
            for code, argument, _ in pickletools.genops(stream):
                if code.name == "GLOBAL":
                    yield str(argument).replace(" ", ".")
                elif code.name == "STACK_GLOBAL":
                    yield ".".join(strings[-2:])
                elif isinstance(argument, str):
                    strings.append(argument)
        except (ValueError, EOFError, IndexError):
            return


def _unwrapped(content: Any, file: Path) -> Mapping[Any, Any]:
    """The mapping from names to tensors inside a checkpoint."""
    for _ in range(DEEPEST):
        if not isinstance(content, Mapping):
            break
        parts = {key: part for key, part in content.items() if isinstance(part, Mapping) and _has_tensors(part)}
        wrapped = [key for key in WRAPPERS if key in parts]
        if not wrapped and not _is_state_dict(content):
            wrapped = list(parts)  # under a name of its own
            if len(wrapped) > 1:
                raise ValueError(
                    f"{file} holds several sets of tensors ({_few([repr(key) for key in wrapped])}): save the state "
                    "dict that is wanted alone"
                )
        if not wrapped:
            break
        if others := [repr(key) for key in wrapped[1:]]:
            log.warning("%s: the weights are those under %r; %s hold some, too", file, wrapped[0], _few(others))
        content = parts[wrapped[0]]
    if not _is_state_dict(content):
        raise ValueError(f"{file} holds no state dict (a mapping from names to tensors)")
    return content


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, Mapping) and any(isinstance(value, Tensor) for value in content.values())


def _has_tensors(content: Mapping[Any, Any], depth: int = DEEPEST) -> bool:
    """Whether a mapping is a state dict, or holds one."""
    return _is_state_dict(content) or (
        depth > 0 and any(isinstance(part, Mapping) and _has_tensors(part, depth - 1) for part in content.values())
    )


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
    return _few([f"{name} {list(value.shape)}" for name, value in weights.items()], most=2)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
