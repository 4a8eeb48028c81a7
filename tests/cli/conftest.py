"""The command line in this process: what it prints, what it returns, what it leaves behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import train

# A run of a second: a small net on the embedded digits, no pictures, no event files.
QUICK = ("model=mlp", "model.hidden=[16]", "callbacks=none", "logger=quiet", "trainer.max_epochs=1")


@dataclass
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    def sentence(self) -> str:
        """The one line on stderr of a command that was refused."""
        lines = self.err.splitlines()
        assert len(lines) == 1, f"not one line on stderr but {len(lines)}:\n{self.err}"
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which commands are given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CURVLAB_DATA", raising=False)
    monkeypatch.delenv("CURVLAB_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def command(work: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Give a command: `command("optimizer=sgd", "seed=1")`."""

    def give(*argv: str) -> Outcome:
        capfd.readouterr()
        program = list(sys.argv)
        code = train.main(argv)
        assert sys.argv == program
        return Outcome(code, *capfd.readouterr())

    return give


@pytest.fixture
def quick(command: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Give a command for a run of a second."""
    return lambda *argv: command(*QUICK, *argv)


def runs(folder: Path, pattern: str = "runs/*/*") -> list[Path]:
    """Run folders, in order."""
    return sorted(path for path in folder.glob(pattern) if path.is_dir())


def summary(run: Path) -> dict[str, Any]:
    """Content of a run's `summary.json`."""
    return json.loads((run / "summary.json").read_text())


def metrics(run: Path) -> list[dict[str, Any]]:
    """A run's events without their times."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [{k: v for k, v in e.items() if k not in ("seconds", "wall") and not k.startswith("time/")} for e in events]


def unfinish(run: Path, all_steps: bool = False) -> None:
    """Bring a finished run to where a kill would have left it: no summary, the last checkpoint not yet written."""
    (run / "summary.json").unlink()
    steps = sorted((run / "checkpoints").glob("step_*.pt"))
    assert all_steps or len(steps) > 1
    for path in steps if all_steps else steps[-1:]:
        path.unlink()
