"""Every family of timm and torchvision with three optimizers: does it build, does every parameter train, under what?

    python scripts/studies/families.py --markdown
    python scripts/studies/families.py lcnet vit_b_32 --optimizers kfac

A family is a source file of its package; the smallest model of it stands for all. It is built as ``model=timm`` and
``model=torchvision`` build it, for images of the smallest side that it takes, and takes two steps with AdaFisher, K-FAC
and AdaHessian on one batch of noise, in float64. ``ok`` means that the loss is finite and that every parameter with a
gradient beyond rounding has moved. Where no gradient came through some layer (behind a weight that starts at zero, or
in front of a softmax over one place), K-FAC takes two more, on larger images if need be. Results are kept in a file as
they come; a second call goes on with what is missing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    import training.missing  # noqa: F401 - first: a package that is not installed is a sentence

import timm
import torch
import torchvision
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from analysis import pages
from models import timm_model, torchvision_model
from optimizers import KFAC, AdaFisher, AdaHessian, Categorical, CurvatureOptimizer
from optimizers.base import Coverage
from optimizers.curvature.probe import DEAD
from scripts.studies.zoo import keep
from training.errors import did_you_mean
from training.show import heart

SIDES = (32, 64, 224, 240, 256)  # of images
CLASSES = 10
LARGEST = 150_000_000  # parameters, beyond which nothing is tried
LARGE = 100  # side of images, beyond which a larger one is not tried for the sake of a layer without gradients
FREE = "free parameter"
FLAT = 1e-12  # of the largest gradient: one that is rounding alone, as of a bias in front of a batch norm

# Wide factors are left to the diagonal: what is asked is what a model's layers do, not what they cost.
OPTIMIZERS: dict[str, Callable[[nn.Module], CurvatureOptimizer]] = {
    "adafisher": lambda model: AdaFisher(model, lr=1e-3),
    "kfac": lambda model: KFAC(model, lr=1e-3, damping=0.1, likelihood=Categorical(), max_factor_dim=512),
    "adahessian": lambda model: AdaHessian(model, lr=0.01),
}


@dataclass
class Family:
    """What came of one.

    Attributes:
        package: timm or torchvision.
        model: the smallest of the family.
        parameters: of that model as its package has it.
        side: of the images; None: it was not built.
        why: it was not built.
        covered: share of the parameters under K-FAC's curvature.
        layers: the same of the parameters of layers; those that belong to none (tokens, tables, scales) do not count.
        others: what the rest is, and how many lines of the coverage table say so.
        verdicts: by optimizer: ``ok``, or what happened.
    """

    package: str
    model: str
    parameters: int
    side: int | None = None
    why: str = ""
    covered: float | None = None
    layers: float | None = None
    others: dict[str, int] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)


def families() -> dict[str, tuple[str, list[str]]]:
    """Package and models by family; torchvision's are called ``torchvision/NAME``."""
    found = {name: ("timm", timm.list_models(module=name)) for name in timm.list_modules()}
    for name in torchvision.models.list_models(module=torchvision.models):
        module = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
        found.setdefault(f"torchvision/{module}", ("torchvision", []))[1].append(name)
    return {name: chosen for name, chosen in found.items() if chosen[1]}


def smallest(package: str, names: Sequence[str]) -> tuple[str, int]:
    """The model of the fewest parameters, and how many."""
    sizes: dict[str, int] = {}
    for name in names:
        if package == "timm":
            with torch.device("meta"):
                sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
        else:
            sizes[name] = next(iter(torchvision.models.get_model_weights(name))).meta["num_params"]
    name = min(sizes, key=lambda name: sizes[name])
    return name, sizes[name]


def examined(package: str, names: Sequence[str], chosen: Sequence[str], found: Family | None = None) -> Family:
    """Build the smallest of some models and train it.

    Args:
        package: timm or torchvision.
        names: of models.
        chosen: the optimizers.
        found: what is known of others.
    """
    found = found or Family(package, *smallest(package, names))
    if found.parameters > LARGEST:
        found.why = f"more than {LARGEST:,} parameters"
        return found
    build = timm_model if package == "timm" else torchvision_model
    left = list(chosen)
    for side in SIDES:
        torch.manual_seed(0)
        try:
            model = build(found.model, in_channels=3, image_size=side, num_classes=CLASSES).double()
        except ValueError as error:
            found.why = "" if found.side else str(error)
            continue
        found.side, found.why = found.side or side, ""
        for name in list(left):
            its = copy.deepcopy(model)
            optimizer = OPTIMIZERS[name](its)
            verdict = trained(its, optimizer, side)
            if name != "kfac":
                left.remove(name)
                found.verdicts[name] = verdict
            elif _looked_at(found, its, optimizer, side, verdict):
                left.remove(name)
            optimizer.close()
        if not left:
            break
    return found


def _looked_at(found: Family, model: nn.Module, optimizer: CurvatureOptimizer, side: int, verdict: str) -> bool:
    """Take down what K-FAC covers, if it is more than is known; whether a larger image would show no more."""
    if verdict == "ok" and DEAD in _reasons(optimizer.coverage()):
        verdict = trained(model, optimizer, side)
    table = optimizer.coverage()
    if found.covered is None or table.fraction > found.covered:
        found.side, found.verdicts["kfac"] = side, verdict
        found.covered, found.layers, found.others = table.fraction, of_layers(table), _reasons(table)
    return verdict != "ok" or DEAD not in found.others or side > LARGE


def of_layers(table: Coverage) -> float:
    """Share of the parameters of layers that are under curvature."""
    counts: Counter[bool] = Counter()
    for _, method, _, parameters, _ in table.rows:
        if method != f"fallback: {FREE}":
            counts[method.startswith("fallback")] += parameters
    return counts[False] / max(counts.total(), 1)


def _reasons(table: Coverage) -> dict[str, int]:
    """Why there is no curvature, and how many lines of the table say so."""
    reasons = (row[1] for row in table.rows if row[1].startswith("fallback: "))
    return dict(Counter(reason.removeprefix("fallback: ") for reason in reasons))


def trained(model: nn.Module, optimizer: CurvatureOptimizer, side: int) -> str:
    """Two steps on four images of noise; the verdict."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, side, side, generator=generator, dtype=torch.float64)
    classes = torch.randint(CLASSES, (4,), generator=generator)
    pulled: set[str] = set()
    moved: set[str] = set()
    for _ in range(2):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer.zero_grad()
        outputs = model(images)
        loss = F.cross_entropy(outputs, classes)
        try:
            optimizer.backward(loss, outputs)
            optimizer.step()
        except RuntimeError as error:
            return str(error).splitlines()[0]
        gradients = {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.grad is not None}
        largest = max(gradients.values())
        pulled |= {name for name, gradient in gradients.items() if gradient > FLAT * largest}
        moved |= {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    if not math.isfinite(loss.item()):
        return "the loss is no longer finite"
    still = pulled - moved
    return "ok" if not still else f"{len(still)} parameters with a gradient stay ({min(still)}, ...)"


def markdown(results: dict[str, Family]) -> str:
    """The table of docs/results/families.md."""
    shown = [name for name in OPTIMIZERS if any(name in it.verdicts for it in results.values())]
    head = ["family", "model", "parameters", "side", *shown, "under curvature", "of layers", "the rest"]
    words = (0, 1, *range(4, 4 + len(shown)), len(head) - 1)
    lines = []
    for name, it in results.items():
        verdicts = [it.verdicts.get(optimizer, "") for optimizer in shown]
        shares = ["" if x is None else f"{math.floor(1000 * x) / 10:.1f} %" for x in (it.covered, it.layers)]
        rest = it.why or ", ".join(f"{reason} ({count})" for reason, count in it.others.items())
        lines.append([name, f"`{it.model}`", f"{it.parameters:,}", it.side or "", *verdicts, *shares, rest])
    return pages.table(head, lines, left=words)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 1 if something that was built does not train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("families.json"), help="where results are kept (%(default)s)")
    parser.add_argument("--optimizers", nargs="+", choices=[*OPTIMIZERS], default=[*OPTIMIZERS], help="(all)")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown at the end")
    parser.add_argument("names", nargs="*", help="families or models; none: all families")
    options = parser.parse_args(argv)
    known = families()
    chosen = {name: known[name] for name in options.names or known if name in known}
    for name in (name for name in options.names if name not in known):
        package = next((package for package, models in known.values() if name in models), None)
        if package is None:
            sys.stderr.write(f"error: there is no family and no model {name!r}{did_you_mean(name, known)}\n")
            return 1
        chosen[name] = package, [name]
    console = Console(width=120, highlight=False)
    kept = json.loads(options.json.read_text()) if options.json.exists() else {}
    results = {name: Family(**kept[name]) for name in dict.fromkeys([*known, *kept]) if name in kept}
    for name, (package, models) in chosen.items():
        before = results.get(name)
        left = [key for key in options.optimizers if before is None or not (before.why or key in before.verdicts)]
        if left:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results[name] = examined(package, models, left, before)
            keep({key: asdict(value) for key, value in results.items()}, options.json)
            gc.collect()  # of the models that hooks and optimizers refer to in circles
        it = results[name]
        console.print(f"{name}: {it.model}, {it.why or ', '.join(map(': '.join, it.verdicts.items()))}", markup=False)
    if options.markdown:
        print(markdown(results), end="")
    return int(any(verdict != "ok" for it in results.values() for verdict in it.verdicts.values()))


if __name__ == "__main__":
    with heart.working("families"):
        sys.exit(main())
