"""The picture of a confusion matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from training.show.curves import name_of_run

#: Up to so many classes each count is written into its cell, and up to so many each class is named.
COUNTED, NAMED = 20, 50


def plot(counts: Tensor, names: list[str], folder: Path, what: str) -> Figure:
    """Shares of each class as colours, which tell small ones apart, and counts where there is room.

    Args:
        counts: see `confusion` of `classes`.
        names: of the classes.
        folder: of the run.
        what: was measured, for the title.
    """
    classes = len(counts)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    right = float(counts.diagonal().sum() / counts.sum())
    side = min(max(0.42 * classes, 3.0), 10.0)
    longest = 0.085 * max(map(len, names)) if classes <= NAMED else 0.3
    figure = Figure(figsize=(side + 1.9 + longest, side + 1.3 + longest))  # margins in inches
    width, height = figure.get_size_inches()
    axes = figure.add_axes(((0.6 + longest) / width, (0.5 + longest) / height, side / width, side / height))
    image = axes.imshow(shares.numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    if classes <= COUNTED:
        for row, line in enumerate(counts.tolist()):
            for column, count in enumerate(line):
                dark = float(shares[row, column]) > 0.3
                colour = "white" if dark else "black" if count else "#bbbbbb"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
    if classes <= NAMED:
        axes.set_xticks(range(classes), labels=names, rotation=90 if longest > 0.2 else 0)
        axes.set_yticks(range(classes), labels=names)
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    bar = figure.add_axes((1 - 0.95 / width, (0.5 + longest) / height, 0.15 / width, side / height))
    figure.colorbar(image, cax=bar, format=lambda value, _: f"{100 * value:.0f} %", ticks=[0, 0.05, 0.2, 0.5, 1])
    title = f"{name_of_run(folder)}\n{what}: {100 * right:.2f} % right; colours: share of the row"
    figure.suptitle(title, fontsize="medium", y=1 - 0.08 / height, va="top")
    return figure


def pixels(figure: Figure) -> Tensor:
    """A figure as a picture for loggers, uint8 ``[3, H, W]``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1)
