"""All checks, in the order in which they are told."""

from __future__ import annotations

from collections.abc import Iterator

from . import moves, options, parameters, passes, state
from .common import Check

TOPICS = (moves, state, passes, parameters, options)


def optimizer_checks() -> Iterator[tuple[str, Check]]:
    """All checks as (name, function), for ``pytest.mark.parametrize`` or a loop of one's own."""
    for topic in TOPICS:
        yield from ((name, value) for name, value in vars(topic).items() if name.startswith("check_"))
