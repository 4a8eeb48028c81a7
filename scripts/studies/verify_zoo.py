"""Every model of configs/model: is what K-FAC and AdaFisher record of each layer right, by ``check_curvature``?

    python scripts/studies/verify_zoo.py --markdown
    python scripts/studies/verify_zoo.py resnet18 gpt1_mini --verbose

A model is built as ``python train.py model=...`` builds it, for small noise images or short random text, four examples.
Each example goes through the model alone, and its gradient is compared with the recorded one, layer by layer. Models
that fit are checked in float64, the others in their own precision. Parameters that start at zero (branches, heads,
biases) get small random values first, so that a gradient comes through every layer. Results are kept in a file as they
come; a second call goes on with what is missing.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

import torch
from rich.console import Console
from torch import Tensor, nn

from analysis import pages
from models import build_model
from optimizers import KFAC, AdaFisher
from optimizers.testing import CurvatureReport, check_curvature
from scripts.studies.families import FREE
from scripts.studies.zoo import ROWS, Row, keep, node
from training import tasks
from training.errors import did_you_mean
from training.loop.rng import seed_everything
from training.settings.schema import build
from training.show import heart

EXAMPLES = 4
CLASSES = 10
LARGEST_DOUBLE = 60_000_000  # parameters, beyond which float64 copies take too much memory
SMALLEST = 1e-12  # of a weight, below which it starts at zero

# Without inverses of wide factors: what is asked is what is recorded, not what is made of it.
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "kfac": partial(KFAC, damping=0.1, fisher="empirical", max_factor_dim=512),
    "adafisher": AdaFisher,
}


@dataclass
class Checked:
    """What came of a model with an optimizer.

    Attributes:
        parameters: of the model.
        dtype: of the check.
        layers: how many have parameters.
        covered: how many of them are under curvature.
        share: of the parameters of layers, those under curvature.
        reproduced: the largest relative error of a layer's summed gradient.
        apart: the same of a single example's.
        wrong: what deviates, by layer.
        others: why layers are not covered, and how many of them.
        notes: how the check was made.
        seconds: that it took.
        failed: why there was none.
    """

    parameters: int = 0
    dtype: str = ""
    layers: int = 0
    covered: int = 0
    share: float = 0.0
    reproduced: float = 0.0
    apart: float | None = None
    wrong: dict[str, str] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    failed: str = ""

    @property
    def verdict(self) -> str:
        """``ok``, or what is not."""
        if self.failed:
            return self.failed
        return "ok" if not self.wrong else f"{len(self.wrong)} deviate ({next(iter(self.wrong))}, ...)"


def facts(row: Row) -> tuple[str, dict[str, Any]]:
    """The task of a model's data set, and what a model may ask of it: small images, short text."""
    if row.data == "WikiText-2":
        words = [f"word{i}" for i in range(200)]
        return "language_modelling", {"vocabulary": len(words), "sequence": 12, "words": words, "level": "word"}
    if row.data.endswith("rebuilt"):
        side, channels = (25, 1) if row.data.startswith("faces") else (28, 1) if "MNIST" in row.data else (32, 3)
        return "reconstruction", {"in_channels": channels, "image_size": side, "likelihood": "bernoulli"}
    side, channels = (28, 1) if row.data == "MNIST" else (32, 3)
    return "classification", {"in_channels": channels, "image_size": side, "num_classes": CLASSES}


def prepared(row: Row) -> tuple[nn.Module, Any, Tensor, Tensor]:
    """Model, likelihood, inputs and targets."""
    task, known = facts(row)
    generator = torch.Generator().manual_seed(0)
    if task == "language_modelling":
        text = torch.randint(known["vocabulary"], (EXAMPLES, known["sequence"] + 1), generator=generator)
        inputs, targets = text[:, :-1], text[:, 1:]
    else:
        side = known["image_size"]
        inputs = torch.rand(EXAMPLES, known["in_channels"], side, side, generator=generator)
        targets = torch.randint(CLASSES, (EXAMPLES,), generator=generator)
        targets = inputs.flatten(1) if task == "reconstruction" else targets
    seed_everything(0)
    chosen = node("model", f"model={row.name}", *row.options)
    model = build(chosen, "model", through=build_model, facts=known).train()
    with torch.no_grad():
        for p in model.parameters():
            if float(p.abs().max()) < SMALLEST:
                p.normal_(0.0, 0.02, generator=generator)
    return model, tasks.build(task, known).likelihood, inputs, targets


def checked(row: Row, optimizer: str) -> tuple[Checked, CurvatureReport | None]:
    """Check one model with one optimizer."""
    start = time.perf_counter()
    try:
        model, likelihood, inputs, targets = prepared(row)
        count = sum(p.numel() for p in model.parameters())
        dtype = torch.float64 if count <= LARGEST_DOUBLE else None
        report = check_curvature(
            model, OPTIMIZERS[optimizer], inputs, likelihood, targets=targets, examples=EXAMPLES, dtype=dtype
        )
    except (ValueError, RuntimeError, AssertionError) as error:
        return Checked(failed=" ".join(str(error).split())), None
    found = summary(report, model)
    found.parameters, found.dtype = count, "float64" if dtype else "float32"
    found.seconds = time.perf_counter() - start
    return found, report


def summary(report: CurvatureReport, model: nn.Module) -> Checked:
    """A report in numbers."""
    own = {name: sum(p.numel() for p in m.parameters(recurse=False)) for name, m in model.named_modules()}
    lines = [line for line in report.layers if line.reason != FREE and own[line.module]]
    covered = [line for line in lines if not line.reason]
    apart = [line.apart for line in covered if line.apart is not None]
    return Checked(
        layers=len(lines),
        covered=len(covered),
        share=sum(own[line.module] for line in covered) / max(sum(own[line.module] for line in lines), 1),
        reproduced=max((line.reproduced or 0.0 for line in covered), default=0.0),
        apart=max(apart) if apart else None,
        wrong={line.module: line.wrong for line in report.wrong},
        others=dict(Counter(line.reason for line in lines if line.reason)),
        notes=list(report.notes),
    )


def markdown(results: dict[str, Checked]) -> str:
    """The table of docs/results/verified.md."""
    head = ["model", "parameters", "in", "optimizer", "layers covered", "parameters of layers", "reproduced to"]
    head += ["told apart to", "verdict", "the rest"]
    lines = []
    for key, it in results.items():
        label, _, optimizer = key.rpartition(" ")
        rest = "; ".join(f"{reason} ({count})" for reason, count in it.others.items())
        apart = "" if it.apart is None else f"{it.apart:.0e}"
        share = f"{int(1000 * it.share) / 10:.1f} %"
        cells = (label, f"{it.parameters:,}", it.dtype, optimizer, f"{it.covered} of {it.layers}", share)
        lines.append([*cells, f"{it.reproduced:.0e}", apart, it.verdict, rest])
    return pages.table(head, lines, left=(0, 2, 3, 8, 9))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 1 if anything deviates or cannot be checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("verified.json"), help="where results are kept (%(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown at the end")
    parser.add_argument("--verbose", action="store_true", help="print each table of layers")
    parser.add_argument("--optimizers", nargs="+", choices=[*OPTIMIZERS], default=[*OPTIMIZERS], help="(all)")
    parser.add_argument("names", nargs="*", help="models of configs/model; none: all but those that play a game")
    options = parser.parse_args(argv)
    known = {row.name for row in ROWS}
    for name in options.names:
        if name not in known:
            sys.stderr.write(f"error: there is no model {name!r}{did_you_mean(name, known)}\n")
            return 1
    console = Console(width=120, highlight=False)
    kept = json.loads(options.json.read_text()) if options.json.exists() else {}
    results = {key: Checked(**value) for key, value in kept.items()}
    for row in (row for row in ROWS if not options.names or row.name in options.names):
        for optimizer in options.optimizers:
            key = f"{row.label} {optimizer}"
            if key not in results or results[key].verdict != "ok":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    results[key], report = checked(row, optimizer)
                keep({name: asdict(value) for name, value in results.items()}, options.json)
                if options.verbose and report is not None:
                    console.print(str(report), markup=False, soft_wrap=True)
                gc.collect()  # of the models that hooks and optimizers refer to in circles
            it = results[key]
            said = f"{it.verdict}, {it.covered} of {it.layers} layers, {it.share:.1%}, {it.seconds:.0f} s"
            console.print(f"{key}: {said}", markup=False)
    if options.markdown:
        print(markdown(results), end="")
    return int(any(it.verdict != "ok" for it in results.values()))


if __name__ == "__main__":
    with heart.working("verifying models"):
        sys.exit(main())
