"""How good each approximation of the Fisher matrix is: errors of its blocks and inverses, angles of its directions.

    python scripts/fisher_quality.py                                   # four built-in nets, in training
    python scripts/fisher_quality.py --nets mlp,convnet --methods kfac,ekfac,kpsvd,deflation --damping 0.1,0.01,0.001
    python scripts/fisher_quality.py RUN --steps 100,last --layers 'layer1.*conv,fc' --examples 64

Each method is an optimizer of this project, built on the model and shown one batch; what its state holds then is held
against the exact Fisher matrix of that batch, layer by layer and as a whole, in double precision:

- errors: |F - approximation| / |F| and |(F + damping)^-1 - inverse| / |(F + damping)^-1| of each layer's block, in the
  Frobenius norm and in the operator norm;
- angles, in degrees, between the step that it takes and the natural gradient, of exact blocks and of the whole matrix;
- decrease: of what the quadratic model can fall along any direction, the share that it falls along this one.

Batch norms run on their running statistics, dropout is off, and averages over steps, momentum and clips are too. With
--fisher exact, F is the likelihood's own: a pass an output, for up to some dozens of outputs. With sampled, it is that
of one draw of targets an example, the same for all methods. AdaFisher sees the gradients of the data's targets whatever
--fisher says, and FishLeg learns its inverse in --updates updates on halves of the batch.

Writes fisher_quality.jsonl (with which an interrupted call goes on), .csv, .md, and for each net NET_errors.png,
NET_directions.png, of several steps NET_training.png, and with --profile NET_profile.png and, of all, profiles.jsonl.
The same command gives the same numbers.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from analysis import fisher
from analysis.fisher.tables import DIRECTIONS, ERRORS
from data import DataError
from optimizers import Likelihood
from optimizers.curvature.layers import AffineLayer, adapt
from scripts import Parser
from training.errors import UserError, did_you_mean
from training.loop.signals import CTRL_C
from training.runs.folder import atomic_file
from training.runs.record import find
from training.settings.loading import LoadedRun, Weights, load_run
from training.settings.own import reachable
from training.show import heart

#: Of a run, unless others are asked for: examples, damping, FishLeg's updates, and up to how many outputs F is exact.
EXAMPLES, DAMPING, UPDATES, FEW = 64, 1e-2, 200, 20


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. `argv`: the arguments, None for those of the process."""
    try:
        with reachable():
            _main(_parser().parse_args(argv))
    except (ValueError, UserError, DataError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped: what is measured is kept, and the same command goes on from there\n")
        return CTRL_C
    return 0


def _main(options: argparse.Namespace) -> None:
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    methods = [_known(name, fisher.METHODS, "methods") for name in _words(options.methods) or fisher.METHODS]
    dampings = _numbers("damping", options.damping, float)
    out = Path(options.out or options.run or "fisher_quality")
    if options.run:
        find(options.run, asked="")
    settings = {
        "methods": [method.name for method in methods], "layers": options.layers, "fisher": options.fisher,
        "examples": options.examples, "seed": options.seed, "fraction": options.fraction, "updates": options.updates,
        "aux_lr": options.aux_lr, "tolerance": options.tolerance,
    }  # fmt: skip
    results = fisher.Results(out, settings, options.fresh)
    nets = [_known(name, fisher.NETS, "nets") for name in _words(options.nets) or fisher.NETS]
    titles = {net.name: net.title for net in nets}
    plan: dict[tuple[str, float], None] = {}
    last: dict[str, fisher.Problem] = {}
    with _progress() as progress, heart.working("preparing", bar=True) as work:
        task = progress.add_task("")
        for problem in _of_run(options, titles) if options.run else _of_nets(options, nets):
            for damping in dampings or [problem.settings.damping]:
                plan[problem.net, damping] = None
                if problem.net not in last or problem.step >= last[problem.net].step:
                    last[problem.net] = problem
                if results.has(problem.net, problem.step, damping):
                    continue
                began = time.perf_counter()
                lead = f"{problem.net}, step {problem.step}, damping {damping:g}"

                def say(text: str, lead: str = lead) -> None:
                    work.text = f"{lead}: {text}"
                    progress.update(task, description=work.text)

                damped = replace(problem, settings=replace(problem.settings, damping=damping))
                results.add(fisher.measure(damped, methods, options.tolerance, say))
                progress.console.print(f"{lead}: {time.perf_counter() - began:.0f} s")
    written = _write(out, results, list(plan), titles)
    if options.profile:
        written += _profiles(out, last, methods, titles)
    for net, damping in plan:
        console.print(_table(results.of(net, damping), titles.get(net, net)))
    loose = max((row.bound for row in results.rows if row.layer), default=0.0)
    if loose > options.tolerance:
        console.print(
            f"Operator norms of the largest layers are known to {100 * loose:.2g} %: the iteration ended at its limit."
        )
    console.print(f"{out}: {', '.join(written)}", soft_wrap=True)


def _of_nets(options: argparse.Namespace, nets: Sequence[fisher.Net]) -> Iterator[fisher.Problem]:
    """Built-in nets at their steps, each with its own damping."""
    for net in nets:
        steps = _numbers("steps", options.steps, int) or net.steps
        inputs, targets = fisher.batch(net, options.examples or net.examples, options.seed)
        settings = _settings(options, net.likelihood, options.fisher or net.fisher, net.damping, net.updates)
        for step, model in fisher.trained(net, sorted(set(steps)), options.seed):
            layers = _layers(model, options.layers) if options.layers else net.layers
            yield fisher.Problem(net.name, step, model, inputs, targets, settings, layers)


def _of_run(options: argparse.Namespace, titles: dict[str, str]) -> Iterator[fisher.Problem]:
    """A run at its checkpoints, on the first examples that it was trained on."""
    loaded = load_run(options.run, "last", own=options.own)
    likelihood = getattr(loaded.task, "likelihood", None)
    if likelihood is None:
        raise UserError(f"RUN must be of a model with a likelihood; {options.run} trains two players: take another run")
    inputs, targets = _first(loaded, options.examples or EXAMPLES)
    with torch.no_grad():
        outputs = likelihood.observations(loaded.model(inputs[:1]))[0].numel()
    kind = options.fisher or ("exact" if outputs <= FEW else "sampled")
    net = re.sub(r"[^\w.=-]+", "_", loaded.folder.resolve().name)
    titles[net] = loaded.name
    layers = _layers(loaded.model, options.layers) if options.layers else None
    for weights in _weights(options.steps, loaded):
        state = loaded.state(weights)
        step = loaded.load(weights)
        own = state.get("optimizer", {}).get("curvature")
        settings = _settings(options, likelihood, kind, DAMPING)
        yield fisher.Problem(net, step, loaded.model, inputs, targets, settings, layers, own)


def _weights(text: str | None, loaded: LoadedRun) -> list[Weights]:
    """Which checkpoints: by their steps, oldest first, or by ``last`` and ``best``."""
    every: list[Weights] = [step for step, _ in loaded.checkpoints()]
    named = [word for word in _words(text) if word in ("last", "best")]
    steps: list[Weights] = [*_numbers("steps", ",".join(w for w in _words(text) if w not in (*named, "all")), int)]
    if not _words(text) or "all" in _words(text):
        steps = every
    found = [*steps, *named]
    if not found:
        raise UserError(f"steps: {loaded.folder} has no checkpoint; train with trainer.checkpoint_every_epochs=1")
    return found  # type: ignore[return-value]


def _first(loaded: LoadedRun, examples: int) -> tuple[Tensor, Tensor]:
    parts: list[tuple[Tensor, Tensor]] = []
    for batch in loaded.data.train.epoch(0):
        parts.append(batch)
        if sum(len(targets) for _, targets in parts) >= examples:
            break
    inputs, targets = (torch.cat(column)[:examples] for column in zip(*parts, strict=True))
    if len(targets) < examples:
        raise ValueError(f"examples must be at most {len(targets)}, which an epoch of {loaded.folder} has")
    return inputs, targets


def _settings(
    options: argparse.Namespace, likelihood: Likelihood, kind: Any, damping: float, updates: int = UPDATES
) -> fisher.Settings:
    updates = updates if options.updates is None else options.updates
    return fisher.Settings(likelihood, damping, kind, options.seed, options.fraction, updates, options.aux_lr)


def _layers(model: nn.Module, patterns: str) -> list[str]:
    """Affine layers whose names contain a match of one of some patterns."""
    affine = [name for name, module in model.named_modules() if isinstance(adapt(name, module), AffineLayer)]
    try:
        found = [name for name in affine if any(re.search(pattern, name) for pattern in _words(patterns))]
    except re.error as error:
        raise ValueError(f"layers must be regular expressions, got {patterns!r} ({error})") from error
    if not found:
        raise ValueError(f"layers: {patterns!r} is in no name of {', '.join(affine)}")
    return found


def _write(out: Path, results: fisher.Results, plan: Sequence[tuple[str, float]], titles: dict[str, str]) -> list[str]:
    """Tables and pictures; returns the names of the files."""
    rows = [row for net, damping in plan for row in results.of(net, damping)]
    written = [results.path.name]
    texts = {"fisher_quality.csv": fisher.to_csv(rows), "fisher_quality.md": fisher.to_markdown(rows, titles)}
    for name, text in texts.items():
        with atomic_file(out / name) as file:
            file.write(text.encode())
        written.append(name)
    for net, damping in plan:
        several = sum(net == other for other, _ in plan) > 1
        own = results.of(net, damping)
        last = max(row.step for row in own)
        at_last = [row for row in own if row.step == last]
        title = f"{titles.get(net, net)}: step {last}, damping {damping:g}"
        pictures = {"errors": fisher.errors(at_last, title), "directions": fisher.directions(at_last, title)}
        if len({row.step for row in own}) > 1:
            pictures["training"] = fisher.training(own, f"{titles.get(net, net)}: damping {damping:g}")
        for kind, figure in pictures.items():
            written.append(_picture(out, f"{net}_{kind}{f'_{damping:g}' if several else ''}", figure))
    return written


def _profiles(
    out: Path, problems: dict[str, fisher.Problem], methods: Sequence[fisher.Method], titles: dict[str, str]
) -> list[str]:
    """A picture of each net, and a file with what they are drawn from; returns the names of the files."""
    written, lines = ["profiles.jsonl"], []
    for net, problem in problems.items():
        title = f"{titles.get(net, net)}: step {problem.step}, damping {problem.settings.damping:g}"
        found = [one.by_decades() for one in fisher.profiles(problem, methods)]
        lines.append(json.dumps({"net": net, "title": title, "profiles": [asdict(one) for one in found]}) + "\n")
        written.append(_picture(out, f"{net}_profile", fisher.profile(found, title)))
    with atomic_file(out / written[0]) as file:
        file.write("".join(lines).encode())
    return written


def _picture(out: Path, name: str, figure: Figure) -> str:
    """Write a picture in 128 colours, which halves the file; returns its name."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    with atomic_file(out / f"{name}.png") as file:
        Image.open(drawn).convert("RGB").quantize(128).save(file, format="png", optimize=True)
    return f"{name}.png"


def _table(rows: Sequence[fisher.Row], title: str) -> Table:
    last = max(row.step for row in rows)
    at_last = [row for row in rows if row.step == last]
    table = Table(title=f"\n{title}: step {last}, damping {rows[0].damping:g}", title_justify="left")
    table.add_column("method", no_wrap=True)
    for name in (*ERRORS.values(), *DIRECTIONS.values()):
        table.add_column(name, justify="right")
    for line in fisher.summary(at_last):
        table.add_row(*line)
    return table


def _progress() -> Progress:
    console = Console(stderr=True, highlight=False, markup=False)
    return Progress(TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True)


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _numbers(key: str, text: str | None, kind: type) -> list[Any]:
    try:
        found = [kind(word) for word in _words(text)]
    except ValueError:
        example = "0,100,1000" if kind is int else "0.1,0.01"
        raise ValueError(f"{key} must be numbers such as {example}, got {text!r}") from None
    low = 0 if kind is int else 1e-30
    if any(not value >= low for value in found):
        raise ValueError(f"{key} must be {'at least' if kind is int else 'above'} 0, got {text!r}")
    return found


def _known(name: str, known: Any, key: str) -> Any:
    if name not in known:
        raise ValueError(f"{key} has no {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
    return known[name]


def _parser() -> argparse.ArgumentParser:
    nets, methods = ", ".join(fisher.NETS), ", ".join(fisher.METHODS)
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's folder, whose checkpoints are looked at")
    parser.add_argument("--nets", help=f"built-in nets, where no run is given, of {nets} (default: all)")
    parser.add_argument("--methods", help=f"of {methods} (default: all)")
    parser.add_argument(
        "--layers", help="patterns of layers' names; the whole matrix is then theirs alone (default: all layers)"
    )
    parser.add_argument(
        "--steps", help="of the training (default: each net's own); of a run: of its checkpoints, or last, best, all"
    )
    parser.add_argument("--damping", help="one or more, e.g. 0.1,0.01 (default: 0.01, or the net's own)")
    parser.add_argument(
        "--fisher", choices=["exact", "sampled", "empirical"],
        help="what F is made of (default: each net's own; of a run exact up to 20 outputs, else sampled)",
    )  # fmt: skip
    parser.add_argument("--examples", type=int, help="in the batch (default: each net's own; of a run 64)")
    parser.add_argument("--seed", type=int, default=0, help="of training, batch and draws (default: 0)")
    parser.add_argument(
        "--fraction", type=float, default=1.0,
        help="of the batch that approximations are made on; F is the whole batch's (default: 1)",
    )  # fmt: skip
    parser.add_argument("--updates", type=int, help="of FishLeg's inverse (default: each net's own; of a run 200)")
    parser.add_argument("--aux-lr", type=float, default=1e-3, help="FishLeg's rate of learning it (default: 0.001)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-2, help="to which operator norms are worked out (default: 0.01)"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also NET_profile.png: curvature and step by eigenvalue of F, last step"
    )
    parser.add_argument("--out", help="folder of the results (default: the run's, or fisher_quality)")
    parser.add_argument("--own", action="append", default=[], metavar="NAME", help="a callable of yours: mine.Net")
    parser.add_argument("--fresh", action="store_true", help="leave results of an earlier call behind")
    return parser


if __name__ == "__main__":
    sys.exit(main())
