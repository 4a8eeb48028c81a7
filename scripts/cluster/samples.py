"""Scripts to start from, in scripts/slurm and scripts/msub: written by ``python -m scripts.cluster.samples``."""

from __future__ import annotations

from pathlib import Path

from scripts.cluster import site, systems
from scripts.cluster.script import render

FOLDER = Path(__file__).resolve().parents[1]
ONE = ("--", "optimizer=kfac", "model=resnet50", "dataset=cifar100")
SWEEP = ("--", "optimizer=sgd,adamw,kfac,adafisher", "seed=0,1,2", "model=resnet18", "dataset=cifar10")
FOUR = ("--", "optimizer=sgd,adamw,kfac,adafisher", "model=resnet18", "dataset=cifar10")
#: By name: what scripts/submit.py is told besides the cluster.
SAMPLES = {
    "single": ("name=single", "gpus=1", "cpus=8", *ONE),
    "nodes_srun": ("name=nodes_srun", "nodes=2", "gpus=4", "cpus=8", *ONE),
    "nodes_torchrun": ("name=nodes_torchrun", "nodes=2", "gpus=4", "cpus=8", "launcher=torchrun", *ONE),
    "sweep_array": ("name=sweep", "gpus=1", "cpus=8", "array=4", *SWEEP),
    "side_by_side": ("name=side_by_side", "gpus=4", "cpus=8", "side=4", *FOUR),
}


def samples() -> dict[Path, str]:
    """The scripts, by where they lie."""
    found = {}
    for system in systems.SYSTEMS.values():
        for name, words in SAMPLES.items():
            given = [f"cluster={system.name}", *words]
            job = site.describe(site.read(given))
            found[FOLDER / system.name / f"{name}{system.ending}"] = render(job, site.as_typed(given))
    return found


def main() -> None:
    """Write them."""
    for path, text in samples().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
