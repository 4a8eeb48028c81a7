"""``check_curvature``: is what an optimizer records of each layer of a model right, for this model, loss and data?"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from ..base import CurvatureOptimizer, unwrap
from ..likelihoods import Likelihood
from ..wrapper import innermost
from .loop import Maker
from .recording import (
    PLAIN,
    Recording,
    exact,
    in_matrix_order,
    recorded_gradients,
    records,
    small_blocks,
)
from .tables import aligned

#: Below this share of a larger one a gradient is rounding, and only its absolute error counts.
NEGLIGIBLE = 1e-6


@dataclass
class LayerCheck:
    """What was found of a layer.

    Attributes:
        module: its name in the model.
        kind: its type.
        curvature: what is kept of it; "" where nothing is.
        reproduced: relative error of the sum over examples against the gradient of its parameters, the worst of them.
        apart: the largest relative error of a single example's gradient.
        distance: of its block from the Fisher block that the examples' gradients make, relative, in the Frobenius norm;
            of a diagonal from the diagonal. Zero for what is kept exactly; an approximation has a distance and that is
            no fault.
        reason: why it has no curvature; "" where it has.
        wrong: what deviates, a sentence; "" where nothing does.
    """

    module: str
    kind: str
    curvature: str = ""
    reproduced: float | None = None
    apart: float | None = None
    distance: float | None = None
    reason: str = ""
    wrong: str = ""


@dataclass
class CurvatureReport:
    """What ``check_curvature`` found; ``str(report)`` is a table, a line a layer.

    Attributes:
        optimizer: its class.
        layers: a line each.
        notes: sentences about how the check was made.
        tolerance: what counts as equal.
        examples: how many were looked at.
    """

    optimizer: str
    layers: list[LayerCheck] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tolerance: float = 0.0
    examples: int = 0

    @property
    def wrong(self) -> list[LayerCheck]:
        """The layers that deviate."""
        return [layer for layer in self.layers if layer.wrong]

    @property
    def ok(self) -> bool:
        """Whether no layer deviates. One that is left without curvature, and said to be, does not."""
        return not self.wrong

    def raise_if_wrong(self) -> None:
        """Raise AssertionError with the table if any layer deviates."""
        if not self.ok:
            names = ", ".join(repr(layer.module) for layer in self.wrong)
            counted = f"{len(self.wrong)} of {len(self.layers)} layers"
            raise AssertionError(f"curvature deviates in {counted}, {names}\n{self}")

    def __str__(self) -> str:
        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:.1e}"

        header = ("module", "kind", "curvature", "reproduced to", "told apart to", "distance", "covered")
        rows = [
            (
                layer.module or "(root)", layer.kind, layer.curvature or "-", number(layer.reproduced),
                number(layer.apart), number(layer.distance),
                f"WRONG: {layer.wrong}" if layer.wrong else f"no: {layer.reason}" if layer.reason else "yes",
            )
            for layer in self.layers
        ]  # fmt: skip
        lines = aligned(header, rows, right=(3, 4, 5)) if rows else []
        lines += [f"note: {note}" for note in self.notes]
        if rows:
            covered = sum(not layer.reason for layer in self.layers)
            verdict = f"{len(self.wrong)} deviate" if self.wrong else "none deviates"
            lines.append(
                f"{self.optimizer}: {covered} of {len(rows)} layers covered, {verdict} by more than "
                f"{self.tolerance:.0e} on {self.examples} examples"
            )
        return "\n".join(lines)


def check_curvature(
    model: nn.Module,
    make_optimizer: Callable[..., Optimizer],
    inputs: Any,
    loss: Callable[..., Tensor] | Likelihood,
    outputs: Callable[[Any], Tensor] | None = None,
    *,
    targets: Any = None,
    batch_dim: int = 0,
    output_dim: int = 0,
    examples: int = 8,
    loss_reduction: Literal["mean", "sum"] = "mean",
    dtype: torch.dtype | None = torch.float64,
    tolerance: float | None = None,
    dense_limit: int = 600,
) -> CurvatureReport:
    """Compare what an optimizer records of each layer with what one backward pass an example gives.

    Every method here is built on the gradients of single examples, and so on knowing which rows of a layer's inputs and
    output gradients belong to which example. Here this is tested on the model itself, whatever its size: each example
    goes through the model alone, and its gradient is compared with the recorded one. For small layers, the block
    (``curvature_matrices()``) is compared with the Fisher block that these gradients make.

    It works on deep copies; the model, its gradients and the random state stay as they are. Batch norms run on their
    running statistics, as batch statistics mix the examples, and dropout is off.

    For example::

        report = check_curvature(model, KFAC, images, Categorical(), targets=labels)
        report.raise_if_wrong()

    Args:
        model: to train.
        make_optimizer: an optimizer class, a ``functools.partial`` of one, or a function
            ``(model, params=None, **overrides)``.
        inputs: of a few examples: a tensor, a tuple (positional arguments) or a dict (keyword arguments), or nested.
        loss: ``loss(outputs, targets)`` to train on, or a likelihood, whose ``nll`` it then is; without targets it may
            take the outputs alone.
        outputs: picks the tensor to train on from what the model returns; None: that itself, its ``logits``, or the
            first of a tuple.
        targets: second argument of the loss.
        batch_dim: dimension of the inputs along which the examples lie. Tensors whose size there is not the number of
            examples are passed whole.
        output_dim: the same of the outputs.
        examples: how many to look at at most, the first ones.
        loss_reduction: how the loss sums over examples; given to the optimizer if it asks for it.
        dtype: to compute in; None: the model's own.
        tolerance: relative error that counts as equal; None: 1e-6 in float64, else 1e-3.
        dense_limit: blocks of layers with more parameters than this are not compared.

    Returns:
        The report.

    Raises:
        ValueError: the outputs do not show the examples, or are others in each pass; the sentence says what to do.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(0)
        case = _Case(model, loss, outputs, targets, batch_dim, output_dim, dtype)
        maker = Maker(make_optimizer, likelihood=loss if isinstance(loss, Likelihood) else None)
        given: dict[str, Any] = {"loss_reduction": loss_reduction} if maker.accepts("loss_reduction") else {}
        twin = case.copy()
        optimizer = innermost(maker(twin, **given))
        name = type(optimizer).__name__
        if not isinstance(optimizer, CurvatureOptimizer) or not optimizer.blocks:
            return CurvatureReport(name, notes=[f"{name} keeps no curvature of layers, so there is nothing to check"])
        count = case.settle(inputs, examples)
        report = CurvatureReport(name, notes=case.notes, examples=count)
        report.tolerance = tolerance or (1e-6 if dtype == torch.float64 else 1e-3)
        if not records(optimizer):
            report.notes.append(f"{name} records nothing in backward passes, so there is nothing to check")
            return report
        case.settle_modes(twin)
        recording = recorded_gradients(optimizer, case.caller(twin), case.loss, case.inputs, case.rolled(), count)
        errors, reached = _compare(case, recording, loss_reduction, dense_limit, report.tolerance)
        plain = {key: value for key, value in PLAIN.items() if maker.accepts(key)}
        judge = case.copy()
        stepped = innermost(maker(judge, **given | plain))
        assert isinstance(stepped, CurvatureOptimizer)
        case.settle_modes(judge)
        _step(case, stepped, judge)
        report.layers = _lines(case, recording, stepped, errors, reached, report.tolerance)
    return report


class _Case:
    """A model with its data and loss, ready to be run on copies."""

    def __init__(
        self, model: nn.Module, loss: Any, pick: Any, targets: Any, batch_dim: int, output_dim: int,
        dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        self._model = unwrap(model)
        self._pick, self._dtype = pick, dtype
        self._batch_dim, self._output_dim = batch_dim, output_dim
        self.notes: list[str] = []
        self.mixed = False
        self._count = 0
        self.inputs: Any = None
        self._quiet = False  # whether all modules but the whole are in evaluation mode
        self.targets = self.cast(targets)
        if isinstance(loss, nn.Module):
            loss = self._to(copy.deepcopy(loss))
        self._loss: Callable[..., Tensor] = loss.nll if isinstance(loss, Likelihood) else loss

    def _to(self, module: nn.Module) -> nn.Module:
        return module if self._dtype is None else module.to(self._dtype)

    def cast(self, values: Any) -> Any:
        """Nested values with floating-point tensors in the dtype of the check, detached."""

        def one(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.detach().to(self._dtype) if self._dtype is not None and x.is_floating_point() else x.detach()

        return tree_map(one, values)

    def copy(self) -> nn.Module:
        """A copy of the model in the dtype of the check, without gradients."""
        twin = self._to(copy.deepcopy(self._model))
        twin.zero_grad()
        twin.train()
        return twin

    def settle_modes(self, twin: nn.Module) -> None:
        """Let nothing mix examples or draw numbers: batch norms and dropout in evaluation mode, or everything."""
        found = set()
        for module in twin.modules():
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
            drop = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
            if module is twin or not (norm or drop or self._quiet):
                continue
            module.training = False
            found |= {"batch norms run on their running statistics"} if norm else set()
            found |= {"dropout is off"} if drop else set()
        for module in twin.modules():
            if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout:
                module.dropout = 0.0
                found.add("dropout is off")
        for said in sorted(found):
            if said not in self.notes:
                self.notes.append(said)

    def run(self, twin: nn.Module, inputs: Any) -> Tensor:
        """The outputs to train on."""
        if isinstance(inputs, Mapping):
            result = twin(**inputs)
        else:
            result = twin(*inputs) if isinstance(inputs, list | tuple) else twin(inputs)
        if self._pick is not None:
            result = self._pick(result)
        elif not isinstance(result, Tensor):
            logits = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
            result = logits if logits is not None else result[0] if isinstance(result, list | tuple) else result
        if not isinstance(result, Tensor):
            raise ValueError(
                f"outputs must be given: the model returns {type(result).__name__}, and outputs=lambda result: ... "
                "picks the tensor to train on"
            )
        return result

    def caller(self, twin: nn.Module) -> Callable[[Any], Tensor]:
        """``run`` of one model."""
        return lambda inputs: self.run(twin, inputs)

    def loss(self, outputs: Tensor) -> Tensor:
        """The scalar to train on."""
        return self._loss(outputs) if self.targets is None else self._loss(outputs, self.targets)

    def settle(self, inputs: Any, limit: int) -> int:
        """Look at the model once: how many examples there are, whether they mix, whether numbers are drawn.

        Returns:
            The number of examples that are looked at.
        """
        self.inputs = self.cast(inputs)
        probe = self.copy()
        self.settle_modes(probe)
        with torch.no_grad():
            outputs = self.run(probe, self.inputs)
        if outputs.dim() <= self._output_dim or outputs.shape[self._output_dim] == 0:
            raise ValueError(
                f"output_dim must be the dimension of the outputs that the examples lie along: they are "
                f"{list(outputs.shape)}"
            )
        self._count = outputs.shape[self._output_dim]
        if self._count > limit:
            self.inputs = self._take(self.inputs, slice(0, limit), self._batch_dim)
            self.targets = self._take(self.targets, slice(0, limit), self._output_dim)
            self._count = limit
        for self._quiet in (False, True):
            twin = self.copy()
            self.settle_modes(twin)
            drawn, self.mixed = self._behaviour(twin)
            if not (drawn or self.mixed):
                break
        if self._quiet:
            self.notes.append("all modules but the model as a whole are in evaluation mode")
        if drawn:
            raise ValueError("model must not draw random numbers in evaluation mode: two passes differ, none compares")
        if self.mixed:
            self.notes.append(
                "an example's outputs depend on the others of its batch, so examples cannot be told apart and the sums "
                "alone are checked (or batch_dim is another one)"
            )
        return self._count

    def _behaviour(self, twin: nn.Module) -> tuple[bool, bool]:
        """Whether two passes differ, and whether an example alone has other outputs than among the others."""
        with torch.no_grad():
            whole, again = self.run(twin, self.inputs), self.run(twin, self.inputs)
            alone = [self.run(twin, self.one(i)) for i in range(self._count)]
        wanted = whole.narrow(self._output_dim, 0, 1).shape
        if alone[0].shape != wanted:
            raise ValueError(
                f"batch_dim must be the dimension of the inputs along which the {self._count} examples lie: outputs of "
                f"one of them are {list(alone[0].shape)} where {list(wanted)} are expected"
            )
        size = float(whole.abs().max()) or 1.0
        limit = (1e-8 if whole.dtype == torch.float64 else 1e-3) * size
        drawn = bool((whole - again).abs().max() > limit)
        return drawn, bool((torch.cat(alone, self._output_dim) - whole).abs().max() > limit)

    def one(self, index: int) -> Any:
        """The inputs of one example."""
        return self._take(self.inputs, slice(index, index + 1), self._batch_dim)

    def rolled(self) -> Any:
        """The inputs with the examples in another order."""

        def roll(x: Any) -> Any:
            return x.roll(1, self._batch_dim) if self._has_examples(x, self._batch_dim) else x

        return tree_map(roll, self.inputs)

    def _has_examples(self, x: Any, dim: int) -> bool:
        return isinstance(x, Tensor) and x.dim() > dim and x.shape[dim] == self._count

    def _take(self, values: Any, part: slice, dim: int) -> Any:
        def cut(x: Any) -> Any:
            return x.narrow(dim, part.start, part.stop - part.start) if self._has_examples(x, dim) else x

        return tree_map(cut, values)

    def references(self, reduction: str) -> Iterator[dict[str, Tensor]]:
        """First the loss's gradient by parameter name, then each example's, alone; nothing but autograd is used."""
        twin = self.copy()
        self.settle_modes(twin)
        # Names of shared parameters, too: a layer may know one by another name.
        named = {n: p for n, p in twin.named_parameters(remove_duplicate=False) if p.requires_grad}

        def gradients(of: Tensor, seed: Tensor | None) -> dict[str, Tensor]:
            if not of.requires_grad:
                return {n: torch.zeros_like(p) for n, p in named.items()}
            found = torch.autograd.grad(of, list(named.values()), seed, allow_unused=True)
            return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}

        outputs = self.run(twin, self.inputs)
        leaf = outputs.detach().requires_grad_()
        (seeds,) = torch.autograd.grad(self.loss(leaf), leaf)
        yield gradients(self.loss(outputs), None)
        del outputs
        seeds = seeds * (self._count if reduction == "mean" else 1)
        for i in range(self._count):
            yield gradients(self.run(twin, self.one(i)), seeds.narrow(self._output_dim, i, 1))


@dataclass
class _Errors:
    """Of a layer: see LayerCheck; and the references by example in the order of its block, of a small one."""

    reproduced: float = 0.0
    apart: float = 0.0
    gradients: list[Tensor] = field(default_factory=list)
    wrong: str = ""


def _compare(
    case: _Case, recording: Recording, reduction: str, dense_limit: int, tolerance: float
) -> tuple[dict[str, _Errors], dict[str, float]]:
    """What was recorded of every layer, against the references; and the norms of the loss's gradients by parameter."""
    references = case.references(reduction)
    total = next(references)
    reached = {key: float(g.norm()) for key, g in total.items()}
    everything = math.hypot(*reached.values())
    errors = {name: _Errors() for name, shown in recording.shown.items() if shown}
    sums: dict[str, Tensor] = {}
    singles: dict[str, list[tuple[float, float]]] = {}  # (error, size) of each example's gradient by parameter
    for i, reference in enumerate(references):
        for name, found in errors.items():
            keys = recording.names(name)
            try:
                gradients = recording.gradients(name, i)
            except (ValueError, RuntimeError, IndexError) as error:
                found.wrong = f"its examples cannot be told apart ({str(error).splitlines()[0]})"
                continue
            for key, value in zip(keys, gradients, strict=True):
                if key in reference:  # the others are frozen
                    sums[key] = sums[key] + value if key in sums else value
                    error_size = float((value - reference[key]).norm())
                    singles.setdefault(key, []).append((error_size, float(reference[key].norm())))
            small = sum(g.numel() for g in gradients) <= dense_limit
            if small and all(key in reference for key in keys):
                found.gradients.append(in_matrix_order(recording.layers[name], [reference[key] for key in keys]))
    unit = recording.examples if reduction == "mean" else 1
    for name, found in errors.items():
        own = [key for key in recording.names(name) if key in singles]
        layer_size = math.hypot(*(reached[key] for key in own)) * unit
        # A share of the layer's gradient that is rounding: of attention's key bias, say, on which nothing depends.
        eps = torch.finfo(recording.layers[name].parameters[0].dtype).eps
        negligible = max(NEGLIGIBLE, 100 * eps / tolerance) * layer_size
        negligible = max(negligible, NEGLIGIBLE**2 * everything * unit)
        for key in own:
            apart = float((sums[key] - total[key] * unit).norm())
            found.reproduced = max(found.reproduced, _relative(apart, max(reached[key] * unit, negligible)))
            # What an example's gradient is small beside the others' of is rounding, too.
            usual = math.hypot(*(size for _, size in singles[key])) / recording.examples**0.5
            floor = max(1e-3 * usual, negligible / recording.examples)
            for apart, size in singles[key]:
                found.apart = max(found.apart, _relative(apart, max(size, floor)))
    return errors, reached


def _relative(error: float, size: float) -> float:
    if error == 0:
        return 0.0
    return error / size if size > 0 and math.isfinite(error) else math.inf


def _step(case: _Case, optimizer: CurvatureOptimizer, model: nn.Module) -> None:
    """One training step; what it warns of is in the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.zero_grad()
        outputs = case.run(model, case.inputs)
        optimizer.backward(case.loss(outputs), outputs)
        optimizer.step()


def _lines(
    case: _Case,
    recording: Recording,
    stepped: CurvatureOptimizer,
    errors: dict[str, _Errors],
    reached: dict[str, float],
    tolerance: float,
) -> list[LayerCheck]:
    """A line a layer, in the order of the model's modules."""
    assert stepped.model is not None
    methods = {("" if row[0] == "(root)" else row[0]): row[1] for row in stepped.coverage().rows}
    reasons: dict[str, dict[str, None]] = {}  # by module, of what has no curvature
    for name, method in methods.items():
        if method.startswith("fallback"):
            module = name if name in stepped.blocks else name.rpartition(".")[0]
            reasons.setdefault(module, {})[method.removeprefix("fallback: ")] = None
    matrices = small_blocks(stepped, [name for name, found in errors.items() if found.gradients])
    lines = []
    for name, module in stepped.model.named_modules():
        line = LayerCheck(name, type(module).__name__, reason="; ".join(reasons.get(name, ())))
        if name in stepped.blocks:
            _judge(line, case, recording, errors.get(name), reached, tolerance)
            if not line.reason:
                line.curvature = methods.get(name, "")
                if name in matrices and line.apart is not None and (rows := errors[name].gradients):
                    line.distance = _distance(matrices[name], torch.stack(rows), stepped, name)
                    if exact(stepped, name) and not line.wrong and not line.distance <= tolerance:
                        line.wrong = "the block, which is meant to be exact, is not that of these gradients"
        elif not line.reason:
            continue
        lines.append(line)
    return lines


def _judge(
    line: LayerCheck,
    case: _Case,
    recording: Recording,
    found: _Errors | None,
    reached: dict[str, float],
    tolerance: float,
) -> None:
    """Say of a layer with a block what was found, and what is wrong with it."""
    own = [reached[key] for key in recording.names(line.module) if key in reached]
    if not own:
        line.reason = line.reason or "frozen"
    elif found is None:
        if any(own) and not line.reason:
            line.wrong = "it has a gradient, and nothing was recorded of it"
        elif not line.reason:
            line.reason = "the loss does not reach it"
    elif not line.reason:
        line.wrong = found.wrong
        if found.wrong:
            return
        line.reproduced = found.reproduced
        line.apart = None if case.mixed else found.apart
        if not found.reproduced <= tolerance:
            line.wrong = "what was recorded does not add up to the gradient of its parameters"
        elif line.apart is not None and not line.apart <= tolerance:
            line.wrong = "it adds up, and gradients of single examples are others'"


def _distance(matrix: Tensor, gradients: Tensor, optimizer: CurvatureOptimizer, name: str) -> float:
    """Of a layer's block from the mean of the gradients' outer products; of a diagonal from the diagonal of that."""
    fisher = gradients.T @ gradients / len(gradients)
    if exact(optimizer, name) == "diagonal" or not bool((matrix - matrix.diagonal().diag()).any()):
        matrix, fisher = matrix.diagonal(), fisher.diagonal()
    return _relative(float((matrix - fisher).norm()), float(fisher.norm()))
