"""Commands in processes of their own that need not import torch: forked from one that has, and killed when told to.

`python -m tests.survival.forks` is that one; `Forks` starts it and speaks to it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

MODULES = ".modules"
LIMIT = 60.0  # seconds after which a command counts as hanging


@dataclass
class Ended:
    """How a command ended.

    Attributes:
        codes: exit code of each rank, negative for the signal that killed it.
        seconds: from its start to the end of its last process.
        output: what each rank printed, stdout and stderr together.
    """

    codes: list[int]
    seconds: float
    output: list[str]


class Forks:
    """The process that has imported all, as a context.

    Args:
        folder: for what the commands print.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def __enter__(self) -> Forks:
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        one["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command has it, which is imported after torch here
        launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "CURVLAB_DEBUG", "CURVLAB_DATA")
        kept = {name: value for name, value in os.environ.items() if name not in launched}
        command = [sys.executable, "-m", "tests.survival.forks"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen(command, cwd=ROOT, env=kept | one, **pipes)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=10)

    def run(
        self,
        *argv: str,
        cwd: Path,
        after: float | None = None,
        when: str | None = None,
        number: int = signal.SIGKILL,
        ranks: Sequence[dict[str, str]] = ({},),
        victims: Sequence[int] | None = None,
        launched: float | None = None,
        then: Sequence[tuple[int, int, float]] = (),
        limit: float = LIMIT,
    ) -> Ended:
        """Give a command, `train.py argv`, and wait for its end.

        Args:
            argv: its arguments.
            cwd: where it is given.
            after: seconds after which a signal is sent; None: never.
            when: a pattern of files below ``cwd``; the signal is sent once there is one. None: see ``after``.
            number: of that signal.
            ranks: what is set in the environment of each of its processes.
            victims: ranks that are sent the signal; None: all.
            launched: as by torchrun, all others get SIGTERM when a process has ended by anything but 0, and so many
                seconds later SIGKILL; None: they do not.
            then: rank, signal and seconds after the first signal, of further ones.
            limit: seconds after which all that is left is killed.
        """
        self._count += 1
        logs = [str(self._folder / f"{self._count}-{rank}.txt") for rank in range(len(ranks))]
        asked = {"argv": argv, "cwd": str(cwd), "after": after, "when": when, "number": int(number), "ranks": [*ranks]}
        asked |= {"launched": launched, "victims": [*(range(len(ranks)) if victims is None else victims)], "logs": logs}
        asked |= {"then": [*then], "limit": limit}
        for log in logs:
            Path(log).touch()  # one may be killed before its first instruction
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return Ended(answer["codes"], answer["seconds"], [Path(log).read_text(errors="replace") for log in logs])


def _child(argv: list[str], cwd: str, environment: dict[str, str], log: str) -> None:
    """In a forked process: the command, and nothing after it."""
    code = 70
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # while it is no command yet, and when it has been one
    try:
        os.setsid()
        os.chdir(cwd)
        os.environ.update(environment)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        import train

        known = set(sys.modules)
        code = train.main(argv)
        Path(log + MODULES).write_text(json.dumps(sorted(set(sys.modules) - known)))
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    begun = time.monotonic()
    children = []
    for environment, log in zip(asked["ranks"], asked["logs"], strict=True):
        child = os.fork()
        if child == 0:
            _child(asked["argv"], asked["cwd"], environment, log)
        children.append(child)
    codes: dict[int, int] = {}
    due: list[tuple[float, int, int]] = []  # when, rank and number of signals to be sent
    whole = asked["after"] is None and asked["when"] is None
    struck = whole
    while len(codes) < len(children):
        now = time.monotonic() - begun
        if not struck and (any(Path(asked["cwd"]).glob(asked["when"])) if asked["when"] else now >= asked["after"]):
            struck = True
            due += [(now, rank, asked["number"]) for rank in asked["victims"]]
            due += [(now + later, rank, number) for rank, number, later in asked["then"]]
        for when, rank, number in [*due]:
            if now >= when:
                due.remove((when, rank, number))
                if children[rank] not in codes:
                    os.kill(children[rank], number)
        held = asked["victims"] if asked["number"] == signal.SIGSTOP else []
        if now > asked["limit"] or all(child in codes for rank, child in enumerate(children) if rank not in held):
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    if asked["launched"] is not None and codes[child]:
                        grace, asked["launched"] = asked["launched"], None
                        for rank in range(len(children)):
                            due += [(now, rank, signal.SIGTERM), (now + grace, rank, signal.SIGKILL)]
        time.sleep(0.002)
    seconds = time.monotonic() - begun
    if whole and (imported := Path(asked["logs"][0] + MODULES)).exists():
        for name in json.loads(imported.read_text()):  # what a command imports the next ones have imported
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    return {"codes": [codes[child] for child in children], "seconds": seconds}


def main() -> None:
    """Answer requests, a line each, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else is printed among the answers
    import torch
    import torch._dynamo  # noqa: F401 - optimizers do, at their first step

    from tests.survival import kills  # noqa: F401 - imports all that a command does

    torch.set_num_threads(1)
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
