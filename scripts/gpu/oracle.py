"""Curvature and steps on the device are those of the CPU in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.gpu.nets import FISHERS, TOLERANCE, Draws, apart, build, prepare, train_step, weights
from scripts.gpu.running import expect
from tests import dense
from tests.optimizers.problems import PROBLEMS


def check_oracle(name: str, precision: str, fisher: str, device: torch.device, nets: list[str], steps: int) -> str:
    """Curvature and weights after a few steps are those of the CPU in float64."""
    extra: dict[str, Any] = {"fisher": fisher} if name in FISHERS else {}
    if name in FISHERS or name == "fishleg":
        extra["likelihood"] = Draws()
    if name == "fishleg" and precision == "fp32":
        extra["eps"] = 1e-2  # a central difference in float32: rounding, not curvature, at the default
    told, examples = [], 96  # factors of full rank, but the first one of the MLP
    for net in nets:
        model, batch = prepare(PROBLEMS[net], torch.device("cpu"), torch.float64, examples)
        dtype = torch.float64 if precision == "fp64" else torch.float32
        twin, twins = prepare(PROBLEMS[net], device, dtype, examples)
        start, ends, curvatures = weights(model), [], []
        for net_, data in ((model, batch), (twin, twins)):
            optimizer = build(name, net_, **extra)
            for _ in range(steps):
                train_step(optimizer, net_, data)
            ends.append(weights(net_))
            curvatures.append({layer: m.cpu().double() for layer, m in optimizer.curvature_matrices().items()})
        # Moments in a basis of nearly equal eigenvalues move with the basis, and that with rounding.
        limit = TOLERANCE[precision] * (10 if name == "ekfac" else 1)
        expect(curvatures[0].keys() == curvatures[1].keys(), f"{net}: other layers have curvature")
        gaps = {n: float((curvatures[1][n] - m).norm() / m.norm()) for n, m in curvatures[0].items()}
        worst = max(gaps, key=lambda n: gaps[n], default="")
        far = apart(ends[1], ends[0], start)
        told.append(f"{net} steps {far:.0e} curvature {gaps.get(worst, 0.0):.0e}")
        bad = [f"curvature of {worst} by {gaps[worst]:.1e}"] if gaps.get(worst, 0.0) > limit else []
        bad += [f"steps by {far:.1e}"] if far > limit else []
        expect(not bad, f"{net} ({fisher}): {' and '.join(bad)} apart ({limit:.0e} may be)")
    return ", ".join(told)


class Separable(nn.Module):
    """Logits that are each a function of one weight's own column, so that probes of the Hessian cannot matter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, 5))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, 5]`` to the same."""
        return torch.tanh(self.weight) * x


def check_adahessian_oracle(precision: str, device: torch.device, net: str) -> str:
    """The estimate is ``z * (H z)`` with the dense Hessian, and steps on a diagonal one are those of the CPU."""
    from optimizers.adahessian import hutchinson, rademacher

    dtype = torch.float64 if precision == "fp64" else torch.float32
    model, (inputs, targets) = prepare(PROBLEMS[net], torch.device("cpu"), torch.float64, 24)
    params = list(model.parameters())
    hessian = dense.hessian(F.cross_entropy(model(inputs), targets), list(params))
    twin, (there, labels) = prepare(PROBLEMS[net], device, dtype, 24)
    others = list(twin.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(twin(there), labels), others, create_graph=True)
    probes = dense.flatten([z.cpu().double() for z in rademacher(others, 3)])
    found = hutchinson(gradients, others, 3)
    estimate = dense.flatten(
        [torch.zeros(p.shape).double() if d is None else d.cpu().double() for d, p in zip(found, others, strict=True)]
    )
    expected = probes * (hessian @ probes)
    gap = float((estimate - expected).norm() / expected.norm())
    expect(gap <= TOLERANCE[precision], f"{net}: the estimate is {gap:.1e} from the dense one")
    ends = []
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for place, kind in ((torch.device("cpu"), torch.float64), (device, dtype)):
        small = Separable().to(place, kind)
        start = weights(small)
        optimizer = build("adahessian", small)
        for _ in range(6):
            optimizer.zero_grad()
            outputs = small(x.to(place, kind))
            optimizer.backward((outputs - 1).square().sum(-1).mean(), outputs)
            optimizer.step()
        ends.append(weights(small))
    far = apart(ends[1], ends[0], start)
    expect(far <= TOLERANCE[precision], f"steps on a diagonal Hessian are {far:.1e} of the distance apart")
    return f"{net} estimate {gap:.0e}, steps {far:.0e}"
