"""What a model is trained for, as the loop sees it: a loss, what is measured, and what chooses the best weights."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models import GAN
from optimizers.likelihoods import Bernoulli, Categorical, Likelihood
from training.errors import UserError
from training.loop.precision import Precision
from training.tasks.metrics import Meters

if TYPE_CHECKING:
    from data import BatchLoader


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """One update of a training step: whose, from which pass through the model, and what is counted of it.

    Attributes:
        optimizer: makes the update.
        play: ``play(inputs, targets)`` returns outputs and the scalar loss.
        measure: ``measure(outputs, targets, loss)``, of tensors without a graph.
    """

    optimizer: Optimizer
    play: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    measure: Callable[[Tensor, Tensor, Tensor], None]


class Learning(Protocol):
    """What a task sees of the run that it is learned in: an attribute each of ``training.runs.run.Run``."""

    @property
    def model(self) -> nn.Module: ...  # noqa: D102 - see Run
    @property
    def forward(self) -> Callable[[Tensor], Tensor]: ...  # noqa: D102
    @property
    def optimizer(self) -> Optimizer: ...  # noqa: D102
    @property
    def precision(self) -> Precision: ...  # noqa: D102
    @property
    def window(self) -> Meters: ...  # noqa: D102
    @property
    def step(self) -> int: ...  # noqa: D102


class Task(ABC):
    """Loss and metrics of one kind of problem.

    Attributes:
        name: what data sets call it.
        metrics: names and which way is better.
        main: the metric that chooses the best weights unless the user says otherwise.
        likelihood: p(targets | outputs) that is trained on; curvature methods sample from it.
        whole: whether training calls the model as a whole; otherwise no wrapper can share its gradients over ranks.
    """

    name: ClassVar[str]
    metrics: ClassVar[dict[str, Literal["min", "max"]]]
    main: ClassVar[str]
    likelihood: Likelihood
    whole: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def of(cls, facts: dict[str, Any], label_smoothing: float, seed: int) -> Task:
        """The task of a data set.

        Args:
            facts: ``DataModule.facts``.
            label_smoothing: of the training loss, where there are labels.
            seed: of what the task draws.

        Raises:
            ValueError: label smoothing is out of its range, or there are no labels.
        """

    @classmethod
    def _refuse_smoothing(cls, label_smoothing: float) -> None:
        if label_smoothing:
            raise ValueError(f"label_smoothing must be 0 for a {cls.name}, which has no labels, got {label_smoothing}")

    @classmethod
    def check_players(cls, two: bool) -> None:
        """See to it that a model has as many players as the task is for.

        Args:
            two: whether it has a generator and a critic.

        Raises:
            UserError: it has not.
        """
        if two:
            raise UserError(
                f"a model of two players is for images to be imitated, and this data set is for {cls.name}: choose a "
                "data set such as dataset=mnist_generation, or another model"
            )

    @abstractmethod
    def meters(self, device: torch.device) -> Meters:
        """Fresh meters of ``metrics``."""

    @abstractmethod
    def measure(self, meters: Meters, outputs: Tensor, targets: Tensor, loss: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            meters: what ``meters`` made.
            outputs: ``[batch, ...]``, full precision, no gradient.
            targets: ``[batch, ...]``.
            loss: the training loss of the batch, a scalar; None: the likelihood's own is computed. A task may report
                it in another unit than it is trained on.
        """

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The scalar to train on: the mean over the batch."""
        return self.likelihood.nll(outputs, targets)

    def check(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """See to it that a model is one for this task.

        Args:
            model: in evaluation mode.
            inputs: one example or more.
            targets: theirs.

        Raises:
            UserError: it is none.
        """
        self.check_players(isinstance(model, GAN))
        outputs = model(inputs)
        if not isinstance(outputs, Tensor):
            raise UserError(
                f"the model returns what is of type {type(outputs).__name__}, and {self.name} needs a tensor: let its "
                "forward return the outputs alone"
            )
        self.loss(outputs, targets)
        if _are_probabilities(outputs, getattr(self, "likelihood", None)):
            log.warning(
                "The model's outputs look like probabilities, and the loss takes logits, of which it makes "
                "probabilities itself: leave the softmax or sigmoid at the model's end out, or it learns slowly and "
                "never gets sure."
            )

    def turns(self, run: Learning) -> Sequence[Turn]:
        """The updates that make up the next step, in order. Each has the step's batches."""

        def play(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            outputs = run.forward(run.precision.prepare(inputs))
            return outputs, self.loss(outputs, targets)

        return (Turn(run.optimizer, play, partial(self.measure, run.window)),)

    def calibrate(self, model: nn.Module, inputs: Tensor, precision: Precision, part: int) -> None:
        """Pass a batch of training through a model whose BatchNorm layers gather statistics.

        Args:
            model: otherwise in evaluation mode, without gradients.
            inputs: of the batch.
            precision: of the forward pass.
            part: the how-manieth batch it is, from 0.
        """
        with precision.autocast():
            model(precision.prepare(inputs))

    def examiners(self, device: torch.device) -> Meters:
        """Fresh meters of an evaluation."""
        return self.meters(device)

    def examine(self, model: nn.Module, loader: BatchLoader, meters: Meters, precision: Precision) -> None:
        """Count a whole set, or this rank's share.

        Args:
            model: in evaluation mode.
            loader: the set.
            meters: what ``examiners`` made.
            precision: of the forward pass.
        """
        for inputs, targets in loader.epoch(0):
            if len(targets):
                with precision.autocast():
                    outputs = model(precision.prepare(inputs))
                self.measure(meters, precision.full(outputs), targets)


def _are_probabilities(outputs: Tensor, likelihood: Likelihood | None) -> bool:
    """Whether outputs look like what a softmax or sigmoid returns, where a likelihood takes logits."""
    if isinstance(likelihood, Categorical) and outputs.shape[-1] > 1:
        return bool((outputs >= 0).all() and (outputs.sum(-1) - 1).abs().max() < 1e-3)
    return isinstance(likelihood, Bernoulli) and outputs.numel() > 15 and bool(((outputs > 0) & (outputs < 1)).all())
