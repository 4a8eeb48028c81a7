"""The one exception for what a user can cause and mend, and a word of help in its sentence."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable
from pathlib import Path


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
