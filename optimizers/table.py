"""What there is to choose from: every optimizer with what it needs, keeps and runs on, measured where it can be.

What a class can be asked for (its signature, its coverage of layers, its blocks) is asked, what it does is tried out on
small nets, and only names and papers are written down, in ``CATALOGUE``. Optimizers whose class is not there (a package
is not installed) have no row.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Categorical, CurvatureOptimizer, build_optimizer
from .packaged import DRAWING, EXCEPTIONS, LIMITS, Package

Target = Callable[..., torch.optim.Optimizer]

# What comes before "optimizers." here: nothing in the clone, "curvlab." where that is installed.
_HOME = __name__.partition("optimizers.")[0]


@dataclass(frozen=True)
class Entry:
    """One file of configs/optimizer, as far as nobody can be asked for it.

    Attributes:
        target: dotted path of the callable.
        idea: what the step is made of.
        paper: where it was published.
        options: values of the file that decide what is kept, where they differ from the defaults.
    """

    target: str
    idea: str
    paper: str
    options: dict[str, Any] = field(default_factory=dict)


#: By the name of the file, in the order of the table.
CATALOGUE: dict[str, Entry] = {
    "sgd": Entry("torch.optim.SGD", "momentum", "Polyak 1964", {"momentum": 0.9}),
    "adam": Entry("torch.optim.Adam", "diagonal: squared gradients", "ICLR 2015, 1412.6980"),
    "adamw": Entry("torch.optim.AdamW", "Adam, decay apart", "ICLR 2019, 1711.05101"),
    "adafisher": Entry("optimizers.AdaFisher", "diagonals of K-FAC's factors", "ICLR 2025, 2405.16397"),
    "adafisherw": Entry("optimizers.AdaFisherW", "AdaFisher, decay apart", "ICLR 2025, 2405.16397"),
    "adahessian": Entry("optimizers.AdaHessian", "diagonal of the Hessian", "AAAI 2021, 2006.00719"),
    "kfac": Entry("optimizers.KFAC", "one Kronecker product a layer", "ICML 2015, 1503.05671"),
    "ekfac": Entry("optimizers.EKFAC", "diagonal in K-FAC's eigenbasis", "NeurIPS 2018, 1806.03884"),
    "kpsvd": Entry("optimizers.KPSVD", "the nearest Kronecker product", "2022, 2201.10285"),
    "deflation": Entry("optimizers.Deflation", "the two nearest ones", "2022, 2201.10285"),
    "kfac_corrected": Entry("optimizers.KFACCorrected", "K-FAC's and one for the rest", "2022, 2201.10285"),
    "lanczos": Entry("optimizers.Lanczos", "Deflation by a Lanczos process", "2022, 2201.10285"),
    "twolevel_kfac": Entry("optimizers.TwoLevelKFAC", "K-FAC and a coarse space over layers", "2023, 2303.18083"),
    "exact_ng": Entry(
        "optimizers.ExactNaturalGradient",
        "the batch's Fisher matrix itself",
        "Amari 1998; Ren & Goldfarb 2019, 1906.02353",
    ),
    "fishleg": Entry("optimizers.FishLeg", "a learned inverse Fisher a layer", "ICLR 2023"),
    "shampoo": Entry("optimizers.shampoo.shampoo", "a matrix a dimension; Adam's length", "ICML 2018, 1802.09568"),
    "soap": Entry("pytorch_optimizer.SOAP", "Adam in Shampoo's eigenbasis", "ICLR 2025, 2409.11321"),
    "lamb": Entry("pytorch_optimizer.Lamb", "Adam, steps as long as weights allow", "ICLR 2020, 1904.00962"),
    "lion": Entry("pytorch_optimizer.Lion", "sign of an average", "NeurIPS 2023, 2302.06675"),
    "muon": Entry("optimizers.packaged.muon", "orthogonalized momentum; AdamW for the rest", "Jordan et al. 2024"),
    "torch": Entry("optimizers.packaged.torch_optim", "any of torch.optim, by name", ""),
    "pytorch_optimizer": Entry("optimizers.packaged.pytorch_optimizer", "any of the package, by name", ""),
}


@dataclass(frozen=True)
class Row:
    """A line of the table; an entry that does not apply is empty.

    Attributes:
        name: of the file in configs/optimizer.
        kind: the class.
        idea: what the step is made of.
        paper: where it was published.
        needs: what it takes beyond gradients: the whole module, outputs, a graph, an auxiliary pass.
        state: bytes of optimizer state a parameter.
        layers: those with curvature; "any" where layers do not matter.
        numbers: the formats it trains in.
        ranks: how processes that train together come to the same step.
    """

    name: str
    kind: str
    idea: str
    paper: str
    needs: str
    state: str
    layers: str
    numbers: str
    ranks: str


#: Titles of the columns.
TITLES = Row("optimizer=", "class", "step", "paper", "needs", "state B/param", "layers", "numbers", "ranks")

NUMBERS: dict[str, dict[str, Any]] = {
    "fp32": {}, "fp64": {"dtype": torch.float64}, "bf16": {"dtype": torch.bfloat16}, "autocast": {"autocast": True},
}  # fmt: skip

#: What the columns mean, below the table.
NOTES = (
    "needs: the whole module, the model's outputs, a graph through gradients (no compile), an auxiliary pass.",
    "state: measured after two float32 steps on a 784-400-200-100 net.",
    "layers: all = Linear, Conv1d, Conv2d, ConvTranspose2d, MultiheadAttention, norms, Embedding; for what else there "
    "is, Adam's step.",
    "numbers: all = weights in fp32, fp64 and bf16, and fp32 weights under bf16 autocast; tried out.",
    "ranks: whether curvature is averaged over processes or its statistics gathered, or made of averaged gradients.",
)


def present(names: list[str] | None = None) -> Iterator[tuple[str, Entry, Target]]:
    """The entries whose class is there.

    Args:
        names: those asked for; default all.
    """
    for name in CATALOGUE if names is None else names:
        target_name = CATALOGUE[name].target
        ours = target_name.startswith("optimizers.")
        module, _, attribute = f"{_HOME if ours else ''}{target_name}".rpartition(".")
        try:
            target = getattr(importlib.import_module(module), attribute, None)
        except ImportError:
            continue
        if target is not None and not (isinstance(target, Package) and not target.installed()):
            yield name, CATALOGUE[name], target


def rows(names: list[str] | None = None) -> list[Row]:
    """The table. Takes seconds: the optimizers are run.

    Args:
        names: of the rows; default all.
    """
    return [_row(name, entry, target) for name, entry, target in present(names)]


def limits() -> list[str]:
    """A line for each reason why a class of a package cannot be asked for by its name."""
    found: dict[str, list[str]] = {}
    packages = [target for _, _, target in present() if isinstance(target, Package)]
    known = {name for package in packages for name in package.classes()}
    for reason, names in LIMITS.items():
        if there := [name for name in names if name in known]:
            found[reason] = there
    lines = [f"{', '.join(names)}: {reason}" for reason, names in found.items()]
    drawing = [name for name in DRAWING if name in known]
    return lines + ([f"{', '.join(drawing)}: alone in one process, for each would draw other numbers"] * bool(drawing))


def text(table: list[Row]) -> str:
    """The table in columns.

    Args:
        table: what ``rows`` returned.
    """
    cells = [_cells(row) for row in (TITLES, *table)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    exceptions = [f"{name}, {point}: {reason}" for (name, point), reason in EXCEPTIONS.items()]
    listed = {"Not met:": exceptions, "Not by name:": limits()}
    return "\n".join([*lines, "", *NOTES, *(f"\n{title}\n  " + "\n  ".join(some) for title, some in listed.items())])


def markdown(table: list[Row]) -> str:
    """The table for a README.

    Args:
        table: what ``rows`` returned.
    """
    cells = [_cells(row) for row in table]
    marked = [[f"`{line[0]}`", f"`{line[1]}`" if line[1] else "", *line[2:]] for line in cells]
    titles = [f"`{TITLES.name}`", *_cells(TITLES)[1:]]
    rule = ["---:" if title == TITLES.state else "---" for title in titles]
    lines = [f"| {' | '.join(line)} |" for line in (titles, rule, *marked)]
    exceptions = "; ".join(f"`{name}` ({point}) {reason}" for (name, point), reason in EXCEPTIONS.items())
    return "\n".join([*lines, "", " ".join(NOTES), f"Not met: {exceptions}."])


def _cells(row: Row) -> list[str]:
    return [getattr(row, f.name) for f in fields(Row)]


def _row(name: str, entry: Entry, target: Target) -> Row:
    kind = getattr(target, "__name__", "")
    if isinstance(target, Package):
        return Row(name, "", entry.idea, "", "", "", "any", "", "by gradients")
    ranks = "by gradients"
    optimizer, _ = _trained(target, entry.options, _small_net, _images)
    if isinstance(optimizer, CurvatureOptimizer):
        blocks = optimizer.blocks.values()
        ranks = "gathered" if any(getattr(block, "gathers", False) for block in blocks) else "averaged"
    numbers = [label for label, setting in NUMBERS.items() if _runs(target, entry.options, setting)]
    return Row(
        name, kind, entry.idea, entry.paper, ", ".join(needs(target)), measure(target, entry.options),
        _layers(target, entry.options), "all" if len(numbers) == len(NUMBERS) else " ".join(numbers), ranks,
    )  # fmt: skip


def needs(target: Target) -> list[str]:
    """What an optimizer takes beyond gradients, as its signature says.

    Args:
        target: a class, or a function that returns an optimizer.
    """
    parameters = inspect.signature(target).parameters
    asked = {
        "module": next(iter(parameters)) == "model",
        "outputs": "fisher" in parameters,
        "graph": getattr(target, "needs_graph", False),
        "auxiliary pass": any(name.startswith("aux_") for name in parameters),
    }
    return [need for need, is_needed in asked.items() if is_needed]


def measure(target: Target, options: dict[str, Any]) -> str:
    """Bytes of optimizer state a parameter: all tensors of ``state_dict``, after two steps on a net of linear layers.

    Args:
        target: a class, or a function that returns an optimizer.
        options: its hyper-parameters.
    """
    optimizer, model = _trained(target, options, _dense_net, _vectors)
    kept = {(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in _tensors(optimizer.state_dict())}
    return f"{sum(kept.values()) / sum(p.numel() for p in model.parameters()):.1f}"


def _layers(target: Target, options: dict[str, Any]) -> str:
    """The kinds of layers that ``coverage`` says have curvature, of a net with one of each."""
    model = _every_layer()
    optimizer = build_optimizer(target, model, likelihood=Categorical(), **options)
    if not isinstance(optimizer, CurvatureOptimizer) or not (covered := optimizer.coverage().rows):
        return "any"
    bare = {row[0].split(".")[0] for row in covered if row[1].startswith("fallback")}
    optimizer.close()
    kinds = {name: type(module).__name__ for name, module in model.named_children()}
    found = [kind for name, kind in kinds.items() if name not in bare]
    return "all" if len(found) == len(kinds) else ", ".join(found)


def _every_layer() -> nn.Module:
    layers = (
        nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.BatchNorm1d(2),
        nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.RMSNorm(2), nn.Embedding(2, 2),
    )  # fmt: skip
    return nn.Sequential(*layers)


def _dense_net() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 400), nn.Tanh(), nn.Linear(400, 200), nn.Tanh(), nn.Linear(200, 100))


def _vectors(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.rand(32, 784, generator=generator), torch.randint(100, (32,), generator=generator)


def _small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, 4))


def _images(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.rand(8, 1, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)


def _trained(
    target: Target,
    options: dict[str, Any],
    net: Callable[[], nn.Module],
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
) -> tuple[torch.optim.Optimizer, nn.Module]:
    """An optimizer after two steps on a net, and the net."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = net().to(dtype)
    optimizer = build_optimizer(target, model, likelihood=Categorical(), **options)
    for _ in range(2):
        inputs, labels = draw(generator)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = model(inputs.to(dtype))
        loss = F.cross_entropy(outputs.float() if autocast else outputs, labels)
        if isinstance(optimizer, CurvatureOptimizer):
            optimizer.backward(loss, outputs)
        else:
            loss.backward()
        optimizer.step()
    if isinstance(optimizer, CurvatureOptimizer):
        optimizer.close()
    return optimizer, model


def _runs(target: Target, options: dict[str, Any], setting: dict[str, Any]) -> bool:
    """Whether two steps in a number format leave finite weights."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, model = _trained(target, options, _small_net, _images, **setting)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return False
    return all(bool(p.isfinite().all()) for p in model.parameters())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
