"""Weights of one run as the beginning of another: `init_from=PATH`."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from models import load, read_weights
from training.errors import UserError
from training.runs.folder import exists, shortened


def warm_start(model: nn.Module, path: str | Path) -> str:
    """Copy every tensor of a file that fits the model; the others stay as they are.

    A head of another class count has another shape and so stays fresh. See `models.weights.fitting.load`.

    Args:
        model: changed in place.
        path: a checkpoint, a state dict (.pt, .safetensors) or a run folder (its best weights).

    Returns:
        A line that says what was loaded, what stayed fresh and what was not used.

    Raises:
        UserError: there is no such file, it holds no weights, or none of them fits.
    """
    try:
        weights, file = read_weights(path if exists(Path(path)) else shortened(str(path)))
        return f"init_from: {load(model, weights, str(file))}"
    except ValueError as error:
        raise UserError(f"init_from={error}") from error
