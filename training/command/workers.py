"""`-m workers=N`: the jobs of a sweep, N at a time, each in a process of its own on its share of cores and GPUs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from training.command import jobs
from training.command.jobs import Row, Train
from training.command.words import complain, mutter, say
from training.errors import UserError
from training.loop.signals import CTRL_C, REQUEUE, Interrupted, StopSignals, requested
from training.runs.claims import release
from training.settings.composition import Sweep
from training.show import report

#: Seconds between two looks at whether a signal has come.
PATIENCE = 0.2
#: Whether workers are forked, which is safe where this process has imported torch and run nothing of weight on it.
FORKED = sys.platform == "linux"
#: The first word of a worker.
READY = "ready"
# What stdout and stderr were before: whoever lets go of them may close the descriptors that took their place.
_KEPT: list[Any] = []
#: What tells a process which GPUs it may see.
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass
class Worker:
    """A process that runs jobs, as the one that started it sees it.

    Attributes:
        process: it.
        jobs: takes the number of a job, gives what became of it.
        errors: what it writes to stderr, whose lines are passed on whole.
        index: number of the job that it runs; None while it waits for one.
        written: the begin of a line of its stderr.
    """

    process: BaseProcess
    jobs: Connection
    errors: Connection
    index: int | None = None
    written: bytes = b""

    def relay(self) -> None:
        """Pass on the lines that have come."""
        while self.errors.poll():
            try:
                text = os.read(self.errors.fileno(), 1 << 16)
            except OSError:
                return
            if not text:
                return
            *lines, self.written = (self.written + text).split(b"\n")
            sys.stderr.write("".join(f"{line.decode(errors='replace')}\n" for line in lines))


@dataclass
class Pool:
    """The workers of a sweep, and which jobs are left for them.

    Attributes:
        train: trains and returns the summary and the run folder.
        sweep: whose jobs.
        threads: of each worker.
        gpus: what each in turn may see; empty: what this process sees.
        waiting: jobs that nobody has begun, the next one first.
        workers: those that live.
        lifeline: a pipe that ends with this process, however it ends.
        code: exit code of a worker that a signal of its own has stopped; 0 while there is none.
    """

    train: Train
    sweep: Sweep
    threads: int
    gpus: list[str]
    waiting: list[int]
    workers: dict[int, Worker] = field(default_factory=dict)
    lifeline: tuple[int, int] = field(default_factory=os.pipe)
    code: int = 0

    def start(self, number: int) -> None:
        """Start a worker in a place of the pool."""
        context: Any = multiprocessing.get_context("fork" if FORKED else "spawn")
        ours, theirs = context.Pipe()
        errors, written = context.Pipe(duplex=False)
        inherited = [*(end for one in self.workers.values() for end in (one.jobs, one.errors)), ours, errors]
        own = _Own(
            train=self.train,
            sweep=self.sweep,
            given=theirs,
            errors=written,
            threads=self.threads,
            gpu=self.gpus[number % len(self.gpus)] if self.gpus else None,
            lifeline=self.lifeline if FORKED else None,
            inherited=inherited if FORKED else [],
        )
        process = context.Process(target=_work, args=(own,), name=f"worker {number + 1}")
        process.start()
        theirs.close()
        written.close()
        self.workers[number] = Worker(process, ours, errors)

    def give(self, number: int) -> None:
        """Give a worker the next job, or let it go if none is left."""
        worker = self.workers[number]
        worker.index = self.waiting.pop(0) if self.waiting else None
        with suppress(OSError):  # if it has died, `take` hears of it
            worker.jobs.send(worker.index)

    def take(self, number: int) -> Any:
        """What a worker reports: `READY`, or the summary of the job it had; None if it has ended itself."""
        worker = self.workers[number]
        with suppress(EOFError, OSError):
            return worker.jobs.recv()
        worker.process.join()
        worker.relay()
        worker.jobs.close()
        worker.errors.close()
        del self.workers[number]
        return None

    def tell(self, number: int) -> None:
        """Pass a signal on to those that run a job; they are in process groups of their own."""
        for worker in self.workers.values():
            if worker.index is not None and worker.process.pid is not None and worker.process.is_alive():
                os.kill(worker.process.pid, number)

    def close(self) -> None:
        """Stop what is still there after an error, and wait for it."""
        self.tell(signal.SIGTERM)
        for worker in self.workers.values():
            worker.jobs.close()
            worker.process.join()
        for end in self.lifeline:
            os.close(end)


def launch(train: Train, sweep: Sweep, rows: list[Row]) -> None:
    """Run the jobs of a sweep, some at a time.

    Args:
        train: trains and returns the summary and the run folder.
        sweep: whose jobs, and how many at a time.
        rows: is given the jobs that have come to an end, in the order of the sweep.

    Raises:
        Interrupted: a signal asked to stop; all that ran has been saved.
        UserError: this system has no such processes.
    """
    if os.name != "posix":
        raise UserError("workers needs a POSIX system: here take hydra/launcher=joblib (hydra-joblib-launcher)")
    jobs.write_plan(sweep)
    count = min(sweep.workers, len(sweep.due))
    pool = Pool(train, sweep, sweep.threads or threads_of(count), _gpus(), list(sweep.due))
    gpus = f", on GPUs {', '.join(pool.gpus)}" if pool.gpus else ""
    say(f"{count} at a time, with {pool.threads} thread(s) each{gpus}")
    ended: dict[int, Row] = {}
    try:
        for number in range(count):
            pool.start(number)
        _attend(pool, ended)
    finally:
        pool.close()
        rows += [ended[index] for index in sorted(ended)]
    if code := requested() or pool.code:
        raise Interrupted("Interrupted: what ran is saved, and the same command goes on.", code)


def _attend(pool: Pool, ended: dict[int, Row]) -> None:
    """Hand out jobs and take in what became of them until no worker is left."""
    labels, told, due, began = pool.sweep.labels, False, len(pool.sweep.due), time.monotonic()

    def report_on(index: int, summary: dict[str, Any]) -> None:
        ended[index] = labels[index] or "run 1", summary
        say(report.outcome(f"{len(ended)} of {due}{report.rest(began, len(ended), due)}", *ended[index]))

    while pool.workers:
        if (code := requested() or pool.code) and not told:
            told, pool.waiting = True, []
            pool.tell(signal.SIGINT if code == CTRL_C else signal.SIGTERM)
        ready = wait([end for worker in pool.workers.values() for end in (worker.jobs, worker.errors)], PATIENCE)
        for number, worker in list(pool.workers.items()):
            worker.relay()
            if worker.jobs not in ready:
                continue
            index, result = worker.index, pool.take(number)
            if result is None:
                how = worker.process.exitcode
                if index is not None and how in (REQUEUE, CTRL_C):  # a signal of its own has stopped it
                    pool.code = pool.code or how
                elif index is not None and not told:
                    report_on(index, _bury(pool, index, how))
                if pool.waiting:
                    pool.start(number)
                continue
            if index is not None:
                report_on(index, result)
            pool.give(number)


def _bury(pool: Pool, index: int, code: int | None) -> dict[str, Any]:
    """Record that a job's process has died, in its place."""
    how = f"signal {-code} ({signal.Signals(-code).name})" if code is not None and code < 0 else f"exit code {code}"
    hint = ": the system may have run out of memory" if code == -signal.SIGKILL else ""
    error = UserError(f"the process that trained it was ended by {how}{hint}; launched again, the sweep tries it again")
    mutter(f"error: {pool.sweep.labels[index]}: {error}")
    try:
        return jobs.record_failure(pool.sweep.job(index), error)
    finally:
        release()


def threads_of(workers: int) -> int:
    """The share of a worker in this process's threads (all cores, or OMP_NUM_THREADS)."""
    import torch

    return max(1, torch.get_num_threads() // workers)


def _gpus() -> list[str]:
    """The GPUs that this process may see, by the names that `CUDA_VISIBLE_DEVICES` takes; CUDA is not started."""
    import torch

    given = os.environ.get(VISIBLE)
    if given is not None:
        return [name for name in given.split(",") if name.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]


@contextmanager
def relayed() -> Iterator[None]:
    """Within it, SIGTERM and its like reach the processes that a launcher of Hydra's has started on this machine.

    Ctrl-C they hear of themselves: a terminal sends it to all.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(PATIENCE):
            if requested() == REQUEUE:
                for child in multiprocessing.active_children():
                    if child.pid is not None:
                        os.kill(child.pid, signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, name="relay", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# -- in the worker -----------------------------------------------------------------------------------------------------


@dataclass
class _Own:
    """What a worker is given: see `Pool`; and of what it inherits, the ends of pipes that are not its own."""

    train: Train
    sweep: Sweep
    given: Connection
    errors: Connection
    threads: int
    gpu: str | None
    lifeline: tuple[int, int] | None
    inherited: list[Connection]


def _work(own: _Own) -> None:
    """Run the jobs that come until none is left; end with the exit code of a signal, if one comes."""
    os.setpgid(0, 0)  # what a terminal sends to all, the parent passes on
    for end in own.inherited:
        end.close()
    if own.lifeline is not None:
        os.close(own.lifeline[1])
        threading.Thread(target=_follow, args=(own.lifeline[0],), daemon=True).start()
    _speak_through(own.errors)
    os.environ["OMP_NUM_THREADS"] = str(own.threads)
    if own.gpu is not None:
        os.environ[VISIBLE] = own.gpu
    import torch

    torch.set_num_threads(own.threads)
    code = 0
    with StopSignals(command=True):
        try:
            own.given.send(READY)
            while (index := own.given.recv()) is not None:
                own.given.send(jobs.perform(own.train, own.sweep, index))
        except Interrupted as stop:
            code = stop.exit_code
        except (EOFError, BrokenPipeError):  # the parent has gone
            code = requested()
        except Exception as error:  # noqa: BLE001 - what cannot even be recorded; the parent says that the job is lost
            complain(error)
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _speak_through(errors: Connection) -> None:
    """Say nothing on stdout, and on stderr what the parent passes on line by line: neither is a terminal."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(errors.fileno(), 2)
    _KEPT.extend([sys.stdout, sys.stderr])
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))


def _follow(lifeline: int) -> None:
    """Stop when the parent has gone: after a signal that it has passed on, at once; else like after SIGTERM."""
    os.read(lifeline, 1)
    time.sleep(PATIENCE)  # it may have gone because all is done
    os.kill(os.getpid(), signal.SIGTERM)
