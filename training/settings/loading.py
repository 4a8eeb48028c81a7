"""A run's model, data and task from its configuration: to be trained, or to be looked at when it was."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data import kept
from data.kept import Preparation
from data.options import Kind
from models import build_model
from training import tasks
from training.errors import UserError
from training.loop import rng
from training.loop.distributed import World, choose
from training.loop.launch import Place
from training.loop.precision import Precision
from training.names import PLAYERS, TARGET
from training.runs import checkpoints, record
from training.runs.warm_start import warm_start
from training.settings import schema
from training.settings.trust import is_known, targets
from training.tasks import suited
from training.tasks.task import Task

if TYPE_CHECKING:
    from data import DataModule

#: Which weights: of the best evaluation, of the newest checkpoint, of a step, of a file, or None: untrained.
Weights = Literal["best", "last"] | int | Path | None
# What of a configuration is called to make a run's optimizer.
OPTIMIZERS = ("optimizer", *PLAYERS)


def build_parts(config: Mapping[str, Any], world: World) -> tuple[DataModule, Task, nn.Module]:
    """What a run trains, drawn from the global generators, which the caller has seeded.

    Args:
        config: a checked configuration.
        world: where, and which share of the data.

    Returns:
        The data, in the normalisation that the model's weights were published with, if they were; the task; the model.

    Raises:
        UserError: a value is refused, or something is not there.
    """
    _check_choice(config)
    data = build_data(config["dataset"], config["seed"], world)
    task, model = build_learning(config, data, world)
    suited.fill_lazy_layers(model, data)
    if statistics := getattr(model, "statistics", None):  # they were trained on pixels of this mean and std
        data.normalise(*statistics)
    return data, task, model


def _check_choice(config: Mapping[str, Any]) -> None:
    """Refuse a model and a data set that are not for each other before the data are read, fetched or made."""
    kind = getattr(schema.locate(config["dataset"][TARGET], "dataset"), "kind", None)
    if not isinstance(kind, Kind):  # one's own says what it is when it is called
        return
    factory = schema.locate(config["model"][TARGET], "model")
    options = {*config["model"]} - {TARGET}
    with schema.refusals("trainer", config["trainer"]):
        suited.check_smoothing(config["trainer"].get("label_smoothing", 0.0), kind)
    with schema.refusals("model", options, factory):
        suited.check_choice(factory, options, kind)
    if suited.makes_players(factory) is False:
        schema.refuse_players(config)


def build_learning(config: Mapping[str, Any], data: DataModule, world: World) -> tuple[Task, nn.Module]:
    """The task and the model for a data set; see ``build_parts``.

    Args:
        config: a checked configuration.
        data: whose facts alone are looked at.
        world: where.

    Raises:
        UserError: a value is refused.
    """
    with schema.refusals("trainer", config["trainer"]):
        task = tasks.build(data.task, data.facts, config["trainer"].get("label_smoothing", 0.0), config["seed"])
    model = schema.build(config["model"], "model", through=build_model, facts=data.facts)
    if not isinstance(model, nn.Module):
        made = f"{config['model'][TARGET]} returned what is of type {type(model).__name__}"
        raise UserError(f"model: {made}, and a model is a torch.nn.Module")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(f"model: {config['model'][TARGET]} returned one on the device meta, which holds no numbers")
    return task, model.to(world.device)


def build_data(node: Mapping[str, Any], seed: int, world: World) -> DataModule:
    """The data set of a checked node; what is no `DataModule`, such as a torch ``Dataset``, is wrapped into one.

    Args:
        node: names a callable, which is given ``seed``, ``device``, ``rank`` and ``world_size`` if it takes them.
        seed: of the order.
        world: where, and which share.

    Raises:
        UserError: a value is refused, or what it returns is no data set, or would be trained on by each process alone.
        DataError: something is not there, or cannot be learned from.
    """
    from data import DataModule, wrap
    from data.own import ASKED, served_to

    place: dict[str, Any] = {"seed": seed, "device": world.device, "rank": world.rank, "world_size": world.world_size}
    takes = inspect.signature(schema.locate(node[TARGET], "dataset")).parameters
    every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    asked = {name: value for name, value in node.items() if name in ASKED and not every and name not in takes}
    with served_to(asked, **place) as wrapping:
        given = {name: value for name, value in place.items() if every or name in takes}
        made = schema.build({name: node[name] for name in node if name not in asked}, "dataset", **given)
        if isinstance(made, DataModule):
            if asked and not wrapping.heard:
                option = next(iter(asked))
                raise UserError(f"dataset.{option}: {node[TARGET]} has no such option, and does not call data.wrap")
            shared = "world_size" in given or getattr(made.train, "world_size", 1) == world.world_size
            if world.world_size > 1 and not shared:
                raise UserError(
                    f"dataset: each of the {world.world_size} processes would train on all of what {node[TARGET]} "
                    "returns: let it take rank and world_size, or make it by data.wrap, which knows them"
                )
            return made
        if made is None:
            raise UserError(f"dataset: {node[TARGET]} returned nothing: let it return a data set")
        if isinstance(made, tuple) and len(made) > 3:
            raise UserError(
                f"dataset: {node[TARGET]} returned {len(made)} parts: let it return one set, or those to train on, to "
                "validate and to test"
            )
        with schema.refusals("dataset", node):
            # What takes any option has been given these too, and may have left them alone.
            given = {name: value for name, value in node.items() if name in ASKED and name not in takes}
            return wrap(*made, **given) if isinstance(made, tuple) else wrap(made, **given)


@dataclass
class LoadedRun:
    """A run that was trained, as it is to be looked at.

    Attributes:
        folder: the run folder.
        config: its values, as in ``config.yaml``.
        choices: the file of each group ({"optimizer": "kfac", ...}).
        data: its data, split as they were. Name, facts and class names are the run folder's own; loaders are made when
            they are asked for, and say then if the data set is not here.
        task: loss and metrics; ``task.likelihood`` is what curvature is of.
        model: in evaluation mode, with the weights that were asked for.
        step: at which step of training these were; 0: untrained.
        device: that all of it is on.
        preparation: how image files become inputs; None: the task has no images, or nobody knows.
        own: dotted names of callables of the user's own that the configuration may call.
    """

    folder: Path
    config: dict[str, Any]
    choices: dict[str, str]
    data: DataModule
    task: Task
    model: nn.Module
    step: int
    device: torch.device
    preparation: Preparation | None = None
    own: Collection[str] = ()

    @property
    def name(self) -> str:
        """What a picture calls it: its optimizer and its folder's name."""
        return f"{self.choices.get('optimizer', '?')} ({self.folder.name})"

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by target; of a text, its tokens."""
        return self.data.class_names

    def prepare(self, images: Sequence[str | Path | Tensor]) -> Tensor:
        """Images as the model has seen them in training: of its size, normalised as its data were.

        Args:
            images: files, or bytes (uint8 ``[C, H, W]``) of the model's size.

        Returns:
            float32 ``[n, C, H, W]``, on ``device``.

        Raises:
            UserError: nobody knows how.
            DataError: a file is no image.
        """
        if self.preparation is None:
            raise UserError(
                f"{self.folder} does not say how images become inputs: its data set has none, yields floats of its own "
                "making (data.wrap(..., normalised=(mean, std)) tells), or lies elsewhere (say where, by data)"
            )
        read = [one if isinstance(one, Tensor) else self.preparation.read(one) for one in images]
        return self.preparation(torch.stack(read).to(self.device))

    @torch.no_grad()
    def outputs(self, inputs: Tensor) -> Tensor:
        """What the model makes of inputs, in the number format that it was trained in.

        Args:
            inputs: as `prepare` returns them, or the loaders of ``data``.
        """
        asked = self.config["trainer"].get("precision", "fp32")
        name: Any = "fp32" if asked == "fp16" and self.device.type != "cuda" else asked
        precision = Precision(name, self.device, self.config["trainer"].get("channels_last", False))
        precision.place(self.model)
        with precision.autocast():
            outputs = self.model(precision.prepare(inputs.to(self.device)))
        return precision.full(outputs)

    def predict(self, images: Sequence[str | Path | Tensor] | Tensor) -> Tensor:
        """Probabilities of the classes, of a classification; else the model's outputs.

        Args:
            images: see `prepare`; or inputs, a tensor of floats.

        Raises:
            UserError, DataError: see `prepare`.
        """
        outputs = self.outputs(images if isinstance(images, Tensor) else self.prepare(images))
        return outputs.softmax(-1) if self.task.name == "classification" else outputs

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Step and file of each numbered checkpoint, oldest first."""
        return sorted(checkpoints.steps(self.folder / "checkpoints"))

    def state(self, weights: Weights = "last") -> dict[str, Any]:
        """All that a checkpoint holds (``checkpoints.PARTS``), on the CPU.

        Args:
            weights: whose; not None.

        Raises:
            UserError: there is no such checkpoint, or it is damaged.
        """
        if weights is None:
            raise UserError("untrained weights are in no checkpoint: give best, last, a step or a file")
        if isinstance(weights, Path):
            return checkpoints.load(weights)
        folder = self.folder / "checkpoints"
        if weights == "last":
            found = checkpoints.latest(folder, ("model",))
            if found is None:
                raise UserError(f"{self.folder} holds no checkpoint that can be read")
            return found[1]
        path = checkpoints.best_file(folder) if weights == "best" else checkpoints.step_file(folder, int(weights))
        if not path.exists():
            there = ", ".join(str(step) for step, _ in self.checkpoints()) or "none"
            raise UserError(f"{self.folder} has no checkpoint {path.name}; steps that are there: {there}")
        return checkpoints.load(path)

    def load(self, weights: Weights) -> int:
        """Give the model the weights of another checkpoint; returns its step.

        Args:
            weights: whose; not None.

        Raises:
            UserError: there is no such checkpoint, it is damaged, or of another model.
        """
        state = self.state(weights)
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise UserError(f"the checkpoint is not of the model in {self.folder}/config.yaml: {error}") from error
        self.step = int(state["counters"]["step"])
        return self.step

    def build_optimizer(self) -> Optimizer:
        """The run's optimizer on ``model``, as it is before its first step; what surrounds it included.

        Raises:
            UserError: the model cannot have it, or it is nobody's here and not named in ``own``.
        """
        given = {group: self.config[group] for group in OPTIMIZERS if self.config.get(group)}
        _require_known(given, self.own, self.folder)
        return schema.build_optimizers(
            self.config, self.model, likelihood=self.task.likelihood, seed=self.config["seed"]
        )  # fmt: skip


def load_run(
    folder: str | Path,
    weights: Weights = "best",
    *,
    data: str | Path | None = None,
    device: str | torch.device = "cpu",
    own: Collection[str] = (),
) -> LoadedRun:
    """Build what a run folder's configuration says, with the weights that it reached, ready to predict.

    Nothing in the folder is changed, and the global generators stay as they are. The data set need not be here, until
    an example of it is asked for: what the model and the task need of it lies in the folder. That of a folder of an
    earlier version has to be.

    Args:
        folder: of a run of train.py.
        weights: see ``Weights``.
        data: where its data set lies here; None: where it lay (``paths.data``).
        device: to load to.
        own: dotted names of your own callables that its configuration may call; a folder may be another person's, and
            what is neither Curvlab's nor its packages' is called only if it is named here.

    Raises:
        UserError: it is no run folder, or something in it cannot be built or read.
        DataError: what it keeps of its data set is damaged.
    """
    path, _ = record.find(str(folder), asked="")
    config, choices = record.load(path)
    held = kept.read(path)
    if held is not None and not (held["whole"] and ("." in held["task"] or held["task"] in tasks.TASKS)):
        held = None
    called = ("model", "dataset") if held is None or weights is None else ("model",)  # drawn after what the data draw
    _require_known({group: config[group] for group in called}, own, path)
    if held is not None and "." in held["task"] and held["task"] not in own:
        raise UserError(f"{path} is of a task that is no part of Curvlab: {_as_own([held['task']])}")
    if data is not None:
        config = record.replace_folder(config, str(config["paths"]["data"]), str(data))
    with schema.refusals("", {}):
        world = World(device=choose(str(device), Place()))

    @functools.cache
    def examples() -> DataModule:
        _require_known({"dataset": config["dataset"]}, own, path)
        with _seeded(config["seed"], world.device):
            found = build_data(config["dataset"], config["seed"], world)
        if held is not None and held["preparation"] is not None and config["model"].get("pretrained"):
            scale, shift = (torch.tensor(held["preparation"][name]).double().flatten() for name in ("scale", "shift"))
            found.normalise((-shift / (255 * scale)).tolist(), (1 / (255 * scale)).tolist())
        return found

    with _seeded(config["seed"], world.device):
        if held is None or weights is None:
            loaded = LoadedRun(path, config, choices, *build_parts(config, world), step=0, device=world.device, own=own)
            loaded.preparation = kept.preparation(loaded.data)
        else:
            recalled = kept.recalled(held, examples)
            spared = {"pretrained": False} if "pretrained" in config["model"] else {}  # its weights are replaced anyway
            learning = build_learning({**config, "model": {**config["model"], **spared}}, recalled, world)
            loaded = LoadedRun(path, config, choices, recalled, *learning, step=0, device=world.device, own=own)
            if held["preparation"] is not None:
                loaded.preparation = Preparation(**held["preparation"])
    if weights is not None:
        loaded.load(weights)
    elif config.get("init_from"):
        warm_start(loaded.model, config["init_from"])
    loaded.model.eval()
    return loaded


def _require_known(nodes: Mapping[str, Any], own: Collection[str], path: Path) -> None:
    strange = {where: target for where, target in targets(nodes) if target not in own and not is_known(where, target)}
    if strange:
        said = " and ".join(f"{where}={target}" for where, target in strange.items())
        what = "is no part" if len(strange) == 1 else "are no parts"
        raise UserError(
            f"{path}/config.yaml has {said}, which {what} of Curvlab, or of its packages for this place: "
            f"{_as_own(strange.values())}"
        )


def _as_own(names: Iterable[str]) -> str:
    """How a user says that callables are the user's own, of a script and in Python."""
    listed = [str(name) for name in dict.fromkeys(names)]
    options = " ".join(f"--own {name}" for name in listed)
    return f"if {'it is' if len(listed) == 1 else 'they are'} yours, add {options}, or own={listed} in Python"


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within it, the global generators begin as a run's do; then they are as they were."""
    before = rng.get_state(device)
    try:
        rng.seed_everything(seed)
        yield
    finally:
        rng.set_state(before, device)
