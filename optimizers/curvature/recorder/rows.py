"""Whose gradient is whose: probes are sent, judged and remembered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .. import probe
from ..layers import Layer
from ..probe import Layout
from .hooks import awake, set_aside
from .look import Look, Verdict, by_example
from .passes import Pass, Record, Root, behind, row_sizes, signature_of
from .reasons import BEHIND

#: How often a layer that no gradient has come through is looked at pass by pass, before the pauses double.
PATIENCE = 6


class Rows:
    """Which rows of which layer belong to which example, found out by probes (see ``probe``) and remembered.

    The first pass that shows a layer is probed: which rows belong to which example, and whether they reproduce the
    gradient of the weight.

    Args:
        layers: that are watched.
        lenient: batch statistics that cannot be held mix examples a little.

    Attributes:
        verdicts: what was found out of each layer.
        reading: of the outputs, as last found: where the examples are, and how many there were.
        probing: whether backward passes of a probe are under way.
    """

    def __init__(self, layers: Sequence[Layer], lenient: bool) -> None:
        self._layers = list(layers)
        self._lenient = lenient
        self.verdicts: dict[Layer, Verdict] = {}
        self.reading: tuple[Layout, int] | None = None
        self.probing = False

    def arrange(self, tensor: Tensor) -> Tensor:
        """A tensor that is like the outputs in its leading dimension, with the examples there: a view."""
        layout, examples = cast("tuple[Layout, int]", self.reading)
        parts = layout.parts(len(tensor), examples)
        if parts is None or parts[0] == parts[2] == 1:
            return tensor
        return tensor.unflatten(0, parts).movedim(1, 0).flatten(1, 2)

    def find(self, now: Pass, roots: list[Root]) -> None:
        """Set how many examples a pass has, and probe layers that nothing is known of."""
        readings = _readings(now.sizes, len(roots[0].like))
        before = self.reading[0] if self.reading else None
        self.reading = next((r for r in readings if r[0] == before), readings[0])
        if (asked := self._unknown(now, self.reading[1])) and self.reading[1]:
            self.probe(now, asked, roots, readings)
        now.examples = self.reading[1]
        for verdict in self.verdicts.values():
            verdict.rest = max(0, verdict.rest - 1)

    def _unknown(self, now: Pass, examples: int) -> list[Layer]:
        """Layers of a pass whose rows have to be looked at (again)."""
        found = []
        for layer, records in now.records.items():
            verdict = self.verdicts.get(layer)
            if verdict is None:
                found.append(layer)
            elif verdict.reason is None:
                if not self._fits(verdict, records, examples) or self._by_chance(verdict, records, examples, now.sizes):
                    found.append(layer)
            elif verdict.rest == 0 and (verdict.reason == probe.DEAD or verdict.signature != signature_of(records)):
                found.append(layer)
        return found

    def _by_chance(
        self, verdict: Verdict, records: Sequence[Record], examples: int, given: Sequence[int]
    ) -> bool:
        """Whether a layout may be that of outputs chosen among the rows: in line by chance, and not another time.

        Where the model itself folds rows, the batch is as long as what it was given, and the rows are not.
        """
        return any(
            layout.split in ("slow", "fast") and (examples not in given or row_sizes(record)[layout.axis] in given)
            for layout, record in zip(verdict.of(len(records)), records, strict=True)
        )

    def _fits(self, verdict: Verdict, records: Sequence[Record], examples: int) -> bool:
        layouts = verdict.of(len(records))
        if len(layouts) != len(records):
            return False
        for layout, record in zip(layouts, records, strict=True):
            sizes = row_sizes(record)
            if layout.split == "one" or not sizes:
                if examples != 1:
                    return False
            elif layout.axis >= len(sizes) or layout.parts(sizes[layout.axis], examples) is None:
                return False
        return True

    def probe(
        self, now: Pass, asked: list[Layer], roots: list[Root], readings: list[tuple[Layout, int]]
    ) -> None:
        """Send seeds of some examples alone, for the likeliest reading first, until the layers' rows make sense."""
        records = {layer: now.records[layer] for layer in asked}
        hidden = behind(now, roots)
        for layer in [layer for layer in asked if any(record.edge.node in hidden for record in records[layer])]:
            self._judge(layer, records.pop(layer), [], BEHIND)
        flat = [record for found in records.values() for record in found]
        usual = [r for r in readings if all(_possible(record, r[1]) for record in flat)]
        ordered = usual + [r for r in readings if r not in usual]
        best: tuple[int, tuple[Layout, int], dict[Layer, tuple[list[Layout], str | None]]] | None = None
        for reading in ordered[:2] if records else []:
            judged = self._look(now, records, roots, *reading, hurry=len(ordered) > 1)
            wrong = _wrong(judged)
            if best is None or wrong < best[0]:
                best = (wrong, reading, judged)
            if wrong == 0:
                break
        if best is not None:
            wrong, self.reading, judged = best
            if wrong and len(ordered) > 1:  # the look was a short one
                judged = self._look(now, records, roots, *self.reading)
            for layer, (layouts, reason) in judged.items():
                self._judge(layer, records[layer], layouts, reason)

    def _judge(self, layer: Layer, records: Sequence[Record], layouts: list[Layout], reason: str | None) -> None:
        before = self.verdicts.get(layer)
        tries = 1 if before is None else before.tries + 1
        if len(set(layouts)) == 1:
            layouts = layouts[:1]
        # A weight that starts at zero lets gradients through after a step.
        patience = PATIENCE if reason == probe.DEAD else 1
        rest = 0 if reason is None else 2 ** min(max(0, tries - patience), 6)
        self.verdicts[layer] = Verdict(layouts, reason, signature_of(records), tries, rest)

    def _look(
        self,
        now: Pass,
        records: dict[Layer, list[Record]],
        roots: list[Root],
        layout: Layout,
        examples: int,
        hurry: bool = False,
    ) -> dict[Layer, tuple[list[Layout], str | None]]:
        """What passes with seeds of one half of the examples, and of the other, show of each layer.

        In a hurry the first one will do, if it shows that the outputs are read in the wrong way.
        """
        generator = torch.Generator().manual_seed(0)
        first = torch.zeros(examples, dtype=torch.bool)
        first[torch.randperm(examples, generator=generator)[: max(1, examples // 2)]] = True
        parts = [first, ~first] if examples > 1 else [first]
        edges = [record.edge for found in records.values() for record in found]
        weights = [p for layer in records for p in layer.parameters if p.requires_grad]
        seen = {layer: Look([[] for _ in found]) for layer, found in records.items()}
        sent: list[list[Tensor]] = []
        by_weight: dict[Tensor, Tensor | None] = {}
        with_seeds = [root for root in roots if _seed(root, layout, first, torch.Generator()) is not None]
        if not with_seeds:
            return {layer: ([], probe.UNFIT) for layer in records}
        for part in parts:
            seeds = [cast("Tensor", _seed(root, layout, part, generator)) for root in with_seeds]
            found = self._sent(now, with_seeds, seeds, edges if sent else [*edges, *weights])
            if not sent:
                by_weight = dict(zip(weights, found[len(edges) :], strict=True))
            self._take(seen, records, found, first=not sent)
            del found
            sent.append(seeds)
            result = {
                layer: self._read(layer, records[layer], look, parts, examples, by_weight)
                for layer, look in seen.items()
            }
            if hurry and _wrong(result):
                return result
        folded = [layer for layer, (found, _) in result.items() if any(one.split in ("slow", "fast") for one in found)]
        if len(parts) > 1 and folded and not self._lenient:
            # Chosen rows may be in line by chance, as far as halves tell. A size for each example tells more.
            sizes = 1 + torch.randperm(examples, generator=generator) / examples
            seeds = [
                (one + other) * by_example(sizes, layout, one.shape[layout.axis], examples, one)
                for one, other in zip(*sent, strict=True)
            ]
            self._take(seen, records, self._sent(now, with_seeds, seeds, edges), first=False)
            for layer in folded:
                if not seen[layer].sized(result[layer][0], sizes):
                    result[layer] = [], probe.MIXED
        return result

    def _sent(
        self, now: Pass, roots: Sequence[Root], seeds: Sequence[Tensor], wanted: Sequence[Any]
    ) -> Sequence[Tensor | None]:
        """Gradients of a backward pass of a probe."""
        self.probing = True
        try:
            with set_aside([*awake(now.made), *(leaf for leaf in wanted if isinstance(leaf, Tensor))]):
                return torch.autograd.grad(
                    [root.edge for root in roots],
                    cast("list[Tensor]", wanted),
                    list(seeds),
                    retain_graph=True,
                    allow_unused=True,
                )
        finally:
            self.probing = False

    @staticmethod
    @torch.no_grad()
    def _take(
        seen: dict[Layer, Look], records: dict[Layer, list[Record]], found: Sequence[Tensor | None], first: bool
    ) -> None:
        gradients = iter(found)
        for layer, mine in records.items():
            seen[layer].take(mine, [next(gradients) for _ in mine], first)

    @torch.no_grad()
    def _read(
        self,
        layer: Layer,
        records: Sequence[Record],
        look: Look,
        parts: Sequence[Tensor],
        examples: int,
        by_weight: dict[Tensor, Tensor | None],
    ) -> tuple[list[Layout], str | None]:
        """A layer's layouts, a call each, or the reason why there are none."""
        layouts: list[Layout] = []
        for energies in look.energies:
            like = next((energy for energy in energies if energy is not None), None)
            if like is None:
                continue
            full = [torch.zeros_like(like) if energy is None else energy for energy in energies]
            read = probe.judged(full, parts[: len(full)], examples, self._lenient)
            if read == probe.DEAD:
                continue
            if isinstance(read, str):
                return [], read
            layouts.append(read)
        if not layouts:
            missed = any((g := by_weight.get(p)) is not None and bool(g.any()) for p in layer.parameters)
            return [], (probe.AROUND if missed else probe.DEAD)
        if len(layouts) < len(records):  # calls without a gradient are read like the others, if these are alike
            layouts = layouts[:1] * len(records) if len(set(layouts)) == 1 else []
        if not layouts:
            return [], probe.DEAD
        return ([], probe.AROUND) if not look.reproduces(layer, by_weight) else (layouts, None)

    def layouts(self, layer: Layer, records: Sequence[Record]) -> list[Layout] | None:
        """How the calls of a layer are read; None where they are not."""
        verdict = self.verdicts.get(layer)
        if verdict is None or verdict.reason is not None:
            return None
        return verdict.of(len(records))

    def state(self) -> str:
        """What has been found out of the layers, as text: a run that goes on need not find it out again."""
        reading = None if self.reading is None else [self.reading[0].axis, self.reading[0].split]
        layers = {
            layer.name: [
                [[layout.axis, layout.split] for layout in verdict.layouts],
                verdict.reason,
                verdict.signature,
                verdict.tries,
                verdict.rest,
            ]
            for layer, verdict in self.verdicts.items()
        }
        return json.dumps({"reading": reading, "layers": layers})

    def restore(self, state: str) -> None:
        """Take over what ``state`` returned."""
        saved = json.loads(state)
        self.reading = None if saved["reading"] is None else (Layout(*saved["reading"]), 0)
        found = {layer.name: layer for layer in self._layers}
        self.verdicts = {
            found[name]: Verdict([Layout(*layout) for layout in layouts], reason, tuple(signature), tries, rest)
            for name, (layouts, reason, signature, tries, rest) in saved["layers"].items()
            if name in found
        }

    def reason(self, layer: Layer) -> str | None:
        """Why a layer's rows are not shown; None if they are, or if nothing is known of it."""
        verdict = self.verdicts.get(layer)
        return None if verdict is None else verdict.reason

    @property
    def silent(self) -> bool:
        """Whether no gradient has come yet through some layer that is called."""
        return any(verdict.reason == probe.DEAD for verdict in self.verdicts.values())


def _readings(sizes: Sequence[int], rows: int) -> list[tuple[Layout, int]]:
    """How the examples may lie in the outputs' leading dimension, the likeliest first, and how many there are.

    Args:
        sizes: of the leading dimensions of what the model was given: outputs that are flattened have a multiple of one.
        rows: of the outputs.
    """
    found = [(Layout(0, "whole"), rows)]
    size = next((size for size in sizes if 0 < size < rows and rows % size == 0), None)
    if size is not None and rows not in sizes:
        found += [(Layout(0, "slow"), size), (Layout(0, "fast"), size)]
    return found


def _possible(record: Record, examples: int) -> bool:
    """Whether a record's rows can be told apart by so many examples, as far as sizes tell."""
    return bool(probe.candidates(row_sizes(record), examples))


def _seed(root: Root, layout: Layout, part: Tensor, generator: torch.Generator) -> Tensor | None:
    """Random gradients by a root for some of the examples, zero for the others; None if it does not have them."""
    like = root.like
    if like.dim() <= layout.axis or layout.parts(like.shape[layout.axis], len(part)) is None:
        return None
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    mask = part[layout.labels(like.shape[layout.axis], len(part))]
    noise = noise * mask.view([-1 if axis == layout.axis else 1 for axis in range(like.dim())])
    return noise.to(like.device, like.dtype)


def _wrong(judged: dict[Layer, tuple[list[Layout], str | None]]) -> int:
    """How many layers' rows make no sense."""
    return sum(reason not in (None, probe.DEAD) for _, reason in judged.values())
