"""docs/extending.md: what it adds is added, as it stands there, and trains."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import metrics, runs, summary
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "extending.md").read_text()
FILES = {name: block for name, block in re.findall(r"```\w+\n# (mine/\S+)\n(.*?)```", TEXT, flags=re.DOTALL)}
(COMMAND,) = re.findall(r"^    python train\.py (.*)$", TEXT, flags=re.MULTILINE)


def test_every_block_is_a_file_that_a_reader_would_write() -> None:
    assert len(FILES) == TEXT.count("```") // 2 == 8
    assert all(len(block.splitlines()) < 150 for block in FILES.values())


@pytest.mark.slow
def test_what_it_adds_trains(tmp_path: Path) -> None:
    for name, block in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
    given = [sys.executable, str(ROOT / "train.py"), *shlex.split(COMMAND)]
    env = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(given, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path)
    assert run.parent.name == "half_kfac_volumes_waves" and summary(run)["steps"] == 20
    rows = (run / "validation.csv").read_text().splitlines()
    assert rows[0] == "step,val/error,val/loss" and len(rows) == 1 + 2
    errors = [event["val/error"] for event in metrics(run) if event["event"] == "eval"]
    assert errors[-1] < errors[0] < 1.0, "no better than a guess"
    table = (run / "train.log").read_text()
    assert re.search(r"^0 +InputFactor", table, flags=re.MULTILINE), table
    assert re.search(r"^3 +InputFactor", table, flags=re.MULTILINE), table

    wrong = subprocess.run([*given, "optimizer.trust=2"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr == "error: optimizer.trust must be in (0, 1], got 2.0\n"
