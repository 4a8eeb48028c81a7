"""Write a batch script for a cluster and submit it: one run, several processes, an array, or runs side by side.

    python scripts/submit.py cluster=slurm nodes=2 gpus=4 time=24h account=ab1 -- optimizer=kfac model=resnet50
    python scripts/submit.py cluster=slurm array=8 -- optimizer=sgd,adam,kfac seed=0,1,2
    python scripts/submit.py cluster=msub gpus=4 side=4 --dry-run -- optimizer=sgd,adam,kfac,ekfac

In front of ``--`` are the keys of configs/cluster/NAME.yaml, which explains them, and ``--dry-run`` (print the script
and submit nothing), ``--no-check`` (do not compose what is to run), ``--output FILE`` (where the script is kept; it is
``jobs/NAME_TIME.sbatch`` else) and ``--config-dir DIR`` (whose folder ``cluster/`` has sites of yours). Behind it are
arguments of train.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

from scripts.cluster import site, systems
from scripts.cluster.script import render
from scripts.cluster.submission import check, keep, submit
from training.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv`: the arguments, None for those of the process."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or {"-h", "--help"} & set(given):
        print(__doc__)
        return 0
    try:
        request = site.read(given)
        job = site.describe(request)
        system = systems.find(job.system)
        if request.check:
            check(job)
        text = render(job, site.as_typed(given))
        if request.dry_run:
            print(text, end="")
        else:
            print(submit(system, keep(system, job, text, request.output)))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
