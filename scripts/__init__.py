"""Thin commands over the packages beside them."""

from __future__ import annotations

import argparse
from typing import NoReturn

from training.errors import UserError


class Parser(argparse.ArgumentParser):
    """The command line of a script: what is wrong with it is one sentence, as of anything else.

    Args:
        description: of the command, printed by ``--help`` as it is.
    """

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """What argparse has against the arguments.

        Raises:
            UserError: it, in a sentence.
        """
        raise UserError(f"{message} (see --help)")
