"""Pictures of what a model makes, in the course of training and at its end."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from training.runs.folder import atomic_file
from training.runs.run import Callback, Run

DENSEST = 1200  # dots an inch, at which a picture of a few inches takes some hundred megabytes while it is drawn
CELL = 60  # smaller images are enlarged to about so many pixels a side


def check_resolution(dpi: int) -> None:
    """Refuse a resolution that no picture is drawn in.

    Args:
        dpi: dots an inch.

    Raises:
        ValueError: it is out of its range.
    """
    if not 1 <= dpi <= DENSEST:
        raise ValueError(f"dpi must be from 1 to {DENSEST}, got {dpi}")


class Pictures(Callback, ABC):
    """Draws a picture now and then, for TensorBoard, and at the end, into the run folder; for one kind of task.

    Args:
        columns: images side by side.
        rows: of images.
        every_epochs: how often, at the first evaluation after so many epochs; fractions count.

    Attributes:
        name: of the file in the run folder, without ``.png``, and in TensorBoard.
        task: name of the one whose runs have such a picture.

    Raises:
        ValueError: for a value out of its range.
    """

    name: ClassVar[str]
    task: ClassVar[str]

    def __init__(self, columns: int, rows: int, every_epochs: float) -> None:
        for name, value in {"columns": columns, "rows": rows}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < every_epochs < math.inf:
            raise ValueError(f"every_epochs must be above 0, got {every_epochs}")
        self.columns, self.rows, self.every_epochs = columns, rows, every_epochs
        self._due = 0.0
        self._saved: float | None = None

    def on_fit_start(self, run: Run) -> None:
        """See Callback."""
        self._due = 0.0
        if run.resumed:  # checkpoints of earlier versions do not say
            self._due = self._next(run) if self._saved is None else self._saved

    def on_evaluation(self, run: Run, values: dict[str, float]) -> None:
        """See Callback."""
        if run.epoch < self._due or run.task.name != self.task:
            return
        self._due = self._next(run)
        if run.world.is_main:
            picture = self.draw(run)
            for logger in run.loggers:
                logger.image(self.name, picture, run.step)

    def on_fit_end(self, run: Run, summary: dict[str, Any]) -> None:
        """See Callback."""
        if run.world.is_main and run.task.name == self.task:
            pixels = self.draw(run).permute(1, 2, 0).squeeze(-1)  # [H, W] is a grey picture
            from PIL import Image  # takes a while to import, and most runs draw none

            with atomic_file(run.folder.path / f"{self.name}.png") as file:
                Image.fromarray(pixels.numpy()).save(file, format="png")

    def state_dict(self) -> dict[str, Any]:
        """See Callback."""
        return {"due": self._due}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Callback."""
        self._saved = state["due"]

    @abstractmethod
    def draw(self, run: Run) -> Tensor:
        """The picture, uint8 ``[channels, H, W]`` on the CPU."""

    def _next(self, run: Run) -> float:
        return math.floor(run.epoch / self.every_epochs + 1) * self.every_epochs
