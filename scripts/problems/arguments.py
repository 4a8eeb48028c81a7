"""Command lines of ``key=value`` that choose among problems and optimizers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from optimizers.table import present
from scripts import Parser
from scripts.problems import catalogue
from training.errors import UserError, did_you_mean
from training.loop.signals import CTRL_C, Interrupted

Chosen = TypeVar("Chosen")


def given_to(kind: type[Chosen], given: Sequence[str]) -> Chosen:
    """The choices of a command line; those of ``problems`` and ``optimizers`` exist.

    Args:
        kind: their dataclass.
        given: ``key=value``.

    Raises:
        UserError: one of them does not exist, or has a value of another type.
    """
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.from_dotlist([*given])))
    except OmegaConfBaseException as error:
        known = ", ".join(vars(kind()))
        raise UserError(f"{str(error).splitlines()[0]} (choices are {known}; see --help)") from error
    assert isinstance(merged, kind)
    known_names = {"problems": [*catalogue.PROBLEMS], "optimizers": [name for name, _, _ in present()]}
    for key, names in known_names.items():
        for name in getattr(merged, key, ()):  # some commands choose among one kind alone
            if name not in names:
                raise UserError(f"{key} has no {name!r}{did_you_mean(name, names)}")
    return merged


def command(about: str | None, argv: Sequence[str] | None, work: Callable[[list[str]], tuple[Path, bool]]) -> int:
    """A command line of ``key=value``; returns the exit code.

    Args:
        about: what ``--help`` prints.
        argv: None: the process's.
        work: of the ``key=value``; returns the page that it wrote, and whether all cells came to a result.
    """
    parser = Parser(about)
    parser.add_argument("choices", nargs="*", metavar="key=value", help="see above")
    torch.set_num_threads(1)
    try:
        target, good = work(parser.parse_args(argv).choices)
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    except Interrupted as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return CTRL_C
    print(f"{target} is written")
    return int(not good)
