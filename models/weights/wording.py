"""Parts of the sentences about weights."""

from __future__ import annotations


def first_line(error: Exception) -> str:
    """What an error says first, without its full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def few(names: list[str], most: int = 4) -> str:
    """The first names of a list, and how many there are besides."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
