"""``check_curvature``: is what an optimizer records of each layer of a model right, for this model, loss and data?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...base import CurvatureOptimizer
from ...likelihoods import Likelihood
from ...wrapper import innermost
from ..loop import Maker
from ..recording import PLAIN, Recording, exact, recorded_gradients, records, small_blocks
from .case import Case
from .comparison import Errors, compare, distance, judge_layer
from .report import CurvatureReport, LayerCheck


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
        case = Case(model, loss, outputs, targets, batch_dim, output_dim, dtype)
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
        errors, reached = compare(case, recording, loss_reduction, dense_limit, report.tolerance)
        plain = {key: value for key, value in PLAIN.items() if maker.accepts(key)}
        judge = case.copy()
        stepped = innermost(maker(judge, **given | plain))
        assert isinstance(stepped, CurvatureOptimizer)
        case.settle_modes(judge)
        _step(case, stepped, judge)
        report.layers = _lines(case, recording, stepped, errors, reached, report.tolerance)
    return report


def _step(case: Case, optimizer: CurvatureOptimizer, model: nn.Module) -> None:
    """One training step; what it warns of is in the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.zero_grad()
        outputs = case.run(model, case.inputs)
        optimizer.backward(case.loss(outputs), outputs)
        optimizer.step()


def _lines(
    case: Case,
    recording: Recording,
    stepped: CurvatureOptimizer,
    errors: dict[str, Errors],
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
            judge_layer(line, case, recording, errors.get(name), reached, tolerance)
            if not line.reason:
                line.curvature = methods.get(name, "")
                if name in matrices and line.apart is not None and (rows := errors[name].gradients):
                    line.distance = distance(matrices[name], torch.stack(rows), stepped, name)
                    if exact(stepped, name) and not line.wrong and not line.distance <= tolerance:
                        line.wrong = "the block, which is meant to be exact, is not that of these gradients"
        elif not line.reason:
            continue
        lines.append(line)
    return lines
