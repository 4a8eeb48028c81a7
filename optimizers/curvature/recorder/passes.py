"""What forward passes leave of layers: records of their calls, in the graph that a backward pass goes through."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ..approximations import statistics_dtype
from ..layers import Layer


@dataclass
class Root:
    """Where seeds are sent from: the place of a tensor in the graph, and what is known of it."""

    edge: GradientEdge
    like: Tensor
    leading: int

    @classmethod
    def of(cls, tensor: Tensor, leading: int) -> Root:
        """Where a tensor is made."""
        return cls(get_gradient_edge(tensor), tensor.detach(), leading)


@dataclass(eq=False)
class Record:
    """A layer's input and the place of its output in the graph, which later in-place operations do not move."""

    layer: Layer
    x: Tensor
    shape: torch.Size  # of the output
    edge: GradientEdge
    rows: tuple[int, int] | None  # of the weight, where a slice of it was used
    g: Tensor | None = None
    prepared: Tensor | None = None

    def gradient(self, g: Tensor) -> Tensor:
        """A gradient by the output, in its shape; of a slice, among zeros for the other rows."""
        g = g.detach().reshape(self.shape)
        if self.rows is None:
            return g
        whole = g.new_zeros(*g.shape[:-1], len(self.layer.parameters[0]))
        whole[..., self.rows[0] : self.rows[1]] = g
        return whole

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's statistics."""
        return statistics_dtype(self.layer.parameters[0])

    def input(self) -> Tensor:
        """The input as the adapter takes it."""
        if self.prepared is None:
            self.prepared = self.layer.prepared(self.x.to(self.dtype) if self.x.is_floating_point() else self.x)
        return self.prepared


@dataclass(eq=False)
class Pass:
    """What forward passes have left that one backward pass goes through."""

    sizes: list[int] = field(default_factory=list)  # of the leading dimensions of what the model was given
    outputs: list[Root] = field(default_factory=list)  # what the model returned
    records: dict[Layer, list[Record]] = field(default_factory=dict)
    unseen: dict[Layer, int] = field(default_factory=dict)  # calls without gradients
    made: list[weakref.ref[Tensor]] = field(default_factory=list)  # what is not a leaf in its graph
    shown: set[Layer] = field(default_factory=set)
    examples: int | None = None
    counted: Tensor | None = None  # which of them count, bool [examples]; None: all
    chosen: Tensor | None = None  # which are shown
    serial: int = 0  # its number, once it is counted
    announced: bool = False  # its backward pass has been told of before
    started: bool = False  # a gradient has arrived
    keep: bool = False  # another backward pass will come
    waiting: bool = False  # gradients were cleared since; what comes next is its backward pass, or it has none

    def merge(self, other: Pass) -> None:
        """Take in what another forward pass has left."""
        self.outputs += other.outputs
        self.made += other.made
        for layer, records in other.records.items():
            self.records.setdefault(layer, []).extend(records)
        for layer, count in other.unseen.items():
            self.unseen[layer] = self.unseen.get(layer, 0) + count


def row_sizes(record: Record) -> tuple[int, ...]:
    """Sizes of a record's leading dimensions."""
    like = torch.empty(record.shape, device="meta")
    return tuple(record.shape[: record.layer.leading(record.x, like)])


def signature_of(records: Sequence[Record]) -> tuple[int, ...]:
    """How many leading dimensions each record has."""
    return tuple(len(row_sizes(record)) for record in records)


def used(passes: list[Pass], outputs: Tensor) -> list[Pass]:
    """The passes that outputs were computed by: others of the model's were for something else.

    Args:
        passes: that no backward pass has come through.
        outputs: with their graph.
    """
    if outputs.grad_fn is None:
        return passes
    nodes = _ancestors([outputs.grad_fn])
    found = []
    for now in passes:
        records = [record for own in now.records.values() for record in own]
        if not records or any(record.edge.node in nodes for record in records):
            found.append(now)
    return found


def behind(now: Pass, roots: Sequence[Root]) -> set[Node]:
    """Nodes that a gradient reaches through a reentrant checkpoint, on one way at least."""
    if all(layer in now.records for layer in now.unseen):
        return set()
    nodes = _ancestors([root.edge.node for root in roots])
    barriers = [node for node in nodes if isinstance(node, BackwardCFunction)]
    return _ancestors([n for node in barriers for n, _ in node.next_functions if n is not None])


def _ancestors(nodes: Iterable[Node]) -> set[Node]:
    """The nodes, and all that a backward pass from them reaches."""
    found, stack = set(nodes), list(nodes)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node not in found:
                found.add(node)
                stack.append(node)
    return found
