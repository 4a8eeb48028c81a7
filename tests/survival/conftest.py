"""One process that has imported all, for all commands of a test run, and places for those of several processes."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.survival.forks import Forks


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("output")) as started:
        yield started


def places(second: dict[str, str] | None = None, **variables: str) -> list[dict[str, str]]:
    """What a launcher would set for each of two processes, which meet at a port that is free.

    Args:
        second: what else is set, for rank 1 alone.
        variables: and for both.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | variables
    own = ({}, second or {})
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | own[rank] for rank in range(2)]
