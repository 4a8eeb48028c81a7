"""What a loss's own graph states of the loss: its targets, what it ignores, its class weights and its reduction.

A loss such as ``F.cross_entropy(outputs.flatten(0, 1), targets.flatten())`` keeps what it was computed from for its
backward pass. Read there, padding need not be guessed from gradients that happen to be zero, and a likelihood that
reduces otherwise than the loss is found out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..likelihoods import Bernoulli, Categorical, Likelihood, check_outputs
from .recorder import set_aside

#: A node of the graph, and which of its outputs.
Edge = tuple[Any, int]

Kind = Literal["cross_entropy", "mse", "bernoulli", "probabilities"]
KINDS: dict[str, Kind] = {
    "NllLossBackward0": "cross_entropy",
    "NllLoss2DBackward0": "cross_entropy",
    "MseLossBackward0": "mse",
    "BinaryCrossEntropyWithLogitsBackward0": "bernoulli",
    "BinaryCrossEntropyBackward0": "bernoulli",
}
REDUCTIONS: tuple[Literal["none", "mean", "sum"], ...] = ("none", "mean", "sum")  # at::Reduction, by number
#: What leaves the row-major order of entries as it is.
VIEWS = frozenset({"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"})
COPIES = frozenset({"ToCopyBackward0", "CloneBackward0"})
#: A probe's digits are less than so much: exact in every floating point format that models compute in.
BASE = 128


@dataclass(frozen=True)
class Stated:
    """One of torch's losses in the graph of a loss, as it was called.

    Attributes:
        kind: ``cross_entropy`` (``F.nll_loss`` with it), ``mse``, ``bernoulli``, or ``probabilities``, a binary
            cross-entropy that takes the outputs themselves for probabilities.
        reduction: ``none``, ``mean`` or ``sum``; what is done with a loss that is not reduced is not known.
        targets: of a cross-entropy, class indices by the outputs' leading shape ``[n, ...]``, -100 where the loss
            ignores them or does not look at all (the last position of a shifted sequence); None where it cannot be
            told which output is which. Of the others, the targets as they were given, in the loss's own shape.
        given: the targets as they were given, -100 where a cross-entropy ignores them.
        dim: of a cross-entropy, the outputs' class dimension; None where it cannot be told.
        ignore_index: of a cross-entropy, as it was given.
        weight: class weights of a cross-entropy, or the elementwise weight of a Bernoulli loss; None: none.
        pos_weight: of a Bernoulli loss; None: none.
    """

    kind: Kind
    reduction: Literal["none", "mean", "sum"]
    targets: Tensor | None
    given: Tensor
    dim: int | None = None
    ignore_index: int | None = None
    weight: Tensor | None = None
    pos_weight: Tensor | None = None


def stated(loss: Tensor, outputs: Tensor, *, nodes: int = 1000) -> list[Stated]:
    """Torch's losses of these outputs in a loss's graph, the nearest to the loss first; empty where there is none.

    The graph is walked from the loss to the outputs and never beyond them, and is left as it is. A loss counts only if
    the outputs are behind it. Targets are as late as the graph: call this before ``loss.backward()``.

    Args:
        loss: the scalar, or what it is to be reduced from.
        outputs: the model's outputs that it was computed from; ``[classes]`` are one observation, ``[1]``.
        nodes: at most so many are looked at; the model's own come last.

    Raises:
        RuntimeError: the graph was freed already.
    """
    if not outputs.requires_grad or not loss.requires_grad:
        return []
    end = _edge(outputs)
    found = []
    for node, _ in _walk(_edge(loss), end, nodes):
        kind = KINDS.get(node.name())
        if kind is not None and _reaches(node.next_functions[0], end, nodes):
            found.append(_read(node, kind, outputs, end, nodes))
    return found


def targets_of(likelihood: Likelihood, loss: Tensor, outputs: Tensor) -> Tensor | None:
    """Targets that a loss states, as the likelihood takes them with these outputs; None where it states none.

    Args:
        likelihood: what the loss is taken for.
        loss: the scalar, with its graph.
        outputs: the model's outputs that it was computed from.

    Raises:
        TypeError: outputs are not one tensor.
        ValueError: outputs are a single number, or the loss has its classes in another dimension than the likelihood.
    """
    check_outputs(outputs)
    for found in stated(loss, outputs):
        if isinstance(likelihood, Categorical) and found.kind == "cross_entropy" and found.targets is not None:
            targets = found.targets.masked_fill(found.targets == -100, likelihood.ignore_index)
            targets = targets[0] if outputs.dim() == 1 else targets
            # A dimension that was named is the likelihood's, and otherwise the targets' shape may tell it.
            if likelihood.class_dim(outputs, None if likelihood.dim is not None else targets) == found.dim:
                return targets
            raise ValueError(
                f"the loss has its classes in dimension {found.dim} of the outputs {list(outputs.shape)}, and the "
                f"likelihood has them in dimension {likelihood.class_dim(outputs)}: use Categorical(dim={found.dim})."
            )
        if isinstance(likelihood, Bernoulli) and found.targets is not None and found.kind == "bernoulli":
            return found.targets if found.targets.shape == outputs.shape else None
    return None


def _edge(tensor: Tensor) -> Edge:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _walk(start: Edge, end: Edge, nodes: int) -> Iterator[Edge]:
    """Edges from a node on, breadth first, each node once; not beyond ``end``."""
    queue, seen = [start], {start[0]}
    for node, number in queue:
        yield node, number
        if node is end[0]:
            continue
        for following, index in node.next_functions:
            if following is not None and len(seen) < nodes and following not in seen:
                seen.add(following)
                queue.append((following, index))


def _reaches(start: Edge, end: Edge, nodes: int) -> bool:
    """Whether the outputs are behind an edge. Other outputs of the node that made them are not they."""
    queue, seen = [start], {start}
    for node, number in queue:
        if node is end[0]:
            if number == end[1]:
                return True
            continue
        for edge in node.next_functions:
            if edge[0] is not None and len(seen) < nodes and edge not in seen:
                seen.add(edge)
                queue.append(edge)
    return False


def _behind(edge: Edge, names: frozenset[str], end: Edge | None = None) -> Edge:
    """The first edge whose node has none of these names, or ``end``."""
    while edge != end and edge[0] is not None and edge[0].name() in names:
        edge = edge[0].next_functions[0]
    return edge


def _read(node: Any, kind: str, outputs: Tensor, end: Edge, nodes: int) -> Stated:
    reduction = REDUCTIONS[int(node._saved_reduction)]
    target = node._saved_target.detach()
    if kind == "mse":
        return Stated("mse", reduction, target, target)
    weight = node._saved_weight
    if kind == "bernoulli":
        with_logits = hasattr(node, "_saved_pos_weight")
        positive = node._saved_pos_weight if with_logits else None
        bare = not with_logits and _behind(node.next_functions[0], VIEWS | COPIES, end) == end
        named: Kind = "probabilities" if bare else "bernoulli"
        return Stated(named, reduction, target, target, weight=weight, pos_weight=positive)
    ignored = _signed(node._saved_ignore_index)
    target = target.masked_fill(target == ignored, -100)
    dim, placed = _placed(node, target, outputs, end)
    return Stated("cross_entropy", reduction, placed, target, dim=dim, ignore_index=ignored, weight=weight)


def _signed(number: int) -> int:
    """A saved integer: torch hands out the 64 bits of a negative one as those of an unsigned one."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _placed_by_shape(target: Tensor, outputs: Tensor, seen: torch.Size) -> tuple[int | None, Tensor | None]:
    """``_placed`` of outputs that the loss saw as they are but for views, in a shape ``[rows, classes, ...]``."""
    dim = 1 if len(seen) > 2 else outputs.dim() - 1
    leading = (*outputs.shape[:dim], *outputs.shape[dim + 1 :])
    classes = seen[min(1, len(seen) - 1)] if seen else 0
    if outputs.dim() <= dim or outputs.shape[dim] != classes or target.numel() != torch.Size(leading).numel():
        return None, None
    return dim, target.reshape(leading or (1,))


def _placed(node: Any, target: Tensor, outputs: Tensor, end: Edge) -> tuple[int | None, Tensor | None]:
    """The class dimension of the outputs, and the targets by their leading shape; None for what cannot be told.

    Between the outputs and the logits that the loss saw lie views, copies and selections, whose backward pass carries
    numbers from logits to outputs: it is asked where each logit comes from. Whatever computes (a temperature, a soft
    cap) shows, because a one does not come back as a one; then the outputs are not the logits.
    """
    softmax, number = _behind(node.next_functions[0], VIEWS | COPIES, end)
    if (softmax, number) == end:  # the outputs are logarithms of probabilities, whose logits are they themselves
        return _placed_by_shape(target, outputs, node._saved_self.shape)
    softmax, _ = _behind(node.next_functions[0], VIEWS)
    if softmax.name() != "LogSoftmaxBackward0":
        return None, None
    shape, start = softmax._saved_result.shape, softmax.next_functions[0]
    at = _signed(softmax._saved_dim) % max(len(shape), 1)
    classes = shape[at]
    leading = (*shape[:at], *shape[at + 1 :])
    if target.numel() != torch.Size(leading).numel() or classes < 2 or not outputs.numel():
        return None, None
    target = target.reshape(leading)
    if start == end:
        return at, target.unsqueeze(0) if outputs.dim() == 1 else target
    if _behind(start, VIEWS | COPIES, end) == end and at == len(shape) - 1 and classes == outputs.shape[-1]:
        return outputs.dim() - 1, target.reshape(outputs.shape[:-1] or (1,))

    def back(values: Tensor) -> Tensor:
        """Numbers by logit, sent back to the outputs."""
        sent = values.to(softmax._saved_result.dtype).expand(shape).contiguous()
        edge = GradientEdge(*start)
        with set_aside([outputs]):
            (got,) = torch.autograd.grad([edge], [outputs], [sent], retain_graph=True)
        return got

    ones = back(torch.ones((), device=target.device))
    if not bool(((ones == 0) | (ones == 1)).all()):
        return None, None
    numbers = (torch.arange(classes, device=target.device) % BASE).view(-1, *[1] * (len(shape) - 1 - at))
    order = back(numbers)
    for dim in (d for d in range(outputs.dim()) if outputs.shape[d] == classes):
        seen = ones.movedim(dim, -1)
        if not (seen == seen[..., :1]).all():
            continue
        expected = numbers.flatten() * seen
        if (order.movedim(dim, -1) == expected).all():
            looked = seen[..., 0] > 0
            placed = torch.zeros(looked.shape, dtype=torch.long, device=outputs.device)
            digits, place = (target.clamp(min=-1) + 1), 1
            while place <= classes:
                sent = (digits // place % BASE).unsqueeze(at)
                placed += back(sent).movedim(dim, -1)[..., 0].long() * place
                place *= BASE
            placed = torch.where(looked & (placed > 0), placed - 1, -100)
            return dim, placed.unsqueeze(0) if outputs.dim() == 1 else placed
    return None, None
