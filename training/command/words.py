"""What a command says: a line for what a user can mend, a trace for a bug; one process speaks for all."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from training.errors import ProcessLost, UserError, lack_of_memory, lack_of_room, not_installed
from training.loop.launch import is_main
from training.loop.signals import Interrupted, requested
from training.show import heart, report

if TYPE_CHECKING:
    from training.loop.distributed import World

T = TypeVar("T")


def is_mendable(error: object) -> bool:
    """Whether an exception is one that a user can mend: a sentence, no trace."""
    data = sys.modules.get("data")  # before it is imported, with torch, no exception is one of its own
    if isinstance(error, Exception) and _told(error):
        return True
    return isinstance(error, UserError) or (data is not None and isinstance(error, data.DataError))


def _told(error: Exception) -> str | None:
    return lack_of_memory(error) or not_installed(error) or lack_of_room(error)


def say(text: str) -> None:
    """A line on the terminal, from rank 0 alone; "" says nothing."""
    if text and is_main():
        report.say(text)
        heart.spoke()


def complain(error: Exception) -> None:
    """One line on stderr for what a user can mend, the trace of anything else; `CURVLAB_DEBUG=1` shows it always."""
    if not is_mendable(error) or os.environ.get("CURVLAB_DEBUG") == "1":
        traceback.print_exception(error)
    if is_mendable(error) and (error.first if isinstance(error, ProcessLost) else is_main()):
        sentence = _told(error) or " ".join(str(error).split())
        sys.stderr.write(f"error: {as_started(sentence)}\n")


def mutter(text: str) -> None:
    """A line on stderr, from rank 0 alone."""
    if is_main():
        sys.stderr.write(f"{text}\n")


def as_started(text: str) -> str:
    """A text that names `train.py`, as it is where that runs as the command `curvlab`, which says so by a variable."""
    if "CURVLAB_COMMAND" not in os.environ:
        return text
    text = re.sub(r"(torchrun \S+) train\.py", r"\1 -m curvlab", text)
    return re.sub(r"(python )?(?<![\w./])train\.py", "curvlab", text)


def on_main(world: World, function: Callable[[], T]) -> T:
    """The result of a function that rank 0 alone calls, on every rank; its sentence, if it ends in one, too.

    It is for what comes before the first step, so if a signal has asked any rank to stop, all stop here.

    Raises:
        Interrupted: a signal has.
    """
    from training.loop.distributed import broadcast_object, maximum

    if code := int(maximum([float(requested())], world)[0]):
        raise Interrupted("Interrupted before a step: the same command begins where this one was.", code)
    outcome: Any = None
    if world.is_main:
        try:
            outcome = function()
        except Exception as error:
            if not is_mendable(error):
                raise
            outcome = error
    outcome = broadcast_object(outcome, world)
    if is_mendable(outcome):
        raise outcome
    return outcome
