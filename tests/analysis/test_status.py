"""How it stands with runs, from folders as runs leave them: those that live, those that are dead, those to come."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from analysis.status import SILENCE, Status, arranged, as_json, look, table
from scripts import status as command
from training.errors import UserError
from training.runs import claims


def run(folder: Path, budget: dict[str, Any], events: list[dict[str, Any]], **summary: Any) -> Path:
    """A run folder with what `look` reads of it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"trainer": budget, "choices": {}}))
    if events:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"half')
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def events(steps: int) -> list[dict[str, Any]]:
    every = [{"event": "train", "step": n, "epoch": n / 10, "seconds": n * 2.0, "wall": n * 3.0, "train/loss": 1 / n}
             for n in range(1, steps + 1)]  # fmt: skip
    return [*every[:-1], {**every[-1], "event": "eval", "val/loss": 0.5, "val/accuracy": None}, every[-1]]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of seven: one ended, one failed, one cut off, one killed, one refused, two to come."""
    folder = tmp_path / "multirun" / "six"
    budget = {"max_epochs": None, "max_steps": 20, "max_time": None}
    run(folder / "seed-0_00000000", budget, events(20), status="finished", monitor="val/loss", best={"value": 0.5})
    run(folder / "seed-1_00000001", budget, [], status="failed", error="Traceback\n\nRuntimeError: why")
    run(folder / "seed-2_00000002", budget, events(5), status="interrupted")
    run(folder / "seed-3_00000003", budget, events(4))
    labels = [f"seed-{seed}" for seed in range(7)]
    plan = {"jobs": labels, "refused": {"seed-4": "not so"}, "found": {"seed-2": "seed-2_00000002"}}
    (folder / "sweep.json").write_text(json.dumps(plan))
    return folder


def test_a_sweep_from_its_folder(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {one.run: one for one in look(sweep.parent)}
    states = {name.removeprefix("six/")[:6]: one.state for name, one in found.items()}
    assert states == {
        "seed-0": "finished", "seed-1": "failed", "seed-2": "interrupted", "seed-3": "dead", "seed-4": "failed",
        "seed-5": "waiting", "seed-6": "waiting",
    }  # fmt: skip
    ended, cut = found["six/seed-0_00000000"], found["six/seed-2_00000002"]
    assert (ended.progress, ended.best, ended.metrics) == (1.0, 0.5, {"train/loss": 0.05, "val/loss": 0.5})
    assert (cut.progress, cut.step, cut.epoch, cut.seconds, cut.left) == (0.25, 5, 0.5, 10.0, None)
    assert found["six/seed-1_00000001"].error == "RuntimeError: why" and found["six/seed-4"].error == "not so"

    assert [one.state for one in arranged(found.values())][:3] == ["dead", "failed", "failed"]
    assert [one.run[:10] for one in arranged(found.values(), "name")] == [f"six/seed-{n}" for n in range(7)]
    assert arranged(found.values(), "progress")[0] is ended and arranged(found.values(), "train/loss")[0] is ended
    with pytest.raises(UserError, match="sort must be one of state, name, progress, train/loss, val/loss, got 'loss'"):
        arranged(found.values(), "loss")
    assert Status(**json.loads(as_json([ended]))[0]) == ended
    assert len(look(sweep / "seed-0_00000000")) == 1 == len(table([ended]).rows)

    assert command.main([str(sweep), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 7
    assert command.main([str(sweep)]) == 0
    out = capsys.readouterr().out
    assert "7 runs: 1 dead, 2 failed, 1 interrupted, 1 finished, 2 waiting" in out and "\x1b" not in out
    assert command.main([str(sweep / "none")]) == 1 and "is no folder" in capsys.readouterr().err


def hold(folder: Path) -> None:
    claims.claim(folder)
    claims.describe(device="cuda:0", processes=4)
    time.sleep(60)


def test_who_lives_is_asked_for_or_told_by_age(sweep: Path) -> None:
    folder = sweep / "seed-2_00000002"
    process = multiprocessing.get_context("fork").Process(target=hold, args=(folder,))
    process.start()
    while not (folder / claims.SIGN).exists() or "device" not in (folder / claims.SIGN).read_text():
        time.sleep(0.01)
    one = next(one for one in look(sweep) if one.step == 5)
    assert (one.state, one.pid, one.device, one.processes) == ("running", process.pid, "cuda:0", 4)
    assert one.progress == 0.25 and one.left == 45.0 and one.silent is not None and one.silent < SILENCE
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (folder / "summary.json").unlink()
    assert next(one for one in look(sweep) if one.step == 5).state == "dead", "the process is not there"

    sign = json.loads((folder / claims.SIGN).read_text()) | {"host": "another"}
    (folder / claims.SIGN).write_text(json.dumps(sign))
    assert next(one for one in look(sweep) if one.step == 5).state == "running", "elsewhere, it has just beaten"
    os.utime(folder / claims.SIGN, (time.time() - 2 * SILENCE,) * 2)
    dead = next(one for one in look(sweep) if one.step == 5)
    assert (dead.state, dead.host) == ("dead", "another")

    assert claims.claim(folder), "who comes next takes over"
    assert next(one for one in look(sweep) if one.step == 5).pid == os.getpid()
    claims.release()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
