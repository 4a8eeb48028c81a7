"""Signals to real processes: the first is noted, the second does not wait, children leave both to their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.conftest import ROOT
from training.loop.signals import CODES, Interrupted, StopSignals, requested

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
