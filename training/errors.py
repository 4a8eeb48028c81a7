"""The one exception for what a user can cause and mend, and a word of help in its sentence."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

#: Where files of Curvlab lie.
ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("train.py", "optimizers", "models", "data", "training", "analysis", "scripts", "examples")


#: What the system says of a disk that is full.
FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """One clear sentence that says what is wrong and what to do about it.

    The command line prints the sentence alone (`CURVLAB_DEBUG=1` adds the stack trace); any other exception
    counts as a bug and keeps its trace.
    """


class ProcessLost(UserError):
    """Another process ended without a word, or answers no more: there is nothing left to do together.

    Attributes:
        first: whether this process was the first of those that are left to notice, and speaks for them.
    """

    def __init__(self, message: str, first: bool = True) -> None:
        super().__init__(message)
        self.first = first


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause such as ` (did you mean 'momentum'?)`, or an empty string when nothing known is close."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def hidden(module: str) -> str:
    """A clause where a module that was meant has the name of one of Curvlab's own folders; "" otherwise.

    Args:
        module: dotted name of what was imported.
    """
    top = module.partition(".")[0]
    place = next((path for path in (Path(f"{top}.py"), Path(top)) if path.exists()), None)
    found = getattr(sys.modules.get(top), "__file__", None)
    if place is None or found is None or Path(found).is_relative_to(Path.cwd()):
        return ""
    return f"; {place} of this folder is hidden by another module of that name: rename it"


def not_installed(error: BaseException) -> str | None:
    """The sentence about a package that a file of Curvlab's imports and this Python lacks; None of any other error.

    What a user's own module imports in vain is none: its trace says where.

    Args:
        error: any.
    """
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not package or package in ("curvlab", *ROOMS):
        return None
    importer, at = None, error.__traceback__
    while at is not None:
        names = at.tb_frame.f_globals
        if str(names.get("__name__")).partition(".")[0] not in ("importlib", "_frozen_importlib"):
            importer = names.get("__file__")
        at = at.tb_next
    room = next((room for room in ROOMS if importer and Path(importer).resolve().is_relative_to(ROOT / room)), None)
    if room is None:
        return None
    if "CURVLAB_COMMAND" in os.environ:
        return f"{package} is not installed: pip install 'curvlab[train]' adds what curvlab needs"
    needed = "requirements-examples.txt" if room == "examples" else "requirements.txt"
    return f"{package} is not installed: activate the .venv of make train, or pip install -r {needed}"


def lack_of_memory(error: BaseException) -> str | None:
    """The sentence about what did not fit into memory; None of any other error.

    Args:
        error: Python's, or torch's of the CPU or of a GPU.
    """
    text = " ".join(str(error).split())
    gpu = type(error).__name__ == "OutOfMemoryError"
    if not (gpu or isinstance(error, MemoryError) or "can't allocate memory" in text or "not enough memory" in text):
        return None
    size = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)", text)
    asked = ""
    if size:
        asked = f" for {int(size[1]) / 1e9:.3g} GB at once" if size[1] else f" for {size[2]} at once"
    whose = "the GPU's memory" if gpu else "this machine's memory"
    return (
        f"{whose} does not suffice{asked}: choose a smaller model or dataset.batch_size (trainer.accumulate=2 makes "
        "two batches a step), or another optimizer; debug=summary says what one holds"
    )


def lack_of_room(error: BaseException) -> str | None:
    """The sentence about a full disk, where the file that a command prints to may lie; None of any other error.

    Args:
        error: any.
    """
    if isinstance(error, UserError) or not isinstance(error, OSError) or error.errno not in FULL:
        return None
    return f"{error.filename or 'what is printed'} cannot be written ({error.strerror}): make room, and resume the run"
