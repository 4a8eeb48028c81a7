"""Who does what: each block's factors are kept, and the work on them done, by one of the ranks.

The work of refreshes is shared out as in distributed Shampoo (Anil et al., "Scalable Second Order Optimization for Deep
Learning", 2020, arXiv 2002.09018) and KAISA (Pauloski et al., "KAISA: An Adaptive Second-order Optimizer Framework for
Deep Neural Networks", SC 2021, arXiv 2107.01739): blocks go to ranks whole, the costliest first, each to the rank with
the least to do. A step's statistics travel to the owner alone, who averages, fits, decomposes and inverts.

KAISA has two ways from there. Inverses are everywhere (its COMM-OPT, here ``balanced``): owners send them round once a
refresh, each rank preconditions all gradients, and holds its share of the factors and all inverses. Or they stay where
they are made (MEM-OPT, here ``owned``): owners precondition their layers' gradients, and the directions of all
parameters travel in every step, refreshes or not; a rank holds its share of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from ..base import CurvatureOptimizer
from ..curvature import communication
from ..curvature.approximations import Approximation, absent, statistics_dtype
from ..curvature.kronecker import Counts, Factors
from ..curvature.packing import Form, mirror_
from .stacks import Block, Stack

Assign = Literal["balanced", "owned", "replicated"]


def shared_out(costs: Mapping[str, float], ranks: int) -> dict[str, int]:
    """Whose each piece of work is: the costliest first, each to the rank that has the least to do so far.

    Args:
        costs: by name.
        ranks: how many there are.
    """
    loads = [0.0] * ranks
    found: dict[str, int] = {}
    for name in sorted(costs, key=lambda name: -costs[name]):  # stable: equal ones in their order
        found[name] = min(range(ranks), key=loads.__getitem__)
        loads[found[name]] += costs[name]
    return {name: found[name] for name in costs}


def _by_columns(tensor: Tensor) -> bool:
    """Whether matrices are laid out as LAPACK does it, column by column."""
    return tensor.dim() == 3 and not tensor.is_contiguous() and tensor.mT.is_contiguous()


def _by_rows(tensor: Tensor) -> Tensor:
    """The same numbers row by row: transposed, or copied where they are neither."""
    return tensor.mT if _by_columns(tensor) else tensor.contiguous()


def _room(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, by_columns: bool) -> Tensor:
    """Where an inverse comes to lie, in the layout that it has at its owner: products round by it."""
    if not by_columns:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return torch.empty((*shape[:-2], shape[-1], shape[-2]), dtype=dtype, device=device).mT


class OwnedBlocks(CurvatureOptimizer):
    """An optimizer whose blocks may have an owner each among the ranks. Arguments as of its base.

    Attributes:
        assign: ``balanced``: blocks have owners; ``owned``: so have their inverses; ``replicated``: every rank has and
            does everything.
    """

    assign: Assign = "replicated"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.blocks: dict[str, Block]  # type: ignore[assignment]
        self._stacks: list[Stack] = []
        self._counts = Counts()
        self._units: dict[str, Tensor] | None = None  # mean eigenvalues of all blocks; None: to be asked for
        # Factors and inverses of all ranks, between ``consolidate`` and the next step.
        self._lent: dict[str, Factors] = {}
        self._lent_inverses: dict[str, Factors] = {}

    @property
    def _sharing(self) -> bool:
        return self.assign != "replicated" and communication.world_size() > 1

    @property
    def _inverses_stay(self) -> bool:
        """Whether inverses are at their owners alone."""
        return self.assign == "owned" and communication.world_size() > 1

    def _device(self) -> torch.device:
        return next(iter(self.blocks.values())).layer.parameters[0].device

    # -- whose blocks are ----------------------------------------------------------------------------------------------

    def _assign(self) -> None:
        """See LayerwiseOptimizer. A function of what is trained or known: layers that are thawed move others."""
        if not self._sharing:
            return
        wanted = self._wanted()
        moved = [b for name, b in self.blocks.items() if b.factors and b.owner not in (None, wanted.get(name))]
        self._spread([(block, key) for block in moved for key in block.factors if key not in block.everywhere])
        if self._inverses_stay:  # which new owners have to make
            gone = {id(block) for block in moved}
            self._stacks = [stack for stack in self._stacks if not any(id(b) in gone for b in stack.blocks)]
        for name, owner in wanted.items():
            if self.blocks[name].owner != owner:
                self.blocks[name].owner = owner
                self._keep_own(self.blocks[name])

    def _wanted(self) -> dict[str, int]:
        costs = {
            name: block.cost()
            for name, block in self.blocks.items()
            if block.factors or any(p.requires_grad for p in block.layer.parameters)
        }
        return shared_out(costs, communication.world_size())

    @staticmethod
    def _keep_own(block: Block) -> None:
        """Let go of what another rank keeps, and make symmetric what one keeps, as it is where it was sent."""
        for key, factor in block.factors.items():
            if not block.mine and key not in block.everywhere:
                block.factors[key] = absent(factor.shape, factor.dtype)
            elif block.form(key) == "symmetric" and not factor.is_meta:
                mirror_(factor)

    def _spread(self, entries: Sequence[tuple[Block, str]]) -> None:
        """Give every rank some factors of blocks that have owners."""
        tensors = []
        for block, key in entries:
            if not block.mine:
                like = block.factors.get(key, absent(block.shapes()[key], statistics_dtype(block.layer.parameters[0])))
                block.factors[key] = torch.empty(like.shape, dtype=like.dtype, device=block.layer.parameters[0].device)
            else:  # laid out as at the others: products round by it
                block.factors[key] = block.factors[key].contiguous()
            tensors.append(block.factors[key])
        owners = [block.owner for block, _ in entries if block.owner is not None]
        communication.spread_(tensors, owners, [block.form(key) for block, key in entries])

    def _spread_bases(self) -> None:
        """After a rebase: what every rank needs of it."""
        if not self._sharing:
            return
        known = [block for block in self.blocks.values() if block.factors]
        entries = [(block, key) for block in known for key in block.everywhere if key in block.shapes()]
        there = communication.anywhere([b.mine and key in b.factors for b, key in entries], self._device())
        for block, key in entries:
            if not block.mine:  # the last one may be in use still
                block.factors.pop(key, None)
        self._spread([entry for entry, made in zip(entries, there, strict=True) if made])

    # -- estimates -----------------------------------------------------------------------------------------------------

    def _average_ranks(self, estimates: dict[str, Factors]) -> None:
        """See LayerwiseOptimizer. To the owners."""
        if not self._sharing:
            super()._average_ranks(estimates)
            return
        entries = [(name, key) for name in estimates if not self.blocks[name].gathers for key in estimates[name]]
        blocks = [self.blocks[name] for name, _ in entries]
        communication.collect_(
            [estimates[name][key] for name, key in entries],
            [block.owner for block in blocks if block.owner is not None],
            [block.form(key) for block, (_, key) in zip(blocks, entries, strict=True)],
            [self._counted_examples(name) for name, _ in entries],
        )
        for name, key in entries:
            if not self.blocks[name].mine:
                estimates[name][key] = absent(estimates[name][key].shape, estimates[name][key].dtype)

    def _are_finite(self, estimates: dict[str, Factors]) -> list[bool]:
        if not self._sharing or not estimates:
            return super()._are_finite(estimates)
        own = {name: estimate for name, estimate in estimates.items() if self.blocks[name].mine}
        wrong = {name for name, good in zip(own, super()._are_finite(own), strict=True) if not good}
        found = communication.anywhere([name in wrong for name in estimates], self._device())
        return [not bad for bad in found]

    def _forget(self, block: Approximation) -> None:
        self._units = None
        self._lent.pop(block.layer.name, None)
        super()._forget(block)

    # -- work ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Within it each rank counts what it repairs; after it, all know of all."""
        if not self._sharing:
            yield
            return
        before, self._counts = self._counts, Counts()
        yield
        own = self._counts
        floored = torch.as_tensor(own.floored, dtype=torch.int64, device=self._device())
        numbers = torch.stack([floored.new_tensor(own.repaired), floored.new_tensor(own.decomposed), floored])
        repaired, decomposed, floored = communication.total(numbers)
        self._counts = Counts(
            before.repaired + int(repaired), before.floored + floored, before.decomposed + int(decomposed)
        )

    def _unit(self, block: Block) -> Tensor:
        """Mean eigenvalues of a block's F, ``[groups]``. Ranks must ask alike, the first time after an update."""
        if not self._sharing:
            return block.mean_eigenvalue(block.factors)
        if self._units is None:
            known = {name: b for name, b in self.blocks.items() if b.factors}
            sizes = [next(iter(b.factors.values())).shape[0] for b in known.values()]
            parts = [
                b.mean_eigenvalue(b.factors).double() if b.mine else torch.zeros(n).double().to(self._device())
                for b, n in zip(known.values(), sizes, strict=True)
            ]
            found = communication.total(torch.cat(parts)).split(sizes)
            self._units = dict(zip(known, found, strict=True))
        return self._units[block.layer.name].to(statistics_dtype(block.layer.parameters[0]))

    def _summed(self, stacks: Sequence[Stack], compute: Callable[[int], Tensor]) -> list[Tensor]:
        """Numbers ``[n]`` of each stack, worked out by its owner.

        Args:
            stacks: of all blocks.
            compute: the numbers of the k-th one.
        """
        if not self._sharing or not stacks:
            return [compute(k) for k in range(len(stacks))]
        weights = [stack.blocks[0].layer.parameters[0] for stack in stacks]
        sizes = [len(next(iter(stack.cache.values()))) for stack in stacks]
        parts = [
            compute(k) if stack.blocks[0].mine else weight.new_zeros(n, dtype=statistics_dtype(weight))
            for k, (stack, weight, n) in enumerate(zip(stacks, weights, sizes, strict=True))
        ]
        return list(communication.total(torch.cat(parts)).split(sizes))

    def _from_owners(
        self, stacks: Sequence[Stack], like: list[Tensor], compute: Callable[[int], Tensor]
    ) -> list[Tensor]:
        """Tensors of each stack, worked out by its owner and sent to all.

        Args:
            stacks: of all blocks.
            like: tensors of the shapes and dtypes of what is worked out.
            compute: what the k-th stack's tensor is.
        """
        if not self._sharing:
            return [compute(k) for k in range(len(stacks))]
        found = [
            compute(k).contiguous() if stack.blocks[0].mine else like[k].new_empty(like[k].shape)
            for k, stack in enumerate(stacks)
        ]
        owners = [stack.blocks[0].owner for stack in stacks]
        communication.spread_(found, [owner for owner in owners if owner is not None], ["full"] * len(found))
        return found

    def _completed(
        self, groups: Sequence[list[Block]], build: Callable[[list[Block]], Stack]
    ) -> list[tuple[Stack, list[bool]]]:
        """Stacks of all ranks, each with whether its blocks' inverses are finite.

        Args:
            groups: the members of each stack.
            build: makes one, where this rank is its members' owner.
        """
        found: dict[int, tuple[Stack, list[bool]]] = {}
        under_way: list[communication.Parcel] = []
        for turn in self._turns(groups):
            made = [build(groups[i]) if groups[i][0].mine else None for i in turn]
            stacks, parcels = self._sent([groups[i] for i in turn], made, at_once=len(turn) == len(groups))
            found |= zip(turn, stacks, strict=True)
            under_way += parcels
        for parcel in under_way:
            parcel.arrive()
        return [found[i] for i in range(len(groups))]

    def _turns(self, groups: Sequence[list[Block]]) -> list[list[int]]:
        """Which stacks are made first, to travel while the others are made: the costliest of each owner."""
        if not self._sharing or self._inverses_stay:
            return [list(range(len(groups)))]
        costs = [sum(block.cost() for block in members) for members in groups]
        first: dict[int | None, int] = {}
        for i in sorted(range(len(groups)), key=lambda i: -costs[i]):
            first.setdefault(groups[i][0].owner, i)
        rest = [i for i in range(len(groups)) if i not in first.values()]
        return [turn for turn in (sorted(first.values()), rest) if turn]

    def _sent(
        self, groups: Sequence[list[Block]], made: Sequence[Stack | None], at_once: bool
    ) -> tuple[list[tuple[Stack, list[bool]]], list[communication.Parcel]]:
        """``_completed`` for stacks that are made; ``at_once``: they have arrived, one owner's after the other's."""
        good = [None if stack is None else stack.finite() for stack in made]
        if not self._sharing:
            return [(s, g) for s, g in zip(made, good, strict=True) if s is not None and g is not None], []
        # Of each stack: which members are finite, what its cache has, and which of it is laid out by columns.
        told: list[bool] = []
        layouts = [{**members[0].cache_shapes(), **members[0].optional_shapes()} for members in groups]
        for members, stack, finite, shapes in zip(groups, made, good, layouts, strict=True):
            told += [False] * len(members) if finite is None else finite
            cache = {} if stack is None else stack.cache
            told += [flag for key in shapes for flag in (key in cache, key in cache and _by_columns(cache[key]))]
        answers = iter(communication.anywhere(told, self._device()))
        stacks: list[tuple[Stack, list[bool]]] = []
        tensors: list[Tensor] = []
        forms: list[Form] = []
        owners: list[int] = []
        for members, stack, shapes in zip(groups, made, layouts, strict=True):
            finite, first = [next(answers) for _ in members], members[0]
            flags = {key: (next(answers), next(answers)) for key in shapes}
            sent = {key: turned for key, (there, turned) in flags.items() if there and key not in first.everywhere}
            if stack is None:
                device = "meta" if self._inverses_stay else first.layer.parameters[0].device
                rooms = {key: (len(members) * shapes[key][0][0], *shapes[key][0][1:]) for key in sent}
                cache = {key: _room(rooms[key], shapes[key][1], device, sent[key]) for key in sent}
                stack = Stack.received(members, cache)
            for key, turned in () if self._inverses_stay else sent.items():
                tensor = stack.cache[key] = stack.cache[key] if turned else stack.cache[key].contiguous()
                form = first.form(key)
                tensors.append(_by_rows(tensor))
                forms.append("upper" if turned and form == "lower" else form)
                owners += [] if first.owner is None else [first.owner]
            stacks.append((stack, finite))
        if not at_once:
            return stacks, communication.send(tensors, owners, forms)
        communication.spread_(tensors, owners, forms)
        return stacks, []

    # -- state ---------------------------------------------------------------------------------------------------------

    def consolidate(self) -> None:
        """Bring the curvature of all ranks to each of them, until the next step: ``state_dict()`` is then whole.

        Every rank must call it. Where nothing is shared out (one process, or ``assign="replicated"``) there is nothing
        to do.
        """
        self._come_alive()
        if not self._sharing:
            return
        owned = {name: b for name, b in self.blocks.items() if b.owner is not None and b.factors}
        own = {name: dict(block.factors) for name, block in owned.items()}
        self._spread([(block, key) for block in owned.values() for key in block.factors if key not in block.everywhere])
        for name, block in owned.items():
            self._lent[name], block.factors = block.factors, own[name]
        if not self._inverses_stay:
            return
        tensors, owners = [], []
        for stack in self._stacks:
            first, cache = stack.blocks[0], dict(stack.cache)
            device = first.layer.parameters[0].device
            for key in [key for key in cache if key not in first.everywhere]:
                like = cache[key]
                if like.is_meta:
                    cache[key] = _room(like.shape, like.dtype, device, _by_columns(like))
                elif not _by_columns(like):
                    cache[key] = like.contiguous()
                tensors.append(_by_rows(cache[key]))
                owners += [] if first.owner is None else [first.owner]
            self._lent_inverses |= {block.layer.name: part for block, part in Stack(stack.blocks, cache).members()}
        communication.spread_(tensors, owners, ["full"] * len(owners))

    def _reset(self) -> None:
        super()._reset()
        self._lent.clear()
        self._lent_inverses.clear()

    def curvature_matrices(self) -> dict[str, Tensor]:
        """See LayerwiseOptimizer. Of the layers that this rank keeps; after ``consolidate``, of all."""
        own = {name: block.factors for name, block in self.blocks.items()}
        try:
            for name, block in self.blocks.items():
                block.factors = self._lent.get(name, own[name] if block.mine else {})
            return super().curvature_matrices()
        finally:
            for name, block in self.blocks.items():
                block.factors = own[name]

    def _curvature(self) -> dict[str, Any]:
        """See StatefulOptimizer; also whose each block is, which copies need and a whole state does not."""
        owners = {name: block.owner for name, block in self.blocks.items() if block.owner is not None}
        return super()._curvature() | ({"owners": owners} if owners else {})

    def _whole(self, curvature: dict[str, Any]) -> dict[str, Any]:
        """See StatefulOptimizer.

        Raises:
            RuntimeError: some of it is on other ranks.
        """
        lent = {name: dict(factors) for name, factors in self._lent.items() if self.blocks[name].factors}
        whole = {"layers": curvature["layers"] | lent}
        if "inverses" in curvature:
            whole["inverses"] = curvature["inverses"] | self._lent_inverses
        if any(t.is_meta for part in whole.values() for factors in part.values() for t in factors.values()):
            raise RuntimeError(
                "this process keeps its own share of the curvature alone: call optimizer.consolidate() on every "
                "process before state_dict() or a copy, or build the optimizer with assign='replicated'."
            )
        return {key: value for key, value in curvature.items() if key != "owners"} | whole

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        self._units = None
        self._lent.clear()
        self._lent_inverses.clear()
        wanted = {**self._wanted(), **saved.get("owners", {})} if self._sharing else {}
        for name, block in self.blocks.items():
            if self._sharing:
                block.owner = wanted.get(name)
                self._keep_own(block)
            if block.mine and any(t.is_meta for t in block.factors.values()):
                raise RuntimeError(
                    f"the curvature of {name!r} is another process's, and a copy of the optimizer has no more than its "
                    "own: take optimizer.state_dict() to others, after optimizer.consolidate() on every process."
                )
