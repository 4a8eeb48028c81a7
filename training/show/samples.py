"""What a generator makes."""

from __future__ import annotations

from torch import Tensor

from models import GAN
from training.loop import rng
from training.runs.run import Run
from training.show.pictures import CELL, Pictures


class SamplePlots(Pictures):
    """Draws images that the generator makes of the same latents every time; only where images are imitated.

    The picture goes to TensorBoard in the course of training and into the run folder, ``samples.png``, when it ends.

    Args:
        columns: images side by side.
        rows: of images.
        every_epochs: how often, at the first evaluation after so many epochs; fractions count.

    Raises:
        ValueError: for a value out of its range.
    """

    name, task = "samples", "generation"

    def __init__(self, columns: int = 10, rows: int = 6, every_epochs: float = 1.0) -> None:
        super().__init__(columns, rows, every_epochs)

    def draw(self, run: Run) -> Tensor:
        """See Pictures."""
        from torchvision.utils import make_grid  # both take a while to import, and most runs draw no such picture

        from training.tasks.generation import Adversarial, as_bytes

        assert isinstance(run.model, GAN) and isinstance(run.task, Adversarial)
        latents = run.task.latents(self.columns * self.rows, run.model.latent)
        with rng.observed(run.model, run.world.device), run.precision.autocast():
            made = run.model.generator(latents.to(run.world.device))
        scale = max(1, CELL // made.shape[-1])
        large = made.float().nan_to_num().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        return make_grid(as_bytes(large), nrow=self.columns, padding=2, pad_value=128).cpu()
