"""What a model is trained for: its loss, what is measured, and which of these choose the best weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models import GAN
from optimizers.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from training.errors import UserError
from training.metrics import Mean, Meters, Perplexity, accuracy

if TYPE_CHECKING:
    from data import BatchLoader
    from training.precision import Precision
    from training.run import Run


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
        """Raise UserError if a model is none for this task.

        Args:
            model: in evaluation mode.
            inputs: one example or more.
            targets: theirs.
        """
        if isinstance(model, GAN):
            raise UserError(
                f"a model of two players is for images to be imitated, and this data set is for {self.name}: choose a "
                "data set such as dataset=mnist_generation, or another model"
            )
        self.loss(model(inputs), targets)

    def turns(self, run: Run) -> Sequence[Turn]:
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


class Classification(Task):
    """One of several classes an example; outputs are logits ``[batch, classes]``, targets int64 ``[batch]``.

    Args:
        num_classes: how many.
        label_smoothing: of the training loss; evaluation has none.
    """

    name = "classification"
    metrics: ClassVar[dict[str, Literal["min", "max"]]] = {"loss": "min", "accuracy": "max"}
    main = "accuracy"

    def __init__(self, num_classes: int, label_smoothing: float = 0.0) -> None:
        self.num_classes = num_classes
        self.likelihood = Categorical(label_smoothing)
        self._proper = Categorical()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Task.

        Raises:
            UserError: the model's outputs are not as many as the classes.
        """
        if outputs.shape[-1] != self.num_classes:
            raise UserError(
                f"a classification needs {self.num_classes} outputs an example, one a class, and this model gives "
                f"{list(outputs.shape[1:])}: choose a classifier, or a data set of images to rebuild"
            )
        return super().loss(outputs, targets)

    def meters(self, device: torch.device) -> Meters:
        """See Task."""
        return Meters({"loss": Mean(device), "accuracy": accuracy(self.num_classes, device)})

    def measure(self, meters: Meters, outputs: Tensor, targets: Tensor, loss: Tensor | None = None) -> None:
        """See Task."""
        meters.examples += len(targets)
        meters.metrics["loss"].update(self._proper.nll(outputs, targets) if loss is None else loss, len(targets))
        meters.metrics["accuracy"].update(outputs, targets)


class LanguageModelling(Task):
    """The next token at every position; outputs are logits ``[batch, sequence, vocabulary]``, targets int64.

    Every mean is over the tokens that count, which are those whose target is not -100. The perplexity of several
    batches is that of all their tokens together, not a mean of perplexities.

    Args:
        vocabulary: how many tokens there are.
        label_smoothing: of the training loss; evaluation, and perplexity, have none.
    """

    name = "language_modelling"
    metrics: ClassVar[dict[str, Literal["min", "max"]]] = {"loss": "min", "perplexity": "min"}
    main = "perplexity"

    def __init__(self, vocabulary: int, label_smoothing: float = 0.0) -> None:
        self.vocabulary = vocabulary
        self.likelihood = Categorical(label_smoothing)
        self._smoothed = label_smoothing > 0
        self._proper = Categorical()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Task.

        Raises:
            UserError: the model's outputs are not a logit a token of the vocabulary for each target.
        """
        if outputs.shape != (*targets.shape, self.vocabulary):
            raise UserError(
                f"language modelling needs outputs {[*targets.shape[1:], self.vocabulary]} an example, a logit a token "
                f"for every position, and this model gives {list(outputs.shape[1:])}: choose a language model"
            )
        return super().loss(outputs, targets)

    def meters(self, device: torch.device) -> Meters:
        """See Task."""
        return Meters({"loss": Mean(device), "perplexity": Perplexity(device)})

    def measure(self, meters: Meters, outputs: Tensor, targets: Tensor, loss: Tensor | None = None) -> None:
        """See Task."""
        meters.examples += len(targets)
        tokens = (targets != -100).sum()
        nll = self._proper.nll(outputs, targets) if loss is None or self._smoothed else loss
        meters.metrics["loss"].update(nll if loss is None else loss, tokens)
        meters.metrics["perplexity"].update(nll, tokens)


class Reconstruction(Task):
    """The input's pixels; outputs are logits or means ``[batch, pixels]``, targets the pixels themselves.

    Trained on the likelihood, a sum over the pixels, so that curvature needs no scaling; reported a pixel, as
    auto-encoders are compared: the cross-entropy (Bernoulli) or the squared error (Gaussian) of the average pixel.

    Args:
        likelihood: bernoulli, pixels in [0, 1] as probabilities; or gaussian, of variance 1/2, whose negative
            log-likelihood is the squared error itself.

    Raises:
        ValueError: for a likelihood there is none of.
    """

    name = "reconstruction"
    metrics: ClassVar[dict[str, Literal["min", "max"]]] = {"loss": "min", "mse": "min"}
    main = "loss"

    def __init__(self, likelihood: str = "bernoulli") -> None:
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f"likelihood must be bernoulli or gaussian, got {likelihood!r}")
        self.likelihood = Bernoulli() if likelihood == "bernoulli" else Gaussian(sigma=math.sqrt(0.5))

    def meters(self, device: torch.device) -> Meters:
        """See Task."""
        return Meters({"loss": Mean(device), "mse": Mean(device)})

    def measure(self, meters: Meters, outputs: Tensor, targets: Tensor, loss: Tensor | None = None) -> None:
        """See Task."""
        meters.examples += len(targets)
        loss = self.loss(outputs, targets) if loss is None else loss
        meters.metrics["loss"].update(loss / targets.shape[1], len(targets))
        meters.metrics["mse"].update((self.pixels(outputs) - targets).square().mean(), len(targets))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See Task.

        Raises:
            UserError: the model's outputs are not as many as the pixels.
        """
        if outputs.shape != targets.shape:
            raise UserError(
                f"a reconstruction needs {targets.shape[1]} outputs an image, one a pixel, and this model gives "
                f"{list(outputs.shape[1:])}: choose an auto-encoder"
            )
        return super().loss(outputs, targets)

    def pixels(self, outputs: Tensor) -> Tensor:
        """The expected pixels, ``[batch, pixels]``."""
        return outputs.sigmoid() if isinstance(self.likelihood, Bernoulli) else outputs


def build(name: str, facts: dict[str, Any], label_smoothing: float = 0.0, seed: int = 0) -> Task:
    """The task a data set asks for.

    Args:
        name: ``DataModule.task``.
        facts: ``DataModule.facts``.
        label_smoothing: of the training loss, where there are labels.
        seed: of what a task draws.

    Raises:
        ValueError: for a task there is none of, or label smoothing out of its range.
    """
    if name == Classification.name:
        return Classification(facts["num_classes"], label_smoothing)
    if name == LanguageModelling.name:
        return LanguageModelling(facts["vocabulary"], label_smoothing)
    from training.adversarial import Adversarial  # which extends what is defined here

    if name in (Reconstruction.name, Adversarial.name) and label_smoothing:
        raise ValueError(f"label_smoothing must be 0 for a {name}, which has no labels, got {label_smoothing}")
    if name == Reconstruction.name:
        return Reconstruction(facts["likelihood"])
    if name == Adversarial.name:
        return Adversarial(facts["frechet"], seed)
    known = ", ".join(task.name for task in (Classification, LanguageModelling, Reconstruction, Adversarial))
    raise ValueError(f"task must be one of {known}, got {name!r}")
