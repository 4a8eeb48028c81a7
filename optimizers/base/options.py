"""Options that are declared once: a class states its own, and its signature and docstring have those of its bases too.

A constructor that ends in ``**shared`` and hands ``shared`` on to the next class takes what that class takes. Here this
is made visible: to ``inspect.signature``, to ``typing.get_type_hints`` and to ``help``.
"""

from __future__ import annotations

import inspect
import re
import typing
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Declared:
    """What a class says of options in its own source.

    Attributes:
        parameters: of its constructor; None: it has none of its own.
        head: its docstring up to the arguments.
        lines: what it says of arguments, by name.
        tail: its docstring after the arguments.
    """

    parameters: tuple[inspect.Parameter, ...] | None
    head: str
    lines: dict[str, str]
    tail: str


_DECLARED: WeakKeyDictionary[type, Declared] = WeakKeyDictionary()


def declared(cls: type) -> Declared:
    """What a class says in its own source; to be asked before ``complete``, which remembers it."""
    if cls not in _DECLARED:
        init = cls.__dict__.get("__init__")
        parameters = None if init is None else tuple(inspect.signature(init).parameters.values())
        text = inspect.cleandoc(cls.__doc__) if "__doc__" in cls.__dict__ and cls.__doc__ else ""
        head, _, rest = f"{text}\n".partition("\nArgs:\n")
        block = re.match(r"(?: +.*\n|\n)*", rest)
        inside = block.group() if block else ""
        entries = re.findall(r"^    (\w+): (.*\n(?:      +.*\n)*)", inside, flags=re.MULTILINE)
        lines = {name: line.rstrip() for name, line in entries}
        _DECLARED[cls] = Declared(parameters, head.strip(), lines, rest[len(inside) :].strip())
    return _DECLARED[cls]


def complete(cls: type, root: type) -> None:
    """Give a class the signature, the type hints and the docstring of all its options.

    The order is that of the declarations, the bases' first; defaults, hints and lines are those of the class nearest.
    What a class says to be ``fixed`` (see ``with_fixed``) is left out.

    Args:
        cls: to be changed.
        root: the class that declares what all share.
    """
    line = [base for base in cls.__mro__ if issubclass(base, root)]
    own = declared(cls)
    constructors = []
    for base in line:
        if (found := declared(base).parameters) is not None:
            constructors.append((base, found))
            if not any(p.kind is p.VAR_KEYWORD for p in found):
                break
    nearest = {p.name: p for _, found in reversed(constructors) for p in found if p.kind not in VARIADIC}
    rest = [p for p in constructors[-1][1] if p.kind is p.VAR_KEYWORD]
    fixed = {name for base in line for name in base.__dict__.get("fixed", ())}
    names = [name for name in nearest if name not in fixed]
    parameters = sorted([nearest[name] for name in names] + rest, key=lambda p: p.kind)
    if own.parameters is not None:
        init: Any = cls.__dict__["__init__"]
        hints: dict[str, Any] = {}
        for base, _ in reversed(constructors[1:]):
            hints |= _hints(base.__dict__["__init__"])
        hints |= init.__annotations__
        kept = {*(p.name for p in parameters), "return"}
        init.__annotations__ = {name: hint for name, hint in hints.items() if name in kept}
        init.__signature__ = inspect.Signature(parameters)
    if own.head:
        known: dict[str, str] = {}
        for base in reversed(line):
            known |= declared(base).lines
        shown = [f"    {p.name}: {known[p.name]}" for p in parameters if p.name in known]
        tail = next((text for base in line if (text := declared(base).tail)), "")
        cls.__doc__ = "\n\n".join([own.head, "\n".join(["Args:", *shown]), *([tail] if tail else [])]) + "\n"


def with_fixed(cls: type, optimizer: object, options: dict[str, Any]) -> dict[str, Any]:
    """Options that were given, and those that a class has ``fixed``, for the next constructor.

    Args:
        cls: the class whose constructor this is.
        optimizer: under construction.
        options: that the constructor does not name.

    Raises:
        TypeError: a fixed one was given.
    """
    fixed: dict[str, Any] = cls.__dict__["fixed"]
    for name in fixed:
        if name in options:
            raise TypeError(f"{type(optimizer).__name__}.__init__() got an unexpected keyword argument {name!r}")
    return {**options, **fixed}


def _hints(function: Any) -> dict[str, Any]:
    """Type hints of a function; those that cannot be resolved stay text."""
    try:
        return typing.get_type_hints(function)
    except NameError:  # of a class inside a function, say
        return dict(function.__annotations__)
