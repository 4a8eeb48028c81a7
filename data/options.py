"""Options that data sets share, each written once: its name, type, default, range and line of help.

A group of them is a frozen dataclass (`Loading` is the one that all sets have). A builder takes a group as one keyword,
and `served` lets callers see the options that it stands for::

    @served(batch_size=64)
    def digits(*, loading: Loading) -> DataModule: ...

    digits(batch_size=32, limit_train=0.5)  # digits gets Loading(batch_size=32, ..., limit_train=0.5)

What a configuration is checked against (``inspect.signature``, ``typing.get_type_hints``) and ``help`` are complete.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, dataclass, fields
from inspect import Parameter
from typing import Any, ClassVar, Literal

import torch

from data.base import DataModule

Builder = Callable[..., DataModule]

# An argument in a docstring's section: its name, and what is said of it on this line and the deeper ones that follow.
ENTRY = re.compile(r"^    (\w+): (.*(?:\n     .*)*)", re.MULTILINE)


@dataclass(frozen=True)
class Kind:
    """What is known of a set before any of it is there.

    Attributes:
        task: what is learned from it, as ``DataModule.task``.
        facts: names of the ``DataModule.facts``.
    """

    task: str
    facts: tuple[str, ...]


@dataclass(frozen=True)
class Options:
    """A group of options: its fields are the parameters, and the lines under ``Args`` say what they mean.

    Attributes:
        kind: of the sets that are served by it; None: it does not tell.
    """

    kind: ClassVar[Kind | None] = None


@dataclass(frozen=True)
class Loading(Options):
    """How a set is split and served: the options that all builders share, checked before anything is read.

    Args:
        batch_size: of all ranks together.
        eval_batch_size: for validation and test, of all ranks together.
        augment: ``standard`` crops with padding (4 pixels, an eighth of sides below 32) and mirrors where a mirrored
            image still shows its class, ``cutout`` also cuts a hole of half the side, at most 16 × 16.
        val_fraction: share of what is not test that is held out for validation, unless the set has validation images.
        test_fraction: share held out for the test, unless the set has test images.
        split_seed: which examples go where; independent of ``seed``.
        limit_train: share of the train split that is used.
        limit_val: share of the validation split that is used.
        limit_test: share of the test split that is used.
        seed: of order and augmentation.
        device: of the batches.
        rank: this process.
        world_size: how many processes there are.

    Raises:
        ValueError: for an option out of its range.
    """

    batch_size: int = 128
    eval_batch_size: int = 512
    augment: Literal["none", "standard", "cutout"] = "standard"
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0
    limit_train: float = 1.0
    limit_val: float = 1.0
    limit_test: float = 1.0
    seed: int = dataclasses.field(default=0, kw_only=True)  # Python 3.10 has no type hints where there is a KW_ONLY
    device: torch.device | str = dataclasses.field(default="cpu", kw_only=True)
    rank: int = dataclasses.field(default=0, kw_only=True)
    world_size: int = dataclasses.field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("split_seed", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, both excluded, got {getattr(self, name)}")
        for name in ("limit_train", "limit_val", "limit_test"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if self.augment not in ("none", "standard", "cutout"):
            raise ValueError(f"augment must be none, standard or cutout, got {self.augment!r}")
        if self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size must be divisible by the number of processes, got {self.batch_size} for {self.world_size}"
            )

    def serving(self, training: bool) -> dict[str, Any]:
        """What every loader takes of these, for training or for evaluation."""
        return {
            "batch_size": self.batch_size if training else self.eval_batch_size,
            "training": training,
            "seed": self.seed,
            "device": self.device,
            "rank": self.rank,
            "world_size": self.world_size,
        }


def served(*, without: Collection[str] = ("test_fraction",), **defaults: Any) -> Callable[[Builder], Builder]:
    """Put the options that a builder's groups stand for in the place of the groups.

    A group is a parameter whose type is a class of `Options`. In the builder's docstring, which names it too, its line
    makes room for those of its options. Fields that are keyword-only come after all other options.

    Args:
        without: options of the groups that this set does not have; they keep the defaults of their class.
        defaults: of this set, where they differ from those of the classes.

    Returns:
        What makes of the builder the callable that users call; its ``kind`` is that of the groups.
    """

    def decorate(function: Builder) -> Builder:
        hints = typing.get_type_hints(function)
        groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Options)}
        members = {name: _members(group, without) for name, group in groups.items()}
        signature = _merged(function, hints, members, defaults)

        @functools.wraps(function)
        def build(*args: Any, **options: Any) -> DataModule:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            given = bound.arguments
            made = {
                name: group(**{field.name: given.pop(field.name) for field in members[name]})
                for name, group in groups.items()
            }
            return function(**given, **made)

        del build.__wrapped__  # its parameters are others
        build.__signature__ = signature  # type: ignore[attr-defined]
        build.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
        build.__annotations__["return"] = DataModule
        build.kind = next((group.kind for group in groups.values() if group.kind), None)  # type: ignore[attr-defined]
        for name, group in groups.items():
            build.__doc__ = _documented(build.__doc__ or "", name, group, members[name])
        return build

    return decorate


def _members(group: type[Options], without: Collection[str]) -> list[Field]:
    """The fields of a group that a set has; those that a class adds stand before those of the class it builds on."""
    inherited = {field.name for base in group.__bases__ if issubclass(base, Options) for field in fields(base)}
    return sorted((f for f in fields(group) if f.name not in without), key=lambda field: field.name in inherited)


def _merged(
    function: Builder, hints: dict[str, Any], members: dict[str, list[Field]], defaults: dict[str, Any]
) -> inspect.Signature:
    """The signature with the fields in the place of their groups."""
    merged: list[Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in members:
            merged.append(parameter.replace(annotation=hints[name]))
            continue
        types = typing.get_type_hints(hints[name])
        for field in members[name]:
            default = Parameter.empty if field.default is MISSING else field.default
            kind = Parameter.KEYWORD_ONLY if field.kw_only else Parameter.POSITIONAL_OR_KEYWORD
            default = defaults.get(field.name, default)
            merged.append(Parameter(field.name, kind, default=default, annotation=types[field.name]))
    return inspect.Signature(sorted(merged, key=lambda parameter: parameter.kind), return_annotation=DataModule)


def _documented(doc: str, name: str, group: type[Options], members: list[Field]) -> str:
    """A docstring with the lines of a group's options in the place of the group's."""
    said: dict[str, str] = {}
    for base in reversed(group.__mro__):
        _, _, arguments = inspect.cleandoc(base.__doc__ or "").partition("Args:\n")
        said |= ENTRY.findall(arguments.split("\n\n")[0])
    lines = "\n".join(f"    {field.name}: {said.get(field.name, '')}" for field in members)
    clean = inspect.cleandoc(doc)
    return re.sub(rf"^    {name}: .*(?:\n     .*)*", lambda _: lines, clean, count=1, flags=re.MULTILINE)
