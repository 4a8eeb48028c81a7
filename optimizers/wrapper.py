"""What goes around any optimizer, and is one to everybody who trains with it.

A wrapper shares its optimizer's groups, adds its own state to ``state_dict()``, and hands on whatever it does not know:
``backward``, ``coverage``, ``renew``, ``close``, hyper-parameters, ... Wrappers nest.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .checks import refuse_sharded
from .proxies import hand_on

#: Where a state says which wrappers were around the optimizer, from the outermost on.
WRAPPERS = "wrappers"

#: Torch's dictionaries of hooks, one set for each optimizer.
HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside all wrappers; itself if there is none."""
    while isinstance(optimizer, Wrapper):
        optimizer = optimizer.inner
    return optimizer


def wrappers(optimizer: Optimizer) -> list[str]:
    """The kinds of the wrappers around an optimizer, from the outermost on."""
    found = []
    while isinstance(optimizer, Wrapper):
        found.append(optimizer.entry)
        optimizer = optimizer.inner
    return found


def check_wrappers(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """See to it that a state is of the wrappers that there are.

    Args:
        optimizer: any, wrapped or not.
        state: what ``state_dict()`` returned. One that went through ``torch.distributed.checkpoint`` does not say.

    Raises:
        ValueError: it is of others.
    """
    here, saved = wrappers(optimizer), list(state.get(WRAPPERS, {}))
    if here != saved and (WRAPPERS in state or (here and "param_groups" in state and not _has_own(state, here[0]))):
        raise ValueError(
            f"the state is of {_described(saved)} and here is {_described(here)}: build what was saved, or start from "
            "the weights alone."
        )


def _described(kinds: Sequence[str]) -> str:
    return " around ".join([*kinds, "an optimizer"]) if kinds else "an optimizer with nothing around it"


def _has_own(state: Mapping[str, Any], kind: str) -> bool:
    """Whether a state without a list of wrappers may still be of this kind: of entries, or of no step yet."""
    entries = [entry for entry in state.get("state", {}).values() if isinstance(entry, Mapping)]
    return "curvature" not in state and (not entries or any(kind in entry for entry in entries))


def half(p: Tensor) -> bool:
    """Whether a parameter is in a format too coarse for averages and small differences."""
    return p.dtype in (torch.float16, torch.bfloat16)


def wide(p: Tensor) -> torch.dtype:
    """The format in which averages of a parameter are kept: its own, or float32 where that is half of it."""
    return torch.float32 if half(p) else p.dtype


class Wrapper(Optimizer):
    """Base of what goes around an optimizer and changes its steps, or what is made of them.

    Groups, defaults and hyper-parameters are the optimizer's own, so schedulers and groups work on both as on one. An
    attribute that the wrapper does not have is the optimizer's, for reading and for setting; where both have one of
    that name (``decay``, say), the optimizer's is ``wrapper.inner.decay``. ``state`` shows what both keep of each
    parameter, for reading only. Step and state hooks are each one's own.

    A closure is called once, before the step. Hence optimizers that need one, to call the model several times a step,
    cannot be wrapped.

    Args:
        optimizer: any that steps on gradients.

    Raises:
        TypeError: it is no optimizer, or of weights that are sharded over processes where the wrapper needs whole ones.
        ValueError: it needs a closure, or there is a wrapper of this kind around it already.
    """

    #: Name of the kind, in configurations and under which state is kept.
    entry: ClassVar[str]

    #: Attributes that copies and pickles do without.
    _transient: ClassVar[frozenset[str]] = frozenset()

    #: Whether each parameter is for itself, so that pieces of them do as well (see ``checks.are_sharded``).
    of_pieces: ClassVar[bool] = False

    inner: Optimizer

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hand_on(cls)

    def __init__(self, optimizer: Optimizer) -> None:
        # Without Optimizer's own: groups and state stay the inner one's, which replaces them when it loads its state.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ValueError(
                f"{type(self).__name__} cannot go around {type(optimizer).__name__}, which calls the model itself "
                "through a closure: choose an optimizer that steps on gradients."
            )
        if self.entry in wrappers(optimizer):
            raise ValueError(f"there is {self.entry} around this optimizer already: once is enough.")
        if not self.of_pieces:
            refuse_sharded(type(self).__name__, [p for group in optimizer.param_groups for p in group["params"]])
        self.inner = optimizer
        self._prepare()

    def _prepare(self) -> None:
        """What torch's constructor does beside groups and state."""
        for name in HOOKS:
            if name not in self.__dict__:
                self.__dict__[name] = OrderedDict()
        self._patch_step_function()
        self._warned_capturable_if_run_uncaptured = True

    # -- the inner optimizer's -----------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The optimizer's own groups."""
        return self.inner.param_groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The optimizer's own."""
        return self.inner.defaults

    @property
    def state(self) -> Mapping[Tensor, dict[str, Any]]:  # type: ignore[override]
        """What the optimizer keeps of each parameter, and under ``entry`` what the wrapper does; for reading."""
        merged: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        merged.update(self.inner.state)
        for p, own in self._entries().items():
            merged[p] = {**merged[p], self.entry: own}
        return MappingProxyType(merged)

    if not TYPE_CHECKING:  # to whom every attribute would be there

        def __getattr__(self, name: str) -> Any:
            """The optimizer's, but for what torch and packages keep to themselves."""
            if name.startswith("_") or "inner" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set one's own attribute, or else the optimizer's if it has it."""
        mine = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        inner = self.__dict__.get("inner")
        if mine or inner is None or not hasattr(inner, name):
            object.__setattr__(self, name, value)
        else:
            setattr(inner, name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__} around {self.inner!r}"

    # -- the verbs -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The optimizer's step, and what the wrapper makes of it.

        Args:
            closure: optional; zeroes gradients, computes the loss, calls ``backward`` and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        self._check_ready()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._is_asked_for_state():
            self.inner.step()
            self._begin([p for group in self.param_groups for p in group["params"] if p.requires_grad])
        else:
            self._advance()
        return loss

    def _check_ready(self) -> None:
        """Raise RuntimeError with a sentence where a step would be wrong."""

    def _advance(self) -> None:
        """A step on the gradients that there are."""
        raise NotImplementedError

    def _begin(self, params: list[Tensor]) -> None:
        """Make the wrapper's state of parameters that have none yet, before their first step."""

    def _is_asked_for_state(self) -> bool:
        """Whether ``torch.distributed.checkpoint`` makes the state appear: with gradients and rates of zero."""
        if self.inner.state or any("lr" in group and group["lr"] != 0 for group in self.param_groups):
            return False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return bool(grads) and not any(bool(g.any()) for g in grads if not g.is_sparse)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See torch.optim.Optimizer."""
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch.optim.Optimizer."""
        self.inner.add_param_group(param_group)

    def diagnostics(self) -> dict[str, float]:
        """Scalars worth a line in the log: the optimizer's, and the wrapper's own."""
        return dict(getattr(self.inner, "diagnostics", dict)())

    # -- state ---------------------------------------------------------------------------------------------------------

    def _entries(self) -> Mapping[Tensor, dict[str, Any]]:
        """The wrapper's state of each parameter: tensors and plain values by name."""
        return {}

    def _settings(self) -> dict[str, Any]:
        """What else a resumed wrapper needs: plain values."""
        return {}

    def _check_entries(self, entries: Mapping[Tensor, dict[str, Any]]) -> None:
        """Raise ValueError with a sentence if these do not belong to the parameters here."""

    def _restore(self, entries: dict[Tensor, dict[str, Any]], settings: Mapping[str, Any]) -> None:
        """Take over copies of what ``_entries`` and ``_settings`` returned."""

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, with the wrapper's state of each parameter under ``entry`` in ``"state"``.

        ``"wrappers"`` names the wrappers, from the outermost on, with what else they keep. Torch's own optimizers do
        not look at it when they load a state, and go on without: ``check_wrappers`` tells.
        """
        for pre in self._optimizer_state_dict_pre_hooks.values():
            pre(self)
        found = self.inner.state_dict()
        entries, packed = self._entries(), dict(found["state"])
        for p, index in self._numbered(found["param_groups"]):
            if p in entries:
                packed[index] = {**packed.get(index, {}), self.entry: dict(entries[p])}
        state = found | {"state": packed, WRAPPERS: {self.entry: self._settings()} | found.get(WRAPPERS, {})}
        for post in self._optimizer_state_dict_post_hooks.values():
            if (changed := post(self, state)) is not None:
                state = changed
        return state

    def _numbered(self, saved: Iterable[Mapping[str, Any]]) -> list[tuple[Tensor, Any]]:
        """Parameters with their numbers in a state's groups."""
        pairs = zip(self.param_groups, saved, strict=False)  # torch will say so
        return [pair for own, other in pairs for pair in zip(own["params"], other["params"], strict=False)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; the argument is neither changed nor, by the wrapper, aliased.

        Raises:
            ValueError: if the state is of an optimizer without this wrapper, of other wrappers or of another model.
        """
        state = dict(state_dict)
        for pre in self._optimizer_load_state_dict_pre_hooks.values():
            if (changed := pre(self, state)) is not None:
                state = changed
        check_wrappers(self, state)
        numbers = {index: p for p, index in self._numbered(state["param_groups"])}
        entries: dict[Tensor, dict[str, Any]] = {}
        rest: dict[Any, Any] = {}
        for index, entry in state["state"].items():
            if isinstance(entry, Mapping) and self.entry in entry:
                own, entry = entry[self.entry], {k: v for k, v in entry.items() if k != self.entry}
                if index in numbers and own:
                    entries[numbers[index]] = dict(own)
            if entry or not isinstance(entry, Mapping):
                rest[index] = entry
        self._check_entries(entries)
        inner = {key: value for key, value in state.items() if key != WRAPPERS} | {"state": rest}
        settings = dict(state.get(WRAPPERS, {}))
        own_settings = settings.pop(self.entry, {})
        self.inner.load_state_dict(inner | ({WRAPPERS: settings} if settings else {}))
        self._restore(entries, own_settings)
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def __getstate__(self) -> dict[str, Any]:
        """All but hooks: copies of a model with its wrapped optimizer train like the originals."""
        # "step" is there where a scheduler has wrapped it.
        left = {name for name in self.__dict__ if name == "step" or name.startswith("_optimizer_")} | self._transient
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()
