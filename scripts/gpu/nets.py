"""The small nets of the checks, their optimizers, and a training step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optimizers
from optimizers import Categorical, CurvatureOptimizer, build_optimizer
from tests import dense
from tests.optimizers.problems import Problem

#: Updates and refreshes fall on different steps, so that inverses are now older than the factors and now not. Sampled
#: curvature of so few examples is noisy: more damping than usual.
KRONECKER: dict[str, Any] = {
    "lr": 0.02, "damping": 0.1, "update_every": 3, "refresh_every": 4, "batch_fraction": 1.0,
}  # fmt: skip

#: Class and options of each optimizer for small nets, by its name in configs/optimizer.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Without L2: the fallback's denominator does not see it, and where the gradient is rounding alone (the bias of
    # attention's keys in nn.MultiheadAttention) the weight then grows without bound, on every device.
    "adafisher": ("AdaFisher", {"lr": 1e-3, "update_every": 3}),
    "adafisherw": ("AdaFisherW", {"lr": 1e-3, "update_every": 3, "weight_decay": 1e-2}),
    "kfac": ("KFAC", KRONECKER | {"weight_decay": 5e-4}),
    "ekfac": ("EKFAC", KRONECKER | {"refresh_every": 6}),
    "kpsvd": ("KPSVD", KRONECKER),
    "deflation": ("Deflation", KRONECKER),
    "kfac_corrected": ("KFACCorrected", KRONECKER),
    "lanczos": ("Lanczos", KRONECKER),
    "twolevel_kfac": ("TwoLevelKFAC", KRONECKER | {"damping": 1.0}),
    "exact_ng": ("ExactNaturalGradient", {"lr": 0.05, "damping": 0.1, "update_every": 2}),
    # A polar factor makes singular values that are rounding alone as large as the others, in so many steps.
    "newton_muon": (
        "NewtonMuon", {"lr": 0.005, "damping": 10.0, "update_every": 3, "refresh_every": 4, "polar_steps": 3}
    ),
    "adahessian": ("AdaHessian", {"lr": 0.05, "hessian_every": 2, "weight_decay": 5e-4}),
    "fishleg": ("FishLeg", {"lr": 0.02, "damping": 0.1, "aux_every": 3, "weight_decay": 5e-4}),
}

#: Those whose Fisher matrix may be the data's or the exact one in place of a sampled one.
FISHERS = tuple(name for name, (_, options) in OPTIMIZERS.items() if name == "exact_ng" or "batch_fraction" in options)

#: How far weights may be apart, in units of the distance that training moved them.
TOLERANCE = {"fp64": 1e-6, "fp32": 2e-3, "bf16": 0.1, "fp16": 0.1}

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

#: What an interval is set to where nothing shall be due.
NEVER = 10**9


class Draws(Categorical):
    """Categorical whose samples are the same on every device and in every precision."""

    def sample(
        self, outputs: Tensor, generator: torch.Generator | None = None, *, rank: int = 0, world_size: int = 1
    ) -> Tensor:
        """See Likelihood; uniform numbers come from a generator of the CPU with the given one's seed."""
        seed = 0 if generator is None else generator.initial_seed()
        uniforms = torch.rand(
            self.noise_shape(outputs), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        return self.quantile(outputs.detach().double(), uniforms.to(outputs.device))


def build(name: str, model: nn.Module, **changes: Any) -> CurvatureOptimizer:
    """An optimizer of the table above for a small net."""
    target, options = OPTIMIZERS[name]
    options = {"likelihood": Categorical()} | options | changes
    if name in ("adafisher", "adafisherw", "adahessian"):
        del options["likelihood"]
    optimizer = build_optimizer(getattr(optimizers, target), model, **options)
    assert isinstance(optimizer, CurvatureOptimizer)
    return optimizer


def prepare(
    problem: Problem, device: torch.device, dtype: torch.dtype = torch.float32, examples: int = 16
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A net and its batch, the same numbers on every device."""
    factory, data = problem
    torch.manual_seed(0)
    model = factory()
    inputs, targets = data(examples)
    inputs = inputs.to(device, dtype) if inputs.is_floating_point() else inputs.to(device)
    return model.to(device, dtype), (inputs, targets.to(device))


def make_scaler(device: torch.device, precision: str) -> Any:
    """A gradient scaler for float16, else None."""
    return torch.amp.GradScaler(device.type, init_scale=2.0**10) if precision == "fp16" else None


def train_step(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    precision: str = "fp32",
    scaler: Any = None,
    micro: int = 1,
) -> Tensor:
    """One training step as a training script writes it. Returns the loss, on the device: nothing waits for it."""
    optimizer.zero_grad()
    losses = []
    kind, mixed = batch[0].device.type, precision in AUTOCAST
    for inputs, targets in zip(batch[0].chunk(micro), batch[1].chunk(micro), strict=True):
        with torch.autocast(kind, dtype=AUTOCAST.get(precision, torch.bfloat16), enabled=mixed):
            outputs = model(inputs)
            loss = F.cross_entropy(outputs.float() if mixed else outputs, targets) / micro
        losses.append(loss.detach())
        scaled = loss if scaler is None else scaler.scale(loss)
        if isinstance(optimizer, CurvatureOptimizer):
            optimizer.backward(scaled, outputs, scale=1.0 if scaler is None else scaler.get_scale())
        else:
            scaled.backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return torch.stack(losses).sum()


def weights(model: nn.Module) -> Tensor:
    """All parameters in one vector, in float64 on the CPU."""
    return dense.flatten([p.detach().cpu().double() for p in model.parameters()])


def apart(found: Tensor, expected: Tensor, start: Tensor) -> float:
    """Distance of two vectors of weights, in units of how far the second has come from the start."""
    return float((found - expected).norm() / (expected - start).norm().clamp(min=1e-300))


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Where two states are not the same bits."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if not torch.equal(a, b):
            far = float((a.double() - b.double()).abs().max()) if a.shape == b.shape else float("nan")
            yield f"{path} by {far:.1e}"
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from differences(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{path}.{index}")
    elif type(a) is not type(b) or a != b:
        yield path


def interval(optimizer: CurvatureOptimizer, update: int, refresh: int) -> None:
    """Set how often curvature is updated and refreshed."""
    optimizer.update_every = update
    if hasattr(optimizer, "refresh_every"):
        optimizer.refresh_every = refresh
