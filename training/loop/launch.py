"""Which process of how many this one is, by what torchrun or SLURM's srun left in its environment. Without torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from training.errors import UserError

#: The variable that names a file in which a run that was stopped leaves word; torchrun and srun lose its exit code.
STOPPED = "CURVLAB_STOPPED"
# SLURM's own steps (the batch script, an interactive shell) have the highest numbers; a step of srun counts from 0.
_OWN_STEPS = 0xFFFFFFF0
# Where the processes of srun meet: 12,000 ports below those that Linux gives out by itself.
_FIRST_PORT, _PORTS = 20000, 12000


@dataclass(frozen=True)
class Place:
    """A process among those that were started together.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: how many there are.
        local_rank: rank among the processes of this machine.
        address: of the store where they meet, `host:port`; None where torchrun says so in variables of its own.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str | None = None


def place() -> Place:
    """This process's place: torchrun's RANK, LOCAL_RANK and WORLD_SIZE, or else those of a step of srun, or alone.

    A SLURM job that has several tasks is not yet several processes: its batch script and the shell of `salloc` are one.

    Raises:
        UserError: half of torchrun's variables, several torchruns side by side, an interactive step of several tasks.
    """
    tasks = _tasks()
    if "WORLD_SIZE" in os.environ:
        size = _number("WORLD_SIZE")
        if "TORCHELASTIC_RUN_ID" in os.environ and (nodes := int(os.environ.get("GROUP_WORLD_SIZE", tasks))) < tasks:
            raise UserError(
                f"srun started {tasks} torchruns, each of which would train by itself (it knows of {nodes} node(s)): "
                "use `srun python train.py ...` without torchrun, `srun --ntasks=1 torchrun ...` on one node, or one "
                "torchrun a node with --nnodes=N --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT (scripts/submit.py "
                "writes such scripts)."
            )
        rank, local_rank = (_number(name, 0 if size == 1 else None) for name in ("RANK", "LOCAL_RANK"))
        return Place(rank, size, local_rank)
    if tasks == 1:
        return Place(_number("RANK", 0), 1, _number("LOCAL_RANK", 0))
    if "SLURM_PTY_PORT" in os.environ:
        raise UserError(
            f"this terminal is one of {tasks} tasks that `srun --pty` started, so the others would be waited for: ask "
            "for it by `srun --ntasks=1 --cpus-per-task=N --pty ...`, or set WORLD_SIZE=1 to train in one process."
        )
    rank, local_rank = (_number(name) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    return Place(rank, tasks, local_rank, _address())


def is_main() -> bool:
    """Whether this process speaks for all that were started together. Never raises: it may have to say what fails."""
    several = _tasks() > 1 and "WORLD_SIZE" not in os.environ
    return os.environ.get("SLURM_PROCID" if several else "RANK", "0") == "0"


def leave_word(code: int) -> None:
    """Write the exit code of a run that was stopped, and can be resumed, where `CURVLAB_STOPPED` says, if it does."""
    path = os.environ.get(STOPPED)
    if path and is_main():
        Path(path).write_text(f"{code}\n")


def first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes it: `n3` of `n[3-5,9],m1`, `rack02` of `rack[02-10]`.

    Raises:
        UserError: for what is no such list.
    """
    found = re.match(r"([^\[,\s]*)(?:\[(\w+)[^\]]*\])?([^\[,\s]*)(?:,|\[|$)", nodes)
    host = "".join(part or "" for part in found.groups()) if found else ""
    if not host:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r} names no host: set MASTER_ADDR to that of rank 0.")
    return host


def _tasks() -> int:
    """How many tasks the step of srun has that this process belongs to; 1 outside of a step."""
    step, tasks = (os.environ.get(name, "") for name in ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"))
    inside = step.isdigit() and int(step) < _OWN_STEPS and tasks.isdigit()
    return int(tasks) if inside else 1


def _address() -> str:
    """Where the tasks of this step meet: the host of task 0, and a port that differs between jobs and their steps."""
    host = os.environ.get("MASTER_ADDR") or first_host(os.environ.get("SLURM_STEP_NODELIST", ""))
    job, step = (int(os.environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = os.environ.get("MASTER_PORT") or _FIRST_PORT + (job + 997 * step) % _PORTS
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        size = os.environ.get("WORLD_SIZE", f"{_tasks()} by SLURM")
        raise UserError(
            f"The environment says WORLD_SIZE={size} but {name}={text}: start several processes with `torchrun "
            "--nproc-per-node=N train.py ...` or `srun -n N python train.py ...`, or unset these variables to train in "
            "one."
        )
    return int(text)
