"""Fetching what is published: one process at a time, with an end to waiting, and every failure in one sentence."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from textwrap import shorten

from filelock import FileLock

from data.base import DataError

SILENCE = 20.0  # seconds without a byte after which a download is given up

# What torchvision raises where a set is absent (RuntimeError), cut short, or out of reach.
UNLOADABLE = (RuntimeError, OSError, AssertionError, ValueError, EOFError, HTTPException)
UNREACHABLE = (OSError, HTTPException, ValueError)


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Within it, this is the one process of all that fetches into a folder, and a silent server raises."""
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock"), _socket_timeout(SILENCE):
        yield


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def reason(error: Exception) -> str:
    """Why something failed, short enough for a sentence."""
    return shorten(str(error), 120)


def fetch_file(path: Path, site: str, download: bool, way_out: str) -> None:
    """See that a published file is there; one process at a time downloads it.

    Args:
        path: where it belongs; its name is that on the site.
        site: the address in front of its name.
        download: fetch it if it is not there.
        way_out: what users can do in its place.

    Raises:
        DataError: it is not there and is not or cannot be fetched.
    """
    if path.is_file():
        return
    absent = f"{path.absolute()} is absent"
    if not download:
        raise DataError(f"{absent}: put it there from {site}, set dataset.download=true, or use {way_out}")
    partial = path.with_name(f".{path.name}.part")
    try:
        with alone(path.parent):
            if path.is_file():  # another rank or run has fetched it meanwhile
                return
            with urllib.request.urlopen(site + path.name, timeout=SILENCE) as answer, partial.open("wb") as file:
                while block := answer.read(1 << 20):
                    file.write(block)
            partial.replace(path)
    except UNREACHABLE as error:
        raise DataError(f"{absent} and cannot be downloaded from {site} ({reason(error)}): use {way_out}") from error


def fetch_archive(
    name: str, root: Path, find: Callable[[], Path | None], url: str, md5: str, download: bool
) -> Path:
    """The folder of a published set, fetched and unpacked if it is not there (by one process at a time).

    Args:
        name: of the set, for the sentences.
        root: where to unpack it.
        find: tells where its folder lies, or None.
        url: of the archive.
        md5: of the archive.
        download: fetch it if it is not there.

    Raises:
        DataError: it is not there and is not or cannot be fetched.
    """
    from torchvision.datasets.utils import download_and_extract_archive  # takes a second to import

    if found := find():
        return found
    absent = f"{name} is absent from {root.absolute()}"
    ways_out = "put its files there, or name another folder with dataset.root"
    if not download:
        raise DataError(f"{absent}: set dataset.download=true, {ways_out}")
    try:
        with alone(root):
            if not find():  # no other rank or run has fetched it meanwhile
                download_and_extract_archive(url, str(root), md5=md5, remove_finished=True)
    except UNLOADABLE as error:
        raise DataError(f"{absent} and cannot be downloaded ({reason(error)}): {ways_out}") from error
    if found := find():
        return found
    raise DataError(f"{absent}, and the archive that was downloaded does not hold it: {ways_out}")
