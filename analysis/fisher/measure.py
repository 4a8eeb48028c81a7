"""How good each approximation of the Fisher matrix is on one batch: errors of blocks, angles of directions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from analysis.fisher import reading
from analysis.fisher.blocks import ExactBlock
from analysis.fisher.methods import METHODS, OWN, Method, Settings, natural
from optimizers import CurvatureOptimizer, ExactNaturalGradient
from optimizers.curvature.layers import AffineLayer
from optimizers.curvature.samples import Samples
from optimizers.testing.curvature.case import Case
from training import backward

Direction = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """What one method came to, on one layer or, where ``layer`` is empty, on the whole net.

    Errors are relative (see ``blocks.Errors``); what a method has not is NaN.

    Attributes:
        net: where it was measured.
        step: of the training.
        damping: lambda.
        method: its name.
        layer: its name.
        size: parameters that take part.
        shared: positions that share the weight.
        fisher_frobenius: of the approximation of F.
        fisher_operator: likewise, in the operator norm.
        inverse_frobenius: of the damped inverse, against ``(F + lambda I)^-1``.
        inverse_operator: likewise.
        angle_block: degrees between the method's direction and the natural gradient of the exact blocks.
        angle_full: degrees between it and the natural gradient of the whole matrix (for a layer, its part of that).
        decrease_block: share of what the quadratic model with exact blocks can fall along any direction that it falls
            along this one, at the best length; 0 uphill.
        decrease_full: of the model with the whole matrix.
        bound: the larger of the bounds to which the two operator norms are known, relative to themselves.
    """

    net: str
    step: int
    damping: float
    method: str
    layer: str
    size: int
    shared: int
    fisher_frobenius: float = math.nan
    fisher_operator: float = math.nan
    inverse_frobenius: float = math.nan
    inverse_operator: float = math.nan
    angle_block: float = math.nan
    angle_full: float = math.nan
    decrease_block: float = math.nan
    decrease_full: float = math.nan
    bound: float = math.nan


@dataclass
class Problem:
    """A model at some weights, and a batch.

    It is looked at in double precision and as a function of single examples: batch norms run on their running
    statistics, and dropout is off.

    Attributes:
        net: its name in the results.
        step: of its training.
        model: as it is trained; not changed.
        inputs: of the batch.
        targets: of the batch.
        settings: what all methods have in common.
        layers: names of the layers that count; None: all. The whole matrix is then that of these layers.
        own: curvature of the training's own optimizer at this step, of ``state_dict()``: a line of its own.
    """

    net: str
    step: int
    model: nn.Module
    inputs: Any
    targets: Any
    settings: Settings
    layers: Sequence[str] | None = None
    own: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._case = Case(self.model, self.settings.likelihood, None, self.targets, 0, 0, torch.float64)
        self._cast = self._case.cast(self.inputs)

    def twin(self) -> nn.Module:
        """A copy of the model to be stepped on."""
        twin = self._case.copy()
        self._case.settle_modes(twin)
        return twin

    def params(self, model: nn.Module) -> list[nn.Parameter]:
        """Those that count, of a copy.

        Raises:
            ValueError: a layer does not exist, or has none.
        """
        if self.layers is None:
            return [p for p in model.parameters() if p.requires_grad]
        known = dict(model.named_modules())
        found = []
        for name in self.layers:
            own = [p for p in known[name].parameters(recurse=False) if p.requires_grad] if name in known else []
            if not own:
                raise ValueError(f"layers: the model has no layer {name!r} with parameters that are trained")
            found += own
        return found

    def step_on(self, model: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor | None = None) -> None:
        """One step of an optimizer on the batch, or on some of its examples."""
        inputs, targets = self._cast, self._case.targets
        if rows is not None:
            inputs, targets = _taken(inputs, rows), _taken(targets, rows)
        optimizer.zero_grad()
        outputs = self._case.run(model, inputs)
        loss = self.settings.likelihood.nll(outputs, targets)
        backward(optimizer, loss, outputs, targets=targets)
        optimizer.step()

    @property
    def examples(self) -> int:
        """How many there are."""
        return len(self.targets)


@dataclass
class Seen:
    """What is kept of a method: its direction by parameter name, and its curvature as its state has it."""

    direction: Direction
    curvature: Mapping[str, Any] | None


@dataclass
class Exact:
    """What approximations are held against.

    Attributes:
        samples: of which the exact Fisher matrix consists, by layer.
        names: of their parameters, by layer.
        gradient: of the batch.
        full: the natural gradient of the whole matrix.
        block: that of its diagonal blocks.
    """

    samples: dict[str, Samples]
    names: dict[str, list[str]]
    gradient: Direction
    full: Direction
    block: Direction

    def affine(self) -> list[AffineLayer]:
        """The layers that have matrices, in the model's order."""
        return [s.layer for s in self.samples.values() if isinstance(s.layer, AffineLayer)]


def see(problem: Problem, method: Method) -> Seen:
    """Let a method take its step.

    Args:
        problem: where.
        method: which.
    """
    model = problem.twin()
    params = problem.params(model)
    optimizer = method.build(model, params, problem.settings)
    if method.learned:
        _learn(problem, model, optimizer)
    direction = _step(problem, model, optimizer)
    curvature = None
    if isinstance(optimizer, CurvatureOptimizer):
        curvature = copy.copy(optimizer.state_dict()["curvature"])
        optimizer.close()
    return Seen(direction, curvature)


def _step(problem: Problem, model: nn.Module, optimizer: torch.optim.Optimizer) -> Direction:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    problem.step_on(model, optimizer)
    mine = {p for group in optimizer.param_groups for p in group["params"]}
    return {name: before[name] - p.detach() for name, p in model.named_parameters() if p in mine}


def _learn(problem: Problem, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Updates of a learned inverse on random halves of the batch, the model as it is; then no more."""
    generator = torch.Generator().manual_seed(problem.settings.seed)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(problem.settings.updates):
        order = torch.randperm(problem.examples, generator=generator)
        problem.step_on(model, optimizer, order[: max(1, problem.examples // 2)])
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.update_every = 10**12  # type: ignore[attr-defined]


def exact(problem: Problem) -> Exact:
    """The exact Fisher matrix of the batch, and its natural gradients.

    Args:
        problem: where.

    Raises:
        ValueError: no layer has curvature.
    """
    model, whole = problem.twin(), replace(problem.settings, fraction=1.0)
    optimizer = natural(ExactNaturalGradient, model, problem.params(model), whole)
    assert isinstance(optimizer, ExactNaturalGradient)
    full = _step(problem, model, optimizer)
    samples = {name: s for name, s in optimizer.samples.items() if s.factors}
    optimizer.close()
    if not samples:
        raise ValueError(f"{problem.net}: no layer has curvature: {optimizer.coverage()}")
    places = {p: name for name, p in model.named_parameters()}
    names = {name: [places[p] for p in s.layer.parameters] for name, s in samples.items()}
    blocks = problem.twin()
    block = _step(problem, blocks, METHODS["block"].build(blocks, problem.params(blocks), whole))
    gradient = see(problem, METHODS["gradient"]).direction
    return Exact(samples, names, gradient, full, block)


def measure(
    problem: Problem,
    methods: Iterable[Method],
    tolerance: float = 1e-2,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """All methods on one problem: a row a method and affine layer, and one a method for the whole.

    Args:
        problem: where.
        methods: which.
        tolerance: of operator norms, see ``operators.operator_norm``.
        say: told what is under way.

    Raises:
        ValueError: no layer has curvature, or a method's numbers are not finite.
    """
    damping = problem.settings.damping
    say("exact")
    truth = exact(problem)
    has_shared = any(_shared(truth.samples[layer.name]) > 1 for layer in truth.affine())
    chosen = [method for method in methods if has_shared or not method.shared]
    seen = {}
    for method in chosen:
        say(method.label)
        seen[method.name] = see(problem, method)
        if not all(bool(t.isfinite().all()) for t in seen[method.name].direction.values()):
            raise ValueError(f"{problem.net}: {method.label} found no finite direction: give a larger damping")
    rows = []
    for layer in truth.affine():
        say(layer.name)
        block = ExactBlock(truth.samples[layer.name])
        start = (problem.net, problem.step, damping)
        common = (layer.name, block.size, _shared(truth.samples[layer.name]))
        for method in chosen:
            found = seen[method.name]
            row: dict[str, Any] = _alignment(truth, found.direction, [layer.name], damping)
            if found.curvature is not None:
                row |= _errors(block, layer, found.curvature, damping, tolerance)
            rows.append(Row(*start, method.name, *common, **row))
        if problem.own is not None:  # its inverse has another damping
            row = {**_errors(block, layer, {"layers": problem.own["layers"]}, None, tolerance)}
            rows.append(Row(*start, OWN, *common, **row))
    size = sum(truth.gradient[name].numel() for names in truth.names.values() for name in names)
    for method in chosen:
        whole: dict[str, Any] = _alignment(truth, seen[method.name].direction, list(truth.samples), damping)
        rows.append(Row(problem.net, problem.step, damping, method.name, "", size, 0, **whole))
    return rows


def _errors(
    block: ExactBlock, layer: AffineLayer, curvature: Mapping[str, Any], damping: float | None, tolerance: float
) -> dict[str, float]:
    """Of what an optimizer's state keeps of a layer, as entries of a row."""
    found = {"bound": 0.0}
    if (own := reading.approximation(curvature, layer)) is not None:
        errors = block.errors(own, tolerance)
        found |= {"fisher_frobenius": errors.frobenius, "fisher_operator": errors.operator, "bound": errors.bound}
    if damping is not None and (inverted := reading.inverse(curvature, layer, damping)) is not None:
        errors = block.inverse_errors(inverted, damping, tolerance)
        found |= {"inverse_frobenius": errors.frobenius, "inverse_operator": errors.operator}
        found["bound"] = max(found["bound"], errors.bound)
    return found


def _alignment(truth: Exact, direction: Direction, layers: Sequence[str], damping: float) -> dict[str, float]:
    """A direction beside the exact ones, on some layers."""
    d, g, block, full = (
        _flat(entries, truth, layers) for entries in (direction, truth.gradient, truth.block, truth.full)
    )
    seen = {  # Sᵀ d, layer by layer
        key: torch.stack(
            [truth.samples[layer].dots([entries[name] for name in truth.names[layer]]) for layer in layers]
        )
        for key, entries in (("d", direction), ("block", truth.block), ("full", truth.full))
    }

    def share(best: Tensor, coupled: bool) -> float:
        """Of the fall along the best direction."""
        images = seen["d"].sum(0) if coupled else seen["d"]
        slope, curvature = float(g @ d), float(images.square().sum()) + damping * float(d @ d)
        return slope**2 / (curvature * float(g @ best)) if slope > 0 else 0.0

    found = {"angle_block": angle(d, block), "angle_full": angle(d, full), "decrease_block": share(block, False)}
    if len(layers) > 1 or len(truth.samples) == 1:
        found["decrease_full"] = share(full, True)
    return found


def angle(one: Tensor, two: Tensor) -> float:
    """Degrees between two vectors; of small angles as exactly as of large ones.

    Args:
        one: a vector.
        two: another.
    """
    a, b = (v / v.norm().clamp(min=torch.finfo(v.dtype).tiny) for v in (one, two))
    return math.degrees(2 * math.atan2(float((a - b).norm()), float((a + b).norm())))


def _flat(entries: Direction, truth: Exact, layers: Sequence[str]) -> Tensor:
    return torch.cat([entries[name].flatten() for layer in layers for name in truth.names[layer]])


def _shared(samples: Samples) -> int:
    """Positions that share a layer's weight."""
    if "V" in samples.factors:
        return 2
    layer = samples.layer
    assert isinstance(layer, AffineLayer)
    return layer.gradients(samples.factors["g"][:1]).shape[2]


def _taken(values: Any, rows: Tensor) -> Any:
    if isinstance(values, Tensor):
        return values[rows]
    if isinstance(values, Mapping):
        return {key: _taken(value, rows) for key, value in values.items()}
    return type(values)(_taken(value, rows) for value in values) if isinstance(values, list | tuple) else values


def as_dict(row: Row) -> dict[str, Any]:
    """A row by names, NaN as None.

    Args:
        row: one.
    """
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(row).items()}
