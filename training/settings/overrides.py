"""Hydra's grammar of overrides, as far as a command line of ours is read before Hydra reads it."""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

from training.errors import UserError
from training.names import AROUND, PLAYERS, TARGET
from training.runs.folder import exists

#: The one key whose names are not in the files: those of the chosen optimizer's scalars, which are checked against it.
OPEN = "schedules"
#: Another one, checked against the names of the model's parameters.
RATES = "finetune.lr_mult"
#: And another, against the options of a class of torch.optim.
GRAFTED = "step_length.options"
#: Groups of one callable, and those of callables by names of their own.
ONE = ("model", "dataset", "optimizer", "scheduler", "trainer", *PLAYERS, *AROUND)
MANY = ("callbacks.", "logger.")
#: The variable that makes of a sweep one of its jobs, by its number from 0: for the elements of a queue's array.
JOB = "CURVLAB_SWEEP_JOB"
# Regular expressions, which are full of what Hydra's grammar takes for its own.
EXPRESSIONS = ("finetune.freeze", "optimizer.skip", "generator.skip", "critic.skip", "trainer.recompute")


class Arguments(argparse.ArgumentParser):
    """The flags of a Hydra program, as its documentation lists them; what it does not know is a UserError."""

    def __init__(self) -> None:
        super().__init__(add_help=False)
        self.add_argument("overrides", nargs="*")
        self.add_argument("--help", "-h", action="store_true")
        for flag in ("--hydra-help", "--version", "--resolve"):
            self.add_argument(flag, action="store_true")
        self.add_argument("--experimental-rerun")
        self.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
        shown = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
        self.add_argument("--info", "-i", nargs="?", const="all", choices=shown)
        self.add_argument("--package", "-p")
        self.add_argument("--run", "-r", action="store_true")
        self.add_argument("--multirun", "-m", action="store_true")
        self.add_argument("--shell-completion", "-sc", action="store_true")
        self.add_argument("--config-path", "-cp")
        self.add_argument("--config-name", "-cn")
        self.add_argument("--config-dir", "-cd")

    def error(self, message: str) -> NoReturn:
        """See argparse; values are given as key=value."""
        unknown = re.search(r"unrecognized arguments: (--?)(\S+)", message)
        if unknown:
            flag = "".join(unknown.groups())
            raise UserError(
                f"unknown flag {flag!r}: values are given as key=value, e.g. optimizer.lr=0.01 (see --help)"
            )
        raise UserError(f"{message} (see --help)")


def flags_of(argv: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The arguments that are no overrides, flags with their values."""
    left = list(overrides)
    flags = []
    for text in argv:
        if left and text == left[0]:
            left.pop(0)
        else:
            flags.append(text)
    return flags


def parse(text: str) -> Override:
    """One override.

    Raises:
        UserError: it is malformed.
    """
    if text.startswith("="):
        raise UserError(f"malformed override {text!r}: it names no key, write key=value")
    try:
        return OverridesParser.create().parse_overrides([text])[0]
    except OverrideParseException as error:
        raise UserError(f"malformed override {text!r}: {_advice(text)}") from error


def _advice(text: str) -> str:
    """What to do about an override that Hydra's grammar does not know."""
    key, equals, value = text.partition("=")
    if not equals:
        return "write key=value, without spaces"
    if not re.fullmatch(r"[+~]{0,2}[\w-]+([./@:][\w-]+)*", key):
        return f"{key!r} is no key such as optimizer.lr"
    if any(value.count(a) != value.count(b) for a, b in ("[]", "{}", "()")):
        return "a bracket has no other"
    if any(value.count(mark) % 2 for mark in "'\""):
        return "a quote has no other"
    if value.startswith("="):
        return "write key=value, with one ="
    if re.search(r",\s*(,|$)", value):
        return "a value is missing beside a comma"
    if value.startswith("(") and value.endswith(")"):
        return f"a list has brackets, {key}=[{value[1:-1]}]"
    if re.match(r"""\{\s*["']""", value):
        return "the keys of a group have no quotes, {key: value}"
    return f"""quote its value twice, for the shell and for Hydra: '{key}="{value}"'"""


def name_of(override: Override) -> str:
    """A key or group, the latter with the package that it is chosen for: `optimizer@critic`."""
    return override.key_or_group + (f"@{override.package}" if override.package else "")


def quoted(text: str) -> str:
    """Quote a regular expression, and the path of an existing file, that means something to Hydra's grammar."""
    key, _, value = text.partition("=")
    if key == "notes" and not (value.startswith(("'", '"')) or value in ("", "null")):  # free text, commas and all
        return "notes='{}'".format(value.replace("'", "\\'"))
    if value.startswith("~/"):  # which a shell leaves to whoever reads it, behind the = of a word with a dot
        value = os.path.expanduser(value)
        text = f"{key}={value}"
    if not value.isascii() and not re.search(r"[=,{}\[\]()'\"\\]", value):  # its grammar knows no such letters
        return f"{key}='{value}'"
    if value.startswith(("'", '"')) or not re.search(r"[^\w./:~-]", value):
        return text
    if key in EXPRESSIONS:
        return f"{key}='{value}'" if value.strip() and "'" not in value else text
    special = re.search(r"[=,{}\[\]()]", value) and not value.startswith("[")
    return f"{key}='{value}'" if special and exists(Path(value)) else text


def opened(texts: Sequence[str]) -> list[str]:
    """Overrides, those of keys that no file has in the form that adds them, which Hydra would refuse.

    These are what lies under `schedules`, and the options of a callable that the command itself names: those of
    `model._target_=mynet.MyNet`, `callbacks.mine._target_=...`. What it takes is checked against its signature.
    """
    named = [key.removesuffix(TARGET) for text in texts if (key := text.partition("=")[0]).endswith(f".{TARGET}")]
    own = tuple(node for node in named if node[:-1] in ONE or (node.count(".") == 2 and node.startswith(MANY)))

    def open_one(text: str) -> str:
        key = text.partition("=")[0]
        free = key.split(".")[0] == OPEN or key.startswith((RATES, GRAFTED)) or key.startswith(own)
        return f"++{text}" if free else text

    return [open_one(text) for text in texts]


def values_of(overrides: Sequence[Override]) -> dict[str, list[str]]:
    """By key, an override for each of the values that a sweep over lists gives it; what is fixed has one.

    Raises:
        UserError: one is given none.
    """
    values: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        swept = override.is_sweep_override()
        given = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
        values[key] = [f"{key}={value}" for value in given]
        if not values[key]:
            raise UserError(f"{override.input_line} holds no value: give some, as in {key}=0,1,2")
    return values


def jobs(overrides: Sequence[Override]) -> list[list[str]]:
    """Every job of a sweep over lists of values, as its overrides: the last key varies fastest."""
    return [list(job) for job in itertools.product(*values_of(overrides).values())]


def due(count: int) -> list[int]:
    """The jobs of a sweep that are to be run, by number: all, or the one that `CURVLAB_SWEEP_JOB` asks for.

    Args:
        count: how many the sweep has.

    Raises:
        UserError: there is no such job.
    """
    number = os.environ.get(JOB, "")
    if not number:
        return [*range(count)]
    if not number.isdigit() or int(number) >= count:
        raise UserError(f"{JOB}={number}, but this sweep has jobs 0 to {count - 1}: unset it to run them all")
    return [int(number)]
