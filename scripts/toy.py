"""Optimizers on Rosenbrock's and Rastrigin's functions: paths over contours, and how near to the minimum they end.

    python scripts/toy.py
    python scripts/toy.py --evaluations 200 --optimizers adam,adahessian,torch:Rprop,pytorch_optimizer:Yogi --out toy

Every learning rate of a grid (half decades from 1e-4 to 10) gets the same number of evaluations of the function, and
the best one counts. Weight decay is off, other options are the classes' defaults. Writes toy.png and toy.csv.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

import torch
from rich.console import Console
from rich.table import Table

from analysis import records, toy
from optimizers import packaged, table
from scripts import Parser
from training.errors import UserError, did_you_mean
from training.show import heart

# AdamW without decay is Adam, and the two generic files are asked for by the names of classes.
DEFAULT = (
    "sgd", "torch:Adagrad", "torch:RMSprop", "adam", "torch:NAdam", "torch:RAdam", "pytorch_optimizer:AdaBelief",
    "adahessian", "shampoo", "soap", "lamb", "lion",
)  # fmt: skip
PACKAGES = {"torch": packaged.torch_optim, "pytorch_optimizer": packaged.pytorch_optimizer}
# Two numbers are a vector, which SOAP would leave to Adam; and what Shampoo does is to be seen, not Adam's length.
OPTIONS: dict[str, dict[str, Any]] = {
    "soap": {"precondition_1d": True},
    "shampoo": {"graft": None, "matrix_eps": 1e-6, "preconditioning_compute_steps": 1},
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv`: the arguments, None for those of the process."""
    try:
        _main(_parser().parse_args(argv))
    except (ValueError, UserError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return 0


def _main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    targets = {name: _target(name) for name in dict.fromkeys(filter(None, options.optimizers.split(",")))}
    layered = [name for name, target in targets.items() if "module" in table.needs(target)]
    builds = {name: _build(name, target) for name, target in targets.items() if name not in layered}
    paths: list[toy.Path] = []
    total = len(builds) * len(toy.SURFACES)
    with heart.working("optimizers on toy functions") as work:
        for name, build in builds.items():
            for surface in toy.SURFACES:
                work.of(len(paths), total, f"paths, now {name} on {surface.name}")
                paths.append(toy.tune(name, build, surface, options.evaluations))
    if not paths:
        raise ValueError(f"optimizers must name one that takes two numbers for parameters, got {options.optimizers!r}")
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        toy.plot(paths).savefig(out / "toy.png", dpi=110)
        (out / "toy.csv").write_text(toy.to_csv(paths), encoding="utf-8")
        if options.json:
            records.write(options.json, map(toy.as_dict, paths))
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror}); give another folder") from error
    if options.optimizers == ",".join(DEFAULT):
        layered = [name for name, _, target in table.present() if "module" in table.needs(target)]
    console = Console(highlight=False, markup=False)
    console.print(_table(paths, options.evaluations))
    if layered:
        console.print(f"need layers, of which a function of two numbers has none: {', '.join(layered)}")
    console.print(f"{out}: toy.png, toy.csv", soft_wrap=True)


def _target(name: str) -> table.Target:
    """The class of ``adam`` (a file of configs/optimizer) or ``torch:RAdam`` (a class of a package)."""
    package, _, kind = name.partition(":")
    if package in PACKAGES:
        return PACKAGES[package].choose(kind)
    if name not in table.CATALOGUE:
        raise ValueError(f"optimizers: there is no {name!r}{did_you_mean(name, table.CATALOGUE)}")
    for _, _, target in table.present([name]):
        return target
    raise ValueError(f"optimizers: {name} needs a package that is not installed: pip install -r requirements.txt")


def _build(name: str, target: table.Target) -> toy.Build:
    known = inspect.signature(target).parameters
    options = table.CATALOGUE[name].options if name in table.CATALOGUE else {}
    options = options | OPTIONS.get(name, {}) | ({"weight_decay": 0.0} if "weight_decay" in known else {})
    return lambda tensors, lr: partial(target, **options)(tensors, lr=lr)


def _table(paths: Sequence[toy.Path], evaluations: int) -> Table:
    table = Table(title=f"distance to the minimum after {evaluations} evaluations, at the best learning rate")
    table.add_column("optimizer")
    for surface in toy.SURFACES:
        table.add_column(surface.name, justify="right")
        table.add_column("lr", justify="right")
    for name in dict.fromkeys(path.optimizer for path in paths):
        own = [path for path in paths if path.optimizer == name]
        table.add_row(name, *(text for path in own for text in (f"{path.distance:.3g}", f"{path.lr:.2g}")))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("--evaluations", type=int, default=500, help="of the function, for each learning rate")
    parser.add_argument("--optimizers", default=",".join(DEFAULT), help="names, torch:CLASS or pytorch_optimizer:CLASS")
    parser.add_argument("--out", default="toy", help="folder of the results")
    parser.add_argument("--json", type=Path, metavar="FILE", help="of the record (none)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
