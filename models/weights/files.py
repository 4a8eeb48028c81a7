"""Files of weights, of any program: which of their formats one has, and where in it the tensors are."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models.weights.pickles import read_pickled
from models.weights.wording import few

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
# The beginnings of files that people give in place of weights, and what to say of them.
FOREIGN = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself: fetch that with git lfs pull"),
    (b"\x89HDF", "is an HDF5 file, as Keras writes: save its weights as a state dict of torch"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it and give the file inside"),
    (b"7z\xbc\xaf", "is a 7z archive: unpack it and give the file inside"),
    (b"\x93NUMPY", "is a file of numpy: save its arrays as a state dict of torch"),
    (b"GGUF", "is a GGUF file: give the weights as torch or safetensors has them"),
)
SAFETENSORS_MOST = 100_000_000  # bytes of a header, by the format


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
                    f"{file} holds several sets of tensors ({few([repr(key) for key in wrapped])}): save the state "
                    "dict that is wanted alone"
                )
        if not wrapped:
            break
        if others := [repr(key) for key in wrapped[1:]]:
            log.warning("%s: the weights are those under %r; %s hold some, too", file, wrapped[0], few(others))
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
