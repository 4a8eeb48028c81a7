"""What every curvature-aware optimizer shares: the ``backward`` verb, blocks over layers, the fallback, the state."""

from __future__ import annotations

import copy
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.optim.optimizer import Optimizer

from .checks import check_range
from .curvature import communication
from .curvature.approximations import Approximation, statistics_dtype
from .curvature.layers import COMPUTED, Flow, Layer, adapt, layer_kinds
from .curvature.losses import stated
from .curvature.probe import DEAD
from .curvature.recorder import NOT_CALLED, NOT_SEEN, Recorder, remove_dead_hooks
from .wrapper import check_wrappers

Params = Iterable[Tensor] | Iterable[dict[str, Any]]

#: A step before all others.
LONG_AGO = -(10**12)

#: Steps within which it is no news that no gradient has come through a layer.
STARTING = 3

#: Parts of ``state_dict()["curvature"]`` that have an entry for each layer.
BY_LAYER = ("layers", "kinds", "inverses", "block_updates", "samples", "inner")

#: Where a parameter's state has a layer's curvature.
ENTRY = "curvature"

#: Flags of torch's optimizers that ask for nothing here.
UNUSED_FLAGS = ("foreach", "capturable", "fused", "differentiable")

#: Name under which a profiler finds the time that goes into curvature.
CURVATURE = "curvature"


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel or torch.compile wrappers, whose names are stable."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def placed_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """A mask of the observations, bool, in their shape.

    Args:
        mask: of their leading dimensions, or of the first of them.
        shape: of the observations, ``[n, ...]``.

    Raises:
        ValueError: if it does not fit.
    """
    if mask.shape != shape[: mask.dim()] or not mask.dim():
        raise ValueError(
            f"mask must have the shape of the outputs' observations {list(shape)}, or of the first dimensions of it, "
            f"got {list(mask.shape)}."
        )
    return mask.bool().view(*mask.shape, *[1] * (len(shape) - mask.dim())).expand(shape)


def _is_replaced(layer: Layer) -> bool:
    """Whether other tensors have taken the place of a layer's parameters."""
    own = layer.module._parameters
    return any(own.get(key) is not p for key, p in zip(layer.keys, layer.parameters, strict=True))


def adopted(tensors: Mapping[str, Tensor], weight: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies of a layer's tensors where its weight is.

    Args:
        tensors: by name.
        weight: the layer's.
        dtype: of floating-point ones; None: that of statistics of such a weight.
    """
    dtype = dtype or statistics_dtype(weight)
    return {
        key: t.to(weight.device, dtype if t.is_floating_point() else None, copy=True) for key, t in tensors.items()
    }


def encoded(value: Any) -> Any:
    """Nested values as tensors, numbers and dicts of them, which is all that a distributed checkpoint flattens."""
    if isinstance(value, str):
        return {"text": torch.tensor(list(value.encode()), dtype=torch.uint8)}
    # Marks are tensors, which torch takes in from a checkpoint even where the state here has none.
    if value is None:
        return {"none": torch.zeros(1, dtype=torch.int64)}
    if isinstance(value, (list, tuple)):
        length = torch.tensor([len(value)])
        return {"list": length} | {str(i): encoded(item) for i, item in enumerate(value)}
    if not isinstance(value, dict):
        return value
    if not value:
        return {"empty": torch.zeros(1, dtype=torch.int64)}
    found = {key: encoded(item) for key, item in value.items()}
    return value if all(found[key] is value[key] for key in value) else found


def decoded(value: Any) -> Any:
    """Inverse of ``encoded``."""
    if not isinstance(value, dict):
        return value
    if value.keys() == {"text"}:
        return bytes(value["text"].tolist()).decode()
    if value.keys() == {"none"}:
        return None
    if value.keys() == {"empty"}:
        return {}
    if "list" in value:
        return [decoded(value[str(i)]) for i in range(int(value["list"]))]
    # Torch adds what a checkpoint holds to what was there: an empty dictionary may have been filled.
    return {key: decoded(item) for key, item in value.items() if key != "empty"}


def _tensors_in(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_tensors_in(item) for item in value.values())
    return int(isinstance(value, Tensor))


def _first_trained(params: Sequence[Tensor]) -> Tensor:
    return next((p for p in params if p.requires_grad), params[0])


def _add_curvature(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """A hook on torch's state, before all others."""
    assert isinstance(optimizer, CurvatureOptimizer)
    curvature = optimizer._curvature()
    entries = optimizer._by_parameter(curvature)
    packed = {index: {k: v for k, v in entry.items() if k != ENTRY} for index, entry in state["state"].items()}
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for p, index in zip(group["params"], saved["params"], strict=True):
            if p in entries:
                packed.setdefault(index, {})[ENTRY] = entries[p]
    state["state"] = packed
    state["curvature"] = curvature


class OfGroups:
    """An attribute whose value groups may differ in: reading gives the default, setting sets it in all groups."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Optimizer, owner: type | None = None) -> Any:
        return self if optimizer is None else optimizer.defaults[self._name]

    def __set__(self, optimizer: Optimizer, value: Any) -> None:
        optimizer.defaults[self._name] = value
        for group in optimizer.param_groups:
            group[self._name] = value


def real(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Views of complex tensors as real ones of two channels, behind which they are optimized; others as they are."""
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]


def rate(group: Mapping[str, Any]) -> float | Tensor:
    """A group's learning rate: a number, or a tensor of no dimension on an accelerator, to read which would wait."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return lr
    return float(lr) if lr.device.type == "cpu" else lr.reshape(())


def known_rate(group: Mapping[str, Any]) -> float | Tensor:
    """A group's learning rate, or 1 where it has none that is a number: the optimizer then finds it by itself."""
    return rate(group) if isinstance(group.get("lr"), (int, float, Tensor)) else 1.0


def descend(params: list[Tensor], directions: list[Tensor], lr: float | Tensor) -> None:
    """``params -= lr * directions``, in place."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(directions, lr))
    else:
        torch._foreach_add_(params, directions, alpha=-lr)


def limited(updates: list[Tensor], largest: float, sizes: list[float]) -> list[float] | list[Tensor]:
    """``sizes``, less where the root mean square of ``size * update`` is above ``largest`` (Shazeer & Stern, 2018, 6).

    Numbers on a CPU; tensors of no dimension on an accelerator, to read which would wait.
    """
    wide = torch.float64 if any(u.dtype == torch.float64 for u in updates) else torch.float32
    norms = torch._foreach_norm(updates, 2, dtype=wide)
    ends = [largest * math.sqrt(u.numel()) for u in updates]
    if all(norm.device.type == "cpu" for norm in norms):
        lengths = torch.stack(list(norms)).tolist()
        # A length that is no number stays in the product with it.
        return [size if not size * n > end else end / n for size, n, end in zip(sizes, lengths, ends, strict=True)]
    shares = torch._foreach_reciprocal(norms)
    torch._foreach_mul_(shares, ends)
    return [share.clamp(max=size).to(u.dtype) for share, size, u in zip(shares, sizes, updates, strict=True)]


def descend_scaled(
    params: list[Tensor],
    moments: list[Tensor],
    denominators: list[Tensor],
    sizes: list[float],
    lr: float | Tensor,
    largest: float | None = None,
) -> None:
    """``params -= lr * updates``, in place, of ``sizes * moments / denominators``, each no longer than ``largest``."""
    if largest is None and not isinstance(lr, Tensor):
        torch._foreach_addcdiv_(params, moments, denominators, [-lr * size for size in sizes])
        return
    updates = list(torch._foreach_div(moments, denominators))
    scales = sizes if largest is None else limited(updates, largest, sizes)
    if isinstance(lr, Tensor) or isinstance(scales[0], Tensor):
        torch._foreach_mul_(updates, scales)
        descend(params, updates, lr)
    else:  # no pass that scales the updates
        for p, update, scale in zip(params, updates, scales, strict=True):
            p.add_(update, alpha=-lr * scale)


@dataclass
class Coverage:
    """Which parameters have which curvature, as a table (``str(coverage)``).

    Attributes:
        rows: (module or parameter, method, factor shapes, parameters, bytes of curvature) a line.
    """

    rows: list[tuple[str, str, str, int, int]] = field(default_factory=list)

    @property
    def fraction(self) -> float:
        """Share of the trainable parameters that have curvature rather than the fallback."""
        total = sum(row[3] for row in self.rows)
        return sum(row[3] for row in self.rows if not row[1].startswith("fallback")) / max(total, 1)

    @property
    def bytes(self) -> int:
        """Bytes of all curvature."""
        return sum(row[4] for row in self.rows)

    def __str__(self) -> str:
        header = ("module", "curvature", "factors", "parameters", "bytes")
        cells = [header, *((m, k, f, f"{n:,}", f"{b:,}") for m, k, f, n, b in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(5)]
        template = "  ".join(f"{{:{align}{width}}}" for align, width in zip("<<<>>", widths, strict=True))
        lines = [template.format(*row) for row in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(f"{self.fraction:.1%} of the trainable parameters under curvature, {self.bytes:,} bytes of it")
        return "\n".join(lines)


class CurvatureOptimizer(Optimizer):
    """Base of the optimizers that take more from the backward pass than the gradient.

    Training differs from any other optimizer in one line::

        optimizer.zero_grad()
        outputs = model(inputs)
        loss = criterion(outputs, targets)
        optimizer.backward(loss, outputs)      # in place of loss.backward()
        optimizer.step()

    Several ``backward`` calls on ``loss / k`` before one ``step`` are gradient accumulation: k micro-batches equal one
    batch. Hyper-parameters that may differ between parameters live in ``param_groups``; curvature is kept under layer
    *names* in ``state_dict()["curvature"]``, so a checkpoint of a wrapped model loads into a bare one and back.

    Args:
        model: the whole module (or None where the method needs parameters only). Wrappers are looked through.
        params: parameters or groups to train; default all of the model's.
        defaults: hyper-parameters of a group.
        update_every: curvature is gathered every so many steps, starting with the first. Where no gradient has come
            through a layer yet (behind a weight that starts at zero, say), once more after 1, 3, 7, 15, ... steps, up
            to that interval.
        loss_reduction: how the loss sums over examples; the gradient of the per-example loss is worked out from it.
        flags: what torch's optimizers take besides: ``maximize`` (climb the loss; may differ between groups), and those
            in ``UNUSED_FLAGS``, at the values that ask for nothing.

    Raises:
        ValueError: for a hyper-parameter out of its range, a flag that asks for what there is not, or a group with a
            value of its own for what is the whole optimizer's.
        TypeError: for an argument that is none.
    """

    #: Whether curvature is gathered more often at first: after 1, 3, 7, 15, ... steps, up to the interval.
    early_updates: bool = False

    #: Whether gradients must be differentiable (no torch.compile, no fused attention on due steps).
    needs_graph: ClassVar[bool] = False

    #: Attributes that ``_attach`` and ``_restore`` make: a copy makes its own.
    _bound: ClassVar[frozenset[str]] = frozenset({"blocks", "_recorder", "_uncovered", "_watching", "_owners"})

    def __init__(
        self,
        model: nn.Module | None,
        params: Params | None,
        defaults: dict[str, Any],
        *,
        update_every: int = 1,
        loss_reduction: Literal["mean", "sum"] = "mean",
        flags: Mapping[str, Any] | None = None,
    ) -> None:
        defaults = defaults | self._checked_flags(flags or {})
        check_range("update_every", update_every, 1)
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
        self.model = None if model is None else unwrap(model)
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
        self._owners: dict[Tensor, int] = {}  # which group a parameter is in; made when asked for
        self._scale = 1.0
        self._uncovered: dict[str, str] = {}  # why parameters have no block, by name
        self._reasons: dict[str, str] = {}  # why layers with a block have no curvature, by name
        self._told: set[str] = set()  # of which layers a warning has said so
        self._saw = False  # whether a pass came through the model in this step
        if params is None:
            if self.model is None:
                raise ValueError("params must be given where there is no model")
            params = self.model.parameters()
        super().__init__(params, defaults)
        self._places = self._where()
        self._marked = 0  # entries of the state that have a place for curvature
        self._asked = False  # whether the state was wanted before the first step

    def _attach(self) -> None:
        """Give the layers their blocks and the model its hooks: the last thing in building, and again in a copy."""
        if self.model is not None:
            remove_dead_hooks(self.model)
        for group in self.param_groups:
            self._check_group(group)

    def _checked_flags(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        """What groups get of torch's flags."""
        for name, value in flags.items():
            if name not in ("maximize", *UNUSED_FLAGS):
                raise TypeError(f"{type(self).__name__}.__init__() got an unexpected keyword argument {name!r}")
            if name != "maximize" and value not in (None, False):
                raise ValueError(
                    f"{name} must be false or left out, got {value!r}: it chooses among implementations of torch's "
                    f"own optimizers, and {type(self).__name__} has one."
                )
        return {"maximize": bool(flags.get("maximize", False))}

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a value out of its range, or a group's own for what is the whole optimizer's."""
        self._checked_flags({name: group[name] for name in UNUSED_FLAGS if name in group})
        if group.get("max_update") is not None:
            check_range("max_update", group["max_update"], 0, open_low=True)
        for name in inspect.signature(type(self).__init__).parameters:
            if name in group and name not in self.defaults and name not in ("params", "model"):
                mine = getattr(self, name, getattr(getattr(self, "options", None), name, None))
                if mine is not group[name] and mine != group[name]:
                    raise ValueError(
                        f"{name} is the whole optimizer's and cannot differ between groups: got {group[name]!r} for a "
                        f"group where {type(self).__name__} has {mine!r}."
                    )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch.optim.Optimizer. What is the whole optimizer's, such as ``update_every``, cannot differ.

        Layers whose parameters are added have curvature from the next update on.
        """
        if "loss_reduction" in self.__dict__ and self.__dict__.get("param_groups"):  # else _attach checks them all
            self._check_group(param_group)
        super().add_param_group(param_group)
        self._complete(self.param_groups[-1])
        if self._watching is not None:
            self._watch_layers()

    def _complete(self, group: dict[str, Any]) -> None:
        """Fill in what a group lacks: a state of an earlier version may not have it."""
        for name, value in self.defaults.items():
            if name != "differentiable":  # which torch has put there
                group.setdefault(name, value)

    # -- curvature of layers -----------------------------------------------------------------------------------------

    def _watch(
        self,
        make_block: Callable[[Layer], Approximation],
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
            make_block: the block of a layer.
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
                self.blocks[name] = before[name] if name in before else self._watching["make_block"](layer)
                continue
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

    def _group_of(self, p: Tensor) -> dict[str, Any] | None:
        """The group that a parameter is in."""
        if not self._owners:
            self._owners = {p: index for index, group in enumerate(self.param_groups) for p in group["params"]}
        return self.param_groups[self._owners[p]] if p in self._owners else None

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
        self._recorder.finish()
        blocks = list(self.blocks.values())
        reasons = self._recorder.reasons() | {b.layer.name: COMPUTED for b in blocks if _is_replaced(b.layer)}
        device = blocks[0].layer.parameters[0].device
        own = [self._recorder.silent, self._recorder.seen]
        flags = [*(b.observed for b in blocks), *(b.layer.name in reasons for b in blocks), *own]
        *flags, self._silent, self._saw = communication.anywhere(flags, device)
        if not self._saw:
            warnings.warn(
                "no backward pass came through the model in training mode since the last step, so its curvature was "
                "not updated: call model.train(), and the whole model rather than its parts, before the forward pass "
                "(a batch without examples shows nothing, either).",
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
        found: dict[str, dict[str, Tensor]] = {}
        for kind, members in kinds.items():
            found |= kind.estimate_all(members, *self._scaling())
        return self._exchanged({name: found[name] for name in self.blocks if name in found})

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
        """Estimates averaged over the ranks that have them, without those that are not finite."""
        if communication.world_size() > 1:
            shared = [name for name in estimates if not self.blocks[name].gathers]
            tensors = [t for name in shared for t in estimates[name].values()]
            weights = [float(self.blocks[name].observed) for name in shared for _ in estimates[name]]
            if tensors:
                communication.average_(tensors, torch.tensor(weights, device=tensors[0].device))
        if estimates:  # one synchronisation for all layers
            sums = torch.stack([sum((t.sum() for t in f.values()), start=torch.zeros(())) for f in estimates.values()])
            good = [name for name, finite in zip(estimates, sums.isfinite().tolist(), strict=True) if finite]
            self.rejected += len(estimates) - len(good)
            estimates = {name: estimates[name] for name in good}
        return estimates

    def curvature_matrices(self) -> dict[str, Tensor]:
        """Dense, undamped blocks by layer name, row-major over ``[d_out, d_in (+ 1)]``. For small nets."""
        return {name: block.to_dense() for name, block in self.blocks.items() if block.factors}

    def coverage(self) -> Coverage:
        """The table module → method → factor sizes → bytes, and what falls back to a first-order rule, and why.

        Which layers the model calls is known after the first step only.
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
            size = sum(item * torch.Size(shape).numel() for shape in shapes.values()) + self._cache_bytes(block)
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

    # -- the verbs -----------------------------------------------------------------------------------------------------

    def backward(
        self,
        loss: Tensor,
        outputs: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        scale: float = 1.0,
        retain_graph: bool = False,
    ) -> None:
        """Leave ``.grad`` as ``loss.backward()`` would, and gather curvature where this step is due.

        Args:
            loss: scalar; in accumulation, the micro-batch's loss divided by the number of micro-batches.
            outputs: the model's outputs, ``[batch, ...]``; needed by methods that sample targets, and for all the
                surest way to tell which examples there are.
            targets: of the loss, in the shape that the likelihood takes; they say what counts (padding does not).
                ``F.cross_entropy`` says so itself.
            mask: which observations count, bool, of the outputs' leading shape or of its first dimensions.
            scale: a factor inside ``loss`` that curvature must not see (``GradScaler.get_scale()``).
            retain_graph: another backward pass will go through the same graph; together they are one.

        Raises:
            ValueError: mask or targets do not fit the outputs.
        """
        if self._recorder is not None and self._recorder.recording:
            self._announce(loss, outputs, targets, mask, retain_graph)
        self._scale = float(scale)
        try:
            loss.backward(retain_graph=retain_graph)
        finally:
            self._scale = 1.0

    def _announce(
        self, loss: Tensor, outputs: Any, targets: Tensor | None, mask: Tensor | None, retain_graph: bool
    ) -> None:
        """Before a backward pass that shows layers: which examples there are, and which of them count."""
        assert self._recorder is not None
        if not isinstance(outputs, Tensor) or not outputs.dim() or not outputs.requires_grad:
            self._recorder.expect(retain_graph)
            return
        self._recorder.settle(self._as_observations(outputs, targets), retain_graph)
        counted = self._counted(loss, outputs, targets, mask)
        if counted is not None:
            arranged = self._recorder.arrange(counted)
            self._recorder.counts(arranged.view(len(arranged), -1).any(1))

    def _as_observations(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Outputs as ``[n, ..., features]``."""
        return outputs.unsqueeze(-1) if outputs.dim() == 1 else outputs

    def _counted(
        self, loss: Tensor, outputs: Tensor, targets: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        """Which observations count, bool ``[n, ...]``, as far as they tell it; None: all."""
        if mask is not None:
            return placed_mask(mask, self._as_observations(outputs, targets).shape[:-1])
        found = [s.targets for s in stated(loss, outputs) if s.kind == "cross_entropy" and s.targets is not None]
        return found[0] != -100 if found else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update curvature if it is due, then the parameters.

        Args:
            closure: optional; zeroes gradients, computes the loss, calls ``backward`` and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._come_alive()
        if not self._idle():
            self._refuse_sparse([p.grad for g in self.param_groups for p in g["params"] if p.grad is not None])
            self._follow_model()
            with self._climbing():
                self._advance()
            if len(self.state) != self._marked:
                self._mark()
        else:
            self._reset()
        return loss

    @contextmanager
    def _climbing(self) -> Iterator[None]:
        """Within it, gradients of groups that maximize are those of the negated loss."""
        params = [p for g in self.param_groups if g["maximize"] for p in g["params"] if p.grad is not None]
        own = [p.grad for p in params]
        try:
            with torch.enable_grad():  # AdaHessian may need their graph
                for p, g in zip(params, own, strict=True):
                    p.grad = -g
            yield
        finally:
            for p, g in zip(params, own, strict=True):
                p.grad = g.detach()

    def _advance(self) -> None:
        """A step on the gradients that there are."""
        self._forget_replaced()
        if self._due():
            with record_function(CURVATURE):
                if self._update_curvature():  # what saw nothing stays due
                    self._updated_at = self.steps
                    # A weight that starts at zero lets gradients through after a step: not to wait an interval for it.
                    self._again = 2 * self.steps + 1 if self._silent or self.early_updates else None
        self._precondition()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update_parameters(group, params, [p.grad for p in params])
        self._look_back()
        self._reset()
        self.steps += 1

    def _refuse_sparse(self, grads: Sequence[Tensor]) -> None:
        if any(g.is_sparse for g in grads):
            raise RuntimeError(f"{type(self).__name__} takes no sparse gradients: use nn.Embedding(sparse=False).")

    def _update_curvature(self) -> bool:
        """Fold what this step gathered into the running averages; whether a pass was there to gather from."""
        raise NotImplementedError

    def _precondition(self) -> None:
        """Before the parameters' update: what has to be worked out over all groups together."""

    def _look_back(self) -> None:
        """After the parameters' update: what depends on where it led."""

    def _update_parameters(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Update, in place, the parameters of one group that have gradients."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and whatever curvature was gathered since the last step (an overflowed AMP step, say)."""
        self._come_alive()
        super().zero_grad(set_to_none)
        self._reset()

    def _reset(self) -> None:
        for block in self.blocks.values():
            block.reset()
        if self._recorder is not None:
            self._recorder.reset()

    def _moments(self, params: list[Tensor], grads: list[Tensor], beta: float) -> tuple[list[Tensor], list[float]]:
        """Adam's first moments with this step's gradients in them, and their bias corrections ``1 - beta^t``.

        Those of complex parameters are views as ``real`` has them.
        """
        moments, corrections = [], []
        for p in params:
            state = self.state[p]
            if "exp_avg" not in state:
                state.update(step=0, exp_avg=torch.zeros_like(p))
            state["step"] += 1
            moments.append(state["exp_avg"])
            corrections.append(1 - beta ** state["step"])
        moments = real(moments)
        torch._foreach_lerp_(moments, real(grads), 1 - beta)
        return moments, corrections

    def _fallback(
        self, bare: list[tuple[Tensor, Tensor]], decay: float = 0.999, eps: float = 1e-8
    ) -> dict[Tensor, Tensor]:
        """Adam's denominators ``sqrt(v_hat) + eps`` of (parameter, gradient) pairs: steps of about lr.

        Complex parameters have one for either part, as ``real`` lays them out.
        """
        if not bare:
            return {}
        params, grads = [p for p, _ in bare], real(g for _, g in bare)
        for p in params:
            state = self.state[p]
            if "fallback_sq" not in state:  # what a momentum from before brings along counts as a gradient
                known = "exp_avg" in state and state["step"] > 1
                start = torch.zeros_like(p)
                if known:
                    square, past = real([start, state["exp_avg"]])
                    square.addcmul_(past, past, value=1 - decay)
                state["fallback_sq"], state["fallback_step"] = start, int(known)
        squares = real(self.state[p]["fallback_sq"] for p in params)
        torch._foreach_mul_(squares, decay)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - decay)
        corrections = []
        for p in params:
            self.state[p]["fallback_step"] += 1
            corrections.append((1 - decay ** self.state[p]["fallback_step"]) ** 0.5)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, corrections)
        torch._foreach_add_(denominators, eps)
        return dict(zip(params, denominators, strict=True))

    def diagnostics(self) -> dict[str, float]:
        """Scalars worth a line in the log; computed only when asked for."""
        return {"curvature/rejected": float(self.rejected)} if self.blocks else {}

    def close(self) -> None:
        """Remove every hook from the model. Idempotent; the optimizer then keeps the curvature it has."""
        if self._recorder is not None:
            self._recorder.close()

    # -- state ---------------------------------------------------------------------------------------------------------

    def _curvature(self) -> dict[str, Any]:
        """What is known of the curvature: plain tensors and values. ``_restore`` takes it back."""
        return {
            "steps": self.steps,
            "updated_at": self._updated_at,
            "again_at": LONG_AGO if self._again is None else self._again,
            "layers": {name: dict(block.factors) for name, block in self.blocks.items() if block.factors},
            "kinds": {name: type(block).__name__ for name, block in self.blocks.items() if block.factors},
            "rows": "" if self._recorder is None else self._recorder.state(),
        }

    def _check(self, saved: dict[str, Any]) -> None:
        """Raise ValueError with a sentence if this is the curvature of another method or of another model."""
        if unknown := sorted(set(saved["layers"]) - set(self.blocks)):
            raise ValueError(f"the state holds curvature of {unknown[0]!r}, which is not a layer of this model.")
        for name, kind in saved.get("kinds", {}).items():
            if kind != (here := type(self.blocks[name]).__name__):
                raise ValueError(f"the state holds {kind} of {name!r}, where {here} belong: another method saved it.")
        for name, factors in saved["layers"].items():
            shapes = self.blocks[name].shapes()
            for key, tensor in factors.items():
                if tuple(tensor.shape) != tuple(shapes[key]):
                    raise ValueError(
                        f"factor {key} of {name!r} is {list(tensor.shape)} in the state but {list(shapes[key])} here."
                    )

    def _restore(self, saved: dict[str, Any]) -> None:
        """Take over what ``_curvature`` returned, copied, in the precision and on the device of the layers here."""
        self.steps = int(saved["steps"])
        self._updated_at = int(saved.get("updated_at", LONG_AGO))
        if self._recorder is not None and saved.get("rows"):
            self._recorder.restore(saved["rows"])
            self._reasons = self._recorder.reasons()
        again = int(saved.get("again_at", LONG_AGO))
        self._again = None if again == LONG_AGO else again
        for name, block in self.blocks.items():
            block.factors = adopted(saved["layers"].get(name, {}), block.layer.parameters[0])

    def __getstate__(self) -> dict[str, Any]:
        """All but the hooks, on the model and on this optimizer; and curvature as ``state_dict`` has it.

        So ``copy.deepcopy((model, optimizer))`` and pickling give a pair that trains like this one, and a copy of the
        optimizer alone brings its own copy of the model. What a step under way has gathered stays behind.
        """
        self._come_alive()
        # "step" is among them where a scheduler has wrapped it; torch's own copies do without hooks, too.
        left = {n for n in self.__dict__ if n in self._bound or n == "step" or n.startswith("_optimizer_")}
        kept = {name: value for name, value in self.__dict__.items() if name not in left}
        return kept | {"_brought": self._curvature()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Torch's, which loading a state calls, too; a copy then gets blocks and hooks of its own."""
        super().__setstate__(state)
        for group in self.param_groups:
            self._complete(group)
        # A model that holds its optimizer is not whole yet when the copy of the optimizer is.
        if "_brought" in state and (self.model is None or "_modules" in self.model.__dict__):
            self._come_alive()

    if not TYPE_CHECKING:  # to whom every attribute would be there

        def __getattr__(self, name: str) -> Any:
            """What a copy that is not attached yet has not made."""
            if name in self._bound and "_brought" in self.__dict__:
                self._come_alive()
                return getattr(self, name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _come_alive(self) -> None:
        """What a copy still has to do: attach itself to its model."""
        if (brought := self.__dict__.pop("_brought", None)) is None:
            return
        self.blocks, self._recorder, self._uncovered, self._watching, self._owners = {}, None, {}, None, {}
        self._attach()
        self._restore(brought)
        self._reset()

    def _where(self) -> list[tuple[torch.dtype, torch.device]]:
        return [(p.dtype, p.device) for group in self.param_groups for p in group["params"]]

    def _follow_model(self) -> None:
        """Bring the state into the precision and to the device of the parameters, where they have changed."""
        if (places := self._where()) == self._places:
            return
        self._places = places
        for p, entry in self.state.items():
            for key, value in entry.items():
                if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                    entry[key] = value.to(p.device, p.dtype if value.is_complex() else p.dtype.to_real())
        self._restore(self._curvature())

    def state_dict(self) -> dict[str, Any]:
        """Torch's optimizer state and ``"curvature"``: {"steps", "layers": {name: {factor: tensor}}}; plain tensors.

        What belongs to a layer is also in its weight's entry of ``"state"``, the rest in the first one, where
        ``torch.distributed.checkpoint`` finds it. These are the same tensors, not more of them. Hooks see it all.
        """
        handle = self.register_state_dict_post_hook(_add_curvature, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _carriers(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The parameters in whose state curvature is kept: of the whole model, and of each layer.

        Those that are trained: the others' state does not come back from a distributed checkpoint.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        layers = {name: block.layer.parameters for name, block in self.blocks.items()}
        return _first_trained(params), {name: _first_trained(own) for name, own in layers.items()}

    def _by_parameter(self, curvature: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """Curvature as entries of the parameters' state; ``_joined`` is the inverse."""
        whole, layers = self._carriers()
        # What was found out of rows has no fixed size, which these checkpoints need: it is found out again.
        rest = {key: value for key, value in curvature.items() if key not in (*BY_LAYER, "rows")}
        entries: dict[Tensor, dict[str, Any]] = {whole: {"whole": encoded(rest)}}
        for name, carrier in layers.items():
            own = {key: curvature[key][name] for key in BY_LAYER if name in curvature.get(key, {})}
            count = _tensors_in(own)
            if count == 0 and self._asked:
                own = self._template(name)
            if own or self._asked:
                own = {key: encoded(value) for key, value in own.items()}
                entries.setdefault(carrier, {})["layer"] = {"tensors": count} | own
        return entries

    def _joined(self, entries: dict[Tensor, dict[str, Any]]) -> dict[str, Any]:
        """Curvature from entries of the parameters' state.

        Raises:
            ValueError: if some of it is missing.
        """
        whole = [entry["whole"] for entry in entries.values() if entry.get("whole")]
        if not whole:
            raise ValueError(f"this state has no curvature: it was not saved by {type(self).__name__}.")
        curvature = {key: {} for key in BY_LAYER if key in self._curvature()} | decoded(whole[0])
        for name, block in self.blocks.items():
            for entry in [entries[p]["layer"] for p in block.layer.parameters if entries.get(p, {}).get("layer")]:
                own = decoded({key: value for key, value in entry.items() if key != "tensors"})
                if not (count := int(entry["tensors"])):
                    continue  # a mere template
                if (found := _tensors_in(own)) != count:
                    raise ValueError(
                        f"the state holds {found} of the {count} tensors of the curvature of {name!r}: where a "
                        "checkpoint fills in a state that was there before, take a step of training before asking for "
                        "that state, or save optimizer.state_dict() with torch.save."
                    )
                for key, value in own.items():
                    curvature.setdefault(key, {})[name] = value
        return curvature

    def _template(self, name: str) -> dict[str, Any]:
        """What a layer without curvature will have, in zeros, for a checkpoint to be read into."""
        weight, block = self.blocks[name].layer.parameters[0], self.blocks[name]
        dtype = statistics_dtype(weight)
        shapes = block.shapes()
        layer = {key: torch.zeros(shape, dtype=dtype, device=weight.device) for key, shape in shapes.items()}
        return {"layers": layer, "kinds": type(block).__name__} if layer else {}

    def _initial(self, p: Tensor) -> dict[str, Any]:
        """The state that a parameter will have from its first step on, before it."""
        raise NotImplementedError

    def _initial_fallback(self, p: Tensor) -> dict[str, Any]:
        covered = any(p is q for block in self.blocks.values() for q in block.layer.parameters)
        return {} if covered else {"fallback_sq": torch.zeros_like(p), "fallback_step": 0}

    def _initialise(self) -> None:
        """Make the state that ``torch.distributed.checkpoint`` asks for before the first step."""
        self._asked = True
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    self.state[p].update(self._initial(p))
        self._mark()

    def _mark(self) -> None:
        """Torch reads from flattened checkpoints what is in the state already, by name: so the name is there."""
        for entry in self.state.values():
            entry.setdefault(ENTRY, {})
        self._marked = len(self.state)

    def _idle(self) -> bool:
        """Whether there is nothing to do: no gradient; or all are zero, and so are rates, before the first step.

        The latter is how ``torch.distributed.checkpoint`` makes optimizers create their state.
        """
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return communication.world_size() == 1
        if self.steps or self.state or any(group["lr"] != 0 for group in self.param_groups):
            return False
        if any(p.grad.is_sparse or bool(p.grad.any()) for p in params):
            return False
        self._initialise()
        return True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; the argument is neither changed nor aliased.

        Curvature comes in the precision of the layers here, whatever it was saved in.

        Raises:
            ValueError: if the state is not of this kind of optimizer or of another model.
        """
        taken: list[dict[str, Any]] = []

        def take(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            """After all others: what torch gets is its own half."""
            check_wrappers(self, state)
            curvature, rest = self._apart_from_torch(state)
            self._check(curvature)
            taken.append(curvature)
            return rest

        def give_back(optimizer: Optimizer) -> None:
            """Before all others."""
            self._restore(taken[0])
            self._reset()
            self._mark()

        before = self.register_load_state_dict_pre_hook(take)
        after = self.register_load_state_dict_post_hook(give_back, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _apart_from_torch(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A state's curvature, and a copy of the rest."""
        entries: dict[Tensor, dict[str, Any]] = {}
        for group, saved in zip(self.param_groups, state["param_groups"], strict=False):  # torch will say so
            for p, index in zip(group["params"], saved["params"], strict=False):
                if isinstance(entry := state["state"].get(index), dict):
                    entries[p] = entry.get(ENTRY, {})
        curvature = state["curvature"] if "curvature" in state else self._joined(entries)
        rest = {
            # Reading a flattened checkpoint leaves {} of what was not in it.
            index: {k: v for k, v in entry.items() if k != ENTRY and v != {}} if isinstance(entry, dict) else entry
            for index, entry in state["state"].items()
        }
        return curvature, copy.deepcopy({"state": rest, "param_groups": state["param_groups"]})
