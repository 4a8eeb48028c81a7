"""Two players in the one loop: against plain loops, resumed bit for bit, with every optimizer, on two ranks."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import data
from models import GAN, build_model, dcgan
from models.features import features
from optimizers import KFAC, AdaFisher, AdaHessian, Gaussian
from tests.cli.conftest import Outcome, command, metrics, runs, summary, work  # noqa: F401 - fixtures
from tests.training.small_run import Cast, SignalAt, differences, events, final_state, two_processes
from training import (
    Diverged,
    Interrupted,
    RunFolder,
    Trainer,
    UserError,
    World,
    loggers,
    schedules,
    seed_everything,
    tasks,
)
from training.callbacks import Callback, CurvePlots
from training.runs import checkpoints
from training.settings.composition import CONFIG_FOLDER, compose
from training.settings.schema import build_optimizers
from training.show.samples import SamplePlots
from training.tasks.generation import Adversarial, penalty
from training.tasks.players import Players, frozen, unobserved

SMALL = {"latent": 4, "width": 2}
CURVATURE: dict[str, Any] = {"damping": 0.1, "update_every": 2, "refresh_every": 3, "likelihood": Gaussian()}


def dense_players(pixels: int = 64, latent: int = 4) -> GAN:
    """Linear layers, in which everything can be written down."""
    generator = nn.Sequential(nn.Linear(latent, 6), nn.Tanh(), nn.Linear(6, pixels), nn.Tanh())
    critic = nn.Sequential(
        Cast(torch.get_default_dtype()), nn.Flatten(), nn.Linear(pixels, 5), nn.Tanh(), nn.Linear(5, 1)
    )
    made = nn.Sequential(*generator, nn.Unflatten(1, (1, 8, 8)))
    return GAN(made, critic, latent=latent, crit_repeats=3, penalty=10.0)


def sgd(player: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(player.parameters(), lr=lr)


def fit(
    folder: Path,
    model: GAN,
    players: Players,
    *,
    resume: bool = False,
    world: World | None = None,
    data_options: dict[str, Any] | None = None,
    schedule: Any = None,
    callbacks: list[Callback] | None = None,
    seed: int = 3,
    **trainer: Any,
) -> dict[str, Any]:
    """Train in a folder; from its newest checkpoint if told to resume."""
    world = world or World()
    place: dict[str, Any] = {"rank": world.rank, "world_size": world.world_size}
    sets = data.digits_generation(**({"batch_size": 16, "eval_images": 40} | (data_options or {})), **place)
    settings: dict[str, Any] = {
        "max_steps": 10,
        "eval_every_epochs": None,
        "log_every_steps": 4,
        "deterministic": False,
    }
    found = checkpoints.latest(folder / "checkpoints") if resume else None
    try:
        return Trainer(**settings | trainer).fit(
            model, players, sets, tasks.build(sets.task, sets.facts, seed=seed), world=world, schedule=schedule,
            folder=RunFolder.open(folder) if (folder / "config.yaml").exists() else RunFolder.create(folder, "a: b\n"),
            callbacks=callbacks, loggers=[loggers.JSONLines(), loggers.TensorBoard()] if world.is_main else [],
            resume=found[1] if found else None,
        )  # fmt: skip
    finally:
        players.close()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# -- the game ----------------------------------------------------------------------------------------------------------


def draws(*key: int) -> torch.Generator:
    words = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]))


def slopes_penalty(critic: nn.Module, points: Tensor) -> Tensor:
    """lambda aside, image by image."""
    total = points.new_zeros(())
    for point in points:
        jacobian = torch.autograd.functional.jacobian(lambda x: critic(x[None]).squeeze(), point, create_graph=True)
        total = total + (jacobian.square().sum().sqrt() - 1) ** 2
    return total / len(points)


def test_the_penalty(float64: None) -> None:
    critic, points = dense_players().critic, torch.randn(5, 1, 8, 8)
    expected, found = slopes_penalty(critic, points), penalty(critic, points)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(*(torch.autograd.grad(p, critic[2].weight) for p in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loop_plays_algorithm_1(float64: None, tmp_path: Path, accumulate: int) -> None:
    model, reference = dense_players(), dense_players()
    reference.load_state_dict(model.state_dict())
    players = Players(sgd(model.generator, 0.2), sgd(model.critic, 0.01))
    done = fit(tmp_path / "run", model, players, max_steps=7, accumulate=accumulate, log_every_steps=1)

    sets = data.digits_generation(batch_size=16, eval_images=40)
    served: Iterator[Tensor] = (images.double() for images, _ in sets.train.epoch(0))
    generator, critic = sgd(reference.generator, 0.2), sgd(reference.critic, 0.01)
    for step in range(7):
        critic.zero_grad()
        losses, distances = [], []
        for part in range(accumulate):
            real, numbers = next(served), draws(3, step, part, 0)
            latents = torch.randn(16, 4, generator=numbers)
            places = torch.rand(16, 1, 1, 1, generator=numbers)
            made = reference.generator(latents).detach()
            distances.append(reference.critic(real).mean() - reference.critic(made).mean())
            between = places * real + (1 - places) * made
            losses.append(-distances[-1] + 10 * slopes_penalty(reference.critic, between))
        (sum(losses) / accumulate).backward()
        critic.step()
        if step % 3 == 2:
            generator.zero_grad()
            for part in range(accumulate):
                latents = torch.randn(16, 4, generator=draws(3, step, part, 1))
                (-reference.critic(reference.generator(latents)).mean() / accumulate).backward()
            generator.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], msg=name)
    logged = [e for e in events(tmp_path / "run") if e["event"] == "train"]
    assert ["train/generator_loss" in e for e in logged] == [False, False, True] * 2 + [False]
    assert logged[-1]["train/loss"] == pytest.approx((sum(losses) / accumulate).item())
    assert logged[-1]["train/wasserstein"] == pytest.approx((sum(distances) / accumulate).item())
    assert done["final"]["train/penalty"] == pytest.approx((sum(losses) + sum(distances)).item() / accumulate)


def test_a_player_gets_gradients_in_its_own_turn_alone() -> None:
    model = dense_players()
    scores = {}
    with frozen(model.critic):
        scores["generator"] = model(torch.randn(3, 4)).sum()
    scores["generator"].backward()
    assert all(p.grad is None and p.requires_grad for p in model.critic.parameters())
    assert all(p.grad is not None for p in model.generator.parameters())


# -- curvature ---------------------------------------------------------------------------------------------------------


def layer_factors(inputs: Tensor, gradients: Tensor) -> Tensor:
    """A ⊗ G of a linear layer as a dense matrix, row-major over [d_out, d_in + 1]."""
    a = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
    return torch.kron(gradients.T @ gradients / len(a), a.T @ a / len(a))


def factors_of(scores: Tensor, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of independent rows: the Gaussian's Fisher root is 1, so a row's gradient is that of its score."""
    found = torch.autograd.grad(scores.sum(), list(outputs.values()))
    return {name: layer_factors(inputs[name], g) for name, g in zip(outputs, found, strict=True)}


@pytest.mark.parametrize("weight", [0.0, 10.0])
def test_curvature_is_that_of_the_scores_and_not_of_the_penalty(float64: None, tmp_path: Path, weight: float) -> None:
    """One step of both players that moves nothing, against matrices from a plain pass with the same numbers."""
    model = dense_players()
    model.crit_repeats, model.penalty = 1, weight
    options = CURVATURE | {"lr": 0.0, "fisher": "exact"}
    generator = KFAC(model, model.generator.parameters(), **options)
    critic = KFAC(model.critic, **options)
    before = state_of(model)
    fit(tmp_path / "run", model, Players(generator, critic), max_steps=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def watched(net: nn.Sequential, x: Tensor, prefix: str) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        inputs, outputs = {}, {}
        for index, layer in enumerate(net):
            name = f"{prefix}{index}"
            if isinstance(layer, nn.Linear):
                inputs[name] = x.detach()
            x = layer(x)
            if isinstance(layer, nn.Linear):
                outputs[name] = x
        return x, inputs, outputs

    real = next(iter(data.digits_generation(batch_size=16).train.epoch(0)))[0].double()
    made = model.generator(torch.randn(16, 4, generator=draws(3, 0, 0, 0))).detach()
    both = torch.cat([real, made])
    for name, expected in factors_of(*watched(model.critic, both, "")).items():  # type: ignore[arg-type]
        torch.testing.assert_close(critic.curvature_matrices()[name], expected)
    latents = torch.randn(16, 4, generator=draws(3, 0, 0, 1))
    images, inputs, outputs = watched(model.generator, latents, "generator.")  # type: ignore[arg-type]
    expected_of = factors_of(model.critic(images), inputs, outputs)
    assert generator.curvature_matrices().keys() == expected_of.keys(), "the critic's layers are not its own"
    for name, expected in expected_of.items():
        torch.testing.assert_close(generator.curvature_matrices()[name], expected)


@pytest.mark.parametrize("kind", [KFAC, AdaFisher])
def test_an_unobserved_pass_leaves_no_trace(float64: None, kind: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    others = {"likelihood": Gaussian()} if kind is KFAC else {}

    def matrices(passes: int) -> dict[str, Tensor]:
        optimizer = kind(model, lr=0.0, **others)
        torch.manual_seed(0)
        inputs = torch.randn(6, 3)
        outputs = model(inputs)
        with optimizer.unobserved():
            extra = [model(inputs + 1).square().mean() for _ in range(passes)]
        optimizer.backward(outputs.square().mean() + sum(extra), outputs)
        optimizer.step()
        optimizer.close()
        return optimizer.curvature_matrices()

    plain, watched = matrices(0), matrices(2)
    for name, tensor in plain.items():
        torch.testing.assert_close(watched[name], tensor)


def test_what_is_unobserved_ends_with_its_block() -> None:
    optimizer = KFAC(nn.Linear(2, 1), likelihood=Gaussian())
    with pytest.raises(RuntimeError), unobserved(optimizer):
        assert not optimizer._due()
        raise RuntimeError
    assert optimizer._due()
    with unobserved(torch.optim.SGD([torch.zeros(1)])):
        pass


# -- resume, ranks, the rest of the loop -------------------------------------------------------------------------------


def convolutional(generator: str = "kfac", critic: str = "adam", lr: float = 0.01) -> tuple[GAN, Players]:
    seed_everything(0)
    model = dcgan(**SMALL, in_channels=1, image_size=8, crit_repeats=4)

    def optimizer(name: str, player: nn.Module, **given: Any) -> torch.optim.Optimizer:
        if name == "kfac":
            return KFAC(**({"model": player} | given), lr=lr, **CURVATURE)
        return torch.optim.Adam(player.parameters(), lr=lr, betas=(0.0, 0.9))

    whole = {"model": model, "params": list(model.generator.parameters())}
    return model, Players(optimizer(generator, model.generator, **whole), optimizer(critic, model.critic))


@pytest.mark.parametrize(("generator", "critic"), [("kfac", "adam"), ("adam", "kfac")])
def test_resume_between_two_turns_of_the_generator(tmp_path: Path, generator: str, critic: str) -> None:
    options: dict[str, Any] = {"schedule": partial(schedules.cosine, warmup=0.2), "max_steps": 14, "clip_norm": 1.0,
                               "eval_every_steps": 4, "checkpoint_every_steps": 50}  # fmt: skip
    fit(tmp_path / "whole", *convolutional(generator, critic), **options)
    with pytest.raises(Interrupted):
        fit(tmp_path / "parts", *convolutional(generator, critic), callbacks=[SignalAt(6)], **options)
    assert final_state(tmp_path / "parts")["counters"]["step"] == 6
    fit(tmp_path / "parts", *convolutional(generator, critic), resume=True, **options)
    ours, theirs = (final_state(tmp_path / name) for name in ("whole", "parts"))
    assert ours["optimizer"].keys() == {"generator", "critic"}
    assert list(differences(ours, theirs)) == []
    assert events(tmp_path / "whole") == events(tmp_path / "parts")


def test_both_rates_are_scheduled_and_no_warning_is_given(tmp_path: Path) -> None:
    model, players = convolutional(lr=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(tmp_path / "run", model, players, schedule=schedules.cosine, max_steps=8, log_every_steps=4)
    rates = [(e["lr"], e["generator/lr"], e["critic/lr"]) for e in events(tmp_path / "run") if "lr" in e]
    assert rates[-1][1:] == pytest.approx((0.0, 0.0)), "by the end of the budget"
    assert rates[0][1] == rates[0][2] == pytest.approx(0.01)
    assert any(key.startswith("generator/curvature/") for key in events(tmp_path / "run")[0])


def test_bf16_trains(tmp_path: Path) -> None:
    done = fit(tmp_path / "run", *convolutional("adam", "kfac"), precision="bf16", max_steps=5)
    assert math.isfinite(done["final"]["train/penalty"]) and math.isfinite(done["final"]["val/frechet_mnist"])


def test_a_game_that_diverges_is_stopped(tmp_path: Path) -> None:
    model = dense_players()
    with pytest.raises(Diverged, match="training loss is"):
        fit(tmp_path / "run", model, Players(sgd(model.generator), sgd(model.critic, 1e38)), max_steps=20)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG_FOLDER / "optimizer").glob("*.yaml")))
def test_any_optimizer_plays_either_part(tmp_path: Path, name: str) -> None:
    """With the values of its file, but for intervals, and a rate that both parts can live with."""
    keys = compose([f"optimizer={name}"]).values["optimizer"]
    intervals = ("update_every", "refresh_every", "hessian_every", "aux_every", "preconditioning_compute_steps")
    often = [key for key in intervals if key in keys]
    seed_everything(0)
    model = dcgan(**SMALL, in_channels=1, image_size=8, crit_repeats=1)
    values = [f"{part}.{key}=1" for part in ("generator", "critic") for key in often]
    config = compose(
        [f"optimizer@generator={name}", f"optimizer@critic={name}", "generator.lr=1e-3", "critic.lr=1e-3", *values]
    ).values
    players = build_optimizers(config, model, likelihood=Gaussian(), seed=0)
    assert isinstance(players, Players)
    before = state_of(model)
    fit(tmp_path / "run", model, players, max_steps=2, data_options={"eval_images": 5})
    still = [n for n, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    assert still == []


EXACT: dict[str, Any] = {"max_steps": 6, "eval_every_steps": 3, "clip_norm": 5.0, "data_options": {"eval_images": 41}}


def run_exact(folder: Path, kind: str, world: World) -> None:
    """A run whose numbers do not depend on how many processes share it."""
    torch.set_default_dtype(torch.float64)
    seed_everything(0)
    model = dense_players()
    whole: dict[str, Any] = {"params": list(model.generator.parameters())}
    if kind == "kfac":
        options = CURVATURE | {"fisher": "exact", "lr": 0.01}
        players = Players(KFAC(model, **whole, **options), KFAC(model.critic, **options))
    elif kind == "adahessian":
        options = {"lr": 0.01, "hessian_every": 2}
        players = Players(AdaHessian(model=model, **whole, **options), AdaHessian(model.critic, **options))
    else:
        players = Players(sgd(model.generator), sgd(model.critic))
    fit(folder, model, players, world=world, **EXACT)
    torch.save(model.state_dict(), folder.with_name(f"{folder.name}{world.rank}.pt"))


KINDS = ("sgd", "kfac", "adahessian")


def run_all(root: Path, world: World) -> None:
    for kind in KINDS:
        run_exact(root / kind, kind, world)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs that two processes made, in one launch."""
    root = tmp_path_factory.mktemp("two")
    for kind in KINDS:
        (root / kind).mkdir()
        (root / kind / "config.yaml").touch()
    two_processes(run_all, root)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(two: Path, tmp_path: Path, float64: None, kind: str) -> None:
    run_exact(tmp_path / kind, kind, World())
    expected = torch.load(tmp_path / f"{kind}0.pt", weights_only=True)
    first, second = (torch.load(two / f"{kind}{rank}.pt", weights_only=True) for rank in range(2))
    assert list(differences(first, second)) == []
    for name, tensor in expected.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-7, atol=1e-9, msg=f"{kind} {name}")
    for mine, other in zip(events(two / kind), events(tmp_path / kind), strict=True):
        assert mine.pop("event") == other.pop("event")
        mine, other = ({k: v for k, v in e.items() if "lr" not in k and v is not None} for e in (mine, other))
        assert mine == pytest.approx(other, rel=1e-5), kind


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_evaluation_against_the_definition(tmp_path: Path) -> None:
    model, players = convolutional("adam", "adam")
    done = fit(tmp_path / "run", model, players, max_steps=3, data_options={"eval_images": 120})
    sets, task = data.digits_generation(eval_images=120), Adversarial("mnist", seed=3)
    model.eval()
    with torch.no_grad():
        real = torch.cat([images for images, _ in sets.val.epoch(0)])
        made = model.generator(task.latents(len(real), model.latent))
        distance = model.critic(real).double().mean() - model.critic(made).double().mean()
        spreads, means = [], []
        for images in (real, made):
            found = features("mnist")(images).double().numpy()
            means.append(found.mean(0))
            spreads.append(np.cov(found, rowvar=False))
    values, vectors = np.linalg.eigh(spreads[0])
    root = vectors * values.clip(0) ** 0.5 @ vectors.T
    overlap = (np.linalg.eigvalsh(root @ spreads[1] @ root).clip(0) ** 0.5).sum()
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(spreads[0] + spreads[1]) - 2 * overlap
    assert done["final"]["val/wasserstein"] == pytest.approx(float(distance), rel=1e-4)
    assert done["final"]["val/loss"] == pytest.approx(-float(distance), rel=1e-4)
    assert done["final"]["val/frechet_mnist"] == pytest.approx(float(expected), rel=1e-3)
    assert (done["monitor"], done["best"]["metric"]) == ("val/frechet_mnist",) * 2


def test_evaluations_are_the_same_numbers_and_leave_training_alone(tmp_path: Path) -> None:
    kept = {}
    for name, every in (("often", 2), ("once", 50)):
        model, players = convolutional("adam", "adam")
        plots = [SamplePlots(every_epochs=0.01)] if name == "often" else []
        done = fit(tmp_path / name, model, players, max_steps=8, eval_every_steps=every, callbacks=plots)
        kept[name] = done["final"]
    assert kept["often"] == kept["once"]


def test_inception_is_asked_for_in_a_sentence() -> None:
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        with pytest.raises(
            UserError, match="frechet=inception needs torch-fidelity: pip install it, or choose dataset"
        ):
            Adversarial("inception")
    else:
        pytest.skip("torch-fidelity is installed")


def test_tasks_are_built_by_their_name() -> None:
    assert tasks.build("generation", {"frechet": "cifar10"}).main == "frechet_cifar10"
    with pytest.raises(ValueError, match=r"label_smoothing must be 0 for a generation, which has no labels, got 0.1"):
        tasks.build("generation", {"frechet": "mnist"}, 0.1)


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_pictures(tmp_path: Path) -> None:
    model, players = convolutional("adam", "adam")
    plots = [SamplePlots(columns=4, rows=3, every_epochs=0.01), CurvePlots()]
    fit(tmp_path / "run", model, players, max_steps=9, eval_every_steps=4, log_every_steps=2, callbacks=plots)
    picture = np.asarray(Image.open(tmp_path / "run" / "samples.png"))
    cell = 8 * (60 // 8) + 2
    assert picture.shape == (3 * cell + 2, 4 * cell + 2, 3)
    model.eval()
    with torch.no_grad():
        image = model.generator(Adversarial("mnist", seed=3).latents(12, model.latent))[0, 0]
    shown = picture[2:cell, 2:cell, 0][3::7, 3::7] / 127.5 - 1  # an enlarged pixel is 7 × 7
    np.testing.assert_allclose(shown, image.numpy(), atol=0.005)
    assert {"loss.png", "frechet_mnist.png"} <= {p.name for p in (tmp_path / "run").iterdir()}
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert [e.step for e in board.Images("samples")] == [4, 8, 9]


@pytest.mark.parametrize("name", ["columns", "rows", "every_epochs"])
def test_options_of_the_picture(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*, got 0"):
        SamplePlots(**{name: 0})


# -- the command line --------------------------------------------------------------------------------------------------

GAME = (
    "model=dcgan", "model.latent=4", "model.width=2", "model.crit_repeats=2", "dataset=digits_generation",
    "dataset.eval_images=10", "callbacks=none", "logger=quiet", "trainer.max_epochs=null", "trainer.max_steps=5",
    "trainer.eval_every_epochs=null",
)  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["dataset=digits"], r"model of two players is for images to be imitated, and this data set is for classific"),
        (["model=conv_autoencoder"], r"imitated by a model of two players, .* choose model=dcgan or resnet_gan"),
        (["model=mlp"], r"imitated by a model of two players, .* choose model=dcgan or resnet_gan"),
        (["optimizer@critic=adamm"], r"optimizer@critic has no choice 'adamm' \(did you mean 'adam'\?\)"),
        (["optimizer@critc=adam"], r"unknown key 'optimizer@critc' \(did you mean 'optimizer@critic'\?\)"),
        (["optimizer@generator=kfac", "generator.dampin=1"], r"generator has no key 'dampin' \(did you mean 'damping'"),
        (["optimizer@generator=kfac", "generator.damping=0"], r"generator.damping must be in \(0, inf\), got 0"),
        (["generator.lr=1"], r"no key 'generator.lr' as long as the generator has no optimizer .*optimizer@generator="),
        (["model.crit_repeats=0"], r"model.crit_repeats must be at least 1, got 0"),
        (["trainer.label_smoothing=0.1"], r"trainer.label_smoothing must be 0 for a generation"),
        (["trainer.compile=true"], r"trainer.compile must be false for Players"),
        (["finetune.freeze=generator"], r"finetune is for models with one optimizer"),
        (["schedules.update_every.end=3"], r"update_every is no scalar of Players"),
    ],
)
def test_one_sentence(argv: list[str], says: str, command: Callable[..., Outcome], work: Path) -> None:  # noqa: F811
    group = argv[0].split("=")[0]
    given = [text for text in GAME if not text.startswith(f"{group}.")]
    outcome = command(*given, *argv)
    assert re.search(says, outcome.sentence()), outcome.sentence()
    assert outcome.code == 1 and list(work.iterdir()) == []


def test_a_run_and_its_continuation(command: Callable[..., Outcome], work: Path) -> None:  # noqa: F811
    players = ("optimizer@generator=kfac", "optimizer@critic=adam", "generator.lr=0.01", "critic.lr=0.002")
    assert command(*GAME, *players).code == 0
    (run,) = runs(work)
    assert run.parent.name == "kfac-adam_dcgan_digits_generation"
    assert summary(run)["steps"] == 5
    rates = [(e["generator/lr"], e["critic/lr"]) for e in metrics(run) if "critic/lr" in e]
    assert rates and rates[-1][0] == pytest.approx(5 * rates[-1][1])

    refused = command(f"resume={run}", "optimizer@critic=sgd", "trainer.max_steps=7")
    assert re.search(r"is a run with optimizer@critic=adam, which optimizer@critic=sgd contradicts", refused.sentence())
    refused = command(f"resume={run}", "critic.lr=1", "trainer.max_steps=7")
    assert re.search(r"critic.lr is 0.002 in the checkpoint", refused.sentence())
    assert command(f"resume={run}", "trainer.max_steps=7").code == 0
    assert summary(run)["steps"] == 7
    again = command(f"resume={run}", "trainer.max_steps=9")
    assert again.code == 0 and summary(run)["steps"] == 9 and runs(work) == [run]


def test_a_sweep_over_a_player(command: Callable[..., Outcome], work: Path) -> None:  # noqa: F811
    sweep = (*GAME, "-m", "optimizer=sgd", "optimizer.lr=1e-3", "optimizer@critic=adam,kfac", "trainer.max_steps=2")
    assert command(*sweep).code == 0
    found = runs(work, "multirun/*/*")
    assert sorted(re.sub(r"_[0-9a-f]{8}$", "", run.name) for run in found) == [
        "optimizer-sgd_optimizer-critic-adam", "optimizer-sgd_optimizer-critic-kfac",
    ]  # fmt: skip
    assert {run.parent.name for run in found} == {"dcgan_digits_generation"}
    assert command(*sweep).out.count("skipped") == 2


def test_without_their_own_both_players_share_an_optimizer() -> None:
    model = build_model(dcgan, {"in_channels": 1, "image_size": 8}, **SMALL)
    config = compose(["optimizer=kfac", "optimizer@critic=adam", "optimizer.lr=0.5", "critic.lr=0.25"]).values
    players = build_optimizers(config, model, likelihood=Gaussian(), seed=0)
    assert isinstance(players, Players) and isinstance(players.generator, KFAC)
    assert isinstance(players.critic, torch.optim.Adam)
    assert [group["lr"] for group in players.param_groups] == [0.5, 0.25]
    config = compose(["optimizer=adafisher"]).values
    players = build_optimizers(config, model, likelihood=Gaussian(), seed=0)
    assert isinstance(players, Players)
    assert [type(player) for player in players.players.values()] == [AdaFisher, AdaFisher]
    assert "generator.1" in players.coverage() and "unsupported" not in players.coverage()
    players.close()
