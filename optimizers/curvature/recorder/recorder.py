"""What flows through a layer, shown to an observer on the steps that need it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import cast

import torch
from torch import Tensor, nn

from .. import communication, probe
from ..layers import Flow, Layer
from ..probe import Layout
from .hooks import awake, note, set_aside
from .passes import Pass, Record, Root, behind, used
from .reasons import BEHIND, TWICE
from .rows import Rows
from .watcher import Watcher

Observer = Callable[[Flow], None]


class Recorder(Watcher):
    """Shows an observer the input and the output gradient of every layer, by example, as backward passes through it.

    When a pass is recorded, and what of it, ``Watcher`` says.

    The first pass that shows a layer is probed (see ``probe``): which rows belong to which example, and whether they
    reproduce the gradient of the weight. What fails is not shown; ``refused`` says why.

    With ``deferred`` nothing is shown during ``loss.backward()``. Instead ``differentiate`` sends gradients of one's
    own choice through the recorded pass, as often as one likes and before its graph is freed; parameters are not
    reached, so no weight gradient is formed and neither ``.grad`` nor DDP's reducer sees it.

    Use it as a context manager, or call ``close()``: either removes every hook.

    Args:
        root: the whole model.
        layers: the layers to watch.
        due: asked at each forward pass.
        observe: called with the ``Flow`` of a layer in a backward pass, without gradients.
        deferred: wait for ``differentiate``.
        fraction: share of the examples to show, spread evenly over the batch of all ranks together, its first one
            always among them.

    Attributes:
        examples: how many examples were in the passes since the last ``reset``.
        observed: how many of them were shown.
        seen: whether a backward pass with examples came through since then.
        refused: why layers are not shown in this step, by name.
    """

    def __init__(
        self,
        root: nn.Module,
        layers: Sequence[Layer],
        due: Callable[[], bool],
        observe: Observer,
        deferred: bool = False,
        fraction: float = 1.0,
    ) -> None:
        lenient = any(isinstance(m, nn.SyncBatchNorm) for m in root.modules())
        self._rows = Rows(layers, lenient)
        self.fraction = fraction
        self._before: int | None = None
        self._observe = observe
        self._serial = 0
        self.examples = self.observed = 0
        self.seen = False
        super().__init__(root, layers, due, deferred)

    # -- passes --------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget what was counted and recorded: a new step begins."""
        self.examples = self.observed = 0
        self.seen = False
        self.passed_over = False
        self.refused.clear()
        self._unseen.clear()
        self._open.clear()

    def under_way(self) -> list[Pass]:
        """The passes that no backward pass has come through yet."""
        return [now for now in self._open if not now.started]

    def go_on(self, under_way: list[Pass]) -> None:
        """After a reset: go on with passes that were under way before, until there is another."""
        for now in under_way:
            now.waiting = True
        self._open += under_way
        self._unseen.update(layer for now in under_way for layer in now.unseen)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def _probing(self) -> bool:
        return self._rows.probing

    # -- whose gradient is whose ---------------------------------------------------------------------------------------

    def settle(self, outputs: Tensor, keep: bool = False) -> Tensor:
        """Before the backward pass: find the examples of what was recorded since the last one.

        Args:
            outputs: of the model, ``[batch, ..., features]`` (or ``[batch]``), with their graph, which is kept.
            keep: another backward pass will go through the same graph.

        Returns:
            The outputs, ``[examples, ...]``: a view.
        """
        self._before = None
        if not self._open:
            return outputs
        under_way, gone_through = self.under_way(), [before for before in self._open if before.started]
        chosen = under_way if len(self._open) == 1 else used(under_way, outputs)
        now, *others = chosen or gone_through[-1:] or under_way
        for other in others:
            now.merge(other)
        # The others may have backward passes of their own, or none.
        self._open = [p for p in self._open if p is not now and p not in others]
        self._open.append(now)
        now.keep, now.announced, self.told = keep, True, True
        self._find_examples(now, [Root.of(outputs, max(1, outputs.dim() - 1))])
        return self.arrange(outputs)

    def note(self, outputs: Tensor) -> None:
        """Take note of outputs that were made of what the model returned, whose hooks are to be silent as others'."""
        for now in self._open:
            note(now.made, outputs)

    def arrange(self, tensor: Tensor) -> Tensor:
        """A tensor that is like the outputs in its leading dimension, with the examples there: a view."""
        return self._rows.arrange(tensor)

    def expect(self, more: bool) -> None:
        """Say whether another backward pass will go through the same graph."""
        for now in self._open:
            now.keep, now.announced, self.told = more, True, True

    def _find_examples(self, now: Pass, roots: list[Root]) -> None:
        """Set how many examples a pass has, and probe layers that nothing is known of."""
        self._rows.find(now, roots)
        self.seen |= cast("int", now.examples) > 0

    def state(self) -> str:
        """What has been found out of the layers, as text: a run that goes on need not find it out again."""
        return self._rows.state()

    def restore(self, state: str) -> None:
        """Take over what ``state`` returned."""
        self._rows.restore(state)

    def reasons(self) -> dict[str, str]:
        """Layers of this step whose rows are not shown, by name, and why: refused, or never seen."""
        found = dict(self.refused)
        for layer in self._layers:
            if not any(p.requires_grad for p in layer.parameters):
                continue
            if (reason := self._rows.reason(layer)) is not None:
                found[layer.name] = reason
        return found

    @property
    def silent(self) -> bool:
        """Whether no gradient has come yet through some layer that is called."""
        return self._rows.silent

    # -- showing -------------------------------------------------------------------------------------------------------

    def place(self, before: int) -> None:
        """Say how many examples of the batch the lower ranks have; without it, as many as this one has, each."""
        self._before = before

    def choose(self, examples: int) -> Tensor | None:
        """Indices of this rank's examples that are shown, int64; None: all.

        Which they are follows from their places in the batch of all ranks, one behind the other, not from how many
        ranks there are.
        """
        if self.fraction >= 1:
            return None
        before = communication.rank() * examples if self._before is None else self._before
        marks = (torch.arange(before, before + examples + 1, dtype=torch.float64) * self.fraction).ceil()
        return marks.diff().nonzero().flatten()

    def counts(self, counted: Tensor) -> None:
        """Tell which examples of the pass under way count, bool ``[examples]``: the others' gradients are zero."""
        if self._open:
            self._open[-1].counted = counted.cpu()

    def _count(self, now: Pass) -> None:
        if now.serial:
            return
        self._serial += 1
        now.serial = self._serial
        examples = cast("int", now.examples)
        now.chosen = self.choose(examples)
        marks = torch.ones(examples, dtype=torch.bool) if now.counted is None else now.counted
        self.examples += int(marks.sum())
        self.observed += int(marks.sum() if now.chosen is None else marks[now.chosen].sum())

    def arrived(self, now: Pass, record: Record | None, gradient: Tensor) -> None:
        """A gradient has come to what a layer made, or to what the model returned (None)."""
        if now.examples is None:
            here = [] if record is None else [Root(record.edge, gradient, max(1, gradient.dim() - 1))]
            if not (now.outputs or here):
                return
            try:
                self._find_examples(now, now.outputs or here)
            except RuntimeError as error:  # a part of the graph behind another output may be gone already
                if "second time" not in str(error) or not here:
                    raise
                self._find_examples(now, here)
        now.started = True
        now.outputs.clear()
        if record is None:
            return
        layer = record.layer
        if layer in now.unseen and layer not in self._rows.verdicts:
            # A checkpoint computes it anew: a graph of its own.
            recomputed = [other for other in now.records if other in now.unseen and other not in self._rows.verdicts]
            root = Root(record.edge, gradient, max(1, gradient.dim() - 1))
            self._rows.probe(now, recomputed, [root], [(Layout(0, "whole"), cast("int", now.examples))])
        if layer in now.shown:
            self.refused[layer.name] = TWICE
            return
        with torch.no_grad():
            g = record.gradient(gradient)
            record.g = g if record.g is None else record.g + g
        if not (now.keep or layer in now.unseen) and all(r.g is not None for r in now.records[layer]):
            self._show(now, layer)

    def finish(self) -> None:
        """Show what has not been: calls whose outputs were not used, or passes that others were to follow."""
        if not self.deferred:
            for now in self._open:
                self._finish(now)

    def _finish(self, now: Pass) -> None:
        for layer in list(now.records):
            if any(record.g is not None for record in now.records[layer]):
                self._show(now, layer)

    @torch.no_grad()
    def _show(self, now: Pass, layer: Layer, index: int = 0) -> None:
        """Show one layer's records, which have their gradients; those without have zero ones."""
        records = now.records[layer] if self.deferred else now.records.pop(layer)
        now.shown.add(layer)
        layouts = self._rows.layouts(layer, records)
        if layouts is None:
            return
        self._count(now)
        if not now.examples or (now.chosen is not None and not len(now.chosen)):
            return
        calls: list[tuple[Tensor, Tensor]] = []
        for record, layout in zip(records, layouts, strict=True):
            if record.g is not None:
                g = record.g.to(record.dtype)
                calls += probe.arranged(layer, record.input(), g, layout, now.examples) or []
        if now.chosen is not None:
            calls = [(x[now.chosen.to(x.device)], g[now.chosen.to(g.device)]) for x, g in calls]
        if calls:
            self._observe(Flow(layer, calls, (now.serial, index)))

    @property
    def waiting(self) -> bool:
        """Whether a pass was recorded that ``differentiate`` has not been through."""
        return self.deferred and any(now.records or now.unseen for now in self._open)

    @property
    def recording(self) -> bool:
        """Whether a pass was recorded whose layers are shown as its backward pass goes through."""
        return not self.deferred and any(now.records or now.unseen for now in self._open)

    def differentiate(self, outputs: Tensor, gradients: Iterable[Tensor]) -> None:
        """Show the observer what flows back from ``outputs`` in the pass that was settled, and forget it.

        Args:
            outputs: what ``settle`` returned, with its graph, which is kept.
            gradients: by ``outputs``, in their shape, zero for examples that are not chosen; a backward pass each.
        """
        now = self._open[-1]
        hidden = behind(now, [Root.of(outputs, 1)])
        shown = [
            layer
            for layer, records in now.records.items()
            if self._rows.layouts(layer, records) is not None and not any(r.edge.node in hidden for r in records)
        ]
        for layer in now.records.keys() - set(shown):
            if (verdict := self._rows.verdicts.get(layer)) is not None and verdict.reason is None:
                self.refused[layer.name] = BEHIND
        flat = [record for layer in shown for record in now.records[layer]]
        self._count(now)
        quiet = awake(now.made)
        for index, gradient in enumerate(gradients if flat else ()):
            with set_aside(quiet):
                found = torch.autograd.grad(
                    outputs,
                    [record.edge for record in flat],
                    gradient.to(outputs.dtype),
                    retain_graph=True,
                    allow_unused=True,
                )
            for record, g in zip(flat, found, strict=True):
                record.g = None if g is None else record.gradient(g)
            for layer in shown:
                self._show(now, layer, index)
        if not now.keep:
            self._open.pop()
        else:
            now.examples, now.serial = None, 0
