"""Experiments, the studies they belong to and what a study has for each optimizer: all compose, all run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.cli.conftest import Outcome, runs, summary
from tests.conftest import ROOT
from training.settings.composition import CONFIG_FOLDER, compose

EXPERIMENTS = sorted(
    path.relative_to(CONFIG_FOLDER / "experiment").with_suffix("").as_posix()
    for path in (CONFIG_FOLDER / "experiment").rglob("*.yaml")
)
# The nets that AdaFisher's study trains on CIFAR-10 are the ones on CIFAR-100.
RUN = [name for name in EXPERIMENTS if not name.startswith("adafisher/cifar100_")]

# A data set of files of one's own that is served as a published one is.
PICTURES = ("cifar10", "cifar100", "mnist", "tiny_imagenet", "svhn")
IMAGES = ("curves", "faces", "mnist_autoencoder", "cifar10_autoencoder", "svhn_autoencoder")
TEXTS = ("wikitext2", "wikitext103", "text_file")


def content(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text()) or {}


def study(experiment: str) -> str | None:
    """The study that an experiment chooses, or the experiment that it begins with."""
    for entry in content(CONFIG_FOLDER / "experiment" / f"{experiment}.yaml").get("defaults", []):
        if isinstance(entry, str) and (found := study(entry.removeprefix("/experiment/"))):
            return found
        if isinstance(entry, dict) and "override /study" in entry:
            return entry["override /study"]
    return None


def pairs() -> list[tuple[str, str | None]]:
    """Experiments with optimizers that their study has a preset for: each experiment and each preset at least once."""
    experiments: dict[str | None, list[str]] = {}
    for name in EXPERIMENTS:
        experiments.setdefault(study(name), []).append(name)
    found: list[tuple[str, str | None]] = []
    for chosen, names in experiments.items():
        presets = sorted(path.stem for path in (CONFIG_FOLDER / "preset" / str(chosen)).glob("*.yaml")) or [None]
        found += [
            (names[index % len(names)], presets[index % len(presets)]) for index in range(max(len(names), len(presets)))
        ]
    return found


@pytest.mark.parametrize(("name", "optimizer"), pairs())
def test_an_optimizer_comes_with_what_the_study_has_for_it(name: str, optimizer: str | None) -> None:
    run = compose([f"experiment={name}", *([f"optimizer={optimizer}"] if optimizer else [])])
    assert run.values["name"], "an experiment names its folder"
    assert run.choices.get("study") == study(name)
    assert "preset" not in run.choices, "it follows from the study and the optimizer"
    if optimizer:
        path = CONFIG_FOLDER / "preset" / str(study(name)) / f"{optimizer}.yaml"
        preset = {"optimizer": content(path)} if "# @package optimizer" in path.read_text() else content(path)
        for group, chosen in preset.items():
            assert json.loads(json.dumps(run.values[group] | chosen)) == json.loads(json.dumps(run.values[group]))


def test_a_preset_belongs_to_a_study_and_an_optimizer() -> None:
    for path in (CONFIG_FOLDER / "preset").rglob("*.yaml"):
        folder = path.parent.relative_to(CONFIG_FOLDER / "preset")
        assert (CONFIG_FOLDER / "study" / f"{folder}.yaml").exists(), path
        assert (CONFIG_FOLDER / "optimizer" / path.name).exists(), path


def test_a_study_is_chosen_by_an_experiment_or_carries_one_that_is() -> None:
    folder = CONFIG_FOLDER / "study"
    studies = {path.relative_to(folder).with_suffix("").as_posix(): content(path) for path in folder.rglob("*.yaml")}
    bases = {entry for node in studies.values() for entry in node.get("defaults", []) if isinstance(entry, str)}
    assert {study(name) for name in EXPERIMENTS} - {None} | bases == studies.keys()


def test_a_command_goes_before_a_preset_a_preset_before_a_study() -> None:
    def epochs(*overrides: str) -> float:
        return compose(["experiment=adafisher/cifar10_resnet50", *overrides]).values["trainer"]["max_epochs"]

    assert epochs("optimizer=sgd") == 200, "the study's"
    published = {"adafisher": 200, "adam": 210, "kfac": 107, "adahessian": 89, "shampoo": 36}
    assert {name: epochs(f"optimizer={name}") for name in published} == published
    assert epochs("optimizer=kfac", "trainer.max_epochs=3") == 3
    assert epochs("trainer.max_epochs=3", "optimizer=kfac") == 3
    assert compose(["experiment=adafisher/cifar10_resnet50", "debug=smoke"]).values["trainer"]["max_epochs"] is None


def test_a_study_serves_without_an_experiment() -> None:
    run = compose(["study=adafisher/vit", "dataset=cifar10", "model=vit_tiny", "optimizer=adamw"])
    assert run.choices["study"] == "adafisher/vit"
    assert (run.values["optimizer"]["lr"], run.values["trainer"]["max_epochs"]) == (1e-4, 210)
    assert run.values["dataset"]["augment"] == "cutout"
    other = compose(["experiment=adafisher/cifar10_swin_t", "study=adafisher/cnn", "optimizer=adahessian"]).values
    assert other["optimizer"]["lr"] == 0.15, "one that is given goes before the experiment's"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["study=adafisher/cn"], r"study has no choice 'adafisher/cn' \(did you mean 'adafisher/cnn'\?\)"),
        (["experiment=koroko/curves", "study=null"], r"study must be one of adafisher/cnn, .*, got null"),
        (["~study"], r"study is missing from the configuration: ~ cannot remove it"),
        (["study.batch=3"], r"unknown key 'study.batch'"),
    ],
)
def test_a_wrong_study_ends_in_a_sentence(argv: list[str], says: str, command: Callable[..., Outcome]) -> None:
    assert re.search(says, command(*argv).sentence())


def test_adafishers_published_row() -> None:
    values = compose(["experiment=adafisher/cifar10_resnet18"]).values
    assert values["dataset"] | {"batch_size": 256, "augment": "cutout"} == values["dataset"]
    published = {"lr": 1e-3, "weight_decay": 5e-4, "damping": 1e-3, "decay": 0.8, "update_every": 100}
    assert values["optimizer"] | published | {"ema": "reference"} == values["optimizer"]
    assert values["trainer"]["max_epochs"] == 200 and values["scheduler"]["_target_"] == "training.schedules.cosine"


def test_every_experiment_stands_in_the_documentation() -> None:
    text = (ROOT / "docs" / "experiments.md").read_text()
    listed = re.findall(r"^\| `([\w/]+)` \| (?:`|none)", text, re.MULTILINE)
    assert sorted(listed) == EXPERIMENTS


# -- they run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in three classes, photographs in ImageNet's layout, and a text."""
    folder = tmp_path_factory.mktemp("files")
    draw = np.random.default_rng(0)
    for place, side in (("pictures", 16), ("photographs/train", 80), ("photographs/val", 80)):
        for kind in "abc":
            (folder / place / kind).mkdir(parents=True)
            for index in range(8):
                pixels = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / place / kind / f"{index}.png")
    (folder / "text.txt").write_text(" ".join(f"word{number}" for number in draw.integers(0, 50, 4000)))
    return folder


def small(dataset: str, files: Path) -> list[str]:
    """A few examples of the kind that a data set has."""
    few = ["dataset.batch_size=4", "dataset.eval_batch_size=12"]
    if dataset in PICTURES:
        return ["dataset=image_folder", f"dataset.root={files / 'pictures'}", *few]
    if dataset == "imagenet":
        size = ["dataset.image_size=80", "dataset.resize=80", "dataset.workers=0", "dataset.val_fraction=0.2"]
        return [f"dataset.root={files / 'photographs'}", *size, *few]
    if dataset in IMAGES:
        return ["dataset=image_folder_autoencoder", f"dataset.root={files / 'pictures'}", *few]
    if dataset.endswith("_generation"):
        return ["dataset=image_folder_generation", f"dataset.root={files / 'pictures'}", "model.width=8", *few]
    if dataset in TEXTS:
        few = ["dataset.batch_size=2", "dataset.eval_batch_size=2", "dataset.sequence=32"]
        return ["dataset=text_file", f"dataset.path={files / 'text.txt'}", *few]
    assert dataset == "digits", f"{dataset}: say here what may stand in for it"
    return few


@pytest.mark.parametrize("name", RUN)
def test_every_experiment_runs_two_steps(name: str, command: Callable[..., Outcome], work: Path, files: Path) -> None:
    dataset = compose([f"experiment={name}"]).choices["dataset"]
    budget = ("trainer.max_epochs=null", "trainer.max_steps=2", "trainer.eval_every_epochs=null")
    quiet = ("callbacks=none", "logger=quiet")
    outcome = command(f"experiment={name}", *small(dataset, files), *budget, *quiet)
    assert outcome.code == 0, outcome.err
    (folder,) = runs(work)
    assert summary(folder)["steps"] == 2 and summary(folder)["status"] == "finished"
    shutil.rmtree(folder)  # checkpoints of large nets
