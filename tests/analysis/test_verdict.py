"""The verdict's command: what it refuses, and that it comes to the same however often it is killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import verdict
from tests.conftest import ROOT

TINY = (
    "model=mlp", "model.hidden=[8]", "dataset=digits", "dataset.limit_train=0.3", "optimizers=[sgd,kfac]", "trials=2",
    "seeds=2", "budget=20s",
)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["optimizers=[sgd]"], "optimizers must be at least two: one alone is no comparison"),
        (["optimizers=[sgd,kfak]"], "optimizers has no 'kfak' (did you mean 'kfac'?)"),
        (["optimizer=sgd"], "optimizer=sgd: give optimizers=[sgd]"),
        (["seed=3"], "seed: seeds=N says how many fresh seeds there are"),
        (["seeds=1"], "seeds must be a whole number of at least 2, got 1"),
        (["trainer.max_epochs=3"], "the budget of time says how many steps each optimizer has"),
        (["budget=10"], "budget=10 has no unit"),
        (["tuning=half"], "tuning must be a number such as 0.5, got half"),
        (["model=mpl"], "model has no choice 'mpl' (did you mean 'mlp'?)"),
        (["spaces=nowhere"], "spaces: there is no folder nowhere; give one with files like"),
    ],
)  # fmt: skip
def test_mistakes_are_sentences(
    given: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verdict.tune, "measured", lambda *given: pytest.fail("it was begun"))
    assert verdict.main([*given, *(["model=mlp"] if given != ["model=mpl"] else [])]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert not [*tmp_path.rglob("*")], "nothing is left behind"


def launch(folder: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "verdict.py"), *TINY, "name=v", *more],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def figures(folder: Path) -> dict[str, Any]:
    """All that a verdict found, without seconds and names of runs' folders."""
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {
        f"{one['arm']} {one['rung']} {one['trial']}": [one["overrides"], one["value"], one["val_loss"], one["done"]]
        for one in trials
    }
    assert len(found) == len(trials), "no trial is written down twice"
    found["choices"] = json.loads((folder / "verdict.json").read_text())["choices"]
    for run in sorted((folder / "final").glob("*/metrics.jsonl")):
        events = [json.loads(line) for line in run.read_text().splitlines()]
        timed = ("seconds", "wall")
        found[run.parent.name] = [
            {key: value for key, value in event.items() if key not in timed and not key.startswith("time/")}
            for event in events
        ]
    return found


@pytest.mark.slow
def test_killed_again_and_again_it_comes_to_the_same(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    process = launch(tmp_path / "whole", "workers=2", "threads=1")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    whole = tmp_path / "whole" / "multirun" / "v"
    assert (whole / "report" / "index.html").is_file() and "of the whole done" in out
    state = json.loads((whole / "verdict.json").read_text())
    charged = [choice["charged"] for choice in state["choices"].values()]
    assert max(charged) - min(charged) <= 0.05 * state["tuning"]["seconds"]
    killed = tmp_path / "killed" / "multirun" / "v"
    killed.mkdir(parents=True)
    # What steps take is measured anew by each verdict: this one begins with what that one measured.
    (killed / "verdict.json").write_text(json.dumps(state | {"choices": {}}))
    draw = random.Random(0)
    for kill in range(5):
        process = launch(tmp_path / "killed", f"workers={1 if kill == 2 else 2}")
        after, seen = draw.randint(1, 3), 0
        assert process.stdout is not None
        for line in process.stdout:
            seen += " of " in line and ": finished" in line
            if seen == after:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        process.wait()
    process = launch(tmp_path / "killed", "workers=2")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert figures(killed) == figures(whole)
    shutil.rmtree(tmp_path / "killed")
