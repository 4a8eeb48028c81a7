"""What ``torch.save`` wrote, read without running anything that comes with it; what is wrong in a sentence."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from models.weights.wording import few

# What ``torch.load`` raises at a file that it does not read, by the kind of damage.
UNREADABLE = (
    OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error,
    zlib.error, zipfile.BadZipFile, pickle.UnpicklingError,
)  # fmt: skip
# What the pickle of a state dict asks for.
OF_TENSORS = re.compile(
    r"collections\.(?:OrderedDict|Counter)|_codecs\.encode|(?:builtins|__builtin__)\.(?:set|bytearray|complex)|"
    r"torch\._utils\._rebuild_\w+|torch\.\w+Storage|torch\.storage\.\w+Storage|torch\.Size|"
    r"torch\.device|torch\.(?:bfloat16|bool|u?int\d+|q?u?int\d+|float\d\w*|complex\d+|strided)|"
    r"torch\.(?:Tensor|nn\.parameter\.\w+|_tensor\.\w+)|torch\.serialization\._get_layout"
)


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
        raise ValueError(_damaged(file)) from error
    if kind:
        raise ValueError(f"{file} {kind}")
    try:
        with file.open("rb") as opened:  # a name would be read for its suffix
            return torch.load(opened, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if others := _other_objects(file):
            raise ValueError(
                f"{file} holds other objects than tensors ({few(others)}), and to read these could run what came with "
                "it: where you trust it, write its state dict alone to a new file, "
                'torch.save(torch.load(FILE, weights_only=False)["state_dict"], NEW), with the key that it has there, '
                "or .state_dict() of it if it is a whole model"
            ) from error
        if zipfile.is_zipfile(file) and "operand" in str(error):
            raise ValueError(
                f"{file} was written with a protocol of pickle that is not read without running it: where you trust "
                "it, write it anew, torch.save(torch.load(FILE, weights_only=False), NEW)"
            ) from error
        raise ValueError(_damaged(file)) from error


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
        held = few(names)
        return f"is a zip archive that torch.save did not write (it holds {held}): give the file of weights inside"
    return ""


def _damaged(file: Path) -> str:
    with file.open("rb") as opened:
        begin = opened.read(4)
    if begin.startswith(b"PK") and not zipfile.is_zipfile(file):
        return f"{file} is damaged: its end is missing, so copy or download it anew"
    return f"{file} cannot be read: it is damaged, or no file of tensors that torch.save wrote"


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
