"""Pictures of what an auto-encoder makes of its inputs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from training import rng
from training.callbacks import Callback
from training.tasks import Reconstruction

if TYPE_CHECKING:
    from training.run import Run

MARGIN = 255  # brightness of the lines between the images
CELL = 60  # smaller images are enlarged to about so many pixels a side


class ReconstructionPlots(Callback):
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

    def __init__(self, columns: int = 12, rows: int = 2, every_epochs: float = 10.0) -> None:
        for name, value in {"columns": columns, "rows": rows}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < every_epochs < math.inf:
            raise ValueError(f"every_epochs must be above 0, got {every_epochs}")
        self.columns, self.rows, self.every_epochs = columns, rows, every_epochs
        self._due = 0.0

    def on_fit_start(self, run: Run) -> None:
        """See Callback."""
        self._due = math.floor(run.epoch / self.every_epochs + 1) * self.every_epochs if run.resumed else 0.0
        if run.data.plateau is not None and not run.resumed:
            run.emit("start", {"plateau/loss": run.data.plateau})

    def on_evaluation(self, run: Run, values: dict[str, float]) -> None:
        """See Callback."""
        if run.epoch < self._due or not isinstance(run.task, Reconstruction):
            return
        self._due = math.floor(run.epoch / self.every_epochs + 1) * self.every_epochs
        if run.world.is_main:
            picture = self.draw(run)
            for logger in run.loggers:
                logger.image("reconstructions", picture, run.step)

    def on_fit_end(self, run: Run, summary: dict[str, Any]) -> None:
        """See Callback."""
        if run.world.is_main and isinstance(run.task, Reconstruction):
            pixels = self.draw(run).permute(1, 2, 0).squeeze(-1)  # [H, W] is a grey picture
            Image.fromarray(pixels.numpy()).save(run.folder.path / "reconstructions.png")

    def draw(self, run: Run) -> Tensor:
        """The picture of the first validation images, uint8 ``[C, H, W]``."""
        assert isinstance(run.task, Reconstruction)
        inputs, targets = next(iter(run.data.val.epoch(0)))
        inputs, targets = inputs[: self.columns * self.rows], targets[: self.columns * self.rows]
        run.model.eval()
        try:
            with torch.no_grad(), rng.untouched(run.world.device), run.precision.autocast():
                outputs = run.model(run.precision.prepare(inputs))
        finally:
            run.model.train()
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
