"""Kronecker factors of a run's layers over training: what K-FAC and AdaFisher see of curvature, and what they lose.

    python scripts/factors.py RUN
    python scripts/factors.py RUN --layers 'layer1|fc' --labels empirical --points 8
    python scripts/factors.py RUN RUN RUN --layers attention --damping 1e-3 --out attention

A = second moments of a layer's inputs, G = those of its output gradients, on the same training examples at each of the
run's checkpoints (trainer.keep_checkpoints=1000 keeps them all) and light snapshots (callbacks=trajectory). They come
from the optimizers' own engine. Written for each run, into RUN/factors:

    factors.json      all numbers of all layers at all points, with what they mean; factors.md: the main ones
    study.json        those, and what the pictures are drawn from
    over_training     means, directions that count, diagonals' shares, directions above damping, length of a step
    curvature         eigenvalues of G (x) A of all layers beside the damping, at the first and the last point
    spectra           of both factors, a line a point
    heat_maps         of both factors as they change
    gershgorin        discs and bounds, and the eigenvalues in them
    noise             eigenvalues under noise off the diagonal, with its signal-to-noise ratio (arXiv 2405.16397)
    fourier           fields of the factors without and with the strongest noise
    adafisher         the diagonals that AdaFisher keeps, before and after min-max, and what is dropped

and, of several runs, one picture a layer that is pictured, and runs.jsonl with their numbers, into the folder of --out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from analysis import factors
from data import DataError
from scripts import Parser
from training.errors import UserError
from training.runs.folder import atomic_file, file_name, writing
from training.settings.loading import LoadedRun, load_run
from training.settings.own import reachable
from training.show import heart
from training.show.snapshots import NAME, Snapshots, put

#: K-FAC's damping and AdaFisher's Lambda where the run's own optimizer has none.
DAMPING, LOWER = 3e-3, 1e-3


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv`: the arguments, None for those of the process."""
    try:
        with reachable():
            _main(_parser().parse_args(argv))
    except (ValueError, UserError, DataError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _main(options: argparse.Namespace) -> None:
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    studies: list[factors.Study] = []
    for folder in options.runs:
        run = load_run(folder, None, data=options.data, device=options.device, own=options.own)
        name = str(run.config.get("name") or run.name)
        if any(study.name == name for study in studies):  # of a sweep
            name = f"{name} / {run.folder.name}"
        study = _study(run, name, options)
        out = _folder(run.folder / "factors")
        names = factors.save(study, out, options.dpi)
        console.print(_table(study))
        for name, why in study.left_out.items():
            console.print(f"without factors: {name or '(root)'} ({why})", soft_wrap=True)
        console.print(f"{out}: {', '.join(names)}", soft_wrap=True)
        studies.append(study)
    if len(studies) > 1:
        out = _folder(Path(options.out or "factors"))
        names = ["runs.jsonl"]
        with atomic_file(out / names[0]) as file:
            file.write("".join(factors.to_record(study, drawn=False) for study in studies).encode())
        for layer in studies[0].pictured:
            names.append(f"runs_{file_name(layer)}.png")
            factors.save_figure(factors.runs(studies, layer), out / names[-1], options.dpi)
        console.print(f"{out}: {', '.join(names)}", soft_wrap=True)


def _folder(path: Path) -> Path:
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def _study(run: LoadedRun, name: str, options: argparse.Namespace) -> factors.Study:
    """Look at one run's points, with a bar while it takes long."""
    given = run.config["optimizer"]
    damping = _number(options.damping, given.get("damping") if "kl_clip" in given else None, DAMPING)
    lower = _number(options.adafisher_damping, given.get("damping") if "ema" in given else None, LOWER)
    view = factors.View(
        options.labels, options.sharing, options.layers, options.mode, options.max_dim or None, options.seed,
        torch.float32 if options.float32 else torch.float64,
    )  # fmt: skip
    plan = factors.Plan(damping, lower, options.noise, options.seed, options.pictured)
    study = factors.Study(name, view, plan)
    batches = factors.taken(run.data.train.epoch(0), options.examples)
    fit = factors.taken(batches, options.fit) if options.fit else []
    points = _points(run)
    steps = _steps(run, list(points), options)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
    with progress, heart.working(name, bar=True) as work:
        task = progress.add_task(name, total=len(steps))
        for done, step in enumerate(steps):
            work.of(done, len(steps), f"checkpoints, now step {step}")
            points[step]()
            study.look(step, run.model, run.task.likelihood, batches, fit)
            progress.advance(task)
    return study


def _number(asked: float | None, own: object, default: float) -> float:
    if asked is not None:
        return asked
    return float(own) if isinstance(own, int | float) else default


def _points(run: LoadedRun) -> dict[int, Callable[[], object]]:
    """What gives the run's model the weights of a step: none at 0, snapshots, and checkpoints, which are exact."""
    found: dict[int, Callable[[], object]] = {}
    if (run.folder / NAME).exists():
        snapshots = Snapshots(run.folder)

        def restore(index: int) -> None:
            snapshot = snapshots[index]
            put(run.model, snapshot.weights, snapshot.buffers)

        found |= {step: partial(restore, index) for index, step in enumerate(snapshots.steps)}
    found |= {step: partial(run.load, step) for step, _ in run.checkpoints()}
    return {0: lambda: None} | dict(sorted((step, load) for step, load in found.items() if step > 0))


def _steps(run: LoadedRun, there: list[int], options: argparse.Namespace) -> list[int]:
    """The steps to look at; 0 is the untrained model."""
    if options.steps is None:
        return [int(step) for step in factors.spread(list(map(str, there)), options.points)]
    if missing := [step for step in options.steps if step not in there]:
        raise UserError(f"steps: {run.folder} has none of {missing}; there are {', '.join(map(str, there))}")
    return sorted(set(options.steps))


def _table(study: factors.Study) -> Table:
    header, rows = factors.table(study, keys=factors.SHORT)
    table = Table(title=f"after {study.points[-1].step} steps; {study.title}", title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", overflow="fold", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    parser.add_argument("--layers", metavar="REGEX", help="found in the names of the layers to look at (default: all)")
    parser.add_argument(
        "--pictured", type=_count_or_text, default=4, metavar="N|REGEX",
        help="how many layers have pictures of their matrices, spread evenly (4), or what is found in their names",
    )  # fmt: skip
    parser.add_argument("--steps", type=_integers, help="points of training, e.g. 0,10,200; 0 is untrained (all)")
    parser.add_argument("--points", type=_count, default=8, help="at most so many points, spread evenly (8)")
    parser.add_argument(
        "--labels", choices=("sampled", "empirical", "exact"), default="sampled",
        help="output gradients are of labels sampled from the model (default), of the true ones (as AdaFisher's), or "
        "expected over all (a backward pass an output)",
    )  # fmt: skip
    parser.add_argument(
        "--sharing", choices=("expand", "reduce"), default="expand",
        help="positions of a shared weight: examples of their own (default), or averaged and summed first",
    )  # fmt: skip
    parser.add_argument(
        "--mode", choices=("train", "eval"), default="train",
        help="norms and dropout as in training (default) or as in evaluation",
    )  # fmt: skip
    parser.add_argument("--examples", type=_count, default=128, help="of training, the same at each point (128)")
    parser.add_argument(
        "--fit", type=_natural, default=32, help="of them, to compare Fisher blocks with their products (32); 0: not"
    )
    parser.add_argument("--damping", type=float, help=f"of K-FAC, absolute (default: the run's own, or {DAMPING:g})")
    parser.add_argument(
        "--adafisher-damping", type=float, metavar="LAMBDA", help=f"of AdaFisher (the run's own, or {LOWER:g})"
    )
    parser.add_argument(
        "--noise", type=_numbers, default=(0.01, 0.03, 0.1),
        help="standard deviations of noise off the diagonal, in units of its root mean square (0.01,0.03,0.1)",
    )  # fmt: skip
    parser.add_argument(
        "--max-dim", type=_natural, default=2048, help="a wider factor is kept as its diagonal (2048); 0: none is"
    )
    parser.add_argument("--float32", action="store_true", help="compute in single precision (default: double)")
    parser.add_argument("--seed", type=int, default=0, help="of sampled labels, dropout and noise (0)")
    parser.add_argument("--device", default="cpu", help="where models run (cpu)")
    parser.add_argument("--data", help="where the data lies here (default: where it lay, paths.data)")
    parser.add_argument("--own", action="append", default=[], metavar="NAME", help="a callable of yours: mine.Net")
    parser.add_argument("--dpi", type=_count, default=100, help="dots an inch of the pictures (100)")
    parser.add_argument("--out", help="folder of the pictures of several runs (factors)")
    return parser


def _count(text: str) -> int:
    if (value := _natural(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _count_or_text(text: str) -> int | str:
    return _count(text) if text.isdigit() else text


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def _integers(text: str) -> list[int]:
    return [_natural(word) for word in text.split(",") if word]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(word) for word in text.split(",") if word)
    except ValueError:
        found = ()
    if not found:
        raise argparse.ArgumentTypeError(f"must be numbers such as 0.01,0.1, got {text!r}")
    return found


if __name__ == "__main__":
    sys.exit(main())
