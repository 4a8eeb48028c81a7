"""A callable's signature is its schema: the one mechanism that checks every value of a configuration.

A group file of `configs/` names a callable (`_target_`) and gives its keyword parameters. Here each key is looked up
among the callable's parameters (with a did-you-mean) and each value is checked against its type hint. Ranges are the
callable's own business: it raises `ValueError("lr must be positive, got -1")`, which `build` completes with the group.
"""

from __future__ import annotations

import errno
import importlib
import inspect
import math
import re
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch

from data import DataError, own
from data.base import told
from models import GAN
from optimizers import Gaussian, build_optimizer
from optimizers.packaged import Package
from training.errors import UserError, did_you_mean, hidden, lack_of_memory
from training.names import AROUND, PLAYERS, TARGET
from training.runs.finetune import parameter_groups
from training.schedules import Scalars, ScalarSchedule, trial
from training.tasks.players import Players

# Parameters that the program supplies, by group: they have no entry in a YAML file and a user cannot set them.
# A model's facts (in_channels, num_classes, ...) are its keyword-only parameters without a default.
INJECTED: dict[str, frozenset[str]] = {
    "dataset": frozenset({"seed", "device", "rank", "world_size"}),
    "optimizer": frozenset({"model", "params", "likelihood", "seed", "loss_reduction", "aux_loader"}),
    "step_length": frozenset({"optimizer", "model"}),
    "averaging": frozenset({"optimizer"}),
    "scheduler": frozenset({"optimizer", "ticks"}),
}
# Where callables live that run folders of earlier versions name elsewhere.
MOVED = {
    "training.adversarial": "training.show.samples",
    "training.reconstructions": "training.show.reconstructions",
    "training.sample_text": "training.show.sample_text",
}
# Where our own callables are.
OURS = ("optimizers", "models", "data", "training", "analysis")
# Packages whose exceptions for a value that they refuse are no ValueErrors.
PECULIAR = ("pytorch_optimizer",)


def locate(target: Any, where: str) -> Callable[..., Any]:
    """The callable behind a dotted path such as `torch.optim.SGD`.

    Raises:
        UserError: the module cannot be imported, or holds no such callable.
    """
    if not isinstance(target, str) or not re.fullmatch(r"[\w-]+(\.[\w-]+)+", target):
        raise UserError(f"{where}.{TARGET} must be a dotted path such as torch.optim.SGD, got {target!r}")
    module_name, _, name = target.rpartition(".")
    module_name = MOVED.get(module_name, module_name)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        why = str(error) if isinstance(error, ImportError) else told(error)
        raise UserError(f"{where}.{TARGET}: {module_name!r} cannot be imported ({why}){hidden(module_name)}") from error
    if not callable(found := getattr(module, name, None)):
        inside = f": it is a module, give one of its callables, {target}.NAME" if inspect.ismodule(found) else ""
        hint = hidden(module_name) or inside or did_you_mean(name, dir(module))
        raise UserError(f"{where}.{TARGET}: {module_name} has no callable {name!r}{hint}")
    return found


def is_ours(function: Callable[..., Any]) -> bool:
    """Whether a callable is a part of Curvlab."""
    return str(getattr(function, "__module__", "")).removeprefix("curvlab.").partition(".")[0] in OURS


def parameters(function: Callable[..., Any], group: str = "") -> dict[str, inspect.Parameter]:
    """The parameters of `function` that a configuration may set: all but the injected ones of its group."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = {name: p for name, p in _signature(function).items() if p.kind not in variadic}
    if group == "optimizer":  # its first parameter takes the model or its tensors, whatever the name
        found.pop(next(iter(found), ""), None)
    if group == "dataset" and not is_ours(function):  # which may call `wrap`
        found = {name: _signature(own.wrap)[name] for name in own.ASKED} | found
    injected = INJECTED.get(group, frozenset())
    return {
        name: parameter
        for name, parameter in found.items()
        if name not in injected
        and not (group == "model" and parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty)
    }


def check(node: Mapping[str, Any], where: str, group: str = "") -> dict[str, Any]:
    """Check one `_target_` node against the signature of its callable.

    Args:
        node: the node, resolved to plain containers.
        where: dotted name of the node, for the sentences ("optimizer").
        group: config group, which decides the injected parameters; "" for none.

    Returns:
        The node with its values brought to their hinted types (an int where a float is meant becomes a float).

    Raises:
        UserError: unknown key, wrong type or missing mandatory key.
    """
    function = locate(node.get(TARGET), where)
    options = {name: value for name, value in node.items() if name != TARGET}
    chosen: dict[str, Any] = {}
    if isinstance(function, Package):  # its options are those of the class that it is asked for
        name = {"name": options.pop("name")} if "name" in options else {}
        chosen = check_options(function.choose, name, where)
        with refusals(where, chosen):
            function = function.choose(**chosen)
    return {TARGET: node[TARGET], **chosen, **check_options(function, options, where, group)}


def check_options(function: Callable[..., Any], options: Mapping[str, Any], where: str, group: str = "") -> dict:
    """Check keyword options against the signature of `function`; see `check`."""
    prefix = f"{where}." if where else ""
    known = parameters(function, group)
    # An optimizer that takes whatever it is given would drop a typo in silence.
    open_ended = group != "optimizer" and any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in _signature(function).values()
    )
    names = list(known)
    hints = ({name: _hints(own.wrap)[name] for name in own.ASKED} if group == "dataset" else {}) | _hints(function)
    checked: dict[str, Any] = {}
    for name, value in options.items():
        if name not in names and not open_ended:
            hint = did_you_mean(name, names) or (f"; it takes {', '.join(names)}" if names else "; it takes no options")
            raise UserError(f"{prefix}{name}: {_name(function)} has no such option{hint}")
        checked[name] = check_value(value, hints.get(name, Any), f"{prefix}{name}", finite=is_ours(function))
    missing = [name for name in names if known[name].default is inspect.Parameter.empty and name not in options]
    if group == "model" and not is_ours(function):  # facts of the data set, it may be, of whatever kind
        missing = []
    if missing:
        needs = f": {_name(function)} needs it" if where else " from the configuration"
        raise UserError(f"{prefix}{missing[0]} is missing{needs}")
    return checked


def check_value(value: Any, hint: Any, where: str, finite: bool = False) -> Any:
    """The value brought to the type `hint`; see `check`. Infinities may be meant where it is not `finite`, but for lr.

    Raises:
        UserError: the value does not fit the hint.
    """
    if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and (finite or where.endswith(".lr")))):
        raise UserError(f"{where} must be a finite number, got {value}")
    try:
        return _fit(value, hint, where)
    except TypeError:
        got = "null" if value is None else repr(value)
        mistyped = ""
        if isinstance(value, str):
            mistyped = did_you_mean(value, [choice for choice in _choices(hint) if isinstance(choice, str)])
        raise UserError(f"{where} must be {describe(hint)}, got {got}{mistyped}") from None


def describe(hint: Any) -> str:
    """A type hint in words: `float | None` is "a number or null"."""
    plain: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    plain |= {types.NoneType: "null", dict: "a group of keys"}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join("null" if choice is None else str(choice) for choice in args)
    if origin in (typing.Union, types.UnionType):
        words = [describe(arm) for arm in args if arm in plain or typing.get_origin(arm) is not None]
        return " or ".join(dict.fromkeys(words)) or str(hint)
    if isinstance(origin, type) and issubclass(origin, Sequence) and args:
        items = [arm for arm in args if arm is not Ellipsis]
        kinds = " and ".join(dict.fromkeys(describe(arm) for arm in items))
        count = f" of {len(args)} values" if origin is tuple and Ellipsis not in args else ""
        return f"a list{count} (each {kinds})"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a group of keys"
    return plain.get(hint) or str(getattr(hint, "__name__", hint))


def build(node: Mapping[str, Any], where: str, /, *, through: Callable[..., Any] | None = None, **injected: Any) -> Any:
    """Call the node's `_target_` with its options and the injected values.

    Args:
        node: a checked node.
        where: its dotted name, for the sentences.
        through: a function called as `through(target, **options, **injected)` in place of the target itself.
        injected: values for the injected parameters.

    Raises:
        UserError: the callable refused a value (`ValueError`), the sentence completed with the group's name.
    """
    function = locate(node[TARGET], where)
    options = {name: value for name, value in node.items() if name != TARGET}
    with refusals(where, options, function):
        return through(function, **options, **injected) if through else function(**options, **injected)


def build_named(nodes: Mapping[str, Any], group: str) -> list[Any]:
    """The callbacks, or loggers, of checked nodes; each knows its place, for sentences about it.

    Raises:
        UserError: one refused an option.
    """
    built = {f"{group}.{name}": build(node, f"{group}.{name}") for name, node in nodes.items()}
    for where, one in built.items():
        one.where = where
    return [*built.values()]


def build_optimizers(config: Mapping[str, Any], model: torch.nn.Module, **injected: Any) -> torch.optim.Optimizer:
    """The optimizer of a model, or both players' if it has two: each its own, or else the one of all; wrapped.

    The generator's optimizer sees the whole game, through which its gradients flow, and trains the generator's
    parameters alone; one that sorts a model's parameters itself sees the generator alone.

    Args:
        config: a checked configuration.
        model: to train.
        injected: likelihood and seed.

    Raises:
        UserError: a value is refused, or an entry does not go with the model.
    """
    theirs = [name for name in PLAYERS if config.get(name)]
    tuned = any(config["finetune"].values())
    if not isinstance(model, GAN):
        refuse_players(config)
        if tuned:
            with refusals("finetune", config["finetune"]):
                injected["params"] = parameter_groups(model, **config["finetune"], lr=config["optimizer"].get("lr"))
        optimizer = build(config["optimizer"], "optimizer", through=build_optimizer, model=model, **injected)
        return wrap(config, optimizer, model)
    if tuned:
        raise UserError("finetune is for models with one optimizer and this one has two players: leave it out")

    def through(target: Callable[..., torch.optim.Optimizer], **options: Any) -> torch.optim.Optimizer:
        if "params" in inspect.signature(target).parameters:
            return build_optimizer(target, model, params=list(model.generator.parameters()), **options)
        return build_optimizer(target, model.generator, **options)

    seed = injected.pop("seed")
    names = [name if name in theirs else "optimizer" for name in PLAYERS]
    generator = build(config[names[0]], names[0], through=through, seed=seed, **injected)
    critic = build(config[names[1]], names[1], through=build_optimizer, model=model.critic, seed=seed + 1, **injected)
    return Players(wrap(config, generator, model.generator), wrap(config, critic, model.critic))


def refuse_players(config: Mapping[str, Any]) -> None:
    """Raise a sentence if a configuration, whose model is none of two players, has an optimizer for one of them."""
    for name in PLAYERS:
        if config.get(name):
            raise UserError(
                f"optimizer@{name} is for a model of two players and this one has no {name}: leave it out, or choose "
                "one of them, such as model=dcgan"
            )


def wrap(config: Mapping[str, Any], optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> torch.optim.Optimizer:
    """An optimizer with what the configuration puts around it.

    Args:
        config: a checked configuration.
        optimizer: any.
        model: that it trains.

    Raises:
        UserError: a value is refused, or the optimizer.
    """
    for group in AROUND:
        if node := config.get(group):
            asked = inspect.signature(locate(node[TARGET], group)).parameters
            found: dict[str, Any] = {"optimizer": optimizer} | ({"model": model} if "model" in asked else {})
            optimizer = build(node, group, **found)
    return optimizer


def build_schedule(node: Mapping[str, Any]) -> Callable[..., Any]:
    """The schedule `(optimizer, ticks) -> scheduler` of a checked node, tried out on a throw-away optimizer.

    Raises:
        UserError: it refused an option.
    """
    build(node, "scheduler", optimizer=trial(), ticks=1000)
    return partial(locate(node[TARGET], "scheduler"), **{name: v for name, v in node.items() if name != TARGET})


def build_scalars(nodes: Mapping[str, Any]) -> dict[str, ScalarSchedule]:
    """The schedules of an optimizer's scalars, from the checked nodes under `schedules`.

    Raises:
        UserError: one refused an option.
    """
    built = {}
    for name, node in nodes.items():
        with refusals(f"schedules.{name}", node):
            built[name] = ScalarSchedule(**node)
    return built


def rehearse(values: Mapping[str, Any]) -> None:
    """Build all that needs no data, so that a value out of range is refused before anything is read or written.

    Args:
        values: a checked configuration.

    Raises:
        UserError: something refused an option.
    """
    build(values["trainer"], "trainer")
    build_schedule(values["scheduler"])
    for group in ("callbacks", "logger"):
        for name, node in values[group].items():
            build(node, f"{group}.{name}")
    small = {name: build(values[name], name, through=_small) for name in ("optimizer", *PLAYERS) if values.get(name)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come when the run's own are built
        for one in small.values():
            wrap(values, one, torch.nn.Linear(1, 1))
    optimizer = small["optimizer"]
    if len(small) > 1:
        optimizer = Players(*(small.get(name, optimizer) for name in PLAYERS))
    schedules = build_scalars(values["schedules"])
    with refusals("schedules", schedules):
        scalars = Scalars(optimizer, schedules)
    scalars.set(1.0)
    for name, end in scalars.values.items():
        for node in (values[where] for where in small if name in values[where]):
            # Ranges are intervals: what lies between two values in range is in range.
            with refusals(f"schedules.{name}.end"):
                options = {key: value for key, value in node.items() if key != TARGET}
                _small(locate(node[TARGET], "optimizer"), **options | {name: end})


def _small(target: Callable[..., Any], **options: Any) -> torch.optim.Optimizer:
    """An optimizer of a very small model, to hear what it refuses."""
    optimizer = build_optimizer(target, torch.nn.Linear(1, 1), likelihood=Gaussian(), **options)
    getattr(optimizer, "close", lambda: None)()
    return optimizer


@contextmanager
def refusals(where: str, options: Collection[str] = (), function: Callable[..., Any] | None = None) -> Iterator[None]:
    """Within it, a `ValueError` becomes a `UserError` that names the group, and the option where that leads.

    Args:
        where: dotted name of a node.
        options: of the node.
        function: that is called; of a user's own, whatever it raises becomes a sentence.

    Raises:
        UserError: it, or what the system says of a name that is too long for a file's.
    """
    try:
        yield
    except Exception as error:
        ours = isinstance(error, UserError | ValueError | DataError) or lack_of_memory(error)
        peculiar = type(error).__module__.partition(".")[0] in PECULIAR
        if function is not None and not is_ours(function) and not (ours or peculiar):
            raise UserError(f"{where}: {_name(function)} raised {told(error)}") from error
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{where}: {str(error.filename)[:80]}... is too long for the name of a file") from error
        if not isinstance(error, ValueError) and not peculiar:
            raise
        sentence = str(error)
        known = (*options, *(own.ASKED if where == "dataset" else ()))
        leads_with_option = sentence.split(" ", 1)[0].split("[")[0].rstrip(":,") in known
        raise UserError(f"{where}.{sentence}" if leads_with_option else f"{where}: {sentence}") from error


def _fit(value: Any, hint: Any, where: str) -> Any:
    """The value as `hint`, or `TypeError`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty:
        return value
    if origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        raise TypeError
    if origin in (typing.Union, types.UnionType):
        return _fit_union(value, args, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # name=7: Hydra has read a number where text is meant
    if hint in (int, float) and isinstance(value, bool):
        raise TypeError
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return _fit_sequence(value, origin, args, where)
    expected = origin or hint
    if isinstance(expected, type) and isinstance(value, expected):
        return value
    raise TypeError


def _fit_union(value: Any, arms: tuple[Any, ...], where: str) -> Any:
    """The value as the first arm that is exactly its type, else as the first that can take it."""
    for arm in sorted(arms, key=lambda arm: arm is not type(value)):
        try:
            return _fit(value, arm, where)
        except TypeError:
            continue
    raise TypeError


def _fit_sequence(value: Any, origin: type, args: tuple[Any, ...], where: str) -> Any:
    """A list or tuple with each item as hinted."""
    if not isinstance(value, list | tuple):
        raise TypeError
    if origin is tuple and args and Ellipsis not in args:
        if len(value) != len(args):
            raise TypeError
        return tuple(_fit(item, arm, where) for item, arm in zip(value, args, strict=True))
    items = [_fit(item, args[0] if args else Any, where) for item in value]
    return tuple(items) if origin is tuple else items


def _choices(hint: Any) -> list[Any]:
    """All the literals that a hint admits."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return list(args)
    return [choice for arm in args for choice in _choices(arm)]


@cache  # a sweep asks of every job
def _signature(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Resolved type hints of a function, or of a class's constructor; {} where a foreign one cannot be resolved."""
    described = function.__init__ if inspect.isclass(function) else function
    try:
        return typing.get_type_hints(described)
    except (NameError, TypeError, AttributeError):  # names that exist for type checkers only: keys are checked still
        return {}


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", str(function))
