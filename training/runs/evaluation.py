"""What a model has come to: on the validation set in the course of training, on the test set at its end."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch.distributed as dist
from torch import Tensor, nn

from training.errors import UserError
from training.loop import rng
from training.loop.distributed import World, broadcast_buffers, maximum
from training.loop.precision import Precision
from training.loop.signals import Interrupted, requested
from training.runs import checkpoints
from training.runs.averaging import averaged
from training.runs.finite import require_finite, require_finite_loss
from training.runs.run import Run
from training.tasks.task import Task

if TYPE_CHECKING:
    from data import BatchLoader


def evaluate(model: nn.Module, loader: BatchLoader, task: Task, precision: Precision) -> dict[str, float]:
    """A task's metrics over a whole set, each example once, whatever share of it each rank holds.

    The model is put in evaluation mode and back; random generators are left as they were.

    Args:
        model: the bare model (DDP's wrapper would exchange messages a pass, and shares may differ in length).
        loader: the set; an empty one has no metrics.
        task: says what is measured.
        precision: of the forward pass.

    Returns:
        {"loss": ..., "accuracy": ...}, or what else the task measures; the loss is the likelihood's own, without
        smoothing.
    """
    if loader.num_examples == 0:
        return {}
    meters = task.examiners(precision.device)
    with rng.observed(model, precision.device):
        task.examine(model, loader, meters, precision)
    return meters.compute()


@dataclass
class Heeding:
    """A set that is served until a signal asks to stop, which may come long before its end; all ranks leave then.

    Attributes:
        loader: the set.
        world: this process among the others.
    """

    loader: BatchLoader
    world: World

    def __post_init__(self) -> None:
        self.num_examples = self.loader.num_examples

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See BatchLoader.

        Yields:
            The batches, until a signal comes.

        Raises:
            Interrupted: a signal asked a rank to stop.
        """
        for batch in self.loader.epoch(epoch, start):
            if requested():
                break
            yield batch
        if code := int(maximum([float(requested())], self.world)[0]):
            raise Interrupted("Interrupted in an evaluation: it is made anew when the run is resumed.", code)


def validate(run: Run) -> int:
    """Measure on the validation set, tell whoever looks on, and keep the weights if they are the best so far.

    Args:
        run: that is under way, or has ended.

    Returns:
        0, or the exit code that a signal asked for meanwhile; then nothing was measured.

    Raises:
        Diverged: the loss or a weight is no longer finite.
    """
    require_finite(run)
    with averaged(run):
        try:
            values = measure(run, "val")
        except Interrupted as stop:
            return stop.exit_code
        run.evaluated = run.step
        if not values:  # a data set without validation examples
            return 0
        require_finite_loss(run, values["val/loss"], "validation")
        with run.clock.count("other"):
            run.emit("eval", values)
            before, improved = run.best, run.improves(values)
            if improved:
                found = {"metric": run.monitor, "value": values[run.monitor], "step": run.step, "epoch": run.epoch}
                run.best = found | values
            for callback in run.callbacks:
                callback.on_evaluation(run, values)
            if improved:
                checkpoints.store_best(run, before)
    return 0


def measure(run: Run, split: Literal["val", "test"]) -> dict[str, float]:
    """Metrics on a set, by their names in events ("val/loss", ...). Every rank must call it.

    Raises:
        Interrupted: a signal asked to stop meanwhile.
    """
    with run.clock.count("evaluation"):
        broadcast_buffers(run.model, run.world)
        values = evaluate(run.model, Heeding(getattr(run.data, split), run.world), run.task, run.precision)
    return {f"{split}/{name}": value for name, value in values.items()}


def test(run: Run) -> None:
    """Measure the last and the best weights on the test set, at the end of a run, whose model is what is evaluated."""
    values = measure(run, "test")
    of_best = values if run.best is None or run.best["step"] == run.step else test_best(run)
    with run.clock.count("other"):
        if run.best is not None:
            run.best |= of_best
        if values:
            run.emit("test", values | {f"best/{name}": value for name, value in of_best.items()})


def test_best(run: Run) -> dict[str, float]:
    """Test metrics of the best weights; the model holds the last ones before and after."""
    with best_weights(run):
        return measure(run, "test")  # which broadcasts the buffers


@contextmanager
def best_weights(run: Run) -> Iterator[None]:
    """Within it, at the end of a run, the model holds the best weights, if an evaluation has chosen any. For all ranks.

    Buffers are those of rank 0 only, until they are broadcast.

    Raises:
        UserError: they cannot be read.
    """
    if run.best is None or run.best["step"] == run.step:
        yield
        return
    last = copy.deepcopy(run.model.state_dict())  # with the versions of its layers' formats, which some ask for
    try:
        if run.world.is_main:
            run.model.load_state_dict(_load_best(run))
        if run.world.world_size > 1:
            for parameter in run.model.parameters():
                dist.broadcast(parameter.data, src=0)
        yield
    finally:
        run.model.load_state_dict(last)


def _load_best(run: Run) -> dict[str, Tensor]:
    try:
        return checkpoints.load(checkpoints.best_file(run.folder.checkpoints))["model"]
    except checkpoints.CheckpointError as error:
        raise UserError(
            f"The best weights cannot be tested. {error} Resume the run: its end is made with the best that is left."
        ) from error
