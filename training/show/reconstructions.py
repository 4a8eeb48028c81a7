"""Pictures of what an auto-encoder makes of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from training.loop import rng
from training.runs.run import Run
from training.show.pictures import CELL, Pictures
from training.tasks.reconstruction import Reconstruction

MARGIN = 255  # brightness of the lines between the images


class ReconstructionPlots(Pictures):
    """Draws validation images above what the model makes of them; only where images are to be reproduced.

    The picture goes to TensorBoard in the course of training and into the run folder, ``reconstructions.png``, when it
    ends. The loss of the best constant output, which a net that has learned nothing is stuck at, becomes an event, so
    that curves can show it.

    Args:
        columns: images side by side.
        rows: pairs of rows: inputs, and below them the outputs.
        every_epochs: how often, at the first evaluation after so many epochs; fractions count.

    Raises:
        ValueError: for a value out of its range.
    """

    name, task = "reconstructions", "reconstruction"

    def __init__(self, columns: int = 12, rows: int = 2, every_epochs: float = 10.0) -> None:
        super().__init__(columns, rows, every_epochs)

    def on_fit_start(self, run: Run) -> None:
        """See Callback."""
        super().on_fit_start(run)
        if run.data.plateau is not None and not run.resumed:
            run.emit("start", {"plateau/loss": run.data.plateau})

    def draw(self, run: Run) -> Tensor:
        """The picture of the first validation images; see Pictures."""
        assert isinstance(run.task, Reconstruction)
        inputs, targets = next(iter(run.data.val.epoch(0)))
        inputs, targets = inputs[: self.columns * self.rows], targets[: self.columns * self.rows]
        with rng.observed(run.model, run.world.device), run.precision.autocast():
            outputs = run.model(run.precision.prepare(inputs))
        made = run.task.pixels(run.precision.full(outputs)).view_as(inputs)
        # Pixels that are centred and scaled are brought back to [0, 1] by the range of the inputs.
        low, high = min(0.0, float(targets.min())), max(1.0, float(targets.max()))
        shown = [((part.float() - low) / (high - low)).nan_to_num().clamp(0, 1) for part in (inputs, made)]
        return self._sheet(*(part.mul(255).round().to("cpu", torch.uint8) for part in shown))

    def _sheet(self, inputs: Tensor, made: Tensor) -> Tensor:
        """Rows of images, each above its copy, as one picture."""
        scale = max(1, CELL // inputs.shape[-1])
        pairs = []
        for above, below in zip(inputs.split(self.columns), made.split(self.columns), strict=True):
            lines = []
            for line in (above, below):
                cells = functional.pad(line, (0, 0, 0, 0, 0, 0, 0, self.columns - len(line)))
                cells = cells.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
                cells = functional.pad(cells, (1, 1, 1, 1), value=MARGIN // 2)
                lines.append(torch.cat(list(cells), dim=2))
            pairs.append(functional.pad(torch.cat(lines, dim=1), (4, 4, 4, 4), value=MARGIN))
        return torch.cat(pairs, dim=1)
