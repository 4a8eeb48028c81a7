"""The inverse: factors that are averaged over steps, inverted in stacks when due, and applied to gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from ..base import CURVATURE, LONG_AGO, CurvatureOptimizer, OfGroups, Params, adopted
from ..checks import check_choice, check_range
from ..curvature import communication, spectra
from ..curvature.approximations import Approximation, statistics_dtype
from ..curvature.damping import AdaptiveDamping
from ..curvature.kronecker import Counts, ExactDiagonal, Factors, Invertible, Options
from ..curvature.layers import AffineLayer, Layer
from .owners import OwnedBlocks
from .stacks import Block, Stack, kind_of, reader, stacked


class BlockInverses(OwnedBlocks):
    """An optimizer with a damped inverse of the curvature of each layer.

    Args:
        model: the whole module.
        params: parameters or groups; default all.
        defaults: hyper-parameters of a group; ``damping`` and ``decay`` among them.
        damping_unit: see NaturalGradient.
        adapts: whether lambda is adapted, see ``curvature.damping``.
        early_updates: see NaturalGradient.
        update_every: see NaturalGradient.
        refresh_every: see NaturalGradient.
        loss_reduction: see NaturalGradient.
        flags: torch's; see CurvatureOptimizer.

    Raises:
        ValueError: for a hyper-parameter out of its range.
    """

    _bound = CurvatureOptimizer._bound | {"_stacks"}

    #: What the blocks of all layers share.
    options: Options = Options()

    #: Whether there are blocks between layers, which belong to no group alone.
    between_layers: ClassVar[bool] = False

    decay = OfGroups()

    def __init__(
        self,
        model: nn.Module,
        params: Params | None,
        defaults: dict[str, Any],
        *,
        damping_unit: Literal["absolute", "layer"],
        adapts: bool,
        early_updates: bool,
        update_every: int,
        refresh_every: int,
        loss_reduction: Literal["mean", "sum"],
        flags: Mapping[str, Any],
    ) -> None:
        check_choice("damping_unit", damping_unit, ("absolute", "layer"))
        check_range("decay", defaults["decay"], 0, 1, open_high=True)
        check_range("refresh_every", refresh_every, 1)
        super().__init__(model, params, defaults, update_every=update_every, loss_reduction=loss_reduction, flags=flags)
        self.damping_unit, self.refresh_every, self.early_updates = damping_unit, refresh_every, early_updates
        self.updates = 0  # of the factors
        self.refreshes = 0  # of the inverses
        self._refreshed_at = self._rebased_at = LONG_AGO
        self._inverted_at = LONG_AGO  # when the inverses in use were last others than in the step before
        self._adapted = AdaptiveDamping(1.0 if damping_unit == "layer" else None) if adapts else None
        self._block_updates: dict[str, int] = {}

    @abstractmethod
    def affine_block(self, layer: AffineLayer) -> Approximation:
        """The block of an affine layer."""

    def _block(self, layer: Layer) -> Approximation | None:
        return self.affine_block(layer) if isinstance(layer, AffineLayer) else ExactDiagonal(layer, self.options)

    def renew(self) -> None:
        """See CurvatureOptimizer."""
        super().renew()
        self._refreshed_at = LONG_AGO

    def _check_passes(self) -> None:
        """Raise RuntimeError if a due step went without a backward pass that it needs."""

    def _update_curvature(self) -> bool:
        self._check_passes()
        estimates = self._estimates()
        if not estimates:
            return self._saw
        self._average(estimates)
        self.updates += 1
        if self._must_refresh():
            self._rebase()
        scaling = self._scaling()
        moments = {name: m for name in estimates if (m := self.blocks[name].moments(*scaling))}
        self._average(self._exchanged(moments))
        for name in estimates:
            self._block_updates[name] = self._block_updates.get(name, 0) + 1
        return True

    def _forget(self, block: Approximation) -> None:
        if block.factors:
            self._refreshed_at = LONG_AGO
            self._block_updates.pop(block.layer.name, None)
        super()._forget(block)

    def _average(self, estimates: dict[str, Factors]) -> None:
        self._units = None
        kinds: dict[type[Block], list[str]] = {}
        for name, estimate in estimates.items():
            if self.blocks[name].mine:
                kinds.setdefault(type(self.blocks[name]), []).append(name)
            else:
                self.blocks[name].factors |= estimate
        for kind, names in kinds.items():
            blocks, new = [self.blocks[name] for name in names], [estimates[name] for name in names]
            kind.average_all(blocks, new, [self._keep(name) for name in names])

    def _keep(self, name: str) -> float:
        """Weight of the past in the k-th update: the first one replaces, the second is a mean of two, ..."""
        decay = self._group(self.blocks[name].layer)["decay"]
        return min(1 - 1 / (self._block_updates.get(name, 0) + 1), decay)

    def _refresh_due(self) -> bool:
        elapsed = self.steps - self._refreshed_at
        return elapsed >= self.refresh_every or (self.early_updates and elapsed > self._refreshed_at)

    def _must_refresh(self) -> bool:
        """Whether inverses are due, or a block with factors has none yet (its layer was thawed, say)."""
        inverted = {id(block) for stack in self._stacks for block in stack.blocks}
        return self._refresh_due() or any(b.factors and id(b) not in inverted for b in self.blocks.values())

    def _rebase(self) -> None:
        if self._rebased_at != self.steps:
            self._rebased_at = self.steps
            self._units = None
            with self._counting():
                for block in self.blocks.values():
                    if block.factors and block.mine:
                        block.rebase(self._counts)
            self._spread_bases()

    def _refresh(self, blocks: list[Block]) -> list[Stack]:
        """Invert blocks side by side. One whose inverse is not finite keeps its last good one, or has none."""
        last = {id(block): part for stack in self._stacks for block, part in stack.members()}
        alike: dict[Any, list[Block]] = {}
        for block in blocks:
            alike.setdefault(kind_of(block, block.factors), []).append(block)
        if self.damping_unit == "layer" and blocks:
            self._unit(blocks[0])  # which all ranks have to ask for

        def build(members: list[Block]) -> Stack:
            known = [last[id(block)] for block in members] if all(id(block) in last for block in members) else None
            return Stack.build(members, self._dampings(members), self._counts, known)

        with self._counting():
            completed = self._completed(list(alike.values()), build)
        stacks = []
        for stack, good in completed:
            if all(good):
                stacks.append(stack)
                continue
            self._counts.repaired += good.count(False)
            for (block, part), usable in zip(stack.members(), good, strict=True):
                if usable or id(block) in last:
                    stacks.append(Stack([block], part if usable else last[id(block)]))
        return stacks

    def _dampings(self, blocks: list[Block]) -> Tensor:
        """Lambda of each stacked matrix of some blocks, ``[n]``."""
        weight, groups = blocks[0].layer.parameters[0], len(next(iter(blocks[0].factors.values())))
        damping = [self._lambda(block.layer) for block in blocks]
        scales = weight.new_tensor(damping, dtype=statistics_dtype(weight)).repeat_interleave(groups)
        if self.damping_unit == "absolute":
            return scales
        units = torch.cat([self._unit(block) for block in blocks])
        return scales * units.clamp(min=torch.finfo(scales.dtype).tiny)

    def _lambda(self, layer: Layer) -> float:
        """What a layer is damped by in ``damping_unit``; one that is adapted is that of the inverses in use."""
        damping = float(self._group(layer)["damping"])
        return damping if self._adapted is None else damping * self._adapted.used

    def _take_damping(self, blocks: list[Block], refreshing: bool) -> bool:
        """Before inverses are made: whether all of them have to be, for another lambda."""

        def unit() -> float:
            return float(torch.stack([self._unit(block).mean() for block in blocks]).mean())

        return bool(blocks) and self._adapted is not None and self._adapted.renew(refreshing, unit)

    def _renew_inverses(self) -> None:
        """Invert what is due."""
        usable = [block for block in self.blocks.values() if block.factors]
        if any(block.owner is None for block in usable):  # of a state that was loaded before there were ranks
            self._assign()
        self._stacks = self._stacks if usable else []
        whole = bool(usable) and self._must_refresh()
        follow = [block for block in usable if block.inverts_on_update and self._updated_at == self.steps]
        if self._take_damping(usable, whole or bool(follow)):
            follow = usable  # bases stay as they are, and so does the schedule of refreshes
        if whole:
            with record_function(CURVATURE):
                self._rebase()
                self._stacks = self._refresh(usable)
            self._refreshed_at = self._inverted_at = self.steps
            self.refreshes += 1
        elif follow:
            self._inverted_at = self.steps
            with record_function(CURVATURE):
                renewed = {id(block) for block in follow}
                others = [stack for stack in self._stacks if id(stack.blocks[0]) not in renewed]
                # In the order of the blocks, as after loading: the KL clip's sum over stacks rounds by its order.
                order = {id(block): i for i, block in enumerate(self.blocks.values())}
                self._stacks = sorted(others + self._refresh(follow), key=lambda stack: order[id(stack.blocks[0])])

    def _solve_blocks(self, gradients: list[Tensor]) -> list[Tensor]:
        """Each block's damped inverse times its gradient. Methods that couple layers extend this.

        Args:
            gradients: one stacked tensor ``[n, d_out, columns]`` a stack, in the order of ``_stacks``.

        Returns:
            Directions of the same shapes.
        """
        stacks = self._stacks

        def solve(k: int) -> Tensor:
            return stacks[k].blocks[0].solve(stacks[k].cache, gradients[k])

        if self._inverses_stay:
            return self._from_owners(stacks, gradients, solve)
        return [solve(k) for k in range(len(stacks))]

    def _stacked(self, entry: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Something that each parameter has, in the shape of the stacks' gradients."""
        return [
            stacked([block.to_matrix([entry(p) for p in block.layer.parameters]) for block in stack.blocks])
            for stack in self._stacks
        ]

    def _squared(self, tensors: list[Tensor]) -> list[Tensor]:
        """``xᵀ (F + damping) x`` of each group's layers, for x in the shape of the stacks' gradients."""
        stacks = self._stacks
        if self.damping_unit == "layer" and stacks:
            self._unit(stacks[0].blocks[0])  # which all ranks have to ask for

        def compute(k: int) -> Tensor:
            first, damping = stacks[k].blocks[0], self._dampings(stacks[k].blocks)
            return first.squared(stacks[k].factors(), stacks[k].cache, damping, tensors[k])

        return self._by_group(self._summed(stacks, compute))

    def _by_group(self, numbers: list[Tensor]) -> list[Tensor]:
        """Sums over each group's layers of numbers ``[n]`` a stack."""
        first = numbers[0] if numbers else self.param_groups[0]["params"][0].detach()
        sums = [first.new_zeros(()) for _ in self.param_groups]
        places = {id(group): index for index, group in enumerate(self.param_groups)}
        for stack, values in zip(self._stacks, numbers, strict=True):
            own = [places[id(self._group(block.layer))] for block in stack.blocks]
            parts = [values] if len(set(own)) == 1 else values.chunk(len(own))
            for index, part in zip(own, parts, strict=False):
                sums[index] = sums[index] + part.sum()
        return sums

    # -- state ---------------------------------------------------------------------------------------------------------

    def diagnostics(self) -> dict[str, float]:
        """Adds how often curvature was updated and inverted, and what had to be repaired."""
        return super().diagnostics() | {
            "curvature/updates": float(self.updates),
            "curvature/refreshes": float(self.refreshes),
            "curvature/fallbacks": float(self._counts.repaired),
            "curvature/floored": float(self._counts.floored),
        }

    def layer_diagnostics(self) -> dict[str, dict[str, float]]:
        """See CurvatureOptimizer. Of owned blocks, owners tell the others."""
        members = [member for stack in self._stacks for member in stack.members()]
        if not members:
            return {}
        if self.damping_unit == "layer":
            self._unit(members[0][0])  # which all ranks have to ask for
        rows = []
        for block, cache in members:
            row = spectra.row(block.layer.parameters[0])
            if block.mine:
                spectrum = block.spectrum(block.factors, cache, self._dampings([block]))
                row = spectra.numbers(spectrum, block.floored(cache), row)
            rows.append(row)
        table = torch.stack(rows)
        table = communication.total(table) if self._sharing else table
        return spectra.told([(block.layer.name, row) for (block, _), row in zip(members, table, strict=True)])

    def quadratic(self, steps: Mapping[Tensor, Tensor]) -> float | None:
        """See CurvatureOptimizer."""
        if not self._stacks:
            return None
        return float(torch.stack(self._squared(self._stacked(reader(steps)))).sum())

    def _cache_bytes(self, block: Approximation) -> int:
        assert isinstance(block, Invertible)
        for stack in self._stacks:
            for member, part in stack.members():
                if member is block:  # as it is; before the first refresh, as it will be
                    kept = {t.data_ptr() for t in block.factors.values()}  # some serve in the solve as they are
                    own = [t for t in part.values() if not t.is_meta and t.data_ptr() not in kept]
                    return sum(t.numel() * t.element_size() for t in own)
        return sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in block.cache_shapes().values())

    def _curvature(self) -> dict[str, Any]:
        """See CurvatureOptimizer; also the inverses in use, which may be older than the factors, and all counters."""
        adapted = {} if self._adapted is None else {"damping": self._adapted.state()}
        return super()._curvature() | adapted | {
            "inverses": {block.layer.name: part for stack in self._stacks for block, part in stack.members()},
            "block_updates": dict(self._block_updates),
            "counters": {
                "updates": self.updates,
                "refreshes": self.refreshes,
                "refreshed_at": self._refreshed_at,
                "repaired": self._counts.repaired,
                "floored": int(self._counts.floored),
            },
        }

    def _check(self, saved: dict[str, Any]) -> None:
        super()._check(saved)
        if "inverses" not in saved:
            raise ValueError(f"this state has no inverses: it was not saved by {type(self).__name__}.")

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        counters = saved["counters"]
        self.updates, self.refreshes = int(counters["updates"]), int(counters["refreshes"])
        self._refreshed_at = int(counters["refreshed_at"])
        if self._adapted is not None and "damping" in saved:
            self._adapted.restore(saved["damping"])
        self._rebased_at = self._inverted_at = LONG_AGO  # the step that it is of may come again
        decomposed = int(counters.get("decompositions", 0))
        self._counts = Counts(int(counters["repaired"]), int(counters["floored"]), decomposed)
        self._block_updates = {name: int(count) for name, count in saved["block_updates"].items()}
        alike: dict[Any, list[tuple[Block, Factors]]] = {}
        for name, block in self.blocks.items():
            if name in saved["inverses"]:
                part = self._adopted_inverse(block, saved["inverses"][name])
                if self._inverses_stay and not block.mine:
                    here = block.everywhere
                    part = {k: t if k in here else torch.empty_like(t, device="meta") for k, t in part.items()}
                alike.setdefault((kind_of(block, block.factors), kind_of(block, part)), []).append((block, part))
        self._stacks = [
            Stack([b for b, _ in members], {k: stacked([part[k] for _, part in members]) for k in members[0][1]})
            for members in alike.values()
        ]

    def _template(self, name: str) -> dict[str, Any]:
        """See CurvatureOptimizer."""
        template, block = super()._template(name), self.blocks[name]
        device = block.layer.parameters[0].device
        if template:
            shapes = block.cache_shapes()
            template["inverses"] = {k: torch.zeros(s, dtype=dtype, device=device) for k, (s, dtype) in shapes.items()}
            bases = {k: torch.zeros_like(t) for k, t in template["layers"].items() if k.startswith("U_")}
            template["inverses"] = bases | template["inverses"]  # which serve in the solve as they are
            template["block_updates"] = 0
        return template

    def _adopted_inverse(self, block: Block, part: Factors) -> Factors:
        """An inverse as this optimizer would have made it; diagonals (W) keep the precision of the statistics."""
        weight, narrow = block.layer.parameters[0], None
        if not isinstance(block, ExactDiagonal):
            narrow = self.options.solve_dtype
        wide = adopted({key: t for key, t in part.items() if key[0] == "W"}, weight)
        rest = adopted({key: t for key, t in part.items() if key[0] != "W"}, weight, narrow)
        return {key: wide[key] if key in wide else rest[key] for key in part}
