"""Every model with every optimizer on real data: whether it trains, and what a step costs.

    python scripts/studies/zoo.py --data datasets
    python scripts/studies/zoo.py --data datasets models=[resnet18,gpt1_mini] optimizers=[adafisher,kfac] --markdown

Data, model and optimizer are those of ``python train.py model=... dataset=... optimizer=...``. Two fixed batches are
learned by heart for a few steps: ``ok`` means that their loss afterwards, in training mode, is below that before.
Beside each optimizer runs SGD, block by block, and the ratio is of amortised step times as in scripts/benchmark.py, on
one thread and by the processor's clock, which other programs do not slow down. The first step of a block gathers and
inverts curvature. Results are kept in a file as they come; a second call goes on with what is not ``ok`` yet.

``--data`` is a folder with ``cifar10-subset`` (train/ and test/ of one folder a class), ``mnist`` (torchvision's
layout), ``olivetti``, ``tiny-imagenet-200``, ``wikitext-2`` and ``imagenet-sample`` (photographs, each named
``<class>_<words>.JPEG``). Models of data that are not there are passed over. ``dcgan`` and ``resnet_gan``, which play
against each other, are no part of this: see docs/results/gan.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from torch import Tensor

from analysis import pages
from data import DataError, DataModule
from models import build_model
from optimizers import CurvatureOptimizer, build_optimizer
from scripts.benchmark import Arm
from training import tasks
from training.errors import UserError, did_you_mean
from training.loop.rng import seed_everything
from training.settings.composition import compose
from training.settings.schema import build
from training.show import heart

OPTIMIZERS = ("sgd", "adafisher", "kfac", "adahessian")  # of transformers adafisherw in place of adafisher

#: One learning rate an optimizer and kind of model, that a handful of steps on two batches shows progress with.
RATES: dict[str, dict[str, float]] = {
    "convolutional": {"sgd": 0.01, "adafisher": 1e-4, "kfac": 0.001, "adahessian": 0.03},
    "deep": {"sgd": 1e-4, "adafisher": 1e-5, "kfac": 0.001, "adahessian": 0.03},  # and batch norm on two images
    "transformer": {"sgd": 0.01, "adafisher": 1e-4, "kfac": 0.001, "adahessian": 0.003},
    "wide": {"sgd": 1e-3, "adafisher": 1e-5, "kfac": 3e-5, "adahessian": 0.003},  # transformers, on two images
    "rebuilding": {"sgd": 1e-4, "adafisher": 1e-6, "kfac": 0.01, "adahessian": 1e-3},  # its loss sums over pixels
}

#: By data set: the folder that must be there, and what to say on the command line.
DATA: dict[str, tuple[str, list[str]]] = {
    "MNIST": ("mnist", ["dataset=mnist", "dataset.download=false"]),
    "MNIST, rebuilt": ("mnist", ["dataset=mnist_autoencoder", "dataset.download=false"]),
    "faces, rebuilt": ("olivetti", ["dataset=faces", "dataset.cache=null", "dataset.train_images=1250"]),
    "CIFAR-10": ("cifar10-subset", ["dataset=image_folder"]),
    "CIFAR-10, rebuilt": ("cifar10-subset", ["dataset=image_folder_autoencoder"]),
    "Tiny ImageNet": (
        "tiny-imagenet-200",
        ["dataset=tiny_imagenet", "dataset.download=false", "dataset.batch_size=16"],
    ),
    "ImageNet": (
        "imagenet-sample",
        ["dataset=imagenet", "dataset.workers=0", "dataset.val_fraction=0.1", "dataset.batch_size=4"],
    ),
    "WikiText-2": (
        "wikitext-2",
        [
            "dataset=wikitext2", "dataset.files={train: valid.txt, val: test.txt}", "dataset.download=false",
            "dataset.sequence=64", "dataset.batch_size=16",
        ],
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        name: of its file in configs/model.
        data: one of ``DATA``.
        kind: one of ``RATES``.
        batch: examples a step, at most what is loaded.
        rounds: blocks of steps.
        block: steps a block.
        options: of the model, besides its file.
    """

    name: str
    data: str = "CIFAR-10"
    kind: str = "convolutional"
    batch: int = 8
    rounds: int = 3
    block: int = 3
    options: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What the table calls it."""
        return " ".join([self.name, *(option.removeprefix("model.") for option in self.options)])


def _rows() -> Iterator[Row]:
    """All models, the large ones last and on less."""
    for name in ("mlp", "deep_linear", "toynet"):
        yield Row(name, "MNIST", batch=256)
    wide: dict[str, Any] = {
        "kind": "rebuilding",
        "batch": 256,
    }  # cheap, and with less a factor of 2000 is all null space
    for name in ("autoencoder_curves", "autoencoder_mnist", "conv_autoencoder"):
        yield Row(name, "MNIST, rebuilt", **wide)
    yield Row("autoencoder_faces", "faces, rebuilt", **wide)
    yield Row("autoencoder_cifar10", "CIFAR-10, rebuilt", **wide)
    for name in ("cuda_convnet", "resnet20", "resnet32", "resnet56"):
        yield Row(name)
    yield Row("cct", kind="transformer")
    yield Row("vit_tiny", kind="transformer")
    less: dict[str, Any] = {"batch": 4, "rounds": 1, "block": 4}
    yield Row("gpt1_mini", "WikiText-2", "transformer", **less)
    yield Row("gpt1_mini", "WikiText-2", "transformer", options=("model.tie=false",), **less)
    yield Row("mobilenetv3", **less)
    yield Row("timm", options=("model.name=convnext_atto",), **less)
    yield Row("vgg11", **less)
    yield Row("resnet18", **less)
    yield Row("vit_small", "Tiny ImageNet", "transformer", **less)
    yield Row("torchvision", kind="transformer", options=("model.name=swin_t",), **less)
    yield Row("densenet121", **less)
    few: dict[str, Any] = {"batch": 2, "rounds": 1}
    yield Row("resnet34", "Tiny ImageNet", "deep", **few)
    yield Row("densenet169", kind="deep", **few)
    yield Row("swin_t", kind="transformer", **few)
    yield Row("focalnet", kind="transformer", **few)
    yield Row("resnet50", "ImageNet", "deep", **few)
    yield Row("densenet201", kind="deep", **few)
    yield Row("swin_s", kind="transformer", **few)
    yield Row("resnet101", kind="deep", **few)
    yield Row("densenet161", kind="deep", **few)
    yield Row("resnet152", kind="deep", **few)
    yield Row("vit_base", kind="wide", **few)
    yield Row("gpt1", "WikiText-2", "transformer", **few)
    yield Row("swin_b", kind="wide", **few)
    yield Row("swin_l", kind="wide", **few)


ROWS = list(_rows())


class Timed(Arm):
    """An optimizer with a model of its own, by the seconds that the processor works on its steps."""

    def step(self) -> tuple[float, float, float]:
        """One training step; its seconds stand in the first place."""
        start = time.process_time()
        super().step()
        return time.process_time() - start, 0.0, 0.0

    def loss(self) -> float:
        """Mean over the batches, with the same dropped units each time."""
        torch.manual_seed(0)
        with torch.no_grad():
            return sum(float(self.likelihood.nll(self.model(x), y)) for x, y in self.batches) / len(self.batches)


@dataclass
class Choices:
    """``key=value`` on the command line.

    Attributes:
        models: names in configs/model.
        optimizers: some of ``OPTIMIZERS``.
    """

    models: list[str] = field(default_factory=lambda: [*dict.fromkeys(row.name for row in ROWS)])
    optimizers: list[str] = field(default_factory=lambda: [*OPTIMIZERS])


@dataclass
class Cell:
    """What came of a model with an optimizer.

    Attributes:
        verdict: ``ok``, or why not.
        ratio: of a step's seconds to SGD's.
        seconds: of a step.
        before: loss of the two batches.
        after: the same after the steps.
        parameters: of the model.
    """

    verdict: str
    ratio: float | None = None
    seconds: float | None = None
    before: float | None = None
    after: float | None = None
    parameters: int | None = None

    def __str__(self) -> str:
        """In a table."""
        return f"{self.verdict} {self.ratio:.1f}x" if self.verdict == "ok" else self.verdict


def judged(before: float, after: float) -> str:
    """The verdict on two losses."""
    if not math.isfinite(after):
        return "the loss is no longer finite"
    return "ok" if after < before else f"the loss went from {before:.3g} to {after:.3g}"


class Zoo:
    """Runs cells; data sets that were loaded are kept for the next model.

    Args:
        data: the folder of the data sets.
    """

    def __init__(self, data: Path) -> None:
        self._folder = data
        self._loaded: dict[str, tuple[DataModule, list[tuple[Tensor, Tensor]]]] = {}

    def cell(self, row: Row, optimizer: str) -> Cell:
        """Train one model with one optimizer, beside SGD.

        Raises:
            DataError, UserError, ValueError, RuntimeError: what a run would end in.
        """
        data, batches = self._data(row)
        batches = [(inputs[: row.batch], targets[: row.batch]) for inputs, targets in batches]
        entries = list(dict.fromkeys(["sgd", optimizer]))
        arms = [self._arm(row, entry, data, batches) for entry in entries]
        *_, arm = arms
        before = arm.loss()
        for _ in range(row.rounds):
            for each in arms:
                each.block(row.block)
        after = arm.loss()
        for each in arms:
            if isinstance(each.optimizer, CurvatureOptimizer):
                each.optimizer.close()
        seconds, unit = arm.seconds(), arms[0].seconds()
        count = sum(p.numel() for p in arm.model.parameters())
        return Cell(judged(before, after), seconds / unit, seconds, before, after, count)

    def _data(self, row: Row) -> tuple[DataModule, list[tuple[Tensor, Tensor]]]:
        """A data set and two batches of it."""
        if row.data not in self._loaded:
            folder, overrides = DATA[row.data]
            if not (self._folder / folder).is_dir():
                raise DataError(f"no data: there is no folder {folder} in the one that --data names")
            with arranged(self._folder / folder) as root:
                given = [f"dataset.root={root}", "dataset.batch_size=256", *overrides]
                data = build(node("dataset", *given), "dataset", seed=0, device=torch.device("cpu"))
                served = data.train.epoch(0)
                self._loaded[row.data] = data, [next(served), next(served)]
        return self._loaded[row.data]

    @staticmethod
    def _arm(row: Row, optimizer: str, data: DataModule, batches: list[tuple[Tensor, Tensor]]) -> Timed:
        """Built as train.py builds it."""
        entry = "adafisherw" if optimizer == "adafisher" and row.kind in ("transformer", "wide") else optimizer
        rate = f"optimizer.lr={RATES[row.kind][optimizer]}"
        task = tasks.build(data.task, data.facts)
        chosen = node("model", f"model={row.name}", *row.options)
        seed_everything(0)  # now: a configuration is tried out while it is composed
        model = build(chosen, "model", through=build_model, facts=data.facts).train()
        extras: dict[str, Any] = {"model": model, "likelihood": task.likelihood, "seed": 0}
        given = [rate]
        if entry == "kfac":  # those after 1, 3, 7, ... steps would count as ordinary steps
            given.append("optimizer.early_updates=false")
        built = build(node("optimizer", f"optimizer={entry}", *given), "optimizer", through=build_optimizer, **extras)
        return Timed(entry, model, built, task.likelihood, batches)


@cache
def node(group: str, *overrides: str) -> dict[str, Any]:
    """A group of the configuration that ``python train.py`` with these overrides would run on."""
    return compose(overrides).values[group]


@contextmanager
def arranged(folder: Path) -> Iterator[Path]:
    """The folder; of loose photographs, one with links to them in a folder a class, while it is needed."""
    files = sorted(folder.glob("*.JPEG"))
    if not files:
        yield folder
        return
    made = Path(tempfile.mkdtemp())
    try:
        for file in files:
            for split in ("train", "val"):
                place = made / split / file.name.partition("_")[0]
                place.mkdir(parents=True, exist_ok=True)
                (place / file.name).symlink_to(file.resolve())
        yield made
    finally:
        shutil.rmtree(made)


def keep(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Write results, whole or not at all."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The table of docs/results/zoo.md."""
    lines = []
    for row in ROWS:
        cells = {name: Cell(**results[key]) for name in OPTIMIZERS if (key := f"{row.label} {name}") in results}
        if not cells:
            continue
        count = next((cell.parameters for cell in cells.values() if cell.parameters), None)
        size = "" if count is None else f"{count:,}"
        texts = [str(cells[name]) if name in cells else "" for name in OPTIMIZERS]
        first = cells.get("sgd")
        if first is not None and first.verdict == "ok":
            texts[0] = f"ok {1e3 * (first.seconds or 0):.3g} ms"
        lines.append([row.label, size, row.data, row.batch, row.rounds * row.block, *texts])
    return pages.table(["model", "parameters", "data", "batch", "steps", *OPTIMIZERS], lines, left=(0, 2))


def _chosen(given: Sequence[str]) -> Choices:
    """The choices of the command line.

    Raises:
        UserError: one of them does not exist.
    """
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Choices), OmegaConf.from_dotlist([*given])))
    except OmegaConfBaseException as error:
        raise UserError(f"{str(error).splitlines()[0]} (give models=[...] or optimizers=[...])") from error
    assert isinstance(merged, Choices)
    known = {"models": {row.name for row in ROWS}, "optimizers": set(OPTIMIZERS)}
    for key, names in known.items():
        for name in getattr(merged, key):
            if name not in names:
                raise UserError(f"{key} has no {name!r}{did_you_mean(name, names)}")
    return merged


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 1 if a cell is neither ``ok`` nor without data."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--json", type=Path, default=Path("zoo.json"), help="where results are kept (%(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown at the end")
    parser.add_argument("choices", nargs="*", help="models=[...] optimizers=[...]")
    options = parser.parse_args(argv)
    try:
        choices = _chosen(options.choices)
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = json.loads(options.json.read_text()) if options.json.exists() else {}
    zoo, console, bad = Zoo(options.data), Console(width=120, highlight=False), False
    for row in (row for row in ROWS if row.name in choices.models):
        for name in choices.optimizers:
            key = f"{row.label} {name}"
            if results.get(key, {}).get("verdict") != "ok":
                try:
                    cell = zoo.cell(row, name)
                except DataError as error:
                    cell = Cell(str(error))
                except (UserError, ValueError, RuntimeError) as error:
                    cell, bad = Cell(str(error).splitlines()[0]), True
                gc.collect()  # of the models that hooks and optimizers refer to in circles
                bad |= cell.before is not None and cell.verdict != "ok"
                results[key] = asdict(cell)
                keep(results, options.json)
            console.print(f"{key}: {Cell(**results[key])}", markup=False)
    if options.markdown:
        print(markdown(results), end="")
    return int(bad)


if __name__ == "__main__":
    with heart.working("zoo"):
        sys.exit(main())
