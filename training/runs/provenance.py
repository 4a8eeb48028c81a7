"""What a run came to and where it comes from (versions, commit, machine): what makes a figure in a table traceable."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from training.runs.folder import atomic_file
from training.runs.record import REMARKS
from training.runs.run import Run

PACKAGES = ("torch", "torchvision", "torchmetrics", "hydra-core", "numpy", "scikit-learn", "tensorboard")


def summarise(run: Run, status: str, error: str | None = None) -> dict[str, Any]:
    """The content of ``summary.json``.

    Args:
        run: as it ended.
        status: finished, stopped_early, diverged, interrupted or failed.
        error: why, in a sentence.
    """
    parameters = list(run.model.parameters())
    return {
        "status": status,
        "error": error,
        "stop_reason": run.stop_reason,
        "final": {name: value for name, value in run.latest.items() if name.split("/")[0] in ("train", "val", "test")},
        "best": dict(run.best) if run.best else None,
        "monitor": run.monitor,
        "plateau": run.data.plateau,
        "steps": run.step,
        "epochs": run.epoch,
        "seconds": {
            "training": run.clock.seconds("training"),
            "evaluation": run.clock.seconds("evaluation"),
            "wall": run.clock.seconds("wall"),
        },
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "config_id": run.config_id,
        "git_commit": git_commit(),
        "versions": versions(),
        "hardware": hardware(run.world.device, run.world.world_size),
        "peak_memory_bytes": peak_memory(run.world.device),
        **{name: run.config[name] for name in REMARKS if run.config.get(name)},
    }


def keep_facts(run: Run) -> None:
    """Write what of the data set its model needs into the run folder, so that it predicts where the data are not.

    Args:
        run: before its first step.

    Raises:
        WriteError: it cannot be written.
    """
    from data import kept

    with atomic_file(run.folder.path / kept.FILE) as file:
        file.write((json.dumps(kept.describe(run.data), indent=1, allow_nan=False) + "\n").encode())


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages a run's numbers depend on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found["curvlab"] = getattr(sys.modules.get("curvlab"), "__version__", None)  # installed; a clone has its commit
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_commit() -> str | None:
    """The checkout's commit, with "+changes" where files differ from it; None outside a checkout or without git."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():  # an enclosing repository is not ours
        return None

    def git(*arguments: str) -> str:
        # A question takes no lock: git that is killed with us would leave it, and no commit could be made.
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware(device: torch.device, world_size: int) -> dict[str, Any]:
    """What the run computes on."""
    found: dict[str, Any] = {
        "device": device.type,
        "processes": world_size,
        "cpu": _cpu(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _cpu() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most torch had allocated on the GPU, or this process's largest resident size; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # POSIX only

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
