"""The one exception for what a user can cause and mend, and a word of help in its sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
