"""Runs that a script lists, two of which are trained by somebody else."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from scripts.studies import sweeping
from scripts.studies.sweeping import Sweeping
from tests.cli.conftest import QUICK, unfinish

ROWS = [("a:", "optimizer=sgd"), ("b:", "optimizer=adam")]


def test_it_waits_for_runs_of_another_process_and_trains_what_that_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeping, "PAUSE", 0.1)
    monkeypatch.setattr(sweeping, "AGAIN", 0.3)
    listed = Sweeping("here", tmp_path / "multirun" / "here", QUICK)
    first = listed.run(ROWS)
    assert [summary["status"] for summary in first] == ["finished"] * 2
    folder = Path(first[1]["folder"])
    assert folder.name.startswith("b_")
    unfinish(folder, all_steps=True)
    lock = FileLock(folder / ".lock")
    lock.acquire()

    def looked() -> int:
        """What is asked for between two looks: the other process lets go."""
        lock.release()
        return 0

    monkeypatch.setattr(sweeping, "requested", looked)
    again = listed.run(ROWS)
    said = capsys.readouterr().out
    assert "1 of these runs are trained by another process: waiting for them" in said
    assert [summary["status"] for summary in again] == ["finished"] * 2 and again[0]["folder"] == first[0]["folder"]
    assert again[1]["final"]["val/loss"] == pytest.approx(first[1]["final"]["val/loss"], abs=0)
