"""The zoo script: which models it knows, what it calls trained, what it says of missing data, how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.studies import zoo
from tests.conftest import ROOT

TWO_PLAYERS = {"dcgan", "resnet_gan"}


def run(folder: Path, results: Path, *choices: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code = zoo.main(["--data", str(folder), "--json", str(results), *choices])
    return code, json.loads(results.read_text()) if results.exists() else {}


def test_every_model_is_in_it() -> None:
    known = {path.stem for path in (ROOT / "configs" / "model").glob("*.yaml")}
    assert {row.name for row in zoo.ROWS} == known - TWO_PLAYERS
    assert len({row.label for row in zoo.ROWS}) == len(zoo.ROWS)
    for row in zoo.ROWS:
        assert row.data in zoo.DATA and set(zoo.RATES[row.kind]) == set(zoo.OPTIMIZERS)


@pytest.mark.parametrize(
    "losses, verdict",
    [
        ((2.0, 1.5), "ok"),
        ((2.0, 2.0), "the loss went from 2 to 2"),
        ((2.0, 31.4), "the loss went from 2 to 31.4"),
        ((2.0, float("nan")), "the loss is no longer finite"),
        ((2.0, float("inf")), "the loss is no longer finite"),
    ],
)
def test_the_verdict(losses: tuple[float, float], verdict: str) -> None:
    assert zoo.judged(*losses) == verdict


def test_a_model_trains_with_all_four(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    folder, results = shared_data("mnist").parent, tmp_path / "zoo.json"
    code, cells = run(folder, results, "models=[toynet]")
    assert code == 0
    assert [(key, cell["verdict"]) for key, cell in cells.items()] == [
        (f"toynet {name}", "ok") for name in ("sgd", "adafisher", "kfac", "adahessian")
    ]
    assert all(cell["after"] < cell["before"] and cell["parameters"] == 2986 for cell in cells.values())
    assert cells["toynet sgd"]["ratio"] == 1 and cells["toynet adahessian"]["ratio"] > 1.2
    table = zoo.markdown(cells).splitlines()
    assert len(table) == 3 and table[2].startswith("| toynet | 2,986 | MNIST | 256 | 9 | ok ")


def test_what_is_done_stays_and_what_failed_is_tried_again(
    shared_data: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = shared_data("mnist").parent, tmp_path / "zoo.json"
    monkeypatch.setitem(zoo.RATES["convolutional"], "sgd", 1e6)
    code, cells = run(folder, results, "models=[toynet]", "optimizers=[sgd]")
    assert code == 1 and cells["toynet sgd"]["verdict"] != "ok"
    monkeypatch.undo()
    done = {"verdict": "ok", "ratio": 123.0, "seconds": 1.0, "before": 2.0, "after": 1.0, "parameters": 5}
    results.write_text(json.dumps(cells | {"toynet kfac": done}))
    code, cells = run(folder, results, "models=[toynet]", "optimizers=[sgd,kfac]")
    assert code == 0 and cells["toynet sgd"]["verdict"] == "ok" and cells["toynet kfac"] == done


def test_missing_data_is_a_sentence_and_the_others_go_on(
    shared_data: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mnist").symlink_to(shared_data("mnist"))
    code, cells = run(tmp_path / "data", tmp_path / "zoo.json", "models=[resnet20,toynet]", "optimizers=[sgd]")
    assert code == 0
    assert cells["resnet20 sgd"]["verdict"] == "no data: there is no folder cifar10-subset in the one that --data names"
    assert cells["toynet sgd"]["verdict"] == "ok"
    assert "resnet20 sgd: no data: there is no folder cifar10-subset" in capsys.readouterr().out


@pytest.mark.parametrize(
    "choice, sentence",
    [
        ("models=[resnet19]", r"models has no 'resnet19' (did you mean 'resnet1\d*'?)"),
        ("optimizers=[adam]", "optimizers has no 'adam'"),
        ("model=[resnet18]", "(give models=[...] or optimizers=[...])"),
    ],
)
def test_what_there_is_none_of_ends_in_a_line(
    choice: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, tmp_path / "zoo.json", choice) == (1, {})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert sentence.split(" (did")[0] in line


def test_loose_photographs_get_a_folder_a_class_while_they_are_needed(tmp_path: Path) -> None:
    for name in ("n01_tench", "n02_cobra"):
        (tmp_path / f"{name}.JPEG").write_text("")
    with zoo.arranged(tmp_path) as root:
        found = sorted(str(path.relative_to(root)) for path in root.rglob("*.JPEG"))
        assert found == [
            f"{split}/n0{i}/n0{i}_{n}.JPEG" for split in ("train", "val") for i, n in ((1, "tench"), (2, "cobra"))
        ]
    assert not root.exists()


def test_it_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        zoo.main(["--help"])
    shown = capsys.readouterr().out
    assert "Every model with every optimizer on real data" in shown and "models=[...] optimizers=[...]" in shown
