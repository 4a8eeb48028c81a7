"""Optimizers of other packages, for the same loop: any class by its name, and Muon with its rule for what is no matrix.

Nothing of a package is copied or changed. A package is imported when one of its optimizers is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .base import Params, unwrap
from .checks import check_range
from .curvature import communication
from .curvature.layers import AffineLayer, adapt

#: Classes that cannot train or cannot resume in a loop of forward, backward and step, by the reason.
LIMITS: dict[str, tuple[str, ...]] = {
    "calls the model itself, through a closure": ("AliG", "BSAM", "LBFGS"),
    "takes sparse gradients alone": ("SparseAdam",),
    "takes matrices alone, or groups marked as such: optimizer=muon says what becomes of the rest": (
        "AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon", "SpectralSphere",
    ),
    "wraps another optimizer or its gradients": (
        "FriendlySAM", "GSAM", "LookSAM", "Lookahead", "OrthoGrad", "PCGrad", "SAM", "SafeFP16Optimizer",
        "ScheduleFreeWrapper", "TRAC", "WSAM",
    ),
    "takes the model in place of its parameters": ("AdaLOMO", "AdamMini", "LOMO"),
    # Their estimate is taken in step() from gradients that keep their graph: a cycle of references a step, a gradient
    # scaler's factor inside the Hessian, and probes that differ between ranks and are not averaged.
    "needs gradients with a graph, which only optimizer=adahessian asks for safely": ("AdaHessian", "SophiaH"),
    "keeps objects in its state, which no checkpoint of plain tensors can hold": (
        "AdaShift", "Conda", "SCION", "SCIONLight", "ScalableShampoo",
    ),
    "evaluates other weights than it trains, and has to be told when": (
        "SPlus", "ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD",
    ),
    "needs the package einops": ("DeMo",),
    "does not heed its learning rate": ("A2Grad",),
}  # fmt: skip

#: Options without which a class steps by a rate of its own, whatever ``lr`` and its schedule say.
HEEDING: dict[str, dict[str, Any]] = {"AdaFactor": {"relative_step": False}}

#: Classes that draw from the global random generator, which differs between processes: their copies would part ways.
DRAWING = ("DASH", "Gravity", "Kron", "Magma")

#: What every optimizer here can do (``optimizers.testing``) and these cannot, by (configuration or class, point).
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("muon", "groups"): "sorts the parameters into groups itself, so it takes none",
    ("soap", "micro-batches"): "rounding turns the null space of its matrices, and what later comes there differs",
    ("soap", "ranks"): "for the same reason",
    ("soap", "tensor lr"): "changes the tensor in place",
    ("lion", "NaN"): "takes the sign of NaN for zero, and stays where it is",
    ("adan", "maximize"): "compares with a gradient from before it was negated",
    ("pytorch_optimizer", "copies"): "copies of an optimizer lack the attributes that torch does not know of",
}


class Package:
    """The optimizers of a package by their class names: ``torch_optim(params, name="RAdam", lr=1e-3)``.

    Args:
        module: dotted name of the module that holds the classes.
    """

    def __init__(self, module: str) -> None:
        self.module = module

    def __str__(self) -> str:
        return self.module

    def names(self) -> list[str]:
        """The classes that can be asked for."""
        limited = {name for names in LIMITS.values() for name in names}
        return sorted(set(self.classes()) - limited)

    def choose(self, name: str) -> Callable[..., Optimizer]:
        """The class of a name.

        Raises:
            ValueError: there is none, or it cannot do its work in this loop.
        """
        if (found := self.classes().get(name)) is None:
            lower = {known.lower(): known for known in self.names()}
            close = difflib.get_close_matches(name.lower(), list(lower), n=1)
            hint = f" (did you mean {lower[close[0]]!r}?)" if close else ""
            raise ValueError(f"name must be an optimizer of {self.module}, got {name!r}{hint}")
        for reason, names in LIMITS.items():
            if name in names:
                raise ValueError(f"name must not be {name}, which {reason}")
        if name in DRAWING and communication.world_size() > 1:
            raise ValueError(f"name must not be {name} in several processes, which would each draw other numbers")
        return found

    def __call__(self, params: Params, *, name: str, lr: float = 1e-3, **options: Any) -> Optimizer:
        """Build an optimizer.

        Args:
            params: parameters or groups.
            name: of its class.
            lr: learning rate.
            options: what else the class takes; where it would not heed ``lr`` by default, it does here (``HEEDING``).

        Raises:
            ValueError: for a name that ``choose`` refuses, or a value that the class refuses.
        """
        return self.choose(name)(params, lr=lr, **HEEDING.get(name, {}) | options)

    def installed(self) -> bool:
        """Whether the package is there."""
        return importlib.util.find_spec(self.module) is not None

    def classes(self) -> dict[str, type[Optimizer]]:
        """All its optimizers, those with limits too.

        Raises:
            ValueError: the package is not installed.
        """
        try:
            module = importlib.import_module(self.module)
        except ImportError as error:
            raise ValueError(f"name: {self.module} is not installed ({error}): pip install {self.module}") from error
        found = {name: value for name, value in vars(module).items() if isinstance(value, type)}
        return {n: c for n, c in found.items() if issubclass(c, Optimizer) and c is not Optimizer}


torch_optim = Package("torch.optim")
pytorch_optimizer = Package("pytorch_optimizer")


def muon(
    model: nn.Module,
    *,
    lr: float = 2e-2,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    ns_steps: int = 5,
    adamw_lr: float = 3e-4,
    adamw_betas: tuple[float, float] = (0.9, 0.95),
    adamw_weight_decay: float = 0.0,
) -> Optimizer:
    """Muon for the hidden weights of a model and AdamW for the rest, in one optimizer (pytorch_optimizer's).

    Hidden are the weights of linear layers and convolutions (as matrices ``[d_out, rest]``), except those of the last
    such layer, whose outputs are the model's, and those that a layer shares with another.

    Args:
        model: the whole module.
        lr: learning rate of the hidden weights.
        momentum: decay of their gradient's average.
        nesterov: look ahead along it.
        weight_decay: decoupled, of the hidden weights.
        ns_steps: Newton-Schulz iterations that orthogonalize a step.
        adamw_lr: learning rate of the other parameters; schedules scale both.
        adamw_betas: decay of their first and second moment.
        adamw_weight_decay: decoupled, of the other parameters.

    Raises:
        ValueError: for a value out of its range.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        check_range(name, value, 0)
    check_range("momentum", momentum, 0, 1, open_high=True)
    check_range("ns_steps", ns_steps, 1)
    check_range("adamw_lr", adamw_lr, 0)
    for i, beta in enumerate(adamw_betas):
        check_range(f"adamw_betas[{i}]", beta, 0, 1, open_high=True)
    check_range("adamw_weight_decay", adamw_weight_decay, 0)
    hidden = hidden_weights(model)
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    groups: list[dict[str, Any]] = [
        {"params": hidden, "use_muon": True, "lr": lr, "weight_decay": weight_decay, "momentum": momentum,
         "nesterov": nesterov, "ns_steps": ns_steps},
        {"params": rest, "use_muon": False, "lr": adamw_lr, "weight_decay": adamw_weight_decay,
         "betas": tuple(adamw_betas)},
    ]  # fmt: skip
    return importlib.import_module("pytorch_optimizer").Muon([group for group in groups if group["params"]])


def hidden_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights of linear layers and convolutions but the last, none of them shared between layers."""
    model = unwrap(model)
    # What attention packs into one matrix is three, each with directions of its own: not one to orthogonalize.
    whole = [(name, module) for name, module in model.named_modules() if not isinstance(module, nn.MultiheadAttention)]
    layers = [layer for name, module in whole if isinstance(layer := adapt(name, module), AffineLayer)]
    weights = [layer.parameters[0] for layer in layers[:-1]]
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return [w for w in weights if owners[id(w)] == 1]
