"""Sweeps that are killed, and launched twice at once: every run once, whatever happens to some of them."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import pkgutil
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo  # every command would import it anew

import train
from analysis import status
from tests.cli.conftest import QUICK, metrics
from training.runs.claims import SIGN

Launch = Callable[..., BaseProcess]


def _command(argv: tuple[str, ...], folder: Path, out: Path, at: str | None) -> None:
    """What a shell would do: a command in a folder, in a process group of its own, all that it says in a file."""
    if at is not None:
        _signal_at(at)
    os.setsid()
    os.chdir(folder)
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    code = train.main(argv)
    sys.stdout.flush()
    os._exit(code)


def _signal_at(name: str) -> None:
    """Have this process sent SIGTERM when a function is called for the first time."""
    place, _, function = name.rpartition(".")
    owner: Any = pkgutil.resolve_name(place)
    called = getattr(owner, function)

    def signalled(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, function, called)
        os.kill(os.getpid(), signal.SIGTERM)
        return called(*args, **kwargs)

    setattr(owner, function, signalled)


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Start a command; what it says comes into a file, `outputs` in the order of their starts."""
    # Forked, for importing torch takes longer than such a run.
    context, count = multiprocessing.get_context("fork"), iter(range(100))

    def start(*argv: str, at: str | None = None) -> BaseProcess:
        process = context.Process(target=_command, args=(argv, tmp_path, tmp_path / f"{next(count):02}.out", at))
        process.start()
        return process

    return start


def outputs(folder: Path) -> list[str]:
    """What each command has said, without the ends that killed ones left."""
    return [path.read_text() for path in sorted(folder.glob("*.out"))]


def summaries(folder: Path) -> dict[str, dict[str, Any]]:
    """The summary of each job of the sweep, by folder."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("multirun/*/*/summary.json"))}


def written_at(folder: Path) -> dict[str, int]:
    """When each job's summary was written, by folder."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("multirun/*/*/summary.json")}


def litter(folder: Path) -> list[Path]:
    """Locks, and what was left half-written."""
    return [path for path in folder.rglob(".*") if path.name == ".lock" or path.suffix == ".tmp"]


def test_two_launches_at_once_share_the_jobs(launch: Launch, tmp_path: Path) -> None:
    argv = ("-m", *QUICK, "seed=0,1,2,3,4,5")
    both = [launch(*argv), launch(*argv)]
    for process in both:
        process.join(100)
    first, second = outputs(tmp_path)
    assert [process.exitcode for process in both] == [0, 0], first + second
    assert (first + second).count(": skipped") == 6, "each job was trained by one of them"
    found = summaries(tmp_path)
    assert len(found) == 6 == len([path for path in tmp_path.glob("multirun/*/*") if path.is_dir()])
    assert {summary["status"] for summary in found.values()} == {"finished"}
    logs = [path.read_text() for path in tmp_path.glob("multirun/*/*/train.log")]
    assert [(log.count(" configuration "), log.count(" finished: ")) for log in logs] == [(1, 1)] * 6
    assert litter(tmp_path) == []


def family(process: BaseProcess) -> list[int]:
    """A process and those that it has started."""
    assert process.pid is not None
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [process.pid, *map(int, listed.read_text().split() if listed.exists() else ())]


def until(what: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_a_sweep_that_is_killed_three_times_and_then_launched_twice_at_once(
    launch: Launch, tmp_path: Path, workers: int
) -> None:
    argv = (
        "-m", *QUICK, f"workers={workers}", "dataset.batch_size=30,31,32,33,34,6000", "seed=0,1",
        "trainer.max_epochs=2", "optimizer=sgd",
    )  # fmt: skip
    chance, kills, ended = random.Random(time.time_ns()), 0, dict[str, int]()
    for _ in range(3):
        before = len(summaries(tmp_path))
        process = launch(*argv)
        until(lambda before=before, process=process: len(summaries(tmp_path)) > before or not process.is_alive())
        if not process.is_alive():  # nothing was left to be done
            break
        time.sleep(chance.uniform(0, 0.5))
        for pid in family(process):
            os.kill(pid, signal.SIGKILL)
            kills += 1
        process.join()
        assert ended.items() <= written_at(tmp_path).items(), "what had finished was left alone"
        finished = {name for name, summary in summaries(tmp_path).items() if summary["status"] == "finished"}
        ended = {name: at for name, at in written_at(tmp_path).items() if name in finished}
    until(lambda: not any(one.state in ("running", "starting") for one in status.look(tmp_path)))

    both = [launch(*argv), launch(*argv)]
    for process in both:
        process.join(120)
    said = "".join(last := outputs(tmp_path)[-2:])
    # Who sees a failing run in the other's hands does not know yet that it fails.
    assert [process.exitcode for process in both] == [": failed\n" in text for text in last] != [0, 0], said
    assert "Traceback" not in said
    found = summaries(tmp_path)
    states = sorted(summary["status"] for summary in found.values())
    assert states == ["failed"] * 2 + ["finished"] * 10 and len(list(tmp_path.glob("multirun/*/*/"))) == 12
    for summary in found.values():
        assert summary["status"] == "finished" or "batch_size must be at most" in summary["error"]
    logs = [path.read_text() for path in tmp_path.glob("multirun/*/*/train.log")]
    assert [log.count(" finished: ") for log in logs if " finished: " in log] == [1] * 10, "none ran twice"
    assert sum(log.count(" configuration ") for log in logs) <= 10 + kills, "begun again only where a kill was"
    assert ended.items() <= written_at(tmp_path).items(), "what had finished was left alone"
    assert litter(tmp_path) == []
    assert sorted(one.state for one in status.look(tmp_path)) == states
    lines = re.findall(r"^ *\d+ of 12(?:, about .*?)?  \S+: (failed|finished|running elsewhere)", said, re.MULTILINE)
    assert len(lines) == 24 and lines.count("failed") >= 2


def test_a_worker_that_is_killed_is_replaced_and_all_stop_together(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")  # which of them there are is not asked here
    argv = ("-m", *QUICK, "optimizer=sgd", "seed=0,1,2,3", "trainer.max_epochs=2000")
    process = launch(*argv, "workers=2")
    until(lambda: len([one for one in status.look(tmp_path) if (one.step or 0) > 20]) == 2)
    first, second = [one for one in status.look(tmp_path) if (one.step or 0) > 20]
    assert first.pid != second.pid and first.state == second.state == "running"
    signs = [json.loads((tmp_path / one.run / SIGN).read_text()) for one in (first, second)]
    assert sorted(sign["gpus"] for sign in signs) == ["3", "5"]
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    lost = tmp_path / first.run / "summary.json"
    until(lost.exists)
    assert "was ended by signal 9 (SIGKILL)" in json.loads(lost.read_text())["error"]
    # The others go on, in a new worker too; then all are stopped by what a terminal sends to the command.
    def others() -> list[status.Status]:
        return [one for one in status.look(tmp_path) if one.run != first.run and one.state == "running"]

    until(lambda: len([one for one in others() if (one.step or 0) > 20]) == 2)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    (said,) = outputs(tmp_path)
    assert process.exitcode == 130 and "what ran is saved, and the same command goes on" in said
    assert sorted(one.state for one in status.look(tmp_path)) == ["failed", "interrupted", "interrupted", "waiting"]
    assert litter(tmp_path) == [] and "Traceback" not in said


MOMENTS = {
    "before the first": "training.settings.composition.prepare_sweep",
    "while one is built": "training.settings.schema.build_schedule",
    "after its last step": "training.trainer.Trainer._finish",
    "between two": "training.command.jobs.release",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_is_heeded_at_any_moment(launch: Launch, tmp_path: Path, moment: str) -> None:
    """SIGTERM: the exit code says that the sweep is to be launched again, no further run begins, and it goes on."""
    argv = ("-m", *QUICK, "optimizer=sgd", "seed=0,1")
    process = launch(*argv, at=MOMENTS[moment])
    process.join(60)
    (said,) = outputs(tmp_path)
    assert process.exitcode == 75 and "Traceback" not in said and said.count("Interrupted") == 1, said
    assert len([one for one in status.look(tmp_path) if one.state == "finished"]) == (moment == "between two")
    assert litter(tmp_path) == []
    again = launch(*argv)
    again.join(60)
    assert again.exitcode == 0 and sorted(one.state for one in status.look(tmp_path)) == ["finished"] * 2


def test_two_workers_and_joblib_give_what_one_process_gives(launch: Launch, tmp_path: Path) -> None:
    argv = ("-m", *QUICK, "optimizer=sgd,adam", "seed=0", "dataset.batch_size=32,6000")
    ways = {"one": (), "two": ("workers=2",), "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")}
    if importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None:
        del ways["joblib"]
    for name, way in ways.items():
        process = launch(*argv, *way, f"paths.sweeps=multirun/{name}")
        process.join(120)
        table = re.findall(r"│ (finished|failed) +│", outputs(tmp_path)[-1])
        assert process.exitcode == 1 and sorted(table) == ["failed", "failed", "finished", "finished"]
    found = {
        name: {path.parent.name: metrics(path.parent) for path in tmp_path.glob(f"multirun/{name}/*/*/metrics.jsonl")}
        for name in ways
    }
    assert len(found["one"]) == 2 and all(one == found["one"] for one in found.values())
    assert litter(tmp_path) == []
