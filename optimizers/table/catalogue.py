"""Names and papers of the optimizers there are to choose from, and which of them are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..packaged import Package

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
    "newton_muon": Entry("optimizers.NewtonMuon", "Muon behind K-FAC's factor of the inputs", "Jordan et al. 2024"),
    "torch": Entry("optimizers.packaged.torch_optim", "any of torch.optim, by name", ""),
    "pytorch_optimizer": Entry("optimizers.packaged.pytorch_optimizer", "any of the package, by name", ""),
}


def present(names: list[str] | None = None) -> Iterator[tuple[str, Entry, Target]]:
    """The entries whose class is there.

    Args:
        names: those asked for; default all.

    Yields:
        Name, entry and class.
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
