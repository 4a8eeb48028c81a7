"""A table of the validation metrics, a line an evaluation."""

from training.callbacks import Callback
from training.runs.run import Run


class Table(Callback):
    """Writes a file into the run folder."""

    def __init__(self, name: str = "validation.csv") -> None:
        self.name = name

    def on_evaluation(self, run: Run, values: dict[str, float]) -> None:
        """After an evaluation."""
        if run.world.is_main:
            with (run.folder.path / self.name).open("a") as file:
                file.write(",".join(map(str, [run.step, *values.values()])) + "\n")
