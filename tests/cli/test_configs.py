"""The files in configs/: complete, explained, and every optimizer and debug mode runs."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Outcome, runs, summary
from tests.conftest import ROOT
from training.errors import UserError
from training.settings.composition import CONFIG_FOLDER, compose
from training.settings.schema import locate, parameters

FILES = sorted(CONFIG_FOLDER.rglob("*.yaml"))
OURS = ("data", "models", "optimizers", "training")


def photos(choices: list[str]) -> list[str]:
    """The folder or file that the data sets of one's own need, if one of them is chosen."""
    own = {"dataset=image_folder": "dataset.root=photos", "dataset=text_file": "dataset.path=novel.txt"}
    return [place for start, place in own.items() if any(choice.startswith(start) for choice in choices)]


def names(group: str) -> list[str]:
    return [path.relative_to(CONFIG_FOLDER / group).with_suffix("").as_posix() for path in FILES if group in path.parts]


def nodes(path: Path) -> list[tuple[str, dict]]:
    """(group, node) for each `_target_` of a file, with what its defaults list inherits left out."""
    content = yaml.safe_load(path.read_text()) or {}
    group = path.relative_to(CONFIG_FOLDER).parts[0]
    return [(group, node) for node in (content, *content.values()) if isinstance(node, dict) and "_target_" in node]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIG_FOLDER).as_posix())
def test_a_file_lists_every_option_of_its_target_and_no_other(path: Path) -> None:
    for group, node in nodes(path):
        if node["_target_"].split(".")[0] in OURS:
            known = set(parameters(locate(node["_target_"], group), group))
            assert set(node) - {"_target_"} == known, node["_target_"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CONFIG_FOLDER).as_posix())
def test_a_file_says_what_it_is_and_explains_its_values(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert next(line for line in lines if "@package" not in line).startswith("# "), "no title"
    explained = ("optimizer", "step_length", "averaging", "scheduler", "dataset", "model", "trainer", "paths")
    if path.parent.name in explained:
        for line in lines:
            if re.match(r"\w+: ", line) and not line.startswith(("_target_", "depth")):  # the title says the depth
                assert "  # " in line, f"not explained: {line}"


@pytest.mark.parametrize(
    "group",
    ["optimizer", "step_length", "averaging", "scheduler", "model", "dataset", "trainer", "logger", "callbacks"],
)
def test_every_choice_composes(group: str) -> None:
    for name in names(group):
        choice = f"{group}={name}"
        if group == "logger" and name in ("wandb", "mlflow", "trackio") and importlib.util.find_spec(name) is None:
            with pytest.raises(UserError, match=f"^logger={name} needs a package that is not installed: pip install "):
                compose([choice])
            continue
        assert compose([choice, *photos([choice])]).choices[group] == name


@pytest.mark.parametrize("name", names("optimizer"))
def test_every_optimizer_runs_two_steps(name: str, quick: Callable[..., Outcome], work: Path) -> None:
    """With the values of its file, but for intervals: curvature is renewed in the second step too."""
    keys = compose([f"optimizer={name}"]).values["optimizer"]
    often = [
        f"optimizer.{key}=1" for key in ("update_every", "refresh_every", "hessian_every", "aux_every") if key in keys
    ]
    outcome = quick(f"optimizer={name}", "trainer.max_epochs=null", "trainer.max_steps=2", *often)
    assert outcome.code == 0, outcome.err
    (folder,) = runs(work)
    assert summary(folder)["steps"] == 2 and summary(folder)["status"] == "finished"


@pytest.mark.parametrize("name", [name for name in names("debug") if name not in ("verify", "summary")])
def test_every_debug_mode_runs(name: str, command: Callable[..., Outcome], work: Path) -> None:
    outcome = command(f"debug={name}", "model=mlp", "optimizer=adam")
    assert outcome.code == 0, outcome.err
    (folder,) = runs(work, "runs/debug/*/*")
    assert runs(work) == [folder.parent], "debug runs keep to themselves"
    if name == "overfit":
        assert summary(folder)["final"]["train/loss"] < 0.01
    if name == "profile":
        assert (folder / "trace.json").exists()


def test_help_lists_groups_and_choices(command: Callable[..., Outcome]) -> None:
    outcome = command("--help")
    assert outcome.code == 0
    listed = re.search(r"optimizer: ([\w, \n]*?)\n *\w+: ", outcome.out)
    ours = ["adafisher", "adafisherw", "adahessian", "deflation", "ekfac", "exact_ng", "fishleg", "kfac"]
    ours += ["kfac_corrected", "kpsvd", "lanczos", "twolevel_kfac"]
    assert listed and set(re.findall(r"\w+", listed[1])) >= {*ours, "adam", "adamw", "sgd"}, outcome.out
    assert re.search(r"debug: lr_finder, overfit, profile, smoke, summary, verify", outcome.out)
    assert re.search(r"experiment/adafisher: [^:]*\bcifar10_resnet18\b", outcome.out)
    assert "python train.py -m optimizer=sgd,adam,adafisher seed=0,1" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 120


def test_train_py_fits_on_a_screen() -> None:
    """The reader's path: compose, validate, build, fit, summarise."""
    source = (ROOT / "train.py").read_text()
    assert len(source.splitlines()) < 95
    for module in ("hydra", "omegaconf"):
        users = [p for folder in OURS for p in (ROOT / folder).rglob("*.py") if f"import {module}" in p.read_text()]
        users += [p for folder in OURS for p in (ROOT / folder).rglob("*.py") if f"from {module}" in p.read_text()]
        settings = {"composition", "composer", "composing", "sweeps", "files", "overrides", "faults", "own"}
        assert {path.stem for path in users} <= settings


def test_signature_of_the_trainer_is_documented() -> None:
    trainer = locate("training.trainer.Trainer", "trainer")
    for name in parameters(trainer):
        assert f"{name}:" in (inspect.getdoc(trainer) or ""), name
