"""Files of MATLAB, in which the auto-encoder problems are published."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from torch import Tensor

from data.base import DataError
from data.sources.downloads import reason

# What a file raises that is no .mat, or half of one.
UNREADABLE = (OSError, ValueError, TypeError, KeyError, EOFError, NotImplementedError, zlib.error, MatReadError)


def read_mat(path: Path, shapes: dict[str, tuple[int, int]]) -> list[np.ndarray]:
    """The named arrays of a .mat file."""
    try:
        content = loadmat(path, variable_names=list(shapes))
        arrays = [content[name] for name in shapes]
    except UNREADABLE as error:
        raise DataError(
            f"{path.absolute()} cannot be read ({reason(error)}): remove it, or put it there anew"
        ) from error
    for (name, shape), array in zip(shapes.items(), arrays, strict=True):
        if array.shape != shape:
            raise DataError(
                f"{path.absolute()} has {name} of shape {list(array.shape)}, not {list(shape)}: put the published "
                "file there"
            )
    return arrays


def unit_bytes(path: Path, array: np.ndarray) -> Tensor:
    """Values in [0, 1], which may have been rounded, as bytes."""
    if array.dtype == np.uint8:
        return torch.from_numpy(array)
    if not (array.min() >= -1e-3 and array.max() <= 1 + 1e-3):
        raise DataError(f"{path.absolute()} has values outside [0, 1]: put the published file there")
    return torch.from_numpy(np.rint(255 * array.clip(0, 1)).astype(np.uint8))
