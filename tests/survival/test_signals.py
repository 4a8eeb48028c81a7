"""Signals to real processes: the first is noted, the second does not wait, children leave both to their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import data
from tests.conftest import ROOT
from tests.training.small_run import differences, events, final_state, fit
from training.callbacks import Callback
from training.loop.signals import CODES, Interrupted, StopSignals, requested
from training.runs.run import Run

BUSY = "import hashlib; print('busy', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # no end, no Python


def started(body: str, **environment: str) -> subprocess.Popen[str]:
    """A process that listens as the command does, and has said its first word."""
    code = f"from training.loop.signals import *\nwith StopSignals(command=True) as signals:\n    {body}\n"
    clean = {k: v for k, v in os.environ.items() if k not in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=clean | environment, text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline()
    return process


@pytest.mark.parametrize("name", CODES)
def test_the_first_is_noted_with_its_code(name: str) -> None:
    before = signal.getsignal(getattr(signal, name))
    with StopSignals() as signals, StopSignals() as inner:
        assert inner is signals, "one for all that goes on inside"
        signals.check("not yet")
        signal.raise_signal(getattr(signal, name))
        assert requested() == signals.exit_code == CODES[name]
        with pytest.raises(Interrupted, match="in the midst of it") as stopped:
            signals.check("in the midst of it")
        assert stopped.value.exit_code == CODES[name]
        with pytest.raises(KeyboardInterrupt):  # no command: whoever called decides what becomes of the process
            signal.raise_signal(signal.SIGINT)
        assert signals.exit_code == CODES[name], "that of the first"
    assert requested() == 0 and signal.getsignal(getattr(signal, name)) is before


@pytest.mark.parametrize("at", [1, 3])  # the first evaluation, at step 5, or a later one
def test_one_in_an_evaluation_does_not_wait_for_its_end(tmp_path: Path, at: int) -> None:
    """What a queue gives a run to end in is shorter than some evaluations: the step is saved, and evaluated later."""
    entered = []

    class Enter(Callback):
        def on_fit_start(self, run: Run) -> None:
            run.model.register_forward_pre_hook(self.count)

        def count(self, model: torch.nn.Module, inputs: object) -> None:
            if not model.training:
                entered.append(model)
                if len(entered) == 3 * at - 1:  # in the second of three batches
                    signal.raise_signal(signal.SIGTERM)

    options: dict[str, Any] = {"data": {"eval_batch_size": 10, "val_fraction": 0.02}, "max_steps": 20}
    fit(tmp_path / "whole", **options)
    with pytest.raises(Interrupted, match=f"after step {5 * at}:") as stopped:
        fit(tmp_path / "parts", callbacks=[Enter()], **options)
    assert stopped.value.exit_code == 75 and len(entered) == 3 * at - 1, "and no batch more"
    assert [e["step"] for e in events(tmp_path / "parts") if e["event"] == "eval"] == [5 * i for i in range(1, at)]
    fit(tmp_path / "parts", resume=True, **options)
    assert list(differences(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))) == []
    assert events(tmp_path / "whole") == events(tmp_path / "parts")


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before, codes = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with StopSignals() as signals:
            codes.append((signals.exit_code, signal.getsignal(signal.SIGTERM) is before))

    (thread := threading.Thread(target=work)).start()
    thread.join()
    assert codes == [(0, True)]


@pytest.mark.parametrize("first, second, code", [("SIGTERM", "SIGTERM", 75), ("SIGINT", "SIGUSR1", 130)])
def test_a_second_ends_the_command_even_where_no_python_runs(first: str, second: str, code: int) -> None:
    process = started(BUSY)
    process.send_signal(getattr(signal, first))
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(getattr(signal, second))
    _, errors = process.communicate(timeout=10)
    assert process.returncode == code and errors.count("Stopped at once") == 1 and "Traceback" not in errors


def test_an_echo_of_a_launcher_is_no_second() -> None:
    """A queue sends to all processes, and torchrun passes on what it got."""
    body = """import time; print('ready', flush=True)
    while not signals.exit_code: pass
    time.sleep(0.5); print('saved')"""
    process = started(body, TORCHELASTIC_RUN_ID="x")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=10)
    assert (process.returncode, out, errors) == (0, "saved\n", "")


@pytest.mark.parametrize("name", CODES)
def test_workers_of_a_loader_serve_on(tmp_path: Path, name: str) -> None:
    """A queue sends to all processes of a job, and the step under way needs its batches."""
    for split in ("train", "val"):
        for index in range(12):
            path = tmp_path / split / f"class{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
    sets = data.imagenet(
        str(tmp_path), image_size=8, resize=8, workers=1, batch_size=2, eval_batch_size=2, val_fraction=0.2
    )
    served = 0
    for _ in sets.test.epoch(0):
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, getattr(signal, name))
        time.sleep(0.05)
        served += 1
    assert served == 6 and not multiprocessing.active_children()


def test_an_echo_after_the_end_does_not_change_the_code() -> None:
    """Ranks end one after the other, and a launcher sends SIGTERM to those that are left; torch's end takes a while."""
    body = """import os; print('ready', flush=True)
    while not signals.exit_code: pass
os.kill(os.getpid(), 15)
os._exit(signals.exit_code)"""
    process = started(body)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 75


def test_forked_children_leave_it_to_their_parent() -> None:
    """What is sent to a whole group reaches workers, too: they neither die of it nor count as a second signal."""
    body = """import os, signal, time; os.setsid()
    child = os.fork()
    if child == 0:
        print('ready', flush=True)
        time.sleep(30)
        os._exit(3)
    while not signals.exit_code: time.sleep(0.01)
    time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    print(signals.exit_code)"""
    process = started(body)
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=10)
    assert (process.returncode, out, errors) == (0, "130\n", "")


def test_ctrl_c_while_modules_are_loaded(tmp_path: Path) -> None:
    """Before the command listens it ends the process, as Ctrl-C does anywhere; then the second does; no trace."""
    program = [sys.executable, "-X", "importtime", str(ROOT / "train.py"), "model=mlp"]
    for reached, signals, code in (("omegaconf", 1, -signal.SIGINT), ("numpy", 2, 130)):
        process = subprocess.Popen(program, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        while reached not in process.stderr.readline():
            assert process.poll() is None
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == code and "Traceback" not in errors and "KeyboardInterrupt" not in errors
        assert errors.count("Stopped at once by a second signal") == signals - 1
    assert not list(tmp_path.iterdir())
