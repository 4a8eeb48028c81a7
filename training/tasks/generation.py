"""A generator and a critic taught by each other, as the one loop plays them: their turns and their evaluation.

Source: Gulrajani et al., "Improved Training of Wasserstein GANs", NeurIPS 2017 (arXiv 1704.00028), Algorithm 1. With
real images x, generated ones y = G(z) and points x' between them, the critic minimizes
``mean D(y) - mean D(x) + lambda mean (||dD/dx'|| - 1)²`` and the generator ``-mean D(G(z))``. Evaluation measures the
Fréchet distance of Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017 (arXiv 1706.08500).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from models import GAN
from models.features import features
from optimizers.curvature.communication import rank, world_size
from optimizers.likelihoods import Gaussian
from training.errors import UserError
from training.loop.precision import Precision
from training.tasks.metrics import Mean, Meters
from training.tasks.players import Players, frozen, unobserved
from training.tasks.task import Learning, Task, Turn

if TYPE_CHECKING:
    from data import BatchLoader

#: What is drawn: numbers for the critic's turn, for the generator's, and for all evaluations and pictures.
CRITIC, GENERATOR, FIXED = range(3)
SMALL = 100  # generated images at a time in evaluation


class Adversarial(Task):
    """Images to be imitated, by a model of two players; see ``models.GAN``.

    The critic plays every step, on the next real images and as many generated ones in one pass; the generator plays
    after every ``crit_repeats``-th of these. To curvature, scores are the means of a Gaussian of variance 1: the
    critic's Fisher matrix is that of its scores of real and generated images together, the generator's that of the
    scores of its images, with gradients that flow back through the critic. The penalty's pass leaves no trace in it.

    ``loss`` is the critic's, in evaluation without the penalty; ``wasserstein`` is the critic's estimate of the
    distance between real and generated images; ``frechet_mnist`` and ``frechet_cifar10`` are Fréchet distances between
    features of small classifiers (``models.features``), and comparable with nothing else; ``fid`` is the one that is
    published, of Inception's 2048 features, comparable for the same number of images.

    Args:
        frechet: mnist, cifar10 or inception: whose features are compared.
        seed: of the latents. Every draw is a function of (seed, step, batch), and any number of ranks sees together
            what one process sees.

    Raises:
        UserError: Inception's weights cannot be had.
    """

    name = "generation"
    metrics: ClassVar[dict[str, Literal["min", "max"]]] = {"loss": "min", "wasserstein": "min"}
    whole = False

    def __init__(self, frechet: str, seed: int = 0) -> None:
        self.likelihood = Gaussian()
        self.seed = seed
        self.main = "fid" if frechet == "inception" else f"frechet_{frechet}"  # type: ignore[misc]
        self.metrics = {**type(self).metrics, self.main: "min"}  # type: ignore[misc]
        self._inception = frechet == "inception"
        self._distance = _inception_distance() if self._inception else FrechetInceptionDistance(features(frechet))

    @classmethod
    def of(cls, facts: dict[str, Any], label_smoothing: float, seed: int) -> Task:
        """See Task."""
        cls._refuse_smoothing(label_smoothing)
        return cls(facts["frechet"], seed)

    def check(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """See Task."""
        self.check_players(isinstance(model, GAN))

    @classmethod
    def check_players(cls, two: bool) -> None:
        """See Task."""
        if not two:
            raise UserError(
                "images are imitated by a model of two players, a generator and a critic, and this one is none: choose "
                "model=dcgan or resnet_gan, or another data set"
            )

    # -- training ------------------------------------------------------------------------------------------------------

    def turns(self, run: Learning) -> Sequence[Turn]:
        """See Task."""
        assert isinstance(run.model, GAN) and isinstance(run.optimizer, Players)
        critic = Turn(
            run.optimizer.critic, partial(self._criticise, run, run.model, count()), partial(self.measure, run.window)
        )
        if (run.step + 1) % run.model.crit_repeats:
            return [critic]
        generate = partial(self._generate, run, run.model, run.optimizer, count())
        return [critic, Turn(run.optimizer.generator, generate, partial(self._measure_generator, run.window))]

    def _criticise(
        self, run: Learning, model: GAN, parts: Iterator[int], inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The critic's pass: scores ``[2 b, 1]`` of real images, then of generated ones, and its loss."""
        draws = self._generator(run.step, next(parts), CRITIC)
        real = run.precision.prepare(inputs)
        latents = _shared(torch.randn, draws, (len(real), model.latent), real.device)
        places = _shared(torch.rand, draws, (len(real), 1, 1, 1), real.device)
        with torch.no_grad():
            made = run.precision.full(model.generator(latents))
        scores = model.critic(torch.cat([real, made]))
        on_real, on_made = run.precision.full(scores).chunk(2)
        loss = on_made.mean() - on_real.mean()
        if model.penalty:
            assert isinstance(run.optimizer, Players)
            # In full precision: products of small gradients vanish in half.
            with unobserved(run.optimizer.critic), torch.autocast(real.device.type, enabled=False):
                loss = loss + model.penalty * penalty(model.critic, torch.lerp(made, real.to(made), places.to(made)))
        return scores, loss

    def _generate(
        self, run: Learning, model: GAN, players: Players, parts: Iterator[int], inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The generator's pass: scores ``[b, 1]`` of as many images as there are real ones, and its loss."""
        draws = self._generator(run.step, next(parts), GENERATOR)
        with frozen(model.critic), unobserved(players.critic):
            scores = model(_shared(torch.randn, draws, (len(inputs), model.latent), inputs.device))
        return scores, -run.precision.full(scores).mean()

    def _generator(self, *key: int) -> torch.Generator:
        state = np.random.SeedSequence((self.seed, *key)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))

    def meters(self, device: torch.device) -> Meters:
        """See Task."""
        return Meters({name: Mean(device) for name in ("loss", "generator_loss", "wasserstein", "penalty")})

    def measure(self, meters: Meters, outputs: Tensor, targets: Tensor, loss: Tensor | None = None) -> None:
        """See Task; of the critic's turn."""
        on_real, on_made = outputs.chunk(2)
        distance = on_real.mean() - on_made.mean()
        loss = -distance if loss is None else loss
        meters.examples += len(on_real)
        for name, value in {"loss": loss, "wasserstein": distance, "penalty": loss + distance}.items():
            meters.metrics[name].update(value, len(on_real))

    def _measure_generator(self, meters: Meters, outputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        meters.metrics["generator_loss"].update(loss, len(outputs))

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def latents(self, number: int, length: int) -> Tensor:
        """The latents that every evaluation begins with, ``[number, length]``."""
        return torch.randn(number, length, generator=self._generator(FIXED))

    def calibrate(self, model: nn.Module, inputs: Tensor, precision: Precision, part: int) -> None:
        """See Task. The critic sees real and generated images together, as in training."""
        assert isinstance(model, GAN)
        latents = _shared(torch.randn, self._generator(FIXED, part), (len(inputs), model.latent), inputs.device)
        with precision.autocast():
            real = precision.prepare(inputs)
            model.critic(torch.cat([real, model.generator(latents).to(real)]))

    def examiners(self, device: torch.device) -> Meters:
        """See Task."""
        self._distance.to("cpu" if device.type == "mps" else device).reset()  # it sums in double precision
        return Meters({"loss": Mean(device), "wasserstein": Mean(device), self.main: self._distance})

    def examine(self, model: nn.Module, loader: BatchLoader, meters: Meters, precision: Precision) -> None:
        """See Task. As many images are generated as there are real ones, from the same latents every time."""
        assert isinstance(model, GAN)
        for inputs, _ in loader.epoch(0):
            self._examine(model, inputs, True, meters, precision)
        latents = self.latents(loader.num_examples, model.latent).tensor_split(world_size())[rank()]
        for part in latents.split(SMALL):
            with precision.autocast():
                made = model.generator(part.to(precision.device))
            self._examine(model, precision.full(made), False, meters, precision)
        # An empty share of the data is no reason to warn.
        self._distance._update_count = max(self._distance._update_count, 1)

    def _examine(self, model: GAN, images: Tensor, real: bool, meters: Meters, precision: Precision) -> None:
        if not len(images):
            return
        with precision.autocast():
            scores = model.critic(precision.prepare(images))
        # Half of all images are real, so that twice the mean over all of them is a difference of two means.
        distance = 2 * precision.full(scores).mean() * (1 if real else -1)
        meters.examples += len(images)
        meters.metrics["loss"].update(-distance, len(images))
        meters.metrics["wasserstein"].update(distance, len(images))
        images = images.to(self._distance.device)
        self._distance.update(as_bytes(images) if self._inception else images.float(), real)


def penalty(critic: nn.Module, between: Tensor) -> Tensor:
    """Mean square of the amount by which the slope of a critic is not 1, with a graph.

    Args:
        critic: from images to scores ``[b, 1]``, each of its own image alone.
        between: images ``[b, C, H, W]``.
    """
    between = between.detach().requires_grad_()
    (slopes,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slopes.flatten(1).norm(dim=1) - 1).square().mean()


def _shared(draw: Any, generator: torch.Generator, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """This rank's share of numbers that are drawn for all, on the CPU, whatever the device."""
    joint = draw(world_size() * shape[0], *shape[1:], generator=generator)
    return joint.tensor_split(world_size())[rank()].to(device, non_blocking=True)


def as_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as Inception takes them: coloured bytes."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def _inception_distance() -> FrechetInceptionDistance:
    way_out = "choose dataset.frechet=mnist or cifar10"
    try:
        return FrechetInceptionDistance(2048)
    except ModuleNotFoundError as error:
        raise UserError(f"dataset.frechet=inception needs torch-fidelity: pip install it, or {way_out}") from error
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Inception's weights cannot be downloaded ({reason}): {way_out}") from error
