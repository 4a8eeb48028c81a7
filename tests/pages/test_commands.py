"""Every command that a page, or train.py's help, gives is one that its program takes.

What train.py is given is composed and checked as for a run; a script parses its arguments by its own parser; submit.py
renders its job. Words in capitals (``FILE``) are the reader's to fill in, ``[words]`` in brackets are optional, and
``...`` stands for more of the kind.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import benchmark
from tests.conftest import ROOT
from tests.pages.reading import PAGES, Command, commands, fences, name
from training.command import modelling
from training.errors import UserError
from training.settings.composition import CONFIG_FOLDER, compose
from training.settings.sweeps import taken_out

HELP = "configs/hydra/default.yaml"
GIVEN = [command for path in PAGES for command in commands(path)]
GIVEN += [
    Command(HELP, re.split(r"\s{2,}", line.strip())[0])
    for line in (ROOT / HELP).read_text().splitlines()
    if re.match(r"\s+(python|torchrun) ", line)
]
UNIQUE = list({command.text: command for command in GIVEN}.values())

#: What other tests run as it stands.
RUN_ELSEWHERE = {
    "--config-dir mine/configs": "tests/test_extending.py",
    "--config-dir my/configs": "tests/cli/test_own.py",
    "dataset._target_=mydata.make": "tests/cli/test_own.py",
}

#: Commands without a ``main``, and what their key=value are checked against.
WITHOUT_MAIN = {"scripts.benchmarks.ranks": "Shared"}


class Parsed(BaseException):
    """The arguments of a script were accepted; it goes no farther."""


def filled(words: list[str]) -> list[str]:
    """Words without those that the reader is to fill in, and with those that are optional."""
    bare = [word[1:-1] if re.fullmatch(r"\[[\w.]+=\S+\]", word) else word for word in words]
    return [word for word in bare if "..." not in word and not re.search(r"=[A-Z_]+(\.\w+)?$", word)]


def own(choices: list[str]) -> list[str]:
    """What the data sets of a reader's own need."""
    needs = {"dataset=image_folder": "dataset.root=photos", "dataset=text_file": "dataset.path=novel.txt"}
    return [need for start, need in needs.items() if any(choice.startswith(start) for choice in choices)]


def check_run(words: list[str]) -> None:
    """Compose what train.py is given; of a sweep the first values, and the others as far as they are choices."""
    multirun = "-m" in words
    overrides, _ = taken_out([word for word in filled(words) if "=" in word], multirun)
    single = []
    for text in overrides:
        key, _, value = text.partition("=")
        group = CONFIG_FOLDER / key.partition("@")[0]
        values = value.split(",") if multirun and not value.startswith(("[", "{", "'", '"')) else [value]
        single.append(f"{key}={values[0]}")
        if group.is_dir() and not key.startswith("hydra/"):  # launchers are packages', too
            assert not [v for v in values if not (group / f"{v}.yaml").is_file() and v != "null"], text
    try:
        compose([*single, *own(single)])
    except UserError as error:  # a logger for a tracker, of whose values all are checked by then
        assert re.match(r"logger=\w+ needs a package that is not installed", str(error)), text


def check_script(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a script parse its arguments, and no more; of key=value ones, compare names and types."""
    found = importlib.import_module(module)
    if kind := WITHOUT_MAIN.get(module):
        found.parsed(getattr(found, kind), words)
        return
    accepted: list[Any] = []

    def stopping(plain: Callable[..., Any]) -> Callable[..., Any]:
        def parse(*args: Any, **kwargs: Any) -> Any:
            accepted.append(plain(*args, **kwargs))
            raise Parsed

        return parse

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args))
    monkeypatch.setattr(benchmark, "parsed", stopping(benchmark.parsed))  # key=value of all benchmarks
    monkeypatch.setattr(sys, "argv", [module, *words])
    with contextlib.suppress(Parsed):
        found.main(*([words] if inspect.signature(found.main).parameters else []))
    assert accepted, f"{module} refuses {words}"
    given = getattr(accepted[0], "choices", None)
    if given and dataclasses.is_dataclass(choices := getattr(found, "Choices", None)):
        importlib.import_module("scripts.problems.arguments").given_to(choices, given)


def check_module(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m NAME``."""
    name, *rest = words
    if name == "curvlab":
        check_run(rest)
    elif name == "build":
        assert not rest
    elif name == "models":  # checked and composed; what is then printed takes half a minute
        monkeypatch.setattr(modelling, "present", lambda config, facts, asked: None)
        modelling.show(rest)
    else:
        main = f"{name}.__main__" if (ROOT / name / "__main__.py").is_file() else name
        check_script(main, rest, monkeypatch)


def check_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``python ...``."""
    first, *rest = words
    if first == "-m":
        check_module(rest, monkeypatch)
    elif first == "train.py":
        check_run(rest)
    else:
        path = Path(first)
        assert (ROOT / path).is_file() and path.parts[0] == "scripts", first
        module = ".".join(path.with_suffix("").parts)
        if module == "scripts.submit":
            assert importlib.import_module(module).main(["--dry-run", *rest]) == 0
        else:
            check_script(module, filled(rest), monkeypatch)


def check_launched(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes behind the options of torchrun, or of srun."""
    rest = words
    while rest and rest[0] not in ("train.py", "-m", "python"):
        rest = rest[1:]
    check_python(rest[1:] if rest[0] == "python" else rest, monkeypatch)


def check_make(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are the Makefile's."""
    (known,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(known.split())


def check_files(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the clone that are named are there."""
    made = ("curvlab_env/", "runs", "multirun")  # by the command before
    named = [word for word in words if re.search(r"[/.]", word) and not word.startswith((*made, ".", "-"))]
    assert not [word for word in named if not (ROOT / word).exists()]


def check_pip(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Extras are the package's."""
    hatch = (ROOT / "hatch_build.py").read_text()
    extras = [extra for word in words for extra in re.findall(r"\[([\w,]+)\]", word)]
    assert all(f'"{extra}":' in hatch for given in extras for extra in given.split(","))
    check_files([word for word in words if word.endswith(".txt")], monkeypatch)


CHECKS: dict[str, Callable[[list[str], pytest.MonkeyPatch], None]] = {
    "python": check_python,
    "torchrun": check_launched,
    "srun": check_launched,
    "curvlab": lambda words, _: check_run(words),
    "make": check_make,
    "pip": check_pip,
    "bash": check_files,
    "conda": check_files,
    "jupyter": check_files,
    "tensorboard": check_files,
}


def test_there_is_something_to_check() -> None:
    assert len(UNIQUE) > 100
    assert {command.page for command in GIVEN} >= {"README.md", "docs/clusters.md", "docs/results/gpt.md", HELP}


@pytest.mark.parametrize("command", UNIQUE, ids=lambda command: command.text)
def test_a_command_is_taken(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for part, test in RUN_ELSEWHERE.items():
        if part in command.text:
            assert (ROOT / test).is_file()
            return
    monkeypatch.chdir(tmp_path)
    program, *words = command.words
    CHECKS[program](words, monkeypatch)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_code_of_a_page_is_code(path: Path) -> None:
    for language, text in fences(path):
        if language == "python":
            compile(text, name(path), "exec")
        if language == "yaml":
            yaml.safe_load(text)
        assert language in ("", "bash", "math", "python", "yaml", "text"), language


@pytest.mark.parametrize(
    "text",
    [
        "python train.py optimizer=kfca",
        "python train.py model=mlp optimizer=kfac optimizer.dampening=1",
        "python train.py -m optimizer=sgd,adan seed=0",
        "python scripts/compare.py multirun --epoch",
        "python scripts/benchmark.py optimisers=[kfac]",
        "python scripts/nothing.py",
        "python -m models resnet17",
        "make gup",
        "pip install '.[trian]'",
        "bash scripts/pack.sh",
    ],
)
def test_a_wrong_command_is_noticed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = Command("", text).words
    with pytest.raises((Exception, SystemExit)):
        CHECKS[program](words, monkeypatch)
