"""Several processes as one: whoever fails, hangs, dies or is started again, it is said once and comes to an end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.survival.conftest import places
from tests.survival.forks import Ended, Forks
from training.callbacks import Callback
from training.loop import watch
from training.runs import checkpoints
from training.runs.run import Run

SMALL = (
    "model=mlp", "model.hidden=[16]", "optimizer=sgd", "callbacks=none", "logger=quiet", "dataset.limit_train=0.2",
    "trainer.max_epochs=null", "trainer.max_steps=1000000", "trainer.checkpoint_every_epochs=null",
    "trainer.checkpoint_every_steps=20", "trainer.eval_every_epochs=null",
)  # fmt: skip
SAVED = "runs/*/*/checkpoints/step_*.pt"


def run_of(work: Path) -> Path:
    """The one run folder."""
    (run,) = work.glob("runs/*/*")
    return run


def one_line(ended: Ended) -> str:
    """What was said: one line, by one of the processes."""
    lines = [line for output in ended.output for line in output.splitlines()]
    assert len(lines) == 1, ended.output
    return lines[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_killed_ends_the_other_with_a_sentence(forks: Forks, tmp_path: Path, victim: int) -> None:
    ended = forks.run(*SMALL, cwd=tmp_path, ranks=places(), victims=[victim], when=SAVED)
    assert ended.codes[victim] == -signal.SIGKILL and ended.codes[1 - victim] == 1
    line = one_line(ended)
    assert line.startswith("error: another process ended without a word") and "checkpoints/step_" in line


def test_what_fails_on_one_rank_is_said_once(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a word and another\n" * 100)
    text = ("model=gpt1_mini", "dataset=text_file", "dataset.path=${oc.env:TEXT}", "dataset.sequence=8")
    ranks = places({"TEXT": "b.txt"}, TEXT="a.txt")
    ended = forks.run(*text, "trainer.max_epochs=1", cwd=tmp_path, ranks=ranks)
    assert ended.codes == [1, 1] and ended.seconds < 20
    line = one_line(ended)
    assert line.startswith("error: rank 1: ") and "b.txt" in line


def test_one_that_hangs_is_named_and_not_waited_for_for_ever(forks: Forks, tmp_path: Path) -> None:
    ended = forks.run(
        *SMALL, cwd=tmp_path, ranks=places(CURVLAB_TIMEOUT="6"), victims=[1], number=signal.SIGSTOP,
        when=SAVED, limit=20,
    )  # fmt: skip
    assert ended.codes == [1, -signal.SIGKILL]
    word, error = ended.output[0].splitlines()
    assert word.startswith("waiting for ") and "rank 1, last heard of " in word and ".py:" in word
    assert error.startswith("error: rank 1, last heard of ") and "gave no answer for 6 s (CURVLAB_TIMEOUT)" in error
    assert json.loads((run_of(tmp_path) / "summary.json").read_text())["error"] in error


class Hang(Callback):
    """Keeps a rank busy for ever."""

    def on_step(self, run: Run) -> None:
        if run.step == 3 and run.world.is_main:
            time.sleep(1000)


def test_one_that_is_busy_for_ever_is_named_by_those_that_wait(forks: Forks, tmp_path: Path) -> None:
    (folder := tmp_path / "mine" / "callbacks").mkdir(parents=True)
    (folder / "hang.yaml").write_text("hang:\n  _target_: tests.survival.test_processes.Hang\n")
    command = [*(word for word in SMALL if word != "callbacks=none"), "callbacks=hang", f"--config-dir={folder.parent}"]
    ended = forks.run(*command, cwd=tmp_path, ranks=places(CURVLAB_TIMEOUT="4"), launched=1)
    assert ended.codes == [-signal.SIGKILL, 1], ended.output
    word, error = ended.output[1].splitlines()
    assert word.startswith("waiting for ") and "rank 0, last heard of 0 s ago" in word
    assert "tests/survival/test_processes.py" in word and "(on_step)" in word
    assert "gave no answer for 4 s" in error


def test_asked_to_stop_while_another_hangs_it_does(forks: Forks, tmp_path: Path) -> None:
    stop = [(0, int(signal.SIGTERM), 1.0)]
    ended = forks.run(
        *SMALL, cwd=tmp_path, ranks=places(CURVLAB_TIMEOUT="16"), victims=[1], number=signal.SIGSTOP,
        when=SAVED, limit=14, then=stop,
    )  # fmt: skip
    assert ended.codes == [75, -signal.SIGKILL]
    line = ended.output[0].splitlines()[-1]
    assert "this run cannot save: rank 1, last heard of" in line and "checkpoints/step_" in line


def test_one_that_never_comes_is_not_waited_for_for_ever(forks: Forks, tmp_path: Path) -> None:
    first, _ = places(CURVLAB_TIMEOUT="2")
    ended = forks.run(*SMALL, cwd=tmp_path, ranks=[first])
    assert ended.codes == [1] and "only some of 2 processes came within 2 s" in one_line(ended)
    ended = forks.run(*SMALL, cwd=tmp_path, ranks=places()[:1], after=1.5, number=signal.SIGTERM)
    assert ended.codes == [75] and "nothing was begun" in one_line(ended)


@pytest.mark.parametrize("text", ["never", "0", "-1", "nan"])
def test_a_bad_limit_is_a_sentence(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(watch.TIMEOUT, text)
    with pytest.raises(watch.UserError, match="CURVLAB_TIMEOUT must be seconds above 0"):
        watch.timeout()


# -- torchrun ----------------------------------------------------------------------------------------------------------


@contextmanager
def torchrun(work: Path, *argv: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Two processes of torchrun that have written a first checkpoint, and their ids."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *argv]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=work, env=environment, start_new_session=True, **pipes) as launched:
        workers: list[int] = []
        try:
            deadline = time.monotonic() + 90
            while not any(work.glob(SAVED)):
                assert launched.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text()
            workers += map(int, children.split())
            assert len(workers) == 2
            yield launched, workers
        finally:
            for process in [launched.pid, *workers]:
                if Path(f"/proc/{process}").exists():
                    os.kill(process, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which processes torchrun has started")
def test_started_again_they_go_on_where_they_were(tmp_path: Path) -> None:
    program = ["--max-restarts=1", str(ROOT / "train.py"), *SMALL, "trainer.max_steps=900"]
    with torchrun(tmp_path, *program) as (launched, workers):
        os.kill(workers[1], signal.SIGKILL)
        out, errors = launched.communicate(timeout=90)
    assert launched.returncode == 0, errors
    run = run_of(tmp_path)
    assert f"resuming {run.relative_to(tmp_path)} from step_" in out
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["hardware"]["processes"]) == ("finished", 900, 2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells children that their parent is gone")
def test_they_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    with torchrun(tmp_path, str(ROOT / "train.py"), *SMALL) as (launched, workers):
        launched.kill()
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < deadline, "an orphan trains on"
            time.sleep(0.1)
    summary = json.loads((run_of(tmp_path) / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    found = checkpoints.latest(run_of(tmp_path) / "checkpoints")
    assert found is not None and found[1]["counters"]["step"] == summary["steps"]
