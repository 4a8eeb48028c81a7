"""`-m hydra/launcher=slurm`: each run of a sweep as a job of SLURM, by submitit; this process waits and reports."""

from __future__ import annotations

import getpass
import importlib
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.command import cluster
from training.command.cluster import Job
from training.command.jobs import Row
from training.command.words import say
from training.errors import UserError
from training.loop.launch import is_main, place
from training.loop.signals import REQUEUE, Interrupted, requested
from training.runs.folder import RunFolder
from training.settings.composition import Sweep
from training.settings.overrides import JOB, Arguments

#: Seconds between two looks at the queue.
PAUSE = 2.0
#: Looks in a row that find a job neither in the queue nor with a result, before it counts as lost: file systems lag.
MISSES = 8
#: What scontrol says of a job that was asked to stop by a signal. One that was cancelled is to stay so.
RUNNING = "JobState=RUNNING"
LOST = "the job has left the queue without a result"


@dataclass(frozen=True)
class Call:
    """One job of a sweep, as it runs on the cluster: the same command, told which of its jobs it is.

    Args:
        arguments: of train.py.
        index: the job's number.
        requeue: how often it may go back to the queue.
    """

    arguments: list[str]
    index: int
    requeue: int

    def __call__(self) -> int:
        """Run it; 0 if it ended well.

        Raises:
            SystemExit: it was stopped, and is in the queue again.
            RuntimeError: it was stopped and cannot be, or it failed, which SLURM is to know, too.
        """
        os.environ[JOB] = str(self.index)
        program = "curvlab.command" if "CURVLAB_COMMAND" in os.environ else "train"
        code: int = importlib.import_module(program).main(self.arguments)
        if code not in (0, REQUEUE):
            raise RuntimeError(f"exit code {code}")
        if code == 0:
            return code
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        if restarts >= self.requeue:
            raise RuntimeError(f"stopped and saved, and not queued again after {restarts} restarts")
        array, element = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
        job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{element}"
        if RUNNING not in _answer("scontrol", "--oneliner", "show", "job", job):
            raise RuntimeError("ended by scancel, or out of time without a signal; the same command goes on")
        if is_main():
            subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
        sys.exit(REQUEUE)

    def checkpoint(self) -> Any:
        """For submitit, which answers signals that come before training begins: the same call again."""
        return importlib.import_module("submitit").helpers.DelayedSubmission(self)


def launch(given: Sequence[str], sweep: Sweep, rows: list[Row]) -> None:
    """Submit the jobs of a sweep and wait for them.

    Args:
        given: the command's arguments.
        sweep: what they ask for.
        rows: is given the jobs that have come to an end.

    Raises:
        UserError: there is no SLURM here, or it refuses, or something is wrong with what it is asked for.
        Interrupted: a signal asked to stop; the jobs go on.
    """
    job = _job(given, sweep)
    if place().world_size > 1:
        raise UserError("hydra/launcher=slurm submits jobs itself: start one process, without torchrun or srun")
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: hydra/launcher=slurm is for a login node of a cluster with SLURM")
    own = ("hydra/launcher=", "hydra.launcher.", "hydra.sweep.dir=")
    arguments = [text for text in given if not text.startswith(own)] + [f"hydra.sweep.dir='{sweep.folder}'"]
    submitit = importlib.import_module("submitit")
    executor = submitit.AutoExecutor(
        folder=str(sweep.folder / ".submitit" / "%j"),
        cluster="slurm",
        slurm_python=job.python,
        slurm_max_num_timeout=job.requeue,
    )
    executor.update_parameters(**_parameters(job))
    try:
        with executor.batch():
            waiting = {index: executor.submit(Call(arguments, index, job.requeue)) for index in sweep.due}
        ids = ", ".join(sorted({one.job_id.partition("_")[0] for one in waiting.values()}))
    except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
        raise UserError(f"sbatch refuses: {' '.join(str(error).split())}") from error
    say(f"sweep of {len(waiting)} in {sweep.folder}: job {ids} of SLURM, whose output is in {sweep.folder}/.submitit")
    ended: dict[int, Row] = {}
    try:
        _wait(sweep, waiting, ended, ids)
    finally:
        rows += [ended[index] for index in sorted(ended)]


def _job(given: Sequence[str], sweep: Sweep) -> Job:
    """What each job asks SLURM for: the site's values, and the command's."""
    asked = {key: value for key, value in (sweep.queue or {}).items() if value is not None}
    config = Arguments().parse_intermixed_args(list(given)).config_dir
    values = cluster.defaults(str(asked.pop("cluster", "")), [Path(config)] if config else [])
    unknown = sorted(set(asked) - set(Job.__dataclass_fields__))
    if unknown:
        raise UserError(f"hydra.launcher has no key {unknown[0]!r}; it has those of configs/hydra/launcher/slurm.yaml")
    values |= {"name": values.get("name") or sweep.folder.name, "side": None, "array": None} | asked
    if values["system"] != "slurm":
        raise UserError(f"hydra/launcher=slurm submits by sbatch, and this site has {values['system']}: "
                        "scripts/submit.py array=N does it there")  # fmt: skip
    return cluster.build(values, jobs=len(sweep.due))


def _parameters(job: Job) -> dict[str, Any]:
    """The same for submitit."""
    root = str(Path(__file__).resolve().parents[2])
    flags = [flag.lstrip("-").partition("=") for flag in job.flags]
    asked = {
        "name": job.name,
        "timeout_min": math.ceil(job.seconds / 60),
        "nodes": job.nodes,
        "tasks_per_node": job.processes,
        "cpus_per_task": job.cpus,
        "slurm_gpus_per_node": job.gpus or None,
        "slurm_mem": job.memory,
        "slurm_account": job.account,
        "slurm_partition": job.partition,
        "slurm_qos": job.qos,
        "slurm_constraint": job.constraint,
        "slurm_exclusive": job.exclusive or None,
        "slurm_signal_delay_s": job.signal or 0,
        "slurm_array_parallelism": job.array or job.jobs,
        "slurm_setup": [*job.environment_lines(), f'export PYTHONPATH="{root}${{PYTHONPATH:+:$PYTHONPATH}}"'],
        "slurm_additional_parameters": {
            **({"requeue": True} if job.requeue else {"no-requeue": True}),
            **({"mail-user": job.mail, "mail-type": "END,FAIL"} if job.mail else {}),
            **{name: value or True for name, _, value in flags},
        },
        "stderr_to_stdout": True,
    }
    return {key: value for key, value in asked.items() if value is not None}


def _wait(sweep: Sweep, waiting: dict[int, Any], ended: dict[int, Row], ids: str) -> None:
    """Wait for jobs, by their results and by what the queue says, without accounting."""
    labels, misses = sweep.labels, dict.fromkeys(waiting, 0)
    while waiting:
        queued = _queued()
        for index, job in list(waiting.items()):
            there = job.paths.result_pickle.exists()
            lost = not there and queued is not None and job.job_id not in queued
            misses[index] = misses[index] + 1 if lost else 0
            if there or misses[index] >= MISSES:
                summary = _summary(sweep, index, job, there)
                ended[index] = (labels[index] or "run 1", summary)
                say(f"{labels[index] or 'run 1'}: {summary.get('status')}")
                del waiting[index]
        if code := requested():
            raise Interrupted(f"The jobs go on: the same command reports on them, scancel {ids} ends them.", code)
        if waiting:
            time.sleep(PAUSE)


def _queued() -> set[str] | None:
    """The jobs that SLURM has of this user, elements of arrays one by one; None if it does not answer."""
    try:
        return set(_answer("squeue", "--noheader", "--array", "--format=%i", f"--user={getpass.getuser()}").split())
    except subprocess.SubprocessError:
        return None


def _answer(*command: str) -> str:
    """What a command of SLURM prints; `subprocess.SubprocessError` if it does not answer."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def _summary(sweep: Sweep, index: int, job: Any, there: bool) -> dict[str, Any]:
    """How a job ended, by its folder; or else by what the queue and its output tell."""
    from training.runs.resume import ELSEWHERE, sweep_folder  # with torch

    outcome, result = "error", LOST
    if there:
        outcome, result = importlib.import_module("submitit").core.utils.pickle_load(job.paths.result_pickle)
    why = str(result).strip().splitlines()[-1] if outcome == "error" else ""
    failed = {"status": "failed", "error": f"{why}; see {job.paths.stdout}"}
    try:
        folder = sweep_folder(sweep.job(index))
    except UserError as error:
        return failed | {"error": str(error)}
    summary = RunFolder(folder).read_summary() if folder.exists() else None
    if summary is None and outcome != "error":  # another launch of the sweep has it
        return {"status": ELSEWHERE}
    if summary is not None and (outcome != "error" or summary.get("status") == "failed"):
        return summary
    return (summary or {}) | failed
