"""From a script to the queue, with a look at what it would run first."""

from __future__ import annotations

import shutil
import subprocess
from datetime import datetime
from pathlib import Path

from scripts.cluster.systems import System
from training.command.cluster import Job
from training.errors import UserError


def check(job: Job) -> None:
    """Compose what a job would run, so that none waits for hours to fail of a typing error.

    Raises:
        UserError: what train.py would say.
    """
    from training.settings.composition import prepare  # with torch, for which what can be wrong before does not wait

    sweep = ["-m"] if (job.array or job.side) and not {"-m", "--multirun"} & set(job.overrides) else []
    prepare([*sweep, *job.overrides])


def keep(system: System, job: Job, text: str, path: Path | None = None) -> Path:
    """Write a script, and the folder that its output goes to.

    Args:
        system: whose script it is.
        job: what it runs.
        text: the script.
        path: where to; None: `jobs/`, by name and time.

    Raises:
        UserError: it cannot be written.
    """
    path = path or Path("jobs") / f"{job.name}_{datetime.now():%Y-%m-%d_%H-%M-%S}{system.ending}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if "$" not in job.logs:
            Path(job.logs).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written ({error.strerror}): give --output or logs=.") from error
    return path


def submit(system: System, path: Path) -> str:
    """Give a script to the queue.

    Returns:
        What the queue answers, and where the script is.

    Raises:
        UserError: there is no queue here, or it refuses.
    """
    if shutil.which(system.submit) is None:
        raise UserError(
            f"there is no {system.submit} here, so {path} is not submitted: do it on a login node of the cluster, or "
            "print scripts with --dry-run."
        )
    done = subprocess.run([system.submit, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{system.submit} refuses {path}: {' '.join((done.stderr or done.stdout).split())}")
    return f"{done.stdout.strip()} ({path})"
