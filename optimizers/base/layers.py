"""Curvature of layers: which of them have a block, when blocks are fed, and what they have seen."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from ..checks import check_range, refuse_sharded
from ..curvature import communication
from ..curvature.approximations import Approximation, statistics_dtype
from ..curvature.layers import COMPUTED, Flow, Layer, adapt, layer_kinds
from ..curvature.probe import DEAD
from ..curvature.recorder import NOT_CALLED, NOT_SEEN, Recorder, remove_dead_hooks
from .coverage import Coverage
from .groups import GroupedOptimizer, Params

#: A step before all others.
LONG_AGO = -(10**12)

#: Steps within which it is no news that no gradient has come through a layer.
STARTING = 3

#: Name under which a profiler finds the time that goes into curvature.
CURVATURE = "curvature"


def _is_replaced(layer: Layer) -> bool:
    """Whether other tensors have taken the place of a layer's parameters."""
    own = layer.module._parameters
    return any(own.get(key) is not p for key, p in zip(layer.keys, layer.parameters, strict=True))


class LayerwiseOptimizer(GroupedOptimizer):
    """An optimizer that keeps a block for each layer and gathers its statistics in due backward passes.

    Args:
        model: the whole module (or None where the method needs parameters only). Wrappers are looked through.
        params: parameters or groups to train; default all of the model's.
        defaults: hyper-parameters of a group.
        update_every: see CurvatureOptimizer.
        loss_reduction: how the loss sums over examples.
        flags: see CurvatureOptimizer.

    Raises:
        ValueError: for a hyper-parameter out of its range, or a flag that asks for what there is not.
        TypeError: for an argument that is none.
    """

    #: Whether curvature is gathered more often at first: after 1, 3, 7, 15, ... steps, up to the interval.
    early_updates: bool = False

    #: Attributes that ``_attach`` and ``_restore`` make: a copy makes its own.
    _bound: ClassVar[frozenset[str]] = frozenset({"blocks", "_recorder", "_uncovered", "_watching", "_owners"})

    def __init__(
        self,
        model: nn.Module | None,
        params: Params | None,
        defaults: dict[str, Any],
        *,
        update_every: int,
        loss_reduction: Literal["mean", "sum"],
        flags: Mapping[str, Any],
    ) -> None:
        check_range("update_every", update_every, 1)
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
        self.update_every = update_every
        self.loss_reduction = loss_reduction
        self.steps = 0
        self._updated_at = LONG_AGO
        self._again: int | None = None  # the step at which curvature is gathered out of turn
        self._silent = False  # whether no gradient has come yet through some layer
        self._unobserved = False
        self.rejected = 0  # layer statistics that were not finite and not used
        self.blocks: dict[str, Approximation] = {}
        self._recorder: Recorder | None = None
        self._watching: dict[str, Any] | None = None  # arguments of ``_watch``, once it was called
        self._scale = 1.0
        self._uncovered: dict[str, str] = {}  # why parameters have no block, by name
        self._reasons: dict[str, str] = {}  # why layers with a block have no curvature, by name
        self._told: set[str] = set()  # of which layers a warning has said so
        self._saw = False  # whether a pass came through the model in this step
        super().__init__(model, params, defaults, flags)

    def _attach(self) -> None:
        """Give the layers their blocks and the model its hooks: the last thing in building, and again in a copy."""
        if self.model is not None:
            remove_dead_hooks(self.model)
        for group in self.param_groups:
            self._check_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch.optim.Optimizer. What is the whole optimizer's, such as ``update_every``, cannot differ.

        Layers whose parameters are added have curvature from the next update on.
        """
        super().add_param_group(param_group)
        if self._watching is not None:
            self._watch_layers()

    def _watch(
        self,
        make_block: Callable[[Layer], Approximation | None],
        *,
        skip: str | None = None,
        deferred: bool = False,
        fraction: float = 1.0,
    ) -> None:
        """Give each supported layer a block and let the recorder feed it; note why the other parameters have none.

        A layer is left to the fallback when any of its parameters is shared with another module (its curvature would
        be the sum of both roles') or is not this optimizer's to train. What is added to the optimizer later is watched
        from then on.

        Args:
            make_block: the block of a layer; None: this method has none for it, and leaves it to the fallback.
            skip: regular expression; layers in whose name it is found are left to the fallback.
            deferred: see Recorder.
            fraction: see Recorder.
        """
        self._watching = {"make_block": make_block, "skip": skip, "deferred": deferred, "fraction": fraction}
        self._watch_layers()

    def _watch_layers(self) -> None:
        assert self.model is not None and self._watching is not None
        self._owners = {}
        skip = self._watching["skip"]
        owners: dict[nn.Parameter, list[str]] = {}
        for module_name, module in self.model.named_modules():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(parameter, []).append(module_name)
        mine = {p for group in self.param_groups for p in group["params"]}
        reasons: dict[nn.Parameter, str] = {}
        before, self.blocks = self.blocks, {}
        for name, module in self.model.named_modules():
            own = list(module.parameters(recurse=False))
            layer = adapt(name, module)
            if layer is None:
                reason = f"unsupported layer {type(module).__name__}" if layer_kinds(module) else "free parameter"
            elif isinstance(layer, str):
                reason = layer
            elif skip is not None and re.search(skip, name):
                reason = "skipped"
            elif shared := [o for p in own for o in owners[p] if o != name]:
                reason = "tied to " + ", ".join(dict.fromkeys(shared))
            elif not any(p in mine for p in layer.parameters):
                continue
            elif all(p in mine or not p.requires_grad for p in layer.parameters):
                block = before[name] if name in before else self._watching["make_block"](layer)
                if block is not None:
                    self.blocks[name] = block
                    continue
                reason = "no matrix"
            else:
                reason = "layer trained in part by another optimizer"
            for p in own:
                reasons.setdefault(p, reason)
        self._uncovered = {n: reasons[p] for n, p in self.model.named_parameters() if p in reasons and p in mine}
        if self._recorder is not None:
            self._recorder.close()
        layers = [block.layer for block in self.blocks.values()]
        deferred, fraction = self._watching["deferred"], self._watching["fraction"]
        self._recorder = Recorder(self.model, layers, self._due, self._observe, deferred, fraction)

    def _group(self, layer: Layer) -> dict[str, Any]:
        """The group of a layer's weight; of its bias, where the weight is frozen and was left out."""
        return next(group for p in layer.parameters if (group := self._group_of(p)) is not None)

    def _due(self) -> bool:
        """Whether the pass under way gathers curvature."""
        if self._unobserved:
            return False
        in_turn = self.steps - self._updated_at >= self.update_every
        return in_turn or (self._again is not None and self.steps >= self._again)

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """Within it, passes through the model leave no trace in the curvature: a penalty's, or another player's."""
        before, self._unobserved = self._unobserved, True
        try:
            yield
        finally:
            self._unobserved = before

    def renew(self) -> None:
        """Make the next step gather and refresh curvature, however long its interval has still to run."""
        self._updated_at = LONG_AGO

    def _observe(self, flow: Flow) -> None:
        """Take what one backward pass leaves of a layer."""
        with record_function(CURVATURE):
            self.blocks[flow.layer.name].accumulate(flow.scaled(1 / self._scale))

    def _estimates(self) -> dict[str, dict[str, Tensor]]:
        """This step's factors by layer, averaged over ranks.

        A layer that no rank saw is left out, and so is one whose statistics are not finite (it keeps its last good
        factors, and ``rejected`` counts it). One whose statistics cannot be trusted loses what it has.
        """
        assert self._recorder is not None
        self._saw = False
        if not any(p.requires_grad for block in self.blocks.values() for p in block.layer.parameters):
            self._saw = True  # there is nothing to see
            return {}
        assert self.model is not None
        refuse_sharded(type(self).__name__, self.model.parameters())  # by now
        self._recorder.finish()
        blocks = list(self.blocks.values())
        reasons = self._recorder.reasons() | {b.layer.name: COMPUTED for b in blocks if _is_replaced(b.layer)}
        device = blocks[0].layer.parameters[0].device
        own = [self._recorder.silent, self._recorder.seen]
        flags = [*(b.observed for b in blocks), *(b.layer.name in reasons for b in blocks), *own]
        *flags, self._silent, self._saw = communication.anywhere(flags, device)
        if not self._saw:
            advice = (
                "tell of each that counts by optimizer.backward or before_backward, as of those before"
                if self._recorder.passed_over
                else "call model.train(), and the whole model rather than its parts, before the forward pass (a batch "
                "without examples shows nothing, either)"
            )
            warnings.warn(
                "no backward pass came through the model in training mode since the last step, so its curvature was "
                f"not updated: {advice}.",
                stacklevel=4,
            )
            return {}
        kinds: dict[type[Approximation], list[Approximation]] = {}
        for block, was_seen, is_refused in zip(blocks, flags[: len(blocks)], flags[len(blocks) :], strict=True):
            name = block.layer.name
            if is_refused:
                reasons.setdefault(name, "refused on another rank")
                self._forget(block)
            elif was_seen:  # every rank must bring the same blocks to the exchange
                kinds.setdefault(type(block), []).append(block)
            elif not block.factors and any(p.requires_grad for p in block.layer.parameters):
                reasons[name] = NOT_SEEN if self._recorder.ran_unseen(block.layer) else NOT_CALLED
        self._reasons = reasons
        self._tell()
        self._assign()
        found: dict[str, dict[str, Tensor]] = {}
        for kind, members in kinds.items():
            found |= kind.estimate_all(members, *self._scaling())
        return self._exchanged({name: found[name] for name in self.blocks if name in found})

    def _assign(self) -> None:
        """Before the ranks bring their estimates together: settle who keeps which block. Here, every rank does."""

    def _forget(self, block: Approximation) -> None:
        """Drop what is kept of a layer whose curvature cannot be trusted."""
        block.factors.clear()
        block.reset()

    def _forget_replaced(self) -> None:
        """Drop the curvature of layers whose weights are computed from other tensors now."""
        for name, block in self.blocks.items():
            if block.factors and _is_replaced(block.layer):
                self._forget(block)
                self._reasons[name] = COMPUTED
                self._tell()

    def _tell(self) -> None:
        """Warn of layers without curvature, once each; of one behind weights that start at zero after some steps."""
        early = self.steps < STARTING
        new = [n for n, reason in self._reasons.items() if n not in self._told and not (early and reason == DEAD)]
        if not new:
            return
        self._told.update(new)
        some = "; ".join(f"{name or '(root)'}: {self._reasons[name]}" for name in new[:3])
        more = f"; and {len(new) - 3} more" if len(new) > 3 else ""
        warnings.warn(
            f"no curvature for {len(new)} of {len(self.blocks)} layers, which the fallback trains ({some}{more}). "
            "optimizer.coverage() lists them all.",
            stacklevel=5,
        )

    def _scaling(self) -> tuple[float, int]:
        """What turns an observed gradient into one of the per-example loss, and how many examples were observed."""
        assert self._recorder is not None
        examples = max(self._recorder.examples, 1)
        return (float(examples) if self.loss_reduction == "mean" else 1.0), max(self._recorder.observed, 1)

    def _exchanged(self, estimates: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Estimates averaged over the ranks that have them, without those that are not finite.

        Every example counts alike, whatever rank it was on.
        """
        if communication.world_size() > 1:
            self._average_ranks(estimates)
        finite = self._are_finite(estimates)
        self.rejected += finite.count(False)
        return {name: estimates[name] for name, good in zip(list(estimates), finite, strict=True) if good}

    def _counted_examples(self, name: str) -> float:
        """How much this rank's estimate of a layer counts beside those of others: by its examples."""
        assert self._recorder is not None
        return float(self._recorder.observed) if self.blocks[name].observed else 0.0

    def _average_ranks(self, estimates: dict[str, dict[str, Tensor]]) -> None:
        """Replace estimates, in place, by their means over ranks."""
        shared = [name for name in estimates if not self.blocks[name].gathers]
        tensors = [t for name in shared for t in estimates[name].values()]
        weights = [self._counted_examples(name) for name in shared for _ in estimates[name]]
        if tensors:
            communication.average_(tensors, torch.tensor(weights, device=tensors[0].device))

    def _are_finite(self, estimates: dict[str, dict[str, Tensor]]) -> list[bool]:
        """Whether each estimate is: one synchronisation for all layers."""
        if not estimates:
            return []
        sums = [sum((t.sum() for t in f.values()), start=torch.zeros(())) for f in estimates.values()]
        return torch.stack(sums).isfinite().tolist()

    def _reset(self) -> None:
        for block in self.blocks.values():
            block.reset()
        if self._recorder is not None:
            self._recorder.reset()

    def curvature_matrices(self) -> dict[str, Tensor]:
        """Dense, undamped blocks by layer name, row-major over ``[d_out, d_in (+ 1)]``. For small nets."""
        return {name: block.to_dense() for name, block in self.blocks.items() if block.factors}

    def coverage(self) -> Coverage:
        """The table module → method → factor sizes → bytes, and what falls back to a first-order rule, and why.

        Bytes are those of this process. Which layers the model calls is known after the first step only.
        """
        table = Coverage()
        for name, block in self.blocks.items():
            shapes = block.shapes()
            item = statistics_dtype(block.layer.parameters[0]).itemsize
            described = " ".join(f"{key}{list(shape)}" for key, shape in shapes.items())
            count = sum(p.numel() for p in block.layer.parameters if p.requires_grad)
            if self.steps and count and not block.factors:
                reason = self._reasons.get(name, "the layer gave no statistics yet")
                table.rows.append((name or "(root)", f"fallback: {reason}", "", count, 0))
                continue
            here = [k for k in shapes if k not in block.factors or not block.factors[k].is_meta]  # not another rank's
            size = sum(item * torch.Size(shapes[key]).numel() for key in here) + self._cache_bytes(block)
            table.rows.append((name or "(root)", type(block).__name__, described, count, size))
        named = dict(self.model.named_parameters()) if self.model is not None else {}
        for name, reason in self._uncovered.items():
            if name in named and named[name].requires_grad:
                table.rows.append((name, f"fallback: {reason}", "", named[name].numel(), 0))
        own = set(named.values())
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if self.model is not None and p.requires_grad and p not in own:
                    table.rows.append((f"(group {index})", "fallback: not a parameter of the model", "", p.numel(), 0))
        return table

    def _cache_bytes(self, block: Approximation) -> int:
        """Bytes of what is worked out from a block's factors and kept between refreshes."""
        return 0

    def diagnostics(self) -> dict[str, float]:
        """Scalars worth a line in the log; computed only when asked for."""
        return {"curvature/rejected": float(self.rejected)} if self.blocks else {}

    def layer_diagnostics(self) -> dict[str, dict[str, float]]:
        """What the curvature in use says of each layer, by layer name; computed only when asked for.

        ``above_damping``: share of the directions whose curvature is larger than lambda. ``condition``: largest over
        smallest eigenvalue of the damped matrix that is inverted. ``floored``: share of directions in which its inverse
        has a least eigenvalue in place of a smaller one. ``kl_scale``: what the layer's last step was multiplied by.
        What a method cannot tell is left out. Of several processes, each must ask.
        """
        return {}

    def quadratic(self, steps: Mapping[Tensor, Tensor]) -> float | None:
        """``dᵀ (F + damping) d`` of a step d of the layers with curvature, with the F of the inverses in use.

        Of several processes, each must ask.

        Args:
            steps: by parameter, what was added to it.

        Returns:
            None where the method has no F in units of the loss.
        """
        return None

    def close(self) -> None:
        """Remove every hook from the model. Idempotent; the optimizer then keeps the curvature it has."""
        if self._recorder is not None:
            self._recorder.close()
