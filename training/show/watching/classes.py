"""Which classes a classifier takes for which, and whether the right one is among its first five."""

from __future__ import annotations

import csv
import io
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from training.errors import UserError
from training.loop import rng
from training.loop.distributed import broadcast_buffers
from training.runs.evaluation import Heeding, best_weights
from training.runs.folder import atomic_file
from training.runs.run import Callback, Run
from training.show.pictures import check_resolution
from training.tasks.classification import Classification
from training.tasks.task import Task


class ClassPlots(Callback):
    """Top-5 accuracy at every evaluation, and at the end the confusion matrix: ``confusion.png``, ``confusion.csv``.

    ``val/top5_accuracy`` and ``test/top5_accuracy`` are there where classes are more than five, and may choose the best
    weights (``trainer.monitor``). The matrix is that of the best weights on the test set, on the validation set where
    the test set is left alone; the loggers get its picture. It takes one more pass over that set. The run stays what it
    is, and so does its id.

    Args:
        dpi: resolution of the picture.

    Raises:
        ValueError: for a value out of its range.
    """

    def __init__(self, dpi: int = 120) -> None:
        check_resolution(dpi)
        self.dpi = dpi

    def check(self, task: Task) -> None:
        """See Callback.

        Raises:
            UserError: there are no classes.
        """
        if not isinstance(task, Classification):
            where = self.where or "ClassPlots"
            raise UserError(f"{where} is for classifications, and this is {task.name}: leave it out")
        task.count_top5()

    def on_fit_end(self, run: Run, summary: dict[str, Any]) -> None:
        """See Callback."""
        split: Literal["test", "val"] = "test" if "test/loss" in run.latest else "val"
        if summary["status"] == "diverged" or run.unexamined or not getattr(run.data, split).num_examples:
            return
        with run.clock.count("evaluation"), best_weights(run):
            counts = confusion(run, split)
        if not run.world.is_main:
            return
        from training.show.watching.confusion import pixels, plot  # matplotlib takes a while to import

        names = [str(name) for name in run.data.class_names or range(len(counts))]
        with atomic_file(run.folder.path / "confusion.csv") as file:
            file.write(table(counts, names).encode())
        of = f"{'test' if split == 'test' else 'validation'} set, {'best' if run.best else 'last'} weights"
        figure = plot(counts, names, run.folder.path, of)
        with atomic_file(run.folder.path / "confusion.png") as file:
            figure.savefig(file, format="png", dpi=self.dpi)
        picture = pixels(figure)
        for logger in run.loggers:
            logger.image("confusion", picture, run.step)


def confusion(run: Run, split: Literal["test", "val"]) -> Tensor:
    """How often each class is taken for each. Every rank must call it.

    Args:
        run: whose model is measured as it is.
        split: the set.

    Returns:
        int64 ``[classes, classes]`` on the CPU: rows are what examples are, columns what they are taken for.

    Raises:
        Interrupted: a signal asked to stop meanwhile.
    """
    assert isinstance(run.task, Classification)
    classes = run.task.num_classes
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=run.world.device)
    broadcast_buffers(run.model, run.world)
    with rng.observed(run.model, run.world.device):
        for inputs, targets in Heeding(getattr(run.data, split), run.world).epoch(0):
            if len(targets):
                with run.precision.autocast():
                    outputs = run.model(run.precision.prepare(inputs))
                places = targets * classes + run.precision.full(outputs).argmax(1)
                counts += torch.bincount(places, minlength=classes * classes)
    if run.world.world_size > 1:
        dist.all_reduce(counts)
    return counts.view(classes, classes).cpu()


def table(counts: Tensor, names: list[str]) -> str:
    """A confusion matrix as CSV: a line a class with the share of it that is right, and a sum over all.

    Args:
        counts: see `confusion`.
        names: of the classes.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["is / taken for", *names, "right"])
    for name, line, right in zip(names, counts.tolist(), counts.diagonal().tolist(), strict=True):
        writer.writerow([name, *line, f"{right / sum(line):.6f}" if sum(line) else ""])
    writer.writerow(["all", *counts.sum(0).tolist(), f"{float(counts.diagonal().sum() / counts.sum()):.6f}"])
    return text.getvalue()
