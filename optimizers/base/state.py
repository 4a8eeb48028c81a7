"""The state: as torch keeps it, as distributed checkpoints flatten it, and in copies and pickles."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..curvature import communication
from ..curvature.approximations import statistics_dtype
from ..wrapper import check_wrappers
from .encoding import adopted, decoded, encoded, tensors_in
from .layers import LONG_AGO, LayerwiseOptimizer

#: Parts of ``state_dict()["curvature"]`` that have an entry for each layer.
BY_LAYER = ("layers", "kinds", "inverses", "block_updates", "samples", "inner")

#: Where a parameter's state has a layer's curvature.
ENTRY = "curvature"


def _first_trained(params: Sequence[Tensor]) -> Tensor:
    return next((p for p in params if p.requires_grad), params[0])


def _add_curvature(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """A hook on torch's state, before all others."""
    assert isinstance(optimizer, StatefulOptimizer)
    curvature = optimizer._whole(optimizer._curvature())
    entries = optimizer._by_parameter(curvature)
    packed = {index: {k: v for k, v in entry.items() if k != ENTRY} for index, entry in state["state"].items()}
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for p, index in zip(group["params"], saved["params"], strict=True):
            if p in entries:
                packed.setdefault(index, {})[ENTRY] = entries[p]
    state["state"] = packed
    state["curvature"] = curvature


class StatefulOptimizer(LayerwiseOptimizer):
    """An optimizer whose curvature is part of its state, whatever way the state goes. Arguments as of its base."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._places = self._where()
        self._marked = 0  # entries of the state that have a place for curvature
        self._asked = False  # whether the state was wanted before the first step

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

    def _whole(self, curvature: dict[str, Any]) -> dict[str, Any]:
        """Curvature as a state has it, of what ``_curvature`` found here: what other ranks keep included."""
        return curvature

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
            count = tensors_in(own)
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
                if (found := tensors_in(own)) != count:
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
