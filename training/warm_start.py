"""Weights of one run as the beginning of another: `init_from=PATH`."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.errors import UserError

# Where programs put the weights inside a checkpoint: ours, Lightning's, many scripts'.
WRAPPERS = ("model", "state_dict", "model_state_dict")
# What DistributedDataParallel and torch.compile put before a name.
PREFIXES = ("module.", "_orig_mod.")


def warm_start(model: nn.Module, path: str | Path) -> str:
    """Copy every tensor of a file that the model has under the same name and shape; the others stay as they are.

    A head of another class count has another shape and so stays fresh.

    Args:
        model: changed in place.
        path: a checkpoint, a file with a plain state dict, or a run folder (its best weights).

    Returns:
        A line that says what was loaded, what stayed fresh and what was not used.

    Raises:
        UserError: there is no such file, it holds no weights, or none of them fits.
    """
    file = _file(Path(path))
    weights = _weights(file)
    own = model.state_dict()
    fitting = {name: tensor for name, tensor in weights.items() if name in own and own[name].shape == tensor.shape}
    trainable = {name for name, _ in model.named_parameters()}
    if not trainable & fitting.keys():
        raise UserError(
            f"init_from={file}: none of its {len(weights)} tensors fits this model by name and shape: "
            "choose the model that the file is of"
        )
    model.load_state_dict({**own, **fitting})
    parts = [f"init_from: {len(fitting)} of {len(own)} tensors loaded from {file}"]
    other_shape = [name for name in own if name in weights and name not in fitting]
    reshaped = [f"{name} {_shape(weights[name])} -> {_shape(own[name])}" for name in other_shape]
    absent = [name for name in own if name not in weights]
    unused = [name for name in weights if name not in own]
    parts += [f"replaced by fresh ones (other shape): {_few(reshaped)}"] if reshaped else []
    parts += [f"fresh (not in the file): {_few(absent)}"] if absent else []
    parts += [f"not used: {_few(unused)}"] if unused else []
    return "; ".join(parts)


def _file(path: Path) -> Path:
    """The file that a path means: itself, or a run folder's best checkpoint."""
    file = path / "checkpoints" / "best.pt" if path.is_dir() else path
    if not file.is_file():
        what = "no checkpoints/best.pt in this folder" if path.is_dir() else "there is no such file"
        raise UserError(f"init_from={path}: {what}; give a checkpoint, a state dict or a run folder")
    return file


def _weights(file: Path) -> dict[str, Tensor]:
    """The state dict inside a file, names without wrappers' prefixes."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if (broken := archive.testzip()) is not None:
                    raise UserError(f"init_from={file} is damaged (checksum of {broken!r})")
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise UserError(
            f"init_from={file} cannot be read: it is damaged, or no file of tensors that torch.save wrote"
        ) from error
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"init_from={file} holds no state dict (a mapping from names to tensors)")
    return {_bare(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _bare(name: Any) -> str:
    text = str(name)
    while text.startswith(PREFIXES):
        text = text.split(".", 1)[1]
    return text


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
