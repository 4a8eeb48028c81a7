"""`scripts/tune.py` on real runs: a kill and going on, what is written, and mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.tuning import Book
from scripts import tune
from tests.conftest import ROOT
from training.settings.composition import compose

#: Runs of a second on the embedded digits.
QUICK = ("model=mlp", "model.hidden=[16]", "dataset=digits", "logger=quiet", "trainer.max_steps=24",
         "trainer.eval_every_epochs=null", "threads=1")  # fmt: skip
SMALL = ("optimizers=[adamw]", "trials=4", "rungs=2", "eta=3", "name=t", *QUICK)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which commands are given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # there is one
    return tmp_path


def content(folder: Path) -> list[dict[str, Any]]:
    """What a tuning wrote down, without what clocks say."""
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    return sorted(
        ({key: value for key, value in line.items() if key != "seconds"} for line in lines),
        key=lambda line: (line["arm"], line["rung"], line["trial"]),
    )


def test_killed_at_any_moment_it_comes_to_the_same_choice(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "whole").mkdir()
    monkeypatch.chdir(work / "whole")
    assert tune.main(SMALL) == 0
    said = capsys.readouterr().out
    assert "rung 1: 4 of 0.3333 final runs" in said and "4 trials (rung 1): 4 of adamw" in said
    whole = work / "whole" / "multirun" / "t"
    assert [(line["rung"], line["length"]) for line in content(whole)] == [(0, 8)] * 4 + [(1, 24)]
    assert all((whole / line["folder"] / "summary.json").is_file() for line in content(whole))
    assert not any(
        "test" in key for path in whole.glob("*/summary.json") for key in json.loads(path.read_text())["final"]
    )

    (work / "killed").mkdir()
    killed = work / "killed" / "multirun" / "t"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "tune.py"), *SMALL]
    with subprocess.Popen(
        command, cwd=work / "killed", env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as begun:
        deadline = time.monotonic() + 120
        while len([*killed.glob("*/summary.json")]) < 2 and begun.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(begun.pid, signal.SIGKILL)
    assert begun.returncode == -signal.SIGKILL, "it came to its end before it was killed"
    assert not (killed / "trials.jsonl").exists() and (killed / "tuning.json").exists()
    monkeypatch.chdir(work / "killed")
    assert tune.main(SMALL) == 0
    assert content(killed) == content(whole)
    assert (killed / "tuning.md").read_text() == (whole / "tuning.md").read_text()

    capsys.readouterr()
    assert tune.main(SMALL) == 0, "and once more, with nothing left to do"
    assert "trials (rung" not in capsys.readouterr().out and content(killed) == content(whole)
    assert tune.main([*SMALL, "seed=1"]) == 1
    assert "holds a tuning that differs in seed" in capsys.readouterr().err

    # What was chosen is a preset that train.py takes.
    rows = [line for line in content(whole) if line["rung"] == 1]
    best = min(rows, key=lambda line: (-line["value"], line["val_loss"], line["trial"]))
    chosen = compose([f"hydra.searchpath=['file://{whole}']", "optimizer=adamw", "preset=tuned/adamw"]).values[
        "optimizer"
    ]
    assert {key: chosen[key] for key in ("lr", "weight_decay")} == {
        key: best["values"].get(key, default) for key, default in (("lr", 1e-3), ("weight_decay", 1e-2))
    }


def test_a_budget_of_time_is_one_of_measured_steps(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["optimizers=[sgd]", "budget=1s", "trials=3", "rungs=1", "name=timed", *QUICK]
    assert tune.main(given) == 0
    assert "measuring what a step takes" in capsys.readouterr().out
    plan = json.loads((work / "multirun" / "timed" / "tuning.json").read_text())
    found = Book(work / "multirun" / "timed").of("sgd")
    assert len(found) == 3 and sum(one.charged for one in found) == pytest.approx(1.0, abs=0.05)
    assert found[0].trial.length == int(1 / 3 / plan["paces"]["sgd"])
    assert tune.main(given) == 0 and "measuring" not in capsys.readouterr().out, "by the paces that it began with"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["optimizers=[kfacc]"], "optimizers has no 'kfacc' (did you mean 'kfac'?)"),
        (["optimizers=[]"], "optimizers is empty"),
        (["optimizer=kfac"], "give optimizers=[kfac]"),
        (["--fast"], "unrecognized arguments: --fast (see --help)"),
        (["fast"], "fast is no KEY=VALUE"),
        (["trials=none"], "trials must be a whole number of at least 1, got none"),
        (["eta=x"], "eta must be a number above 1"),
        (["rungs=3", "trials=8"], "3 rungs, each 3 times as long, need 9 trials"),
        (["budget=30"], "budget=30 has no unit: write 90m"),
        (["final=3m"], "final is for a budget of time"),
        (["trainer.max_time=60"], "trainer.max_time is no length of trials"),
        (["metric=test/accuracy"], "metric must be of the validation set"),
        (["sampler=haltn"], "got haltn (did you mean 'halton'?)"),
        (["optimizers=[torch]", "optimizer.name=RMSprop"], "has ranges for optimizer.name=NAdam, got RMSprop"),
        (["modell=mlp"], "unknown key 'modell'"),
    ],
)
def test_mistakes_are_sentences(work: Path, capsys: pytest.CaptureFixture[str], given: list[str], says: str) -> None:
    assert tune.main(["optimizers=[sgd]", "model=mlp", *given]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and says in told and told.count("\n") == 1
    assert not (work / "multirun").exists()


def test_an_optimizer_of_ones_own_and_a_preset_of_a_study_that_is_there(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "mine/optimizer/own.yaml": "_target_: torch.optim.SGD\nlr: 0.1\n",
        "spaces/own.yaml": "lr: {values: [0.1, 0.2, 0.3]}\n",
        "configs/study/old.yaml": "",
    }.items():
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text(text)
    monkeypatch.setattr(tune, "CONFIG_FOLDER", work / "configs")
    given = ["optimizers=[own]", "--config-dir", "mine", "trials=3", "rungs=1", "name=t", "spaces=spaces", "preset=old",
             *QUICK, "trainer.max_steps=6"]  # fmt: skip
    assert tune.main(given) == 0
    found = Book(work / "multirun" / "t").of("own")
    assert {one.trial.values.get("lr") for one in found} == {None, 0.2, 0.3}, "0.1 is trial 0's"
    written = work / "configs" / "preset" / "old" / "own.yaml"
    assert written.read_text().startswith("# @package optimizer\n# own: the best of 3 trials")
    capsys.readouterr()
    assert tune.main(given) == 1 and "is there already, and is left as it is" in capsys.readouterr().err
